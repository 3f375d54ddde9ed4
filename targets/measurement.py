"""What a package costs on a device. Times are in ms, memory and sizes in MB (10^6 bytes), shares in [0, 1]."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from scipy.stats import binom

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class Where:
    """The machine that ran; `cores` are logical."""

    system: str
    arch: str
    cpu: str
    cores: int


@dataclass(frozen=True, config=_STRICT)
class Operator:
    """One operator type on one provider: its nodes after fusion and its share of the time of a run."""

    operator: str
    provider: str
    count: int
    share: float


@dataclass(frozen=True, config=_STRICT)
class Measurement:
    """One package, timed on one device.

    `load_ms` is the creation of the session, from disk where `page_cache_dropped`. `first_run_ms` comes before the
    warm-up. `min_ms`, `median_ms` and `p90_ms` are over `runs` calls of `session.run` on one input.
    `peak_memory_mb` is above `baseline_mb`, the process after its imports; None where the device cannot say.
    `provider_nodes` counts nodes as assigned, before fusion; `operators` come from a second, profiled session.
    """

    kind: Literal["measured"]
    package: str
    where: Where
    providers: list[str]
    missing_providers: list[str]
    provider_nodes: dict[str, int]
    threads: int
    warmup: int
    runs: int
    load_ms: float
    page_cache_dropped: bool
    first_run_ms: float
    min_ms: float
    median_ms: float
    p90_ms: float
    peak_memory_mb: float | None
    baseline_mb: float
    memory_method: str
    file_mb: float
    inputs: dict[str, str]
    operators: list[Operator]
    unattributed_share: float | None
    versions: dict[str, str]
    times_ms: list[float] = field(default_factory=list, repr=False)

    def to_json(self) -> dict[str, Any]:
        """A JSON value of all but the single times."""
        value = asdict(self)
        del value["times_ms"]
        return value


@dataclass(frozen=True, config=_STRICT)
class Timing:
    """One package of a comparison.

    `ratio` is the median over the rounds of its time by the first package's: above 1 is slower. `ratio_low` and
    `ratio_high` hold that median with 95 % confidence; None with fewer than 6 rounds.
    """

    package: str
    providers: list[str]
    missing_providers: list[str]
    median_ms: float
    ratio: float
    ratio_low: float | None
    ratio_high: float | None


@dataclass(frozen=True, config=_STRICT)
class Comparison:
    """Packages timed in turns in one process, `runs` rounds of one timed run each; the first is the reference."""

    kind: Literal["measured"]
    where: Where
    threads: int
    warmup: int
    runs: int
    packages: list[Timing]
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """A JSON value of all fields."""
        return asdict(self)


def from_agent(reply: Mapping[str, Any], *, package: str, file_mb: float, inputs: Mapping[str, str]) -> Measurement:
    """The measurement in an agent's reply for one model; `inputs` maps a name to text such as "int64 1×23"."""
    result = reply["models"][0]
    times = result["times_ms"]
    known = result["memory_method"] != "unavailable"
    return Measurement(
        kind="measured",
        package=package,
        where=Where(**reply["machine"]),
        **{key: result[key] for key in ("providers", "missing_providers", "load_ms", "page_cache_dropped")},
        provider_nodes=result.get("provider_nodes", {}),
        threads=reply["threads"],
        warmup=reply["warmup"],
        runs=len(times),
        first_run_ms=result["first_run_ms"],
        min_ms=min(times),
        median_ms=float(np.median(times)),
        p90_ms=float(np.percentile(times, 90)),
        peak_memory_mb=result["peak_memory_mb"] if known else None,
        baseline_mb=result["baseline_mb"],
        memory_method=result["memory_method"],
        file_mb=file_mb,
        inputs=dict(inputs),
        operators=[Operator(**row) for row in result.get("operators", [])],
        unattributed_share=result.get("unattributed_share"),
        versions=reply["versions"],
        times_ms=times,
    )


def medians(reply: Mapping[str, Any]) -> list[float]:
    """The median time of each model in an agent's reply, in ms, in the order of the request."""
    return [float(np.median(result["times_ms"])) for result in reply["models"]]


def compared(reply: Mapping[str, Any], packages: Sequence[str]) -> Comparison:
    """The comparison in an agent's reply for several models, whose packages are named in the same order."""
    first = reply["models"][0]["times_ms"]
    rows = []
    for package, result, median_ms in zip(packages, reply["models"], medians(reply), strict=True):
        ratios = np.asarray(result["times_ms"]) / np.asarray(first)
        low, high = median_interval(ratios.tolist()) or (None, None)
        rows.append(
            Timing(
                package=package,
                providers=result["providers"],
                missing_providers=result["missing_providers"],
                median_ms=median_ms,
                ratio=float(np.median(ratios)),
                ratio_low=low,
                ratio_high=high,
            )
        )
    return Comparison(
        kind="measured",
        where=Where(**reply["machine"]),
        threads=reply["threads"],
        warmup=reply["warmup"],
        runs=len(first),
        packages=rows,
        versions=reply["versions"],
    )


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Two of the values that hold the population's median with at least 95 % confidence; None below 6 values.

    It assumes independent values and no distribution. Source: the sign test's interval, Conover, Practical
    Nonparametric Statistics, 3.2.
    """
    if len(values) < 6:
        return None
    rank = int(binom.ppf(0.025, len(values), 0.5))  # of the lower end, counted from 1
    ordered = sorted(values)
    return ordered[rank - 1], ordered[-rank]
