"""The limits of a gate as text with units, and the nearest text that a figure holds."""

import math
import re
from collections.abc import Callable, Mapping
from decimal import ROUND_CEILING, Decimal
from functools import partial
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from potstill.validate.errors import InputError

SHARE: Mapping[str, float] = {"%": 0.01}
RISE: Mapping[str, float] = {"%": 0.01}  # may be above 100 %
NATS: Mapping[str, float] = {"nats": 1.0}
BYTES: Mapping[str, float] = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
SECONDS: Mapping[str, float] = {"ms": 1e-3, "s": 1.0}

_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"
_LIMIT = re.compile(rf"^\s*{_NUMBER}\s*(pp|%)\s*$")


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign: `+0.50`, `−1.20`, `0.00`."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if text.strip("+−0.") else text[1:]


def counted(count: int, noun: str) -> str:
    """A number of things: `1 example`, `2,000 examples`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


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

    def amount_of(self, lost: float, teacher_value: float) -> float:
        """The amount of this unit that a loss is, a share of 1; infinite where the teacher has nothing to lose."""
        if self.unit == "pp":
            return lost * 100
        return lost / teacher_value * 100 if teacher_value > 0 else math.inf


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


def parse_quantity(text: str, units: Mapping[str, float], *, zero: bool = False) -> float:
    """A number with one of some units: `97%`, `0.05nats`, `20MB`, `30ms`, as shares of 1, nats, bytes or seconds.

    Raises:
        InputError: it has no such unit, is no number above 0 (with `zero`: from 0 on), or is a share above 100 %.
    """
    found = re.match(rf"^\s*{_NUMBER}\s*({'|'.join(units)})\s*$", str(text))
    if not found or not (float(found[1]) or zero):
        example = " or ".join(f"{20 if unit != 'nats' else 0.1:g}{unit}" for unit in units)
        least = "from 0 on" if zero else "above 0"
        raise InputError(f"{text!r} is not a limit here; write a number {least} with its unit, like {example}")
    value = float(found[1]) * units[found[2]]
    if units is SHARE and value > 1:
        raise InputError(f"{text!r} is more than all")
    return value


PARSERS: Mapping[str, Callable[[str], Any]] = {  # each limit of a gate, by the units that it takes
    "max_drop": parse_limit,
    "max_slice_drop": parse_limit,
    "min_agreement": partial(parse_quantity, units=SHARE),
    "max_flips": partial(parse_quantity, units=SHARE),
    "max_divergence": partial(parse_quantity, units=NATS),
    "max_perplexity_rise": partial(parse_quantity, units=RISE),
    "max_calibration_error": partial(parse_quantity, units=SHARE),
    "max_size": partial(parse_quantity, units=BYTES),
    "max_latency": partial(parse_quantity, units=SECONDS),
    "max_memory": partial(parse_quantity, units=BYTES),
    "max_fallback": partial(parse_quantity, units=SHARE, zero=True),
}


def nearest(name: str, at: float, unit: str, holds: Callable[[Any], bool]) -> str | None:
    """The tightest round limit that a figure holds, as a recipe says it; None where no limit is wide enough.

    It has two digits of the figure, and whole units from 100 on; of a share that is to be reached, two digits of what
    is missing to 100 %.

    Args:
        name: of the limit.
        at: the figure that decides, in `unit`.
        unit: of the text.
        holds: whether the figure holds a limit, as `PARSERS` gives it.
    """
    whole = Decimal(100 if name.startswith("min") else 0)
    gap = abs(float(whole) - at)
    if not math.isfinite(gap):
        return None
    step = Decimal(1).scaleb(min(0, math.floor(math.log10(gap)) - 1)) if gap else Decimal(1)
    first = (Decimal(gap) / step).to_integral_value(ROUND_CEILING)
    for count in (first - 1, first, first + 1):  # binary fractions may lie just beside the decimal one
        text = f"{abs(whole - count * step).normalize():f}{unit}"
        try:
            limit = PARSERS[name](text)
        except InputError:
            continue
        if holds(limit):
            return text
    return None


def nearest_cost(name: str, value: float, units: Mapping[str, float]) -> str | None:
    """`nearest` for a cost in bytes or seconds, in the largest of its units that is no larger than it."""
    smallest, *larger = sorted(units, key=lambda one: units[one])
    unit = next((one for one in reversed(larger) if units[one] <= value), smallest)
    return nearest(name, value / units[unit], unit, lambda limit: value <= limit)
