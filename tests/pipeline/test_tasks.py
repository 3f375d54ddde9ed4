"""A whole run of each kind of task: distilled, exported, packaged, judged, and shown."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from potstill.compress.distill import Distill
from potstill.compress.lesson import Lesson
from potstill.compress.student import Student
from potstill.export.genai import generate
from potstill.export.graph import export_graph
from potstill.pipeline.cli import call
from potstill.pipeline.recipe import OF_TEXT, TaskWord
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.decoder import greedy
from potstill.validate.predictor import OnnxPredictor, Predictor, TorchPredictor
from potstill.validate.session import open_session
from potstill.validate.task import TASKS
from tests.predicted import predicted

CPU = torch.device("cpu")
TARGET, FIXED = "laptop-x86-vnni", "phone-iphone"


def walked(folder: Path, recipe: str) -> dict[str, Any]:
    """The ledger of a recipe walked in a folder."""
    (folder / "recipe.yaml").write_text(recipe)
    assert call(["run", str(folder / "recipe.yaml"), "--out", str(folder / "out")]) == 0
    ledger: dict[str, Any] = json.loads((folder / "out" / "ledger.json").read_text())
    return ledger


def golden(package: Path) -> list[tuple[dict[str, np.ndarray], np.ndarray, float]]:
    """Inputs, expected output and its tolerance of each golden sample."""
    found = []
    for sample in json.loads((package / "golden" / "golden.json").read_text())["samples"]:
        arrays = {
            name: np.fromfile(package / "golden" / one["file"], dtype=one["dtype"]).reshape(one["shape"])
            for name, one in (sample["inputs"] | sample["outputs"]).items()
        }
        ((output, one),) = sample["outputs"].items()
        found.append((arrays, arrays.pop(output), one["atol"]))
    return found


def check_golden(package: Path) -> None:
    session = onnxruntime.InferenceSession(package / "model.onnx")
    for inputs, expected, atol in golden(package):
        np.testing.assert_allclose(session.run(None, inputs)[0], expected, atol=atol)


def check_shapes(packages: Path, free: str = TARGET, fixed: str = FIXED) -> None:
    """One package takes any batch, with the answers of one alone; the other takes one example of one size only."""
    session = onnxruntime.InferenceSession(packages / free / "model.onnx")
    assert all(isinstance(one.shape[0], str) for one in session.get_inputs())
    inputs = golden(packages / free)[0][0]
    one = session.run(None, inputs)[0]
    three = session.run(None, {name: np.repeat(array, 3, axis=0) for name, array in inputs.items()})[0]
    np.testing.assert_allclose(three, np.repeat(one, 3, axis=0), atol=1e-5)
    session = onnxruntime.InferenceSession(packages / fixed / "model.onnx")
    sizes = {one.name: one.shape for one in session.get_inputs()}
    assert all(shape[0] == 1 and all(isinstance(size, int) for size in shape) for shape in sizes.values())
    for sample, _, _ in golden(packages / fixed):
        assert {name: [*array.shape] for name, array in sample.items()} == sizes
    check_golden(packages / fixed)


def check_language_package(package: Path) -> None:
    """It writes by GenAI what plain ONNX Runtime writes, passes its golden samples, and can be timed."""
    check_golden(package)
    prompt = golden(package)[0][0]["input_ids"][0, :3].tolist()
    end = json.loads((package / "genai_config.json").read_text())["model"]["eos_token_id"]
    session = open_session(package / "model.onnx")
    assert generate(package, prompt, 20) == greedy(session, prompt, 20, ends=[end])
    manifest = json.loads((package / "manifest.json").read_text())
    assert "by gptq" in manifest["quantization"]["scheme"]
    assert {"genai_config.json", "tokenizer.json"} <= set(manifest["files"])
    assert call(["profile", str(package), "--runs", "5"]) == 0


def test_a_recipe_knows_every_task() -> None:
    from typing import get_args

    assert set(get_args(TaskWord)) == set(TASKS)
    assert {word for word, task in TASKS.items() if getattr(task, "tool", "") == "tokenizer"} == set(OF_TEXT)


def test_tagging(tag_teacher: Path, tag_files: dict[str, Path], tmp_path: Path) -> None:
    ledger = walked(
        tmp_path,
        f"""
