"""Students of other architectures than their teachers, with preprocessing of their own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.compress.distill import Distill
from potstill.compress.lesson import Lesson
from potstill.compress.student import Student
from potstill.export.graph import export_graph
from potstill.pipeline.cli import call
from potstill.validate.checkpoint import WEIGHTS, Checkpoint
from potstill.validate.errors import InputError
from potstill.validate.predictor import TorchPredictor
from potstill.validate.task import TASKS
from tests.predicted import predicted

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))


@pytest.mark.parametrize(
    ("factory", "word", "teacher", "files", "columns", "rate"),
    [
        ("Recurrent", "text-classification", "text_teacher", "texts", {"text": "sentence"}, 1e-2),
        ("Tagger", "token-classification", "tag_teacher", "tag_files", {}, 1e-2),
        ("Pixels", "image-classification", "image_teacher", "pictures", {}, 1e-2),
    ],
)
def test_another_architecture_learns_and_is_exported(
    factory: str, word: str, teacher: str, files: str, columns: dict[str, str], rate: float,
    request: pytest.FixtureRequest, tmp_path: Path,
) -> None:  # fmt: skip
    task, data = TASKS[word], request.getfixturevalue(files)
    model = task.load(Checkpoint(str(request.getfixturevalue(teacher))))
    train = task.checked(task.examples(str(data["train"]), columns), model.labels)
    judged = task.checked(task.examples(str(data["eval"]), columns, judging=True), model.labels, judging=True)
    student = Student(checkpoint=f"own_models:{factory}")(model, task, {}, 0)
    theirs = predicted(TorchPredictor(model, "teacher", CPU), judged, task.length_of)
    lesson = Lesson(task, model, train, train.take(range(30), "held out"), 0, tmp_path)
    Distill(epochs=6, learning_rate=rate)(student, lesson)
    ours = predicted(TorchPredictor(student, "student", CPU), judged, task.length_of)
    assert task.judge(ours, theirs, judged, model.encode).value > 0.85
    parity = export_graph(student, train, tmp_path / "model.onnx", 20)
    assert parity.max_difference < 1e-4
    student.save(tmp_path)
    again = task.load(Checkpoint(f"own_models:{factory}", tmp_path / WEIGHTS), model.labels, like=model)
    torch.testing.assert_close(again.answers(again.tensors(train.rows([0]), CPU)),
                               student.answers(student.tensors(train.rows([0]), CPU)))  # fmt: skip


def test_a_whole_run_with_a_tokenizer_of_its_own(text_teacher: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    lines = texts["calibrate"].read_text().splitlines()[1:]
    more.write_text("\n".join(json.dumps({"sentence": line.split("\t")[0]}) for line in lines))
    (tmp_path / "recipe.yaml").write_text(
        f"""
task: text-classification
teacher: {text_teacher}
data:
  train: {texts["train"]}
  unlabelled: {more}
  eval: {texts["eval"]}
  columns: {{text: sentence}}
student: own_models:Convolutions
stages: [{{distill: {{epochs: 6, learning_rate: 1e-2}}}}]
targets: [laptop-x86-vnni, phone-iphone]
profile: {{runs: 5}}
"""
    )
    out = tmp_path / "out"
    assert call(["run", str(tmp_path / "recipe.yaml"), "--out", str(out)]) == 0
    ledger = json.loads((out / "ledger.json").read_text())
    values = [entry["scorecard"]["value"] for entry in ledger["entries"]]
    assert values[2] > 0.9 > values[1]
    assert abs(values[3] - values[2]) < 0.05
    record = json.loads((out / "student" / "potstill.json").read_text())
    assert record["factory"] == "own_models:Convolutions"
    assert record["data"]["unlabelled"]["examples"] == 40
    assert "unlabelled training data | more.jsonl" in (out / "student" / "README.md").read_text()
    package = out / "packages" / "laptop-x86-vnni"
    vocabulary = json.loads((package / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocabulary) == 29
    assert json.loads((package / "labels.json").read_text()) == ["negative", "positive"]
    fixed = json.loads((out / "packages" / "phone-iphone" / "golden" / "golden.json").read_text())["samples"][0]
    assert fixed["inputs"]["input_ids"]["shape"] == [1, 128]
    assert call(["run", str(tmp_path / "recipe.yaml"), "--out", str(out), "--dry-run"]) == 0


def test_vectors_of_another_width(text_teacher: Path) -> None:
    task = TASKS["feature-extraction"]
    model = task.load(Checkpoint(str(text_teacher)))
    student = task.load(Checkpoint("own_models:Vectors"), model.labels, like=model)
    assert student.answers(student.tensors({"text": ["good", "bad"]}, CPU)).shape == (2, 12)


def test_a_teacher_of_ones_own_brings_its_tokenizer_and_may_name_its_classes() -> None:
    task = TASKS["text-classification"]
    assert task.load(Checkpoint("own_models:Named")).labels == ("negative", "positive")
    assert task.load(Checkpoint("own_models:Convolutions")).labels == ("0", "1")
    with pytest.raises(InputError, match="no attribute 'tokenizer'; a teacher for text-classification brings its own"):
        task.load(Checkpoint("own_models:Recurrent"))


@pytest.mark.parametrize(
    ("factory", "labels", "match"),
    [
        ("Foreign", ("a", "b"), "takes words; expected inputs among those of its tokenizer: input_ids"),
        ("Flat", ("a", "b"), r"gave \(1,\) for one example; expected outputs of shape \(examples, classes\)"),
        ("Tagger", ("a", "b"), r"gave \(1, 3, 5\) for one example"),
        ("Recurrent", ("a", "b", "c"), "gives 2 classes, and 3 are named"),
        ("Pixels", ("a", "b"), "takes pixel_values; expected inputs among"),
    ],
)
def test_modules_that_do_not_fit_the_task(
    factory: str, labels: tuple[str, ...], match: str, text_teacher: Path
) -> None:
    task: Any = TASKS["text-classification"]
    model = task.load(Checkpoint(str(text_teacher)))
    with pytest.raises(InputError, match=match):
        task.load(Checkpoint(f"own_models:{factory}"), labels, like=model)
