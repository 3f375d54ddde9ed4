"""The limit on the worst slice: one test over many slices.

The limit is held where the interval of every slice holds it: an intersection–union test, which needs no correction
for the number of slices (Berger 1982, "Multiparameter hypothesis testing and acceptance sampling"). It is missed where
that of one slice does not reach it, at a level corrected for their number (Bonferroni; the first step of Holm 1979).
"""

from collections.abc import Callable
from dataclasses import dataclass

from potstill.validate.metrics import CONFIDENCE, Interval, paired_difference
from potstill.validate.slices import LEAST_TESTED, Slice
from potstill.validate.units import Limit, counted, nearest, signed
from potstill.validate.verdict import Check, ask, examples_to_decide

NAME = "max_slice_drop"


@dataclass(frozen=True)
class _Tested:
    """A slice, and its difference's interval at the level corrected for several slices."""

    slice: Slice
    corrected: Interval

    def lower(self) -> float:
        """The lower end of its own 95 % interval."""
        return self.slice.interval.low

    def estimate(self) -> float:
        """Its difference as measured."""
        return self.slice.difference

    def upper(self) -> float:
        """The upper end of the corrected interval."""
        return self.corrected.high


@dataclass(frozen=True)
class _Test:
    """All tested slices and their limit."""

    tested: list[_Tested]
    limit: Limit
    strict: bool

    @property
    def sure(self) -> list[_Tested]:
        """Those that lost more than chance explains, among as many slices."""
        return [one for one in self.tested if one.upper() < 0]

    def passes(self, limit: Limit) -> bool:
        """Whether a limit lets the model pass: strictly by all intervals, else by the estimates of the sure losses."""
        if self.strict:
            return all(_margin(one, _Tested.lower, limit) >= 0 for one in self.tested)
        return all(_margin(one, _Tested.estimate, limit) >= 0 for one in self.sure)

    def nearest(self) -> str | None:
        """The tightest round limit that lets the model pass."""
        ends = [(one.lower(), one) for one in self.tested] if self.strict else [(o.estimate(), o) for o in self.sure]
        at = max(self.limit.amount_of(-end, one.slice.teacher_accuracy) for end, one in ends)
        return nearest(NAME, at, self.limit.unit, self.passes)

    def worst(self, by: Callable[[_Tested], float], among: list[_Tested] | None = None) -> tuple[_Tested, float]:
        """The slice that is the least above the limit, by one of its figures, and how far."""
        one = min(among or self.tested, key=lambda one: _margin(one, by, self.limit))
        return one, _margin(one, by, self.limit)

    def told(self, tested: _Tested, what: str = "worst") -> str:
        """The figures of a slice."""
        one = tested.slice
        return (
            f"{what} of {counted(len(self.tested), 'slice')}: {_name(one)}, {one.accuracy * 100:.2f}% against the "
            f"teacher's {one.teacher_accuracy * 100:.2f}% on {counted(one.examples, 'example')}: "
            f"{signed(one.difference * 100)} points, 95 % interval {signed(one.interval.low * 100)} to "
            f"{signed(one.interval.high * 100)}, limit {signed(-self.limit.of(one.teacher_accuracy) * 100)}"
        )


def judge_slices(slices: list[Slice], limit: Limit, *, strict: bool) -> Check:
    """Whether every slice of at least 10 examples holds a limit on its drop of accuracy.

    Undecided, a strict gate lets nothing pass. Else the estimates decide, but only those of slices that lost more than
    chance explains: the worst of many estimates is far below the truth by noise alone.
    """
    known = [one for one in slices if one.p is not None]
    left = len(slices) - len(known)
    if not known:
        told = f"none of {counted(left, 'slice')} has {LEAST_TESTED} examples, so {NAME} was not checked"
        return Check(NAME, "undecided", not strict, told)
    level = 1 - (1 - CONFIDENCE) / len(known)
    corrected = [paired_difference(one.lost, one.gained, one.examples, level) for one in known]
    test = _Test([_Tested(*one) for one in zip(known, corrected, strict=True)], limit, strict)
    note = f"; {left} of fewer than {LEAST_TESTED} examples not tested" if left else ""
    failing, above = test.worst(_Tested.upper)
    if above < 0:
        ends = f"{signed(failing.corrected.low * 100)} to {signed(failing.upper() * 100)}"
        told = f"{test.told(failing)}, corrected for {counted(len(known), 'slice')} {ends}{note}"
        return Check(NAME, "fail", False, told, nearest=test.nearest())
    if test.worst(_Tested.lower)[1] >= 0:
        return Check(NAME, "pass", True, test.told(test.worst(_Tested.estimate)[0]) + note)
    return _undecided(test, note)


def _undecided(test: _Test, note: str) -> Check:
    """Where neither all slices hold the limit nor one surely misses it."""
    passed = test.passes(test.limit)
    named, above = test.worst(_Tested.estimate, None if passed or test.strict else test.sure)
    what, arm = "worst", named.upper() - named.estimate()
    if above >= 0:  # all estimates hold it: the slice that is the least sure keeps it undecided
        named = test.worst(_Tested.lower)[0]
        what, arm = "least sure", named.estimate() - named.lower()
    gap = abs(_margin(named, _Tested.estimate, test.limit))
    by = "and the gate is strict" if test.strict else "so the estimates decide"
    if passed and above < 0:
        by = "and no more than chance explains among as many slices, so it passes"
    more = examples_to_decide(named.slice.examples, gap, arm)
    asked = ask(more, f"examples of {_name(named.slice)}")
    told = f"{test.told(named, what)}{note}; undecided, {by} ({asked})"
    return Check(NAME, "undecided", passed, told, more, None if passed else test.nearest())


def _margin(one: _Tested, by: Callable[[_Tested], float], limit: Limit) -> float:
    """How far a figure of a slice is above the limit; below 0 where it misses it."""
    return by(one) + limit.of(one.slice.teacher_accuracy)


def _name(one: Slice) -> str:
    return f"{one.by} ‘{one.value}’"
