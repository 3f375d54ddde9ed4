"""What a package may cost on a device: limits with units, as a gate."""

from collections.abc import Mapping, Sequence

from potstill.targets.measurement import Measurement
from potstill.validate.errors import InputError, did_you_mean
from potstill.validate.units import BYTES, SECONDS, parse_quantity
from potstill.validate.verdict import Check, Verdict, verdict_of

BUDGETS: Mapping[str, tuple[str, float, Mapping[str, float], str]] = {  # by field, what one of it is in s or bytes
    "latency_min": ("min_ms", 1e-3, SECONDS, "ms"),
    "latency_median": ("median_ms", 1e-3, SECONDS, "ms"),
    "latency_p90": ("p90_ms", 1e-3, SECONDS, "ms"),
    "latency_p99": ("p99_ms", 1e-3, SECONDS, "ms"),
    "first_run": ("first_run_ms", 1e-3, SECONDS, "ms"),
    "load": ("load_ms", 1e-3, SECONDS, "ms"),
    "peak_memory": ("peak_memory_mb", 1e6, BYTES, "MB"),
    "size": ("file_mb", 1e6, BYTES, "MB"),
}


def parse_budget(texts: Sequence[str]) -> dict[str, float]:
    """`latency_p90=20ms` and more: the most of each, in seconds or bytes.

    Raises:
        InputError: a name is not known, given twice, or its limit has no unit.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, _, limit = (part.strip() for part in text.partition("="))
        if name not in BUDGETS:
            raise InputError(f"no budget is called {name!r}{did_you_mean(name, list(BUDGETS))}")
        if name in found:
            raise InputError(f"the budget {name} is given twice; give it once")
        try:
            found[name] = parse_quantity(limit, BUDGETS[name][2])
        except InputError as error:
            raise InputError(f"the budget {name}: {error}") from None
    return found


def within(budget: Mapping[str, float], measurement: Measurement) -> Verdict:
    """Whether a package holds a budget, as `parse_budget` gives it, not empty.

    An emulated time is no latency, and what the device does not say holds no limit: both are undecided and stop it.
    """
    return verdict_of([_check(name, most, measurement) for name, most in budget.items()])


def _check(name: str, most: float, measurement: Measurement) -> Check:
    field, one, units, unit = BUDGETS[name]
    value: float | None = getattr(measurement, field)
    what, limit = name.replace("_", " "), f"{most / one:g} {unit}"
    if measurement.kind != "measured" and units is SECONDS:
        reason = f"{what}: the times of {measurement.device} are emulated and say nothing of the {limit} allowed"
        return Check(name, "undecided", False, reason)
    if value is None:
        return Check(name, "undecided", False, f"{what}: {measurement.device} does not say; {limit} are allowed")
    held = value * one <= most
    reason = f"{what} {value:.4g} {unit} on {measurement.device}, {limit} allowed"
    return Check(name, "pass" if held else "fail", held, reason)
