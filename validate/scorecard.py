"""One model judged on one evaluation set, alone and against the teacher."""

from dataclasses import field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from potstill.validate.errors import InputError
from potstill.validate.examples import IGNORED
from potstill.validate.metrics import (
    Interval,
    bootstrap_mean,
    divergences,
    mcnemar_p,
    most_likely,
    paired_difference,
    proportion,
)

CLOSED_FORMS = (
    "Wilson’s for the metric, the agreement and the flips; for the difference the outer of Tango’s and Agresti and "
    "Min’s paired ones; for KL the bootstrap over examples"
)
RESAMPLED = "by the paired bootstrap over examples (expanded percentiles)"


@dataclass(frozen=True)
class Perplexity:
    """How surprised a language model is: e to the mean of −log p of the next token.

    Attributes:
        value, interval: of the model, with its 95 % interval.
        teacher: of its teacher on the same tokens.
        ratio, ratio_interval: value over teacher, with the paired 95 % interval.
        tokens: how many were predicted; of models with different tokenizers those of the teacher, for whom both count.
        bits_per_byte: −log₂ p of the text over its bytes, which is the same in all tokenizers.
        teacher_bits_per_byte: of its teacher.
    """

    value: float
    interval: Interval
    teacher: float
    ratio: float
    ratio_interval: Interval
    tokens: int
    bits_per_byte: float | None = None
    teacher_bits_per_byte: float | None = None

    def rise(self) -> tuple[float, Interval]:
        """How far above the teacher's it is, as a share of the teacher's, with its interval."""
        return self.ratio - 1, Interval(self.ratio_interval.low - 1, self.ratio_interval.high - 1)


@dataclass(frozen=True)
class Scorecard:
    """A model on N examples, and the same N by its teacher.

    What makes no sense for a metric is None, and not shown.

    Attributes:
        metric: what `value` is, e.g. `accuracy`: a share of 1, or a correlation.
        examples: N.
        data: name of the evaluation set.
        value, interval: the metric, with its 95 % interval.
        teacher_value: the teacher's metric on the same examples.
        difference, difference_interval: value minus teacher_value, with the paired 95 % interval.
        agreement, agreement_interval: share of units on which both say the same.
        lost: units that the teacher had right and this model has wrong; flips one way.
        gained: the other way.
        mcnemar_p: exact p-value of the hypothesis that both are equally often right.
        lost_share, lost_interval: `lost` as a share of the units.
        kl_nats, kl_interval: mean KL(teacher ‖ model) over the units.
        truncated: examples whose input was cut to the longest length.
        unit: what agreement and flips are counted in.
        method: how the intervals were made.
        beside: other metrics of this model by name, shares of 1 or correlations.
        correlation: whether the metric is a correlation, and so no share.
        perplexity: of a language model.
    """

    metric: str
    examples: int
    data: str
    value: float
    interval: Interval
    teacher_value: float
    difference: float
    difference_interval: Interval
    agreement: float | None = None
    agreement_interval: Interval | None = None
    lost: int | None = None
    gained: int | None = None
    mcnemar_p: float | None = None
    lost_share: float | None = None
    lost_interval: Interval | None = None
    kl_nats: float | None = None
    kl_interval: Interval | None = None
    truncated: int = 0
    unit: str = "examples"
    method: str = CLOSED_FORMS
    beside: dict[str, float] = field(default_factory=dict)
    correlation: bool = False
    perplexity: Perplexity | None = None

    @property
    def scale(self) -> str:
        """What a value times 100 is in: `%`, or `× 100` for a correlation."""
        return "× 100" if self.correlation else "%"

    def shown(self, value: float, digits: int = 1) -> str:
        """A value of the metric as a person reads it: `91.2%`, or `84.3` for a correlation times 100."""
        return f"{value * 100:.{digits}f}" + ("" if self.correlation else "%")

    def also(self) -> list[str]:
        """What a person should read beside the metric, a few words each: `perplexity 4.29 (1.03 × the teacher’s)`."""
        words = [f"{name} {share * 100:.1f}" for name, share in self.beside.items()]
        if one := self.perplexity:
            apart = one.ratio != 1 or one.ratio_interval != Interval(1, 1)
            words.append(f"perplexity {one.value:.4g}" + (f" ({one.ratio:.3f} × the teacher’s)" if apart else ""))
            words += [f"{one.bits_per_byte:.3f} bits a byte"] if one.bits_per_byte is not None else []
        return words

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        plain: dict[str, Any] = TypeAdapter(Scorecard).dump_python(self, mode="json")
        return plain


def scorecard_from_json(value: Any) -> Scorecard:
    """The scorecard that `to_json` gave."""
    return TypeAdapter(Scorecard).validate_python(value)


def paired(right: NDArray[np.bool_], teacher_right: NDArray[np.bool_]) -> dict[str, Any]:
    """The fields of a scorecard that two answers to each of N examples decide, each right or wrong (N,)."""
    lost, gained = int((teacher_right & ~right).sum()), int((right & ~teacher_right).sum())
    n = len(right)
    return {
        "examples": n,
        "value": float(right.mean()),
        "interval": proportion(int(right.sum()), n),
        "teacher_value": float(teacher_right.mean()),
        "difference": (gained - lost) / n,
        "difference_interval": paired_difference(lost, gained, n),
        "lost": lost,
        "gained": gained,
        "lost_share": lost / n,
        "lost_interval": proportion(lost, n),
        "mcnemar_p": mcnemar_p(lost, gained),
    }


def judge(
    logits: NDArray[np.floating],
    teacher: NDArray[np.floating],
    labels: NDArray[np.int64],
    data: str,
    truncated: int = 0,
) -> Scorecard:
    """Judge a model's logits (N, C) against the labels (N,) and against the teacher's logits (N, C), by accuracy.

    Examples labelled `IGNORED` are left out.

    Raises:
        InputError: the shapes differ.
    """
    check_alike(logits, teacher, len(labels))
    known = labels != IGNORED
    mine, theirs, labels = most_likely(logits)[known], most_likely(teacher)[known], labels[known]
    same, n = int((mine == theirs).sum()), len(labels)
    apart = divergences(teacher, logits)[known]
    return Scorecard(
        metric="accuracy",
        data=data,
        agreement=same / n,
        agreement_interval=proportion(same, n),
        kl_nats=float(apart.mean()),
        kl_interval=bootstrap_mean(apart),
        truncated=truncated,
        **paired(mine == labels, theirs == labels),
    )


def check_alike(mine: NDArray[np.floating], teacher: NDArray[np.floating], labels: int) -> None:
    """Refuse outputs that are not over the same examples and classes.

    Raises:
        InputError: the shapes differ.
    """
    if mine.shape != teacher.shape or labels != len(mine):
        raise InputError(
            f"the model's outputs are {mine.shape}, the teacher's {teacher.shape}, "
            f"for {labels} labels; they must be over the same examples and classes"
        )
