"""Predictions as they are kept: in float16, on the disk, in the examples' order, saying what the model said."""

import errno
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from potstill.validate import metrics
from potstill.validate.calibration import confidence
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.errors import InputError
from potstill.validate.examples import Arrays, Examples, Rows
from potstill.validate.flips import flips
from potstill.validate.metrics import divergences, in_parts, most_likely
from potstill.validate.model import MASKED
from potstill.validate.predictor import TorchPredictor, one_below_another, predict, rounded
from potstill.validate.scorecard import judge
from potstill.validate.task import TASKS
from tests.predicted import predicted

STEP = 2.0**-10  # of float16 in [1, 2)


class Given:
    """Gives the rows of a function of the column `x`, its batches as wide as they need."""

    name, encode = "the model", ArrayEncoder()

    def __init__(self, of: Callable[[NDArray[Any]], NDArray[np.float32]], batch_size: int = 7) -> None:
        self.of, self.batch_size = of, batch_size

    def __call__(self, rows: Rows) -> NDArray[np.float32]:
        return self.of(np.asarray(rows["x"]))


def numbered(n: int) -> Examples:
    return Examples("numbers", Arrays({"x": np.arange(n)}), np.zeros(n, dtype=np.int64), ("a", "b"), "d")


# Rounding.

NEAR_TIES = [
    [1.0, 1 + STEP / 4],  # both round to 1
    [1 + STEP / 4, 1.0, 1 + STEP / 3],
    [-1 - STEP / 5, -1.0],
    [-2.0, -1 - STEP / 4, -1.0, -1 - STEP / 3],
    [1e-9, 2e-9],  # below the smallest float16
    [-1e-9, 0.0, 1e-9],
    [-2e-9, -1e-9],
    [65_500.0, 65_480.0, 65_481.0],
    [30_000.0, 30_001.0, 30_002.0],
    [MASKED, MASKED, -9_999.0],
    [-1e9, -1e9, -1e8],  # all below what float16 holds
    [3.0, 3.0, 3.0],  # a tie already: the first one says it
    [0.0, 0.0],
    [5.0, -1e9],
]


@pytest.mark.parametrize("row", NEAR_TIES, ids=str)
def test_the_largest_stays_where_it_was(row: list[float]) -> None:
    exact = np.array([row], dtype=np.float32)
    found = rounded(exact)
    assert found.dtype == np.float16
    assert np.isfinite(found).all()
    assert found.argmax() == exact.argmax()
    clipped = np.clip(exact, -65_504, None)
    step = np.maximum(np.abs(clipped.astype(np.float64)) * STEP, 2.0**-24)
    assert (np.abs(found.astype(np.float64) - clipped) <= 1.5 * step).all()


def by_loop(row: NDArray[np.float32]) -> list[float]:
    """The rule, one row at a time in plain Python."""
    values = [float(np.float16(x)) for x in row]
    top = max(range(len(row)), key=lambda i: float(row[i]))
    if values[top] in values[:top]:
        values[top] = float(np.nextafter(np.float16(values[top]), np.float16(np.inf)))
    return values


def test_many_rows_are_rounded_by_the_rule() -> None:
    rng = np.random.default_rng(0)
    scales = 10.0 ** rng.integers(-8, 4, size=(3000, 1))
    near = rng.normal(size=(3000, 1)) * (1 + rng.integers(-3, 4, size=(3000, 6)) * 1e-4)  # many ties
    for rows in (near * scales, rng.normal(size=(3000, 6)) * scales, np.zeros((2, 6))):
        exact = rows.astype(np.float32)
        found = rounded(exact)
        assert (found.argmax(axis=1) == exact.argmax(axis=1)).all()
        assert found.tolist() == [by_loop(row) for row in exact]
    plain = (near * scales).astype(np.float32)
    assert (plain.astype(np.float16).argmax(axis=1) != plain.argmax(axis=1)).mean() > 0.1  # the rule was needed


# On the disk.


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_rows_are_kept_in_the_examples_order(batch_size: int, tmp_path: Path) -> None:
    predictor = Given(lambda x: np.stack([x, -x], axis=1).astype(np.float32), batch_size)
    found = predict(predictor, numbered(30), None, tmp_path / "logits.npy")
    assert (found.dtype, found.shape, isinstance(found, np.memmap)) == (np.float16, (30, 2), True)
    assert not found.flags.writeable
    assert found[:, 0].tolist() == list(range(30))
    assert np.load(tmp_path / "logits.npy").tolist() == found.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["logits.npy"]


def test_batches_of_other_widths_fill_one_file(tmp_path: Path) -> None:
    """Two rows for each example, as wide as the longest of its batch; the longest are asked first."""
    lengths, asked = np.array([3, 9, 2, 5, 4, 9, 1]), []

    def rows(x: NDArray[Any]) -> NDArray[np.float32]:
        asked.append([len(one.split()) for one in x])
        found = np.full((2 * len(x), max(asked[-1])), MASKED, dtype=np.float32)
        for i, one in enumerate(x):
            length, number = len(one.split()), one.split()[0]
            found[2 * i : 2 * i + 2, :length] = [[float(number)], [-float(number)]]
        return found

    texts = np.array([" ".join([f"{i}"] * length) for i, length in enumerate(lengths)], dtype=object)
    examples = replace(numbered(7), table=Arrays({"x": texts}))
    for length_of, first in (("x", 9), (None, 3)):
        asked.clear()
        found = predict(Given(rows, 2), examples, length_of, tmp_path / f"{length_of}.npy")
        assert asked[0][0] == first
        assert found.shape == (14, 9)
        for i, length in enumerate(lengths):
            assert found[2 * i].tolist() == [i] * length + [MASKED] * (9 - length)
            assert found[2 * i + 1].tolist() == [-i] * length + [MASKED] * (9 - length)


