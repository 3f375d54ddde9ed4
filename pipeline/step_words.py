"""What the report and the terminal say of each step alone, and of other examples than those of the evaluation set."""

from collections.abc import Sequence

from potstill.pipeline.ledger import Entry, Ledger
from potstill.validate.metrics import Interval, detectable, holm
from potstill.validate.shift import Shift
from potstill.validate.slices import SURE
from potstill.validate.units import signed


def interval_places(ends: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Where each interval begins, its difference is and its interval ends, the farthest end of all at ±1."""
    most = max((max(abs(low), abs(high)) for low, _, high in ends), default=0) or 1.0
    return [(low / most, at / most, high / most) for low, at, high in ends]


def ends_of(difference: float, interval: Interval) -> tuple[float, float, float]:
    """An interval with its difference in the middle."""
    return interval.low, difference, interval.high


def alone_in_words(entry: Entry) -> str:
    """What a step alone cost: `lost`, `gained`, or nothing measurable, with the smallest loss that would have shown."""
    assert entry.step
    change, interval = entry.step.difference, entry.step.difference_interval
    if interval.high < 0 or interval.low > 0:
        return f"{'lost' if change < 0 else 'gained'} {abs(change) * 100:.2f} points"
    seen = detectable(interval) * 100
    return f"lost nothing measurable; a loss of {seen:.2f} points would have shown four times in five"


def split_in_words(ledger: Ledger) -> str | None:
    """What each step alone cost, in one sentence; None where there is but one."""
    steps = [(entry, entry.step) for entry in ledger.entries if entry.step]
    if len(steps) < 2:
        return None
    told = []
    for entry, step in steps:
        interval = step.difference_interval
        unseen = interval.low <= 0 <= interval.high
        told.append(f"{entry.name} {signed(step.difference * 100)}" + (" (not measurable)" if unseen else ""))
    return f"Each step alone, in points of {steps[0][1].metric}: {', '.join(told)}"


def shifted_entries(ledger: Ledger) -> list[Entry]:
    """The entries whose other sets are shown: the last stage and each package."""
    stages = [entry for entry in ledger.entries if entry.kind == "stage"]
    packages = [entry for entry in ledger.entries if entry.kind == "package"]
    return [entry for entry in (*stages[-1:], *packages) if entry.shifts]


def fragile_in_words(shifts: Sequence[Shift]) -> str | None:
    """Which perturbations cost the model more than its teacher, corrected by Holm for all of them; None without any."""
    tested = [(one, one.change, one.interval) for one in shifts if one.change is not None and one.interval]
    if not tested:
        return None
    sure = holm([one.p if one.p is not None else 1.0 for one, *_ in tested])
    told = [
        f"{one.what} ({signed(change * 100)} points, 95 % interval {signed(interval.low * 100)} to "
        f"{signed(interval.high * 100)})"
        for (one, change, interval), p in zip(tested, sure, strict=True)
        if p < SURE and change < 0
    ]
    if told:
        return f"More fragile than the teacher under {'; '.join(told)}."
    least = max(detectable(interval) for _, _, interval in tested) * 100
    return (
        f"Not measurably more fragile than the teacher under {' or '.join(one.what for one, *_ in tested)}; a further "
        f"{least:.2f} points would have shown four times in five."
    )
