"""What a scorecard must hold: limits with units, and a verdict that says how sure it is."""

import math
import re
from typing import TYPE_CHECKING, Literal

from pydantic.dataclasses import dataclass

from potstill.validate.errors import InputError

if TYPE_CHECKING:  # a limit is read without loading what computes a scorecard
    from potstill.validate.scorecard import Scorecard

_LIMIT = re.compile(r"^\s*(\d+(?:\.\d+)?|\.\d+)\s*(pp|%)\s*$")


@dataclass(frozen=True)
class Limit:
    """How much of the metric may be lost.

    Attributes:
        amount: the number before the unit.
        unit: `pp`, points of the metric (2pp: from 90 % to 88 %), or `%`, hundredths of the teacher's value
            (2%: from 90 % to 88.2 %).
    """

    amount: float
    unit: Literal["pp", "%"]

    def __str__(self) -> str:
        return f"{self.amount:g}{self.unit}"

    def of(self, teacher_value: float) -> float:
        """The limit as a share of 1, for a teacher of this value."""
        return self.amount / 100 * (1.0 if self.unit == "pp" else teacher_value)


def parse_limit(text: str) -> Limit:
    """`2pp` or `1%`.

    Raises:
        InputError: there is no unit, or no number from 0 to 100.
    """
    found = _LIMIT.match(str(text))
    if not found:
        try:
            float(text)
        except ValueError:
            raise InputError(f"{text!r} is not a limit; write 1pp or 1%") from None
        raise InputError(
            f"{text!r} has no unit: is it a point or a share? Write 1pp for one point of the "
            "metric, or 1% for a hundredth of the teacher's value"
        )
    amount = float(found[1])
    if amount > 100:
        raise InputError(f"{text!r} is more than all there is to lose")
    return Limit(amount, found[2])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Verdict:
    """What a gate says of a scorecard.

    Attributes:
        outcome: `pass` when the whole 95 % interval of the difference holds the limit, `fail` when none of it
            does, `undecided` between.
        passed: whether the run goes on; an undecided gate is decided by the point estimate.
        reason: one sentence.
        more_examples: for an undecided outcome, about how many more evaluation examples would decide it at this
            difference; None when decided, or when no number would.
    """

    outcome: Literal["pass", "fail", "undecided"]
    passed: bool
    reason: str
    more_examples: int | None = None


@dataclass(frozen=True)
class Gate:
    """A limit on the drop of the metric against the teacher: a non-inferiority test.

    Source: Piaggio et al. 2012 (CONSORT, non-inferiority): compare the interval, not the estimate, with the limit.
    """

    max_drop: Limit

    def __call__(self, card: "Scorecard") -> Verdict:
        """Judge a scorecard."""
        limit, interval = self.max_drop.of(card.teacher_value), card.difference_interval
        told = (
            f"{card.metric} {card.shown(card.value, 2)} against the teacher's {card.shown(card.teacher_value, 2)} on "
            f"{card.examples} examples: "
            f"{card.difference * 100:+.2f} points, 95 % interval {interval.low * 100:+.2f} to "
            f"{interval.high * 100:+.2f}, limit −{limit * 100:.2f}"
        )
        if interval.low >= -limit:
            return Verdict("pass", True, told)
        if interval.high < -limit:
            return Verdict("fail", False, told)
        passed = card.difference >= -limit
        more = _more_examples(card, limit)
        ask = f"about {more:,} more examples would decide it" if more else "no number of examples would decide it"
        return Verdict("undecided", passed, f"{told}; undecided, so the estimate decides ({ask})", more)


def _more_examples(card: "Scorecard", limit: float) -> int | None:
    """Examples to add until the interval's half width is below the distance to the limit; it shrinks as 1/√N."""
    gap = abs(card.difference + limit)
    if gap < 1e-9:
        return None
    return max(1, math.ceil(card.examples * ((card.difference_interval.half / gap) ** 2 - 1)))
