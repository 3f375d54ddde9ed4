"""The limits of a recipe, as text with units: those of its gate and of its searches."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from potstill.validate.errors import InputError
from potstill.validate.gate import Gate, Undecided
from potstill.validate.units import PARSERS, parse_quantity


class GateSpec(BaseModel):
    """What every scorecard must hold, each limit with its unit; those from `max_size` on are for packages alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_drop: str
    undecided: Undecided = "point"
    max_slice_drop: str | None = None
    min_agreement: str | None = None
    max_flips: str | None = None
    max_divergence: str | None = None
    max_perplexity_rise: str | None = None
    max_calibration_error: str | None = None
    max_size: str | None = None
    max_latency: str | None = None
    max_memory: str | None = None
    max_fallback: str | None = None

    @field_validator(*PARSERS, mode="before")
    @classmethod
    def _has_its_unit(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return value  # a wrong type, which the field itself reports
        assert info.field_name
        try:
            PARSERS[info.field_name](str(value))
        except InputError as error:
            raise ValueError(str(error)) from None
        return str(value).strip()

    def build(self) -> Gate:
        """The gate."""
        given = {name: getattr(self, name) for name in PARSERS}
        limits = {name: PARSERS[name](text) for name, text in given.items() if text is not None}
        return Gate(undecided=self.undecided, **limits)


DURATIONS = {"s": 1.0, "min": 60.0, "h": 3600.0}


class _TimeSpec(BaseModel):
    """A time with its unit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    time: str

    @field_validator("time", mode="before")
    @classmethod
    def _has_its_unit(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return value  # a wrong type, which the field itself reports
        try:
            seconds(str(value))
        except InputError as error:
            raise ValueError(str(error)) from None
        return str(value).strip()

    @property
    def seconds(self) -> float:
        """The time in seconds."""
        return seconds(self.time)


class SearchSpec(_TimeSpec):
    """How long repairs and nodes to leave in float may be searched for where a target's gate is missed; 0: not."""

    time: str = "10min"


class EmulateSpec(_TimeSpec):
    """How long each package may run by its target's arithmetic where this machine has another; 0: not."""

    time: str = "10s"


def seconds(text: str) -> float:
    """`90s`, `2min` or `1h` in seconds; 0 without a unit too.

    Raises:
        InputError: it is no time.
    """
    return 0.0 if text.strip() in ("0", "0s", "0min", "0h") else parse_quantity(text, DURATIONS)
