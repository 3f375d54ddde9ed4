"""The limits of a recipe's gate, as text with units."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from potstill.validate.errors import InputError
from potstill.validate.gate import BYTES, NATS, SECONDS, SHARE, Gate, Undecided, parse_limit, parse_quantity


def _with_unit(parse: Callable[[str], Any]) -> BeforeValidator:
    """Text that a parser of limits takes."""

    def checked(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return value  # a wrong type, which the field itself reports
        try:
            parse(str(value))
        except InputError as error:
            raise ValueError(str(error)) from None
        return str(value).strip()

    return BeforeValidator(checked)


Share = Annotated[str, _with_unit(partial(parse_quantity, units=SHARE))]
Nats = Annotated[str, _with_unit(partial(parse_quantity, units=NATS))]
Bytes = Annotated[str, _with_unit(partial(parse_quantity, units=BYTES))]
Seconds = Annotated[str, _with_unit(partial(parse_quantity, units=SECONDS))]


class GateSpec(BaseModel):
    """What every scorecard must hold, each limit with its unit; those from `max_size` on are for packages alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_drop: Annotated[str, _with_unit(parse_limit)]
    undecided: Undecided = "point"
    min_agreement: Share | None = None
    max_flips: Share | None = None
    max_divergence: Nats | None = None
    max_size: Bytes | None = None
    max_latency: Seconds | None = None
    max_memory: Bytes | None = None

    def build(self) -> Gate:
        """The gate."""
        of = {"min_agreement": SHARE, "max_flips": SHARE, "max_divergence": NATS}
        of |= {"max_size": BYTES, "max_memory": BYTES, "max_latency": SECONDS}
        given = {name: getattr(self, name) for name in of if getattr(self, name) is not None}
        limits = {name: parse_quantity(text, of[name]) for name, text in given.items()}
        return Gate(parse_limit(self.max_drop), self.undecided, **limits)
