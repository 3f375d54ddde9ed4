"""What a scorecard must hold: limits with units, and a verdict that says how sure it is.

A limit on a figure that was estimated from examples is a test of non-inferiority: the figure's 95 % interval is
compared with the limit, not the figure (Piaggio et al. 2012, "Reporting of noninferiority and equivalence randomized
trials", CONSORT). With `undecided: strict` a model whose true drop is right at the limit passes about once in forty.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from pydantic.dataclasses import dataclass

from potstill.validate.errors import InputError
from potstill.validate.units import (
    BYTES,
    NATS,
    SECONDS,
    SHARE,
    Limit,
    counted,
    nearest,
    nearest_cost,
    parse_limit,
    parse_quantity,
    signed,
)
from potstill.validate.verdict import (
    Check,
    Outcome,
    Verdict,
    ask,
    examples_to_decide,
    nearest_in_words,
    verdict_of,
)

if TYPE_CHECKING:  # a limit is read without loading what computes a scorecard
    from potstill.validate.calibration import Calibration
    from potstill.validate.metrics import Interval
    from potstill.validate.scorecard import Scorecard
    from potstill.validate.slices import Slice

__all__ = [
    "BYTES", "NATS", "SECONDS", "SHARE", "Check", "Gate", "Limit", "Outcome", "Undecided", "Verdict",
    "nearest_in_words", "parse_limit", "parse_quantity", "verdict_of",
]  # fmt: skip

Undecided = Literal["point", "strict"]


@dataclass(frozen=True)
class Gate:
    """Limits on what a model may lose against its teacher, and on what a package may cost.

    Attributes:
        max_drop: of the metric.
        undecided: what decides where a limit lies inside the interval: the `point` estimate, or nothing: `strict` lets
            only what is decided pass.
        max_slice_drop: of the accuracy on any slice of at least 10 examples.
        min_agreement: share of the units (examples, words) on which both say the same.
        max_flips: share of the units that the teacher has right and the model has wrong.
        max_divergence: mean KL(teacher ‖ model), in nats.
        max_perplexity_rise: of a language model's perplexity above the teacher's, as a share of the teacher's.
        max_calibration_error: expected calibration error of the model, a share of 1.
        max_size: of a package's model file, in bytes.
        max_latency: median of a package's runs, in seconds.
        max_memory: peak memory of a package above the runtime's own, in bytes.
        max_fallback: of a package's nodes, and of their multiply-adds, the share that leaves the target's accelerator.
    """

    max_drop: Limit
    undecided: Undecided = "point"
    max_slice_drop: Limit | None = None
    min_agreement: float | None = None
    max_flips: float | None = None
    max_divergence: float | None = None
    max_perplexity_rise: float | None = None
    max_calibration_error: float | None = None
    max_size: float | None = None
    max_latency: float | None = None
    max_memory: float | None = None
    max_fallback: float | None = None

    def __call__(
        self,
        card: "Scorecard",
        size_bytes: int | None = None,
        *,
        slices: "list[Slice] | None" = None,
        calibration: "Calibration | None" = None,
    ) -> Verdict:
        """Judge a scorecard with the slices and the calibration beside it, and the size of a package's model file.

        Raises:
            InputError: a limit is on what this metric has not.
            TypeError: there is a limit on slices or calibration, and they are not given: a fault of ours.
        """
        checks = [self._drop(card), *self._against_teacher(card)]
        if self.max_slice_drop is not None:
            if slices is None:
                raise TypeError("max_slice_drop is set, and no slices were given to the gate")
            from potstill.validate.worst_slice import judge_slices

            checks.append(judge_slices(slices, self.max_slice_drop, strict=self.undecided == "strict"))
        if self.max_calibration_error is not None:
            if calibration is None:
                raise TypeError("max_calibration_error is set, and no calibration was given to the gate")
            checks.append(self._calibration(calibration, self.max_calibration_error))
        if self.max_size is not None and size_bytes is not None:
            checks.append(_cost("max_size", size_bytes, self.max_size, BYTES, "the model file"))
        return verdict_of(checks)

    def with_costs(self, verdict: Verdict, median_ms: float, peak_mb: float | None, where: str) -> Verdict:
        """A package's verdict, with what was measured on a machine: latency in ms, memory in MB (None: unknown)."""
        checks = list(verdict.checks)
        if self.max_latency is not None:
            median = f"the median run on {where}"
            checks.append(_cost("max_latency", median_ms / 1e3, self.max_latency, SECONDS, median))
        if self.max_memory is not None and peak_mb is not None:
            checks.append(_cost("max_memory", peak_mb * 1e6, self.max_memory, BYTES, f"peak memory on {where}"))
        elif self.max_memory is not None:
            told = f"memory cannot be measured on {where}, so max_memory was not checked"
            checks.append(Check("max_memory", "undecided", self.undecided == "point", told))
        return verdict_of(checks)

    def check(self, card: "Scorecard", *, has_classes: bool) -> None:
        """Refuse limits on what a metric or a task has not, before anything is trained.

        Args:
            card: the teacher's own.
            has_classes: whether the task gives one class for each example, and so slices and calibration.

        Raises:
            InputError: a limit cannot be judged.
        """
        for name in ("max_slice_drop", "max_calibration_error"):
            if getattr(self, name) is not None and not has_classes:
                raise InputError(
                    f"gate.{name}: it is of tasks that give one class for each example, and this one is judged by "
                    f"{card.metric}; leave it out"
                )
        list(self._against_teacher(card))

    def _drop(self, card: "Scorecard") -> Check:
        given, interval = self.max_drop, card.difference_interval
        limit = given.of(card.teacher_value)
        told = (
            f"{card.metric} {card.shown(card.value, 2)} against the teacher's {card.shown(card.teacher_value, 2)} on "
            f"{counted(card.examples, 'example')}: "
            f"{signed(card.difference * 100)} points, 95 % interval {signed(interval.low * 100)} to "
            f"{signed(interval.high * 100)}, limit {signed(-limit * 100)}"
        )
        bound = self._bound(card.difference, interval)
        near = nearest(
            "max_drop",
            given.amount_of(-bound, card.teacher_value),
            given.unit,
            lambda tried: bound >= -tried.of(card.teacher_value),
        )
        return self._decide("max_drop", card.examples, card.difference, interval, -limit, told, near)

    def _against_teacher(self, card: "Scorecard") -> Iterator[Check]:
        """The limits on how far a model may be from its teacher, beside the metric."""
        rise = card.perplexity.rise() if card.perplexity else (None, None)
        for name, limit, value, interval, what, unit in (
            ("min_agreement", self.min_agreement, card.agreement, card.agreement_interval, "agreement", "%"),
            ("max_flips", self.max_flips, card.lost_share, card.lost_interval, "flips to wrong", "%"),
            ("max_divergence", self.max_divergence, card.kl_nats, card.kl_interval, "KL", "nats"),
            ("max_perplexity_rise", self.max_perplexity_rise, *rise, "rise in perplexity", "%"),
        ):
            if limit is None:
                continue
            if value is None or interval is None:
                raise InputError(f"gate.{name}: {card.metric} has none; leave it out, or judge by another task")
            yield self._figure(name, card.examples, value, interval, limit, what, unit)

    def _calibration(self, found: "Calibration", limit: float) -> Check:
        """The model's expected calibration error; its interval may lie below the estimate, which must hold it too."""
        side, what = found.model, "expected calibration error"
        examples = sum(one.examples for one in side.bins)
        return self._figure("max_calibration_error", examples, side.ece, side.interval, limit, what, "%")

    def _figure(
        self, name: str, examples: int, value: float, interval: "Interval", limit: float, what: str, unit: str
    ) -> Check:
        """A figure by its interval: a share of 1 or nats, the smaller the better but for `min_…`."""
        scale, digits, space = (100, 2, "") if unit == "%" else (1, 4, " ")
        told = (
            f"{what} {value * scale:.{digits}f}{space}{unit}, 95 % interval {interval.low * scale:.{digits}f} to "
            f"{interval.high * scale:.{digits}f}, limit {limit * scale:g}"
        )
        sign = 1 if name.startswith("min") else -1
        if sign < 0:
            interval = type(interval)(-interval.high, -interval.low)
        bound = self._bound(sign * value, interval)
        near = nearest(name, sign * bound * scale, unit, lambda tried: bound >= sign * tried)
        return self._decide(name, examples, sign * value, interval, sign * limit, told, near)

    def _bound(self, value: float, interval: "Interval") -> float:
        """The largest limit that a value, larger the better, holds: itself, or strictly its interval's lower end."""
        return min(interval.low, value) if self.undecided == "strict" else value

    def _decide(
        self, name: str, examples: int, value: float, interval: "Interval", limit: float, told: str, near: str | None
    ) -> Check:
        """Whether a value, larger the better, holds its limit, by its interval with the value itself."""
        low, high = min(interval.low, value), max(interval.high, value)
        if low >= limit:
            return Check(name, "pass", True, told)
        if high < limit:
            return Check(name, "fail", False, told, nearest=near)
        passed = self._bound(value, interval) >= limit
        more = examples_to_decide(examples, abs(value - limit), value - low if value >= limit else high - value)
        by = "so the estimate decides" if self.undecided == "point" else "and the gate is strict"
        told = f"{told}; undecided, {by} ({ask(more)})"
        return Check(name, "undecided", passed, told, more, None if passed else near)


def _cost(name: str, value: float, limit: float, units: Mapping[str, float], what: str) -> Check:
    """A cost in bytes or seconds, shown in MB or ms."""
    unit = "MB" if units is BYTES else "ms"
    told = f"{what} takes {value / units[unit]:.3g} {unit}, limit {limit / units[unit]:.3g} {unit}"
    if value <= limit:
        return Check(name, "pass", True, told)
    return Check(name, "fail", False, told, nearest=nearest_cost(name, value, units))
