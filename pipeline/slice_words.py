"""What the report says of slices and calibration."""

from collections.abc import Sequence

from potstill.pipeline.ledger import Entry, Ledger
from potstill.validate.slices import LEAST_TESTED, Slice
from potstill.validate.units import counted, signed


def examined(ledger: Ledger) -> list[Entry]:
    """The entries whose slices and calibration are shown: the last stage and each package."""
    stages = [entry for entry in ledger.entries if entry.kind == "stage"]
    packages = [entry for entry in ledger.entries if entry.kind == "package"]
    return [entry for entry in (*stages[-1:], *packages) if entry.slices and entry.calibration]


def named(one: Slice) -> str:
    """A slice by its name: `class owl`, `length: lowest third, 1 to 12 characters`."""
    return f"{one.by}{':' if ' ' in one.value else ''} {one.value}"


def p_in_words(p: float) -> str:
    """`0.012`, or `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def gaps_in_words(slices: Sequence[Slice]) -> str:
    """Which slices' gap to the rest widened by more than chance explains, or that none did; and what was not tested."""
    tested = [one for one in slices if one.gap]
    wider = [(one, one.gap) for one in tested if one.gap and one.gap.widened]
    told = [
        f"{named(one)} (in the teacher {signed(gap.teacher * 100)} points, here {signed(gap.model * 100)}; "
        f"p {p_in_words(gap.p_holm)})"
        for one, gap in wider
    ]
    if told:
        first = f"The gap to the rest widened by more than chance explains for {len(told)} of "
        first += f"{counted(len(tested), 'slice')}: {'; '.join(told)}."
    elif tested:
        first = f"No slice’s gap to the rest widened by more than chance explains, of {len(tested)} tested."
    else:
        first = "No slice and its rest are large enough to compare their gap."
    small = sum(one.p is None for one in slices)
    have = "slice has" if small == 1 else "slices have"
    return first + (f" {small} {have} fewer than {LEAST_TESTED} examples: shown, not tested." if small else "")