task: token-classification
teacher: {tag_teacher}
data: {{train: {tag_files["train"]}, eval: {tag_files["eval"]}, perturb: [typos]}}
student: {{layers: 1, hidden: 16}}
stages: [{{distill: {{epochs: 3, learning_rate: 3e-3}}}}]
gate: {{max_drop: 5pp}}
targets: [{TARGET}, {FIXED}]
profile: {{runs: 5}}
""",
    )
    cards = [entry["scorecard"] for entry in ledger["entries"]]
    assert [card["metric"] for card in cards] == ["entity F1"] * 5
    assert cards[2]["value"] > 0.9
    assert abs(cards[3]["value"] - cards[2]["value"]) < 0.05
    assert ledger["entries"][3]["verdict"]["passed"]
    out = tmp_path / "out"
    check_golden(out / "packages" / TARGET)
    check_shapes(out / "packages")
    report = (out / "report.html").read_text()
    assert "words the teacher had right" in report
    assert "by the paired bootstrap" in report
    assert "entity F1 (95 % interval)" in (out / "student" / "README.md").read_text()


def test_sentence_embeddings(
    text_teacher: Path, pair_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    second = tmp_path / "second.jsonl"
    second.write_text(
        "".join(line[:11] + "so " + line[11:] + "\n" for line in pair_files["eval"].read_text().splitlines())
    )
    ledger = walked(
        tmp_path,
        f"""
task: feature-extraction
teacher: {text_teacher}
data: {{train: {pair_files["train"]}, eval: {pair_files["eval"]}, shifted: {second}, perturb: [typos]}}
student: own_models:Words
stages: [{{distill: {{epochs: 40, learning_rate: 3e-2}}}}]
gate: {{max_drop: 20pp}}
targets: [{TARGET}, {FIXED}]
profile: {{runs: 5}}
""",
    )
    cards = [entry["scorecard"] for entry in ledger["entries"]]
    assert [card["metric"] for card in cards] == ["Spearman"] * 5
    for entry in ledger["entries"][2:]:
        assert [(one["by"], one["scorecard"]["metric"], one["change"]) for one in entry["shifts"]] == [
            ("shifted", "Spearman", None), ("typos", "Spearman", None)
        ]  # fmt: skip
    second.write_text("".join(re.sub(r', "label": [^}]+', "", line) + "\n" for line in second.read_text().splitlines()))
    assert call(["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "other")]) == 2
    assert "is judged by recall@1 and data.eval by Spearman" in capsys.readouterr().err
    assert {path.name.partition("-")[0] for path in (tmp_path / "other" / "stages").iterdir()} <= {
        "0", "judged", "predicted", "leaks"
    }  # fmt: skip
    assert cards[2]["beside"]["Spearman with the teacher"] > cards[1]["beside"]["Spearman with the teacher"]
    assert cards[2]["value"] > cards[1]["value"]
    assert cards[2]["value"] > cards[0]["value"] - 0.1
    package = tmp_path / "out" / "packages" / TARGET
    check_golden(package)
    check_shapes(package.parent)
    assert all(abs(np.linalg.norm(expected) - 1) < 0.01 for _, expected, _ in golden(package))
    session = onnxruntime.InferenceSession(package / "model.onnx")
    assert [one.name for one in session.get_outputs()] == ["sentence_embedding"]
    report = (tmp_path / "out" / "report.html").read_text()
    assert "Spearman with the teacher" in report
    assert "Spearman, × 100" in report
    for word in ("None", "nan", "agreement", "flips −/+", "KL, nats"):
        assert word not in report.split("<body>")[1], word
    card = (tmp_path / "out" / "student" / "README.md").read_text()
    assert "Spearman (95 % interval)" in card
    assert "None" not in card


@pytest.mark.parametrize(
    ("word", "teacher", "files", "options"),
    [
        ("audio-classification", "sound_teacher", "sounds", {}),
        ("question-answering", "span_teacher", "span_files", {"max_length": 24}),
    ],
)
def test_a_cut_learns_and_its_graph_computes_the_same(
    word: str, teacher: str, files: str, options: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    task, data = TASKS[word], request.getfixturevalue(files)
    model = task.load(Checkpoint(str(request.getfixturevalue(teacher))), **options)
    train = task.checked(task.examples(str(data["train"]), {}), model.labels)
    judged = task.checked(task.examples(str(data["eval"]), {}, judging=True), model.labels, judging=True)
    student = Student(layers=1)(model, task, options, 0)
    torch.manual_seed(0)
    torch.nn.init.normal_(list(student.core.parameters())[-2], std=0.02)  # the head forgets
    theirs = predicted(TorchPredictor(model, "teacher", CPU), judged, task.length_of)

    def value(predictor: Predictor) -> float:
        return task.judge(predicted(predictor, judged, task.length_of), theirs, judged, model.encode).value

    before = value(TorchPredictor(student, "student", CPU))
    lesson = Lesson(task, model, train, train.take(range(20), "held out"), 0, tmp_path)
    Distill(epochs=4, learning_rate=3e-3, batch_size=16)(student, lesson)
    after = value(TorchPredictor(student, "student", CPU))
    assert after > max(0.7, before)
    parity = export_graph(student, train, tmp_path / "model.onnx", 20)
    assert parity.max_difference < 1e-4
    packaged = OnnxPredictor(tmp_path / "model.onnx", student.encode, "graph", read=student.read)
    assert value(packaged) == pytest.approx(after, abs=1e-6)


@pytest.mark.parametrize(
    ("word", "teacher", "files", "limits", "perturbation", "metric"),
    [
        pytest.param(
            "audio-classification",
            "sound_teacher",
            "sounds",
            "max_seconds: 1",
            "level",
            "accuracy",
            marks=pytest.mark.slow,
        ),
        ("question-answering", "span_teacher", "span_files", "max_length: 24", "case", "SQuAD F1"),
    ],
)
def test_sounds_and_questions_walk_the_whole_road(
    word: str, teacher: str, files: str, limits: str, perturbation: str, metric: str,
    request: pytest.FixtureRequest, tmp_path: Path,
) -> None:  # fmt: skip
    data = request.getfixturevalue(files)
    ledger = walked(
        tmp_path,
        f"""
