"""What a row of `formats.py` says: whether our file is at or above the best of the others, and if not, why."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potstill.validate.metrics import Interval, bootstrap_mean

MARGIN = 0.03  # by which latency and size may be above the best of the others


@dataclass(frozen=True)
class File:
    """A file that one side made.

    Attributes:
        side: who made it.
        right: of each evaluation example, whether it is classified right (N,).
        ms: median latency.
        size: bytes.
    """

    side: str
    right: NDArray[np.bool_]
    ms: float
    size: int

    @property
    def accuracy(self) -> float:
        """The share that is right."""
        return float(self.right.mean())


@dataclass(frozen=True)
class Verdict:
    """Whether ours holds in accuracy, latency and size, None where nothing was compared; and a sentence on each."""

    accuracy: bool | None
    latency: bool | None
    size: bool | None
    said: tuple[str, ...]


def gain(ours: File, theirs: File) -> Interval:
    """95 % interval of our accuracy less theirs, by the paired bootstrap over examples."""
    return bootstrap_mean(ours.right.astype(np.float64) - theirs.right.astype(np.float64))


def verdict(ours: File, others: Sequence[File], source: File | None = None) -> Verdict:
    """Ours against the best of the others; `source` is the float graph, which says whether a better file is luck.

    Accuracy: against none of them is the interval of the difference below 0. Latency and size: at
    most `MARGIN` above the least of the files that are not less accurate than ours beyond chance; one that is less
    accurate is no equal, and is told of.
    """
    if not others:
        return Verdict(None, None, None, ("not compared: no other side made a file that runs",))
    best = max(others, key=lambda one: one.accuracy)
    above = [one for one in others if gain(ours, one).high < 0]
    if held := not above:
        accuracy = f"accuracy holds: {_told(ours, best)}, the most accurate of the others"
    else:
        accuracy = f"accuracy is below: {'; '.join(_told(ours, one) + _lucky(one, source) for one in above)}"
    rivals = [one for one in others if gain(ours, one).low <= 0]
    fast, latency = _least("latency", ours, others, rivals)
    small, size = _least("size", ours, others, rivals)
    return Verdict(held, fast, small, (accuracy, latency, size))


def _told(ours: File, theirs: File) -> str:
    """The difference in accuracy to another file."""
    found, difference = gain(ours, theirs), 100 * (ours.accuracy - theirs.accuracy)
    return f"{difference:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}] against {theirs.side}"


def _lucky(theirs: File, source: File | None) -> str:
    """A word on a file that is more accurate than the float graph that it was made of."""
    if source is None or theirs.accuracy <= source.accuracy:
        return ""
    return (
        f", whose rounding lifts it {100 * (theirs.accuracy - source.accuracy):.1f} points above the float graph itself"
    )


MEASURES: dict[str, tuple[Callable[[File], float], str]] = {
    "latency": (lambda one: one.ms, "ms"),
    "size": (lambda one: one.size / 1e6, "MB"),
}


def _least(what: str, ours: File, others: Sequence[File], rivals: Sequence[File]) -> tuple[bool, str]:
    """Whether ours is within the margin of the least of its rivals, and what there is to say."""
    (of, unit), (of_other, other) = (MEASURES[one] for one in (what, *(MEASURES.keys() - {what})))
    lower = [one for one in others if one not in rivals and of(ours) > (1 + MARGIN) * of(one)]
    worse = "".join(
        f"; {one.side} has {of(one):.3g} {unit} and {100 * (ours.accuracy - one.accuracy):.1f} points less accuracy"
        for one in lower
    )
    if not rivals:
        return True, f"{what} holds: all others are less accurate beyond chance{worse}"
    best = min(rivals, key=of)
    told = f"{of(ours):.3g} {unit}, {of(ours) / of(best):.2f} × {best.side}"
    if of(ours) <= (1 + MARGIN) * of(best):
        return True, f"{what} holds: {told}{worse}"
    lost = gain(ours, best)
    equal = f"as accurate as ours within chance ([{100 * lost.low:+.1f}, {100 * lost.high:+.1f}] points)"
    beside = f"which has {of_other(best):.3g} {other}, {of_other(best) / of_other(ours):.2f} × ours"
    return False, f"{what} is above: {told}, {equal}, {beside}{worse}"