def test_rows_of_several_examples_are_as_wide_as_the_widest() -> None:
    parts = [np.ones((2, 3), dtype=np.float32), np.ones((1, 5), dtype=np.float32)]
    assert one_below_another(parts).tolist() == [[1, 1, 1, MASKED, MASKED]] * 2 + [[1] * 5]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.nan, "gave logits that are not finite on 2 of 30 examples of numbers, first on row 5; its weights"),
        (np.inf, "that are not finite on 2 of 30"),
        (-np.inf, "that are not finite on 2 of 30"),
        (70_000, "above 65,504, the most that float16 holds, on 2 of 30 .* first on row 5; scale its outputs"),
    ],
)
def test_what_cannot_be_kept_is_told(value: float, words: str, tmp_path: Path) -> None:
    def rows(x: NDArray[Any]) -> NDArray[np.float32]:
        return np.where(np.isin(x, [4, 19])[:, None], [0.0, value], [1.0, 2.0]).astype(np.float32)

    with pytest.raises(InputError, match=words):
        predict(Given(rows), numbered(30), None, tmp_path / "logits.npy")


def test_masks_below_float16_are_kept_as_its_least(tmp_path: Path) -> None:
    found = predict(Given(lambda x: np.full((len(x), 2), [3, -1e9], np.float32)), numbered(2), None, tmp_path / "a.npy")
    assert found.tolist() == [[3, -65_504]] * 2
    assert confidence(found).tolist() == [1, 1]


def test_a_full_disk_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: .*logits\.npy"):
        predict(Given(lambda x: np.ones((len(x), 2), np.float32)), numbered(9), None, tmp_path / "logits.npy")
    assert not list(tmp_path.iterdir())


# Judged from there.


def peak_mb(action: Callable[[], object]) -> float:
    tracemalloc.start()
    action()
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4,000 rows of 500 are 4 MB in float16 and 16 MB in float64."""
    monkeypatch.setattr(metrics, "AT_ONCE", 2**14)

    def rows(x: NDArray[Any]) -> NDArray[np.float32]:
        return np.random.default_rng(int(x[0])).normal(size=(len(x), 500)).astype(np.float32)

    path = tmp_path / "logits.npy"
    assert peak_mb(lambda: predict(Given(rows, 16), numbered(4000), None, path)) < 1.5
    found = np.load(path, mmap_mode="r")
    for action in (lambda: divergences(found, found), lambda: confidence(found), lambda: most_likely(found)):
        assert peak_mb(action) < 1.5


def test_parts_make_the_same_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(101, 6)).astype(np.float16)
    whole = divergences(rows, rows[::-1]), confidence(rows), most_likely(rows)
    monkeypatch.setattr(metrics, "AT_ONCE", 25)
    parts = divergences(rows, rows[::-1]), confidence(rows), most_likely(rows)
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert in_parts(lambda part: part.sum(axis=1), rows[:0]).shape == (0,)


def assert_alike(student: NDArray[np.float32], teacher: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
    """The scorecard from float16 is that from float32: all counts the same, KL within 0.1 %."""
    exact, kept = judge(student, teacher, labels, "made"), judge(rounded(student), rounded(teacher), labels, "made")
    for name in ("value", "teacher_value", "agreement", "lost", "gained", "mcnemar_p", "interval"):
        assert getattr(kept, name) == getattr(exact, name), name
    assert kept.kl_nats == pytest.approx(exact.kl_nats, rel=1e-3)
    assert kept.kl_interval is not None
    assert exact.kl_interval is not None
    assert kept.kl_interval.low == pytest.approx(exact.kl_interval.low, rel=1e-3)
    assert kept.kl_interval.high == pytest.approx(exact.kl_interval.high, rel=1e-3)
    names = [str(i) for i in range(student.shape[1])]
    before, after = (flips(a, b, labels, names) for a, b in ((student, teacher), (rounded(student), rounded(teacher))))
    assert (after.lost, after.gained, after.classes) == (before.lost, before.gained, before.classes)


@pytest.mark.parametrize(("classes", "scale"), [(2, 1), (10, 5), (1000, 3)])
def test_scorecards_from_float16_are_those_from_float32(classes: int, scale: float) -> None:
    rng = np.random.default_rng(classes)
    labels = rng.integers(classes, size=2000)
    teacher = (rng.normal(size=(2000, classes)) * scale + 2 * scale * np.eye(classes)[labels]).astype(np.float32)
    student = (teacher + 0.2 * scale * rng.normal(size=teacher.shape)).astype(np.float32)
    assert_alike(student, teacher, labels)


def test_real_scorecards_from_float16_are_those_from_float32(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    task = TASKS["module"]
    examples = task.examples(str(real_data / "cifar10" / "test.npz"), {})
    logits = []
    for name in ("resnet20", "resnet56"):
        weights = next((real_data / "cifar10").glob(f"{name}*.th"))
        model = task.load(Checkpoint(f"examples.cifar10.model:{name}", weights), example=examples.rows([0]))
        predictor = TorchPredictor(model, name, torch.device("cpu"), batch_size=200)
        rows = [predictor(examples.rows(range(i, i + 200))) for i in range(0, len(examples), 200)]
        logits.append(np.concatenate(rows))
        assert (predicted(predictor, examples.take(range(50), "50")) == rounded(logits[-1][:50])).mean() > 0.99
    assert_alike(logits[0], logits[1], examples.labels)
