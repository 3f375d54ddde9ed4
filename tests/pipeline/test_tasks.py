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
from potstill.export.graph import export_graph
from potstill.pipeline.cli import call
from potstill.pipeline.recipe import OF_TEXT, TaskWord
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.predictor import OnnxPredictor, Predictor, TorchPredictor
from potstill.validate.task import TASKS
from tests.predicted import predicted

CPU = torch.device("cpu")
TARGET = "laptop-x86-vnni"


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
targets: [{TARGET}, phone-iphone]
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
targets: [{TARGET}, phone-iphone]
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
        ("audio-classification", "sound_teacher", "sounds", "max_seconds: 1", "level", "accuracy"),
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
targets: [{TARGET}]
profile: {{runs: 5}}
""",
    )
    kinds = [(entry["kind"], entry["scorecard"]["metric"]) for entry in ledger["entries"]]
    assert kinds == [(kind, metric) for kind in ("teacher", "start", "stage", "package")]
    assert all(entry["verdict"]["passed"] for entry in ledger["entries"][2:])
    assert ledger["entries"][2]["scorecard"]["value"] > 0.7
    for entry in ledger["entries"][2:]:
        assert [one["by"] for one in entry["shifts"]] == [perturbation]
    check_golden(tmp_path / "out" / "packages" / TARGET)
    assert metric in (tmp_path / "out" / "report.html").read_text()
