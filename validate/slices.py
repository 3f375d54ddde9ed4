"""Where a model lost against its teacher: the evaluation set cut into slices, and each slice beside the rest.

Shapes: N examples, C classes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from potstill.validate.errors import InputError
from potstill.validate.metrics import Interval, change_of_gap, holm, mcnemar_p, paired_difference

LEAST_TESTED = 10  # examples of a slice; smaller ones are shown and not tested
MOST_VALUES = 20  # of a column; numbers with more are cut in thirds
SURE = 0.05  # a corrected p-value below it is more than chance explains
MISSING = "missing"


@plain_dataclass(frozen=True)
class Cut:
    """One way to cut N examples into slices.

    Attributes:
        by: what they are cut by, e.g. `class`.
        values: names of the slices.
        of: which slice each example is in, shape (N,).
    """

    by: str
    values: tuple[str, ...]
    of: NDArray[np.int64]

    def take(self, rows: NDArray[Any]) -> "Cut":
        """The same cut of some of the examples."""
        return replace(self, of=self.of[rows])


@dataclass(frozen=True)
class Gap:
    """How far a slice is from the rest of the examples, in the teacher and in the model.

    Attributes:
        teacher, model: accuracy on the slice less accuracy on the rest.
        interval: 95 % interval of `model` less `teacher`.
        p: of the hypothesis that both gaps are the same.
        p_holm: the same, corrected by Holm over all slices.
    """

    teacher: float
    model: float
    interval: Interval
    p: float
    p_holm: float

    @property
    def widened(self) -> bool:
        """Whether the gap is wider in the model than in the teacher, by more than chance explains."""
        return self.p_holm < SURE and abs(self.model) > abs(self.teacher)


@dataclass(frozen=True)
class Slice:
    """A model and its teacher on some of the examples.

    Attributes:
        by: what the examples are cut by.
        value: name of the slice.
        examples: in it.
        lost: of them, that the teacher has right and the model has wrong.
        gained: the other way.
        accuracy, teacher_accuracy: on it.
        difference, interval: the one less the other, with the paired 95 % interval.
        p: exact McNemar p-value; None where there are fewer than 10 examples.
        p_holm: the same, corrected by Holm over all slices.
        gap: to the rest; None where the slice or the rest has fewer than 10 examples.
    """

    by: str
    value: str
    examples: int
    lost: int
    gained: int
    accuracy: float
    teacher_accuracy: float
    difference: float
    interval: Interval
    p: float | None = None
    p_holm: float | None = None
    gap: Gap | None = None

    @property
    def worse(self) -> bool:
        """Whether the model is worse on it than the teacher, by more than chance explains."""
        return self.p_holm is not None and self.p_holm < SURE and self.difference < 0


def by_class(labels: NDArray[np.int64], names: Sequence[str]) -> Cut:
    """A slice for each class; `labels` (N,) are indices into `names` (C)."""
    return Cut("class", tuple(names), labels)


def in_thirds(by: str, values: NDArray[Any], unit: str = "") -> Cut:
    """The lowest, the middle and the highest third of some values (N,); equal values stay together.

    `unit` stands after a value in a slice's name; `%` shows shares of 1.
    """
    scale, places = (100, ".1f") if unit == "%" else (1, ".4g")
    of = np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values, side="left")
    names = []
    for i, word in enumerate(("lowest", "middle", "highest")):
        inside = values[of == i] * scale
        ends = f"{inside.min():{places}} to {inside.max():{places}}{unit}" if len(inside) else "none"
        names.append(f"{word} third, {ends}")
    return Cut(by, tuple(names), of)


def by_column(by: str, values: Sequence[Any]) -> Cut:
    """A slice for each value of a column (N,), or for each third where more than 20 different ones are numbers.

    Raises:
        InputError: there are more than 20 values that are no numbers.
    """
    there = np.array([value is not None and value == value for value in values], dtype=bool)
    present = [value for value, is_there in zip(values, there, strict=True) if is_there]
    distinct = sorted(set(present), key=lambda value: (isinstance(value, str), value))
    of = np.full(len(values), -1, dtype=np.int64)
    if len(distinct) <= MOST_VALUES:
        place = {value: i for i, value in enumerate(distinct)}
        of[there], names = [place[value] for value in present], tuple(map(str, distinct))
    elif all(isinstance(value, int | float) for value in distinct):
        cut = in_thirds(by, np.array(present))
        of[there], names = cut.of, cut.values
    else:
        raise InputError(
            f"data.slices: column {by!r} has {len(distinct)} different values, and a slice for each would say little; "
            f"group them into at most {MOST_VALUES} in a column of its own (numbers are cut in thirds)"
        )
    return Cut(by, (*names, MISSING), np.where(of < 0, len(names), of))


def slices(right: NDArray[np.bool_], teacher_right: NDArray[np.bool_], cuts: Iterable[Cut]) -> list[Slice]:
    """Judge each slice that has examples, by whether model and teacher are right on each of them (N,).

    The largest loss comes first, slices that are too small to be tested last.
    """
    counts = np.stack([np.ones_like(right), right, teacher_right, teacher_right & ~right, right & ~teacher_right])
    of_all, found = counts.sum(axis=1), []
    for cut in cuts:
        parts = np.stack([np.bincount(cut.of[one], minlength=len(cut.values)) for one in counts], axis=1)
        found += [
            _slice(cut.by, value, part, of_all - part) for value, part in zip(cut.values, parts, strict=True) if part[0]
        ]
    p = _corrected({i: one.p for i, one in enumerate(found) if one.p is not None})
    gap_p = _corrected({i: one.gap.p for i, one in enumerate(found) if one.gap})
    found = [
        replace(one, p_holm=p.get(i), gap=replace(one.gap, p_holm=gap_p[i]) if one.gap else None)
        for i, one in enumerate(found)
    ]
    return sorted(found, key=lambda one: (one.p is None, one.difference))


def _corrected(p: dict[int, float]) -> dict[int, float]:
    return dict(zip(p, holm(list(p.values())), strict=True))


def _slice(by: str, value: str, inside: NDArray[np.int64], rest: NDArray[np.int64]) -> Slice:
    """A slice by its counts (5,) and those of the rest: examples, right, teacher right, lost, gained."""
    n, right, teacher_right, lost, gained = map(int, inside)
    gap = None
    if min(n, int(rest[0])) >= LEAST_TESTED:
        teacher, model = (inside[i] / n - rest[i] / rest[0] for i in (2, 1))
        interval, p = change_of_gap((lost, gained, n), (int(rest[3]), int(rest[4]), int(rest[0])))
        gap = Gap(float(teacher), float(model), interval, p, p)
    return Slice(
        by=by,
        value=value,
        examples=n,
        lost=lost,
        gained=gained,
        accuracy=right / n,
        teacher_accuracy=teacher_right / n,
        difference=(gained - lost) / n,
        interval=paired_difference(lost, gained, n),
        p=mcnemar_p(lost, gained) if n >= LEAST_TESTED else None,
        gap=gap,
    )
