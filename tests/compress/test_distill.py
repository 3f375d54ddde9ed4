"""The training: what it learns, what it keeps, where it goes on."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.compress.distill import Distill
from potstill.compress.lesson import Lesson
from potstill.compress.student import Student
from potstill.compress.trainer import last_whole_checkpoint
from potstill.compress.views import Views
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples, load_examples
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.errors import InputError
from potstill.validate.predictor import TorchPredictor
from potstill.validate.task import TASKS, Model
from tests.predicted import predicted

TEXT = TASKS["text-classification"]
COLUMNS = {"text": "sentence"}


@pytest.fixture
def teacher(text_teacher: Path) -> Model:
    return TEXT.load(Checkpoint(str(text_teacher)))


@pytest.fixture
def lesson(teacher: Model, texts: dict[str, Path], tmp_path: Path) -> Lesson:
    train = load_examples(str(texts["train"]), ("text",), COLUMNS).with_labels(teacher.labels)
    return Lesson(TEXT, teacher, train.take(range(540), "train"), train.take(range(540, 600), "held out"), 0, tmp_path)


def agreement(student: Model, lesson: Lesson, texts: dict[str, Path]) -> float:
    """With the teacher on the evaluation set."""
    examples = load_examples(str(texts["eval"]), ("text",), COLUMNS).with_labels(student.labels)
    cpu = torch.device("cpu")
    ours = predicted(TorchPredictor(student, "student", cpu), examples, "text").argmax(axis=1)
    return float((ours == predicted(TorchPredictor(lesson.teacher, "teacher", cpu), examples).argmax(axis=1)).mean())


def cut(teacher: Model) -> Model:
    return Student(layers=1)(teacher, TEXT, {}, 0)


def fresh(teacher: Model) -> Model:
    """A cut whose weights were forgotten."""
    student = cut(teacher)
    torch.manual_seed(1)
    for parameter in student.core.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return student


def test_a_student_comes_to_agree_with_its_teacher(lesson: Lesson, texts: dict[str, Path]) -> None:
    student = fresh(lesson.teacher)
    assert agreement(student, lesson, texts) < 0.75
    log = Distill(epochs=10, learning_rate=3e-3)(student, lesson)
    assert agreement(student, lesson, texts) > 0.95
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]
    assert {"kl", "hard"} <= set(next(entry for entry in log if "loss" in entry))


def test_the_teacher_stays_as_it_was(lesson: Lesson) -> None:
    before = {key: value.clone() for key, value in lesson.teacher.core.state_dict().items()}
    Distill(epochs=1)(cut(lesson.teacher), lesson)
    assert all(torch.equal(value, before[key]) for key, value in lesson.teacher.core.state_dict().items())
    assert not lesson.teacher.module.training


def test_the_best_checkpoint_is_kept(lesson: Lesson) -> None:
    student = cut(lesson.teacher)
    log = Distill(epochs=6, learning_rate=0.02)(student, lesson)  # so high that the end is not the best
    held = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    logits = predicted(TorchPredictor(student, "student", torch.device("cpu")), lesson.held_out)
    theirs = predicted(TorchPredictor(lesson.teacher, "teacher", torch.device("cpu")), lesson.held_out)
    p, q = (torch.log_softmax(torch.from_numpy(x) / 2.0, 1) for x in (theirs, logits))
    soft = 2.0**2 * (p.exp() * (p - q)).sum(1).mean().item()
    hard = -torch.log_softmax(torch.from_numpy(logits), 1)[range(60), lesson.held_out.labels.tolist()].mean().item()
    assert 0.9 * soft + 0.1 * hard == pytest.approx(min(held), rel=0.02)


def test_the_same_seed_gives_the_same_weights(lesson: Lesson) -> None:
    made = []
    for _ in range(2):
        shutil.rmtree(lesson.work, ignore_errors=True)
        student = cut(lesson.teacher)
        Distill(epochs=1)(student, lesson)
        made.append(student.core.state_dict())
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])


def test_a_half_written_checkpoint_is_not_taken_up(tmp_path: Path) -> None:
    for step, text in ((5, '{"global_step": 5}\n'), (10, '{"glob')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-15").mkdir()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]
    assert last_whole_checkpoint(tmp_path / "none") is None


def test_a_loss_that_is_not_finite_stops_with_what_to_try(lesson: Lesson) -> None:
    student = cut(lesson.teacher)
    with torch.no_grad():
        student.core.classifier.weight.fill_(float("nan"))
    said = r"the loss is nan at step 1, on the batch of rows \d+, .* of train.tsv .*; try a lower learning_rate"
    with pytest.raises(InputError, match=said):
        Distill(epochs=1)(student, lesson)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"epochs": 0}, "epochs must be above 0"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"learning_rate": 3.0}, "learning_rate must be above 0 and below 1"),
        ({"epoch": 3}, "epoch"),
    ],
)
def test_settings_that_cannot_train(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Distill(**settings)


def test_views_are_flips_and_shifts_that_can_be_seen_again() -> None:
    x = np.random.default_rng(0).integers(0, 255, size=(64, 16, 16, 3)).astype(np.uint8)
    every = list(range(64))
    flipped = Views(["flip"], 64, 0)({"x": x}, every, 0)["x"]
    same = (flipped == x).all(axis=(1, 2, 3))
    assert 10 < same.sum() < 54
    assert (flipped[~same] == x[~same, :, ::-1]).all()
    views = Views(["shift"], 64, 0)
    shifted = views({"x": x}, every, 3)["x"]
    for before, after in zip(x, shifted, strict=True):
        padded = np.pad(before, ((2, 2), (2, 2), (0, 0)))
        assert any((padded[i : i + 16, j : j + 16] == after).all() for i in range(5) for j in range(5))
    assert x.dtype == shifted.dtype
    assert (Views(["shift"], 64, 0)({"x": x[5:9]}, [5, 6, 7, 8], 3)["x"] == shifted[5:9]).all()
    assert (views({"x": x}, every, 4)["x"] != shifted).any()


def test_what_cannot_be_augmented(lesson: Lesson) -> None:
    with pytest.raises(InputError, match=r"needs images of shape .* x is \(20,\)"):
        Views(["flip"], 4, 0)({"x": np.zeros((4, 20))}, [0, 1, 2, 3], 0)
    with pytest.raises(
        InputError, match="augment works on image arrays x, which the task 'text-classification' does not"
    ):
        Distill(augment=("flip",))(cut(lesson.teacher), lesson)


class Tied(torch.nn.Module):
    """Two layers that share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 2)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.two(self.one(x)))  # type: ignore[no-any-return]


def test_tied_weights_are_saved_and_stay_tied(tmp_path: Path) -> None:
    core = Tied()
    made = Model(core, ArrayEncoder(), ("x",), ("0", "1"), Checkpoint("a.b:c"), core)
    x = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
    examples = Examples("made", Arrays({"x": x}), (x[:, 0] > 0).astype(np.int64), None, "d")
    lesson = Lesson(
        TASKS["module"], made, examples.take(range(60), "t"), examples.take(range(60, 80), "h"), 0, tmp_path
    )
    Distill(epochs=2, losses={"hard": 1})(made, lesson)
    assert core.one.weight is core.two.weight
    assert list(tmp_path.glob("checkpoint-*/model.safetensors"))
