"""One model judged on one evaluation set, alone and against the teacher."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass
from sklearn.metrics import accuracy_score

from potstill.validate.errors import InputError
from potstill.validate.metrics import Interval, mcnemar_p, mean_kl, paired_difference, proportion


@dataclass(frozen=True)
class Scorecard:
    """A model on N examples, and the same N by its teacher.

    Attributes:
        metric: what `value` is: `accuracy`, a share from 0 to 1.
        examples: N.
        data: name of the evaluation set.
        value, interval: the metric, with Wilson's 95 % interval.
        teacher_value: the teacher's metric on the same examples.
        difference, difference_interval: value minus teacher_value, with the paired 95 % interval.
        agreement, agreement_interval: share of examples on which both say the same class.
        lost: examples that the teacher had right and this model has wrong; flips one way.
        gained: the other way.
        mcnemar_p: exact p-value of the hypothesis that both are equally accurate.
        kl_nats: mean KL(teacher ‖ model).
        truncated: examples whose input was cut to the longest length.
    """

    metric: str
    examples: int
    data: str
    value: float
    interval: Interval
    teacher_value: float
    difference: float
    difference_interval: Interval
    agreement: float
    agreement_interval: Interval
    lost: int
    gained: int
    mcnemar_p: float
    kl_nats: float
    truncated: int = 0

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        plain: dict[str, Any] = TypeAdapter(Scorecard).dump_python(self, mode="json")
        return plain


def scorecard_from_json(value: Any) -> Scorecard:
    """The scorecard that `to_json` gave."""
    return TypeAdapter(Scorecard).validate_python(value)


def judge(
    logits: NDArray[np.float32], teacher: NDArray[np.float32], labels: NDArray[np.int64], data: str, truncated: int = 0
) -> Scorecard:
    """Judge a model's logits (N, C) against the labels (N,) and against the teacher's logits (N, C).

    Raises:
        InputError: the shapes differ.
    """
    if logits.shape != teacher.shape or len(labels) != len(logits):
        raise InputError(
            f"the model's outputs are {logits.shape}, the teacher's {teacher.shape}, "
            f"for {len(labels)} labels; they must be over the same examples and classes"
        )
    mine, theirs = logits.argmax(axis=1), teacher.argmax(axis=1)
    right, teacher_right = mine == labels, theirs == labels
    lost, gained = int((teacher_right & ~right).sum()), int((right & ~teacher_right).sum())
    same, n = int((mine == theirs).sum()), len(labels)
    return Scorecard(
        metric="accuracy",
        examples=n,
        data=data,
        value=float(accuracy_score(labels, mine)),
        interval=proportion(int(right.sum()), n),
        teacher_value=float(accuracy_score(labels, theirs)),
        difference=(gained - lost) / n,
        difference_interval=paired_difference(lost, gained, n),
        agreement=same / n,
        agreement_interval=proportion(same, n),
        lost=lost,
        gained=gained,
        mcnemar_p=mcnemar_p(lost, gained),
        kl_nats=mean_kl(teacher, logits),
        truncated=truncated,
    )
