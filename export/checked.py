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
from potstill.validate.units import signed


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
        ran = f"{self.examples:,} of {self.of:,} evaluation examples were run as {self.cpu} by {self.emulator}"
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


def checked(target: Target, emulated: Emulated | None = None, why_not: str | None = None) -> dict[str, Any]:
    """For a manifest: where the scorecard was made, whether that computes as the target does, and what was emulated.

    Args:
        target: of the package.
        emulated: what was run by its target's arithmetic.
        why_not: nothing was; why, and what to do.
    """
    same, note = runs_here(target)
    if emulated:
        note = f"{note} {emulated.in_words()}"
    elif not same:
        note = f"{note} It was not checked by its target's arithmetic: {why_not or 'that is done in a run'}."
    plain = TypeAdapter(Emulated).dump_python(emulated, mode="json") if emulated else None
    where = "this machine" if same else "emulated" if emulated else "not checked"
    return {
        "provider": "CPUExecutionProvider",
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
    two errors are correlated. Agreement, flips and divergence are those of the emulated examples.
    """
    if emulated.examples == emulated.of:
        return emulated.scorecard
    moved, by = emulated.apart.difference, emulated.apart.difference_interval

    def wider(one: Interval) -> Interval:
        return Interval(one.low + by.low, one.high + by.high)

    return replace(
        emulated.scorecard,
        value=card.value + moved,
        interval=wider(card.interval),
        teacher_value=card.teacher_value,
        difference=card.difference + moved,
        difference_interval=wider(card.difference_interval),
    )
