"""Which examples a model lost and gained against its teacher.

Shapes: N examples, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass
from scipy.special import softmax

from potstill.validate.calibration import confidence
from potstill.validate.examples import IGNORED
from potstill.validate.metrics import most_likely

MOST_SHOWN = 12


@dataclass(frozen=True)
class Flip:
    """An example that the teacher had right and the model has wrong.

    Attributes:
        row: its number in the evaluation set, from 1.
        label: its class, which is what the teacher said.
        teacher_probability: that the teacher gave to that class.
        said: the class that the model said.
        probability: that the model gave to what it said.
    """

    row: int
    label: str
    teacher_probability: float
    said: str
    probability: float


@dataclass(frozen=True)
class ClassFlips:
    """How many of the examples of one class a model lost and gained.

    Attributes:
        name: of the class.
        examples: of that class in the evaluation set.
        lost: that the teacher had right and the model has wrong.
        gained: the other way.
    """

    name: str
    examples: int
    lost: int
    gained: int


@dataclass(frozen=True)
class Flips:
    """The flips of a model on an evaluation set.

    Attributes:
        worst: the lost examples that the model was most sure of, at most 12, the surest first.
        lost, gained: how many in all.
        classes: those with a flip, the largest net loss first.
    """

    worst: list[Flip]
    lost: int
    gained: int
    classes: list[ClassFlips]

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        plain: dict[str, Any] = TypeAdapter(Flips).dump_python(self, mode="json")
        return plain


def flips(
    logits: NDArray[np.floating], teacher: NDArray[np.floating], labels: NDArray[np.int64], names: Sequence[str]
) -> Flips:
    """Compare a model's logits (N, C) with the teacher's (N, C) by the labels (N,); `names` of the classes (C).

    Examples without a label are neither lost nor gained. Of those of which the model was equally sure the earlier one
    comes first.
    """
    mine, theirs = most_likely(logits), most_likely(teacher)
    lost, gained = (theirs == labels) & (mine != labels), (mine == labels) & (theirs != labels)
    rows = np.flatnonzero(lost)
    sure = confidence(logits[rows])
    order = np.argsort(-sure, kind="stable")[:MOST_SHOWN]
    worst = [
        Flip(
            row=int(row) + 1,
            label=names[labels[row]],
            teacher_probability=float(softmax(teacher[row].astype(np.float64))[labels[row]]),
            said=names[mine[row]],
            probability=float(p),
        )
        for row, p in zip(rows[order], sure[order], strict=True)
    ]
    of_class, of_lost, of_gained = (
        np.bincount(of, minlength=len(names)) for of in (labels[labels != IGNORED], labels[lost], labels[gained])
    )
    classes = [
        ClassFlips(names[c], int(of_class[c]), int(of_lost[c]), int(of_gained[c]))
        for c in np.argsort(of_gained - of_lost, kind="stable")
        if of_lost[c] + of_gained[c]
    ]
    return Flips(worst, int(lost.sum()), int(gained.sum()), classes)


def flips_from_json(value: Any) -> Flips | None:
    """The flips that `to_json` gave, if there are any."""
    return TypeAdapter(Flips | None).validate_python(value)