task: {word}
teacher: {request.getfixturevalue(teacher)}
data: {{train: {data["train"]}, eval: {data["eval"]}, perturb: [{perturbation}], {limits}}}
student: {{layers: 1}}
stages:
  - distill: {{epochs: 4, learning_rate: 3e-3, batch_size: 16}}
gate: {{max_drop: 30pp}}
targets: [{TARGET}, {FIXED}]
profile: {{runs: 5}}
""",
    )
    kinds = [(entry["kind"], entry["scorecard"]["metric"]) for entry in ledger["entries"]]
    assert kinds == [(kind, metric) for kind in ("teacher", "start", "stage", "package", "package")]
    assert all(entry["verdict"]["passed"] for entry in ledger["entries"][2:])
    assert ledger["entries"][2]["scorecard"]["value"] > 0.7
    for entry in ledger["entries"][2:]:
        assert [one["by"] for one in entry["shifts"]] == [perturbation]
    values = [entry["scorecard"]["value"] for entry in ledger["entries"][2:]]
    assert values[1:] == pytest.approx([values[0]] * 2, abs=0.1)
    check_golden(tmp_path / "out" / "packages" / TARGET)
    check_shapes(tmp_path / "out" / "packages")
    assert metric in (tmp_path / "out" / "report.html").read_text()


def test_a_language_model(story_teacher: Path, story_files: dict[str, Path], tmp_path: Path) -> None:
    ledger = walked(
        tmp_path,
        f"""
task: text-generation
teacher: {story_teacher}
data: {{train: {story_files["train"]}, eval: {story_files["eval"]}, shifted: {story_files["train"]}}}
student: {{layers: 2}}
stages: [{{distill: {{epochs: 2, learning_rate: 5e-3, batch_size: 16, on_policy: 0.25}}}}]
gate: {{max_drop: 5pp, max_perplexity_rise: 30%, max_divergence: 1nats}}
targets: [{TARGET}]
profile: {{runs: 5}}
""",
    )
    cards = [entry["scorecard"] for entry in ledger["entries"]]
    assert [card["metric"] for card in cards] == ["next-token accuracy"] * 4
    assert cards[3]["perplexity"]["ratio"] == pytest.approx(cards[2]["perplexity"]["ratio"], rel=0.1)
    check_language_package(tmp_path / "out" / "packages" / TARGET)
    written = ledger["entries"][3]["measurement"]["written"]
    assert (written["prompt"], written["tokens"]) == (32, 31)  # what 64 positions hold
    assert written["past_mb_per_1k"] == pytest.approx(2 * 2 * 2 * 8 * 4 * 1000 / 1e6)  # 2 layers, 2 heads of 8, float32
    assert written["prompt_tokens_per_s"] == pytest.approx(32e3 / written["first_token_ms"])
    assert 0 < written["of_bandwidth"] < 1
    assert cards[0]["perplexity"]["ratio"] == 1
    assert cards[2]["perplexity"]["ratio"] < min(1.2, cards[1]["perplexity"]["ratio"])
    checks = {check["limit"]: check["outcome"] for check in ledger["entries"][2]["verdict"]["checks"]}
    assert checks["max_perplexity_rise"] == checks["shifted max_perplexity_rise"] == "pass"
    report = (tmp_path / "out" / "report.html").read_text()
    assert f"perplexity {cards[2]['perplexity']['value']:.4g}" in report
    assert f"perplexity {cards[0]['perplexity']['value']:.4g}<" in report
    assert "rise in perplexity" in report
    assert "None" not in report.split("<body>")[1]
    card = (tmp_path / "out" / "student" / "README.md").read_text()
    assert "next-token accuracy (95 % interval)" in card
    assert "pipeline_tag: text-generation" in card
