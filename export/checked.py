"""Where a package was checked: on this machine, and by its target's arithmetic where that is another."""

from dataclasses import replace
from importlib import resources
from typing import Any

import yaml
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from potstill.targets.host import here, runs_here
from potstill.targets.target import Target
from potstill.validate.metrics import Interval
from potstill.validate.scorecard import Scorecard
from potstill.validate.session import CPU
from potstill.validate.units import counted, signed


@dataclass(frozen=True)
class Tolerance:
    """How far the same file may be apart on two CPUs by rounding alone.

    Attributes:
        largest: the largest difference of an example's outputs, as a share of its largest output.
        sqnr_db: the least ratio of the power of the outputs to that of their differences, over many examples, in dB.
    """

    largest: float
    sqnr_db: float


def tolerance(method: str) -> Tolerance:
    """That of a scheme's method; measured, the file says where."""
    text = resources.files("potstill.export").joinpath("tolerances.yaml").read_text(encoding="utf-8")
    return TypeAdapter(Tolerance).validate_python(yaml.safe_load(text)[method])


@dataclass(frozen=True)
class Emulated:
    """A package's file by its target's arithmetic, emulated, on examples of the evaluation set drawn by seed.

    Attributes:
        cpu: what was emulated, e.g. `Haswell`.
        emulator: by which program.
        examples: that were run.
        of: examples of the evaluation set.
        scorecard: of them, against the teacher.
        apart: the same rows against this machine's own, which stand in the teacher's place.
        sqnr_db: between this machine's outputs and the differences there; None where there are none.
        least_db: what rounding alone leaves of it at least.
        seconds: that it took.
    """

    cpu: str
    emulator: str
    examples: int
    of: int
    scorecard: Scorecard
    apart: Scorecard
    sqnr_db: float | None
    least_db: float
    seconds: float

    @property
    def differs(self) -> bool:
        """Whether it computes otherwise there than by rounding: by its outputs, or by the metric beyond chance."""
        return (self.sqnr_db is not None and self.sqnr_db < self.least_db) or self.apart.difference_interval.high < 0

    def in_words(self) -> str:
        """What was run, and whether it computed the same."""
        card = self.apart
        were = "was" if self.examples == 1 else "were"
        ran = (
            f"{self.examples:,} of {counted(self.of, 'evaluation example')} {were} run as {self.cpu} by {self.emulator}"
        )
        if self.sqnr_db is None:
            noise = "the same outputs as here"
        else:
            noise = (
                f"outputs {self.sqnr_db:.0f} dB above their differences from those here (below {self.least_db:.0f} dB "
                "is more than rounding)"
            )
        low, middle, high = (
            signed(one * 100, 1)
            for one in (card.difference_interval.low, card.difference, card.difference_interval.high)
        )
        metric = (
            f"{card.metric} {card.shown(card.value)} there and {card.shown(card.teacher_value)} here ({middle} points, "
            f"95 % interval {low} to {high})"
        )
        verdict = ": this file computes otherwise on its target" if self.differs else ""
        return f"{ran}: {noise}, {metric}{verdict}."


@dataclass(frozen=True)
class NotEmulated:
    """No figures by the target's arithmetic: why, and whether it is the file that broke off there."""

    why: str
    crashed: bool = False

    def in_words(self) -> str:
        """One sentence."""
        if self.crashed:
            return (
                f"By its target's arithmetic it does not run: {self.why}; run its golden samples on a device, whose "
                "CPU may have what its emulator lacks."
            )
        return f"It was not checked by its target's arithmetic: {self.why}."


def checked(target: Target, found: Emulated | NotEmulated | None = None) -> dict[str, Any]:
    """For a manifest: where the scorecard was made, whether that computes as the target does, and what was emulated.

    `where` is `this machine`, `emulated`, `crashed` (emulated, and it ended without an answer) or `not checked`.

    Args:
        target: of the package.
        found: what came of it by its target's arithmetic; None where nothing was tried.
    """
    same, note = runs_here(target)
    if found is None and not same:
        found = NotEmulated("that is done in a run")
    emulated = found if isinstance(found, Emulated) else None
    crashed = isinstance(found, NotEmulated) and found.crashed
    note = f"{note} {found.in_words()}" if found else note
    plain = TypeAdapter(Emulated).dump_python(emulated, mode="json") if emulated else None
    where = "this machine" if same else "emulated" if emulated else "crashed" if crashed else "not checked"
    return {
        "provider": CPU,
        "machine": here().cpu,
        "as_target": same,
        "where": where,
        "emulated": plain,
        "note": note,
    }


def emulated_from(checked: dict[str, Any]) -> Emulated | None:
    """What was emulated, of a manifest's `checked`."""
    found = checked.get("emulated")
    return TypeAdapter(Emulated).validate_python(found) if found else None


def as_on_target(card: Scorecard, emulated: Emulated) -> Scorecard:
    """The scorecard of a file by its target's arithmetic, from all examples here and some of them emulated.

    Where all were emulated it is simply theirs. Else the metric and its difference to the teacher are those of all
    examples here, moved by what emulation changed on its examples (the difference estimator of double sampling:
    Cochran 1977, "Sampling techniques", 12.9); the ends of both intervals are added, which covers their sum however the
    two errors are correlated. What passes the ends of the metric's range (0 to 1, a correlation −1 to 1) stays at them.
    Agreement, flips and divergence are those of the emulated examples.
    """
    if emulated.examples == emulated.of:
        return emulated.scorecard
    moved, by = emulated.apart.difference, emulated.apart.difference_interval

    least, most = -1.0 if card.correlation else 0.0, 1.0
    value = min(max(card.value + moved, least), most)
    difference = value - card.teacher_value

    def wider(one: Interval, middle: float, least: float, most: float) -> Interval:
        return Interval(max(least, min(middle, one.low + by.low)), min(most, max(middle, one.high + by.high)))

    return replace(
        emulated.scorecard,
        value=value,
        interval=wider(card.interval, value, least, most),
        teacher_value=card.teacher_value,
        difference=difference,
        difference_interval=wider(card.difference_interval, difference, least - most, most - least),
    )
