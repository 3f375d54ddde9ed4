"""What a scorecard must hold: limits with units, and a verdict that says how sure it is.

A limit on a figure that was estimated from examples is a test of non-inferiority: the figure's 95 % interval is
compared with the limit, not the figure (Piaggio et al. 2012, "Reporting of noninferiority and equivalence randomized
trials", CONSORT). With `undecided: strict` a model whose true figure is right at the limit passes about once in forty.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Literal

from pydantic.dataclasses import dataclass

from potstill.validate.errors import InputError

if TYPE_CHECKING:  # a limit is read without loading what computes a scorecard
    from potstill.validate.metrics import Interval
    from potstill.validate.scorecard import Scorecard

Outcome = Literal["pass", "fail", "undecided"]
Undecided = Literal["point", "strict"]

SHARE: Mapping[str, float] = {"%": 0.01}
NATS: Mapping[str, float] = {"nats": 1.0}
BYTES: Mapping[str, float] = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
SECONDS: Mapping[str, float] = {"ms": 1e-3, "s": 1.0}

_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"
_LIMIT = re.compile(rf"^\s*{_NUMBER}\s*(pp|%)\s*$")


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


def parse_quantity(text: str, units: Mapping[str, float]) -> float:
    """A number with one of some units: `97%`, `0.05nats`, `20MB`, `30ms`, as shares of 1, nats, bytes or seconds.

    Raises:
        InputError: it has no such unit, is no number above 0, or is a share above 100 %.
    """
    found = re.match(rf"^\s*{_NUMBER}\s*({'|'.join(units)})\s*$", str(text))
    if not found or not float(found[1]):
        example = " or ".join(f"{20 if unit != 'nats' else 0.1:g}{unit}" for unit in units)
        raise InputError(f"{text!r} is not a limit here; write a number above 0 with its unit, like {example}")
    value = float(found[1]) * units[found[2]]
    if units is SHARE and value > 1:
        raise InputError(f"{text!r} is more than all")
    return value


@dataclass(frozen=True)
class Check:
    """What one limit says of a model.

    Attributes:
        limit: its name in a recipe.
        outcome: `pass` when the whole 95 % interval holds the limit, `fail` when none of it does, `undecided` between.
        passed: whether it lets the model pass.
        reason: one sentence.
        more_examples: for an undecided outcome, about how many more evaluation examples would decide it at this
            estimate; None when decided, or when no number would.
    """

    limit: str
    outcome: Outcome
    passed: bool
    reason: str
    more_examples: int | None = None


@dataclass(frozen=True)
class Verdict:
    """What a gate says of a model: the worst of what its limits say.

    Attributes:
        outcome: `fail` if one limit is missed, else `undecided` if one is, else `pass`.
        passed: whether all limits let the model pass, and the run goes on.
        reason: one sentence or several: of the limits that stop the model, else of the drop.
        more_examples: the most that an undecided limit asks for; None when decided, or when no number decides one.
        checks: each limit alone.
    """

    outcome: Outcome
    passed: bool
    reason: str
    more_examples: int | None = None
    checks: list[Check] = field(default_factory=list)


def verdict_of(checks: list[Check]) -> Verdict:
    """The verdict that some checks make together; the first is that of the drop."""
    undecided = [check for check in checks if check.outcome == "undecided"]
    failed = any(check.outcome == "fail" for check in checks)
    asked = [check.more_examples for check in undecided]
    return Verdict(
        outcome="fail" if failed else "undecided" if undecided else "pass",
        passed=all(check.passed for check in checks),
        reason="; ".join([check.reason for check in checks if not check.passed] or [checks[0].reason]),
        more_examples=None if failed else max((n for n in asked if n), default=None) if all(asked) else None,
        checks=checks,
    )


@dataclass(frozen=True)
class Gate:
    """Limits on what a model may lose against its teacher, and on what a package may cost.

    Attributes:
        max_drop: of the metric.
        undecided: what decides where a limit lies inside the interval: the `point` estimate, or nothing: `strict` lets
            only what is decided pass.
        min_agreement: share of the units (examples, words) on which both say the same.
        max_flips: share of the units that the teacher has right and the model has wrong.
        max_divergence: mean KL(teacher ‖ model), in nats.
        max_size: of a package's model file, in bytes.
        max_latency: median of a package's runs, in seconds.
        max_memory: peak memory of a package above the runtime's own, in bytes.
    """

    max_drop: Limit
    undecided: Undecided = "point"
    min_agreement: float | None = None
    max_flips: float | None = None
    max_divergence: float | None = None
    max_size: float | None = None
    max_latency: float | None = None
    max_memory: float | None = None

    def __call__(self, card: "Scorecard", size_bytes: int | None = None) -> Verdict:
        """Judge a scorecard, and the size of a package's model file.

        Raises:
            InputError: a limit is on what this metric has not.
        """
        checks = [self._drop(card), *self._against_teacher(card)]
        if self.max_size is not None and size_bytes is not None:
            checks.append(_cost("max_size", size_bytes / 1e6, self.max_size / 1e6, "MB", "the model file"))
        return verdict_of(checks)

    def with_costs(self, verdict: Verdict, median_ms: float, peak_mb: float | None, where: str) -> Verdict:
        """A package's verdict, with what was measured on a machine: latency in ms, memory in MB (None: unknown)."""
        checks = list(verdict.checks)
        if self.max_latency is not None:
            checks.append(_cost("max_latency", median_ms, self.max_latency * 1e3, "ms", f"the median run on {where}"))
        if self.max_memory is not None and peak_mb is not None:
            checks.append(_cost("max_memory", peak_mb, self.max_memory / 1e6, "MB", f"peak memory on {where}"))
        elif self.max_memory is not None:
            told = f"memory cannot be measured on {where}, so max_memory was not checked"
            checks.append(Check("max_memory", "undecided", self.undecided == "point", told))
        return verdict_of(checks)

    def check(self, card: "Scorecard") -> None:
        """Refuse limits on what a metric has not, by the teacher's own scorecard: before anything is trained.

        Raises:
            InputError: a limit cannot be judged.
        """
        list(self._against_teacher(card))

    def _drop(self, card: "Scorecard") -> Check:
        limit, interval = self.max_drop.of(card.teacher_value), card.difference_interval
        told = (
            f"{card.metric} {card.shown(card.value, 2)} against the teacher's {card.shown(card.teacher_value, 2)} on "
            f"{card.examples} examples: "
            f"{card.difference * 100:+.2f} points, 95 % interval {interval.low * 100:+.2f} to "
            f"{interval.high * 100:+.2f}, limit −{limit * 100:.2f}"
        )
        return self._decide("max_drop", card, card.difference, interval, -limit, told)

    def _against_teacher(self, card: "Scorecard") -> Iterator[Check]:
        """The limits on how far a model may be from its teacher, beside the metric."""
        for name, limit, value, interval, sign, what, unit in (
            ("min_agreement", self.min_agreement, card.agreement, card.agreement_interval, 1, "agreement", "%"),
            ("max_flips", self.max_flips, card.lost_share, card.lost_interval, -1, "flips to wrong", "%"),
            ("max_divergence", self.max_divergence, card.kl_nats, card.kl_interval, -1, "KL", " nats"),
        ):
            if limit is None:
                continue
            if value is None or interval is None:
                raise InputError(f"gate.{name}: {card.metric} has none; leave it out, or judge by another task")
            scale, digits = (100, 2) if unit == "%" else (1, 4)
            told = (
                f"{what} {value * scale:.{digits}f}{unit}, 95 % interval {interval.low * scale:.{digits}f} to "
                f"{interval.high * scale:.{digits}f}, limit {limit * scale:g}"
            )
            flipped = interval if sign > 0 else type(interval)(-interval.high, -interval.low)
            yield self._decide(name, card, sign * value, flipped, sign * limit, told)

    def _decide(
        self, name: str, card: "Scorecard", value: float, interval: "Interval", limit: float, told: str
    ) -> Check:
        """Whether a value, larger the better, holds its limit, by its interval."""
        if interval.low >= limit:
            return Check(name, "pass", True, told)
        if interval.high < limit:
            return Check(name, "fail", False, told)
        passed = self.undecided == "point" and value >= limit
        more = _more_examples(card.examples, abs(value - limit), interval.half)
        ask = f"about {more:,} more examples would decide it" if more else "no number of examples would decide it"
        by = "so the estimate decides" if self.undecided == "point" else "and the gate is strict"
        return Check(name, "undecided", passed, f"{told}; undecided, {by} ({ask})", more)


def _cost(name: str, value: float, limit: float, unit: str, what: str) -> Check:
    passed = value <= limit
    told = f"{what} takes {value:.3g} {unit}, limit {limit:.3g} {unit}"
    return Check(name, "pass" if passed else "fail", passed, told)


def _more_examples(examples: int, gap: float, half: float) -> int | None:
    """Examples to add until the interval's half width is below the distance to the limit; it shrinks as 1/√N."""
    return None if gap < 1e-9 else max(1, math.ceil(examples * ((half / gap) ** 2 - 1)))
