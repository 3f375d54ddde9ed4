"""What a package costs on a device. Times are in ms, memory and sizes in MB (10^6 bytes), shares in [0, 1]."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from typing import Any

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from potstill.targets.device import Device, Kind
from potstill.targets.modules import Module
from potstill.targets.operators import Node, Operator, Profile
from potstill.targets.request import Package
from potstill.targets.version import check_version

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class Where:
    """The machine that ran; `cores` are logical.

    `name` is that in its network, and of a phone its serial number; None of an emulated CPU, which is the same
    everywhere, and of a browser that came by itself.
    """

    system: str
    arch: str
    cpu: str
    cores: int
    name: str | None = None


@dataclass(frozen=True, config=_STRICT)
class Instructions:
    """Instructions that an emulated CPU ran, counted one by one; they are no time.

    `spread` is the range over the timed runs as a share of their `median`. About 45,000 of each run are the
    call from Python.
    """

    load: int
    first_run: int
    median: float
    spread: float


@dataclass(frozen=True, config=_STRICT)
class Written:
    """What a language model's package costs where it writes, by plain ONNX Runtime: medians of `rounds`.

    `first_token_ms` is the time that a prompt of `prompt` tokens takes; then `tokens` are written one by one.
    `past_mb_per_1k` is what keys and values take for a thousand tokens of context, in MB. `read_gb_s` is how fast as
    many threads read memory there, in 10^9 bytes a second; `of_bandwidth`, the share of it that decoding reaches, if
    each token reads every constant once but those that are only looked up by row. Above 1, caches held them.
    """

    prompt: int
    tokens: int
    rounds: int
    first_token_ms: float
    prompt_tokens_per_s: float
    decode_tokens_per_s: float
    past_mb_per_1k: float
    read_gb_s: float
    of_bandwidth: float | None


@dataclass(frozen=True, config=_STRICT)
class Measurement:
    """One package, timed on one device.

    `load_ms` is the creation of the session, from disk where `page_cache_dropped`. `first_run_ms` comes before the
    warm-up. `min_ms` to `p99_ms` are over `runs` calls of `session.run` on one input. `noise` is how far the medians
    of ten consecutive tenths of the runs lie apart, by half, as a share of the median: a smaller difference between
    two measurements says nothing. None with fewer than 50 runs.
    `peak_memory_mb` is above `baseline_mb`, the process after its imports. `weights_mb` are the file's constants,
    `activations_mb` what a run adds to ONNX Runtime's allocator. `energy_mj` is of one run, by the processor's own
    counter, and with it of all else that ran. `throughput` is runs in a second by number of threads.
    None is what the device does not say, `notes` what it says in sentences. `provider_nodes` counts nodes as assigned,
    before fusion, or after it where a phone tells only what ran; `operators`, `nodes` and `modules` come from a second,
    profiled session. The shares of each of the three add up to 1 with `unattributed_share`, the time between nodes.
    """

    kind: Kind
    package: str
    device: str
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
    p99_ms: float
    noise: float | None
    peak_memory_mb: float | None
    baseline_mb: float
    memory_method: str
    file_mb: float
    weights_mb: float
    activations_mb: float | None
    inputs: dict[str, str]
    operators: list[Operator]
    nodes: list[Node]
    unattributed_share: float | None
    throughput: dict[int, float]
    sensors: dict[str, dict[str, Any]]
    energy_mj: float | None
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)
    instructions: Instructions | None = None
    modules: list[Module] = field(default_factory=list)
    written: Written | None = None
    times_ms: list[float] = field(default_factory=list, repr=False)

    def to_json(self) -> dict[str, Any]:
        """A JSON value of all but the single times."""
        value = asdict(self)
        del value["times_ms"]
        return value


def _written(found: Mapping[str, Any] | None, package: Package) -> Written | None:
    """What an agent's times of a decoder come to."""
    if found is None:
        return None
    first, step = np.median(found["prompts_ms"]), float(np.median(found["steps_ms"]))
    rate = package.streamed_mb / step if package.streamed_mb else None  # GB/s
    return Written(
        prompt=package.writes["prompt"],
        tokens=package.writes["tokens"],
        rounds=package.writes["rounds"],
        first_token_ms=float(first),
        prompt_tokens_per_s=1e3 * package.writes["prompt"] / float(first),
        decode_tokens_per_s=1e3 / step,
        past_mb_per_1k=1e3 * found["past_mb"] / found["past_tokens"],
        read_gb_s=found["read_gb_s"],
        of_bandwidth=None if rate is None else rate / found["read_gb_s"],
    )


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

    kind: Kind
    device: str
    where: Where
    threads: int
    warmup: int
    runs: int
    packages: list[Timing]
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A JSON value of all fields."""
        return asdict(self)


def measured(
    reply: Mapping[str, Any],
    package: Package,
    device: Device,
    profile: Profile | None = None,
    modules: Sequence[Module] = (),
) -> Measurement:
    """The measurement in an agent's reply for one model; `profile` is of its operators, where the device has one.

    Raises InputError as of `check_version`.
    """
    result = reply["models"][0]
    times = result["times_ms"]
    known = result["memory_method"] != "unavailable"
    energy = result.get("energy_uj")
    nodes = result.get("provider_nodes")
    return Measurement(
        kind=device.kind,
        package=package.folder.name,
        device=device.where,
        where=Where(**reply["machine"]),
        **{key: result[key] for key in ("providers", "missing_providers", "load_ms", "page_cache_dropped")},
        provider_nodes=_nodes_of(profile) if nodes is None else nodes,
        threads=reply["threads"],
        warmup=reply["warmup"],
        runs=len(times),
        first_run_ms=result["first_run_ms"],
        min_ms=min(times),
        **dict(zip(("median_ms", "p90_ms", "p99_ms"), np.percentile(times, [50, 90, 99]).tolist(), strict=True)),
        noise=noise(times),
        peak_memory_mb=result["peak_memory_mb"] if known else None,
        baseline_mb=result["baseline_mb"],
        memory_method=result["memory_method"],
        file_mb=package.file_mb,
        weights_mb=package.weights_mb,
        activations_mb=profile.activations_mb if profile else None,
        inputs=package.input_texts(),
        operators=profile.operators if profile else [],
        nodes=profile.nodes if profile else [],
        modules=list(modules),
        written=_written(result.get("written"), package),
        unattributed_share=profile.unattributed if profile else None,
        throughput={int(threads): rate for threads, rate in result.get("throughput", {}).items()},
        sensors=result.get("sensors", {}),
        energy_mj=None if energy is None else energy / 1e3 / len(times),
        versions=reply["versions"],
        notes=[*reply.get("notes", []), *check_version(package.target, reply["versions"])],
        instructions=_instructions(result.get("instructions")),
        times_ms=times,
    )


def _instructions(counts: Mapping[str, Any] | None) -> Instructions | None:
    if counts is None:
        return None
    median = float(np.median(counts["runs"]))
    return Instructions(
        counts["load"], counts["first_run"], median, (max(counts["runs"]) - min(counts["runs"])) / median
    )


def _nodes_of(profile: Profile | None) -> dict[str, int]:
    """Nodes by provider, after fusion, where the session did not say how it assigned them."""
    counts: Counter[str] = Counter()
    for row in profile.operators if profile else []:
        counts[row.provider] += row.count
    return dict(counts)


def noise(times: Sequence[float]) -> float | None:
    """Half the range of the medians of ten consecutive tenths, as a share of the median; None below 50 times."""
    if len(times) < 50:
        return None
    tenths = [float(np.median(part)) for part in np.array_split(np.asarray(times), 10)]
    return (max(tenths) - min(tenths)) / 2 / float(np.median(times))


def medians(reply: Mapping[str, Any]) -> list[float]:
    """The median time of each model in an agent's reply, in ms, in the order of the request."""
    return [float(np.median(result["times_ms"])) for result in reply["models"]]


def compared(reply: Mapping[str, Any], packages: Sequence[str], device: Device) -> Comparison:
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
        kind=device.kind,
        device=device.where,
        where=Where(**reply["machine"]),
        threads=reply["threads"],
        warmup=reply["warmup"],
        runs=len(first),
        packages=rows,
        versions=reply["versions"],
        notes=reply.get("notes", []),
    )


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Two of the values that hold the population's median with at least 95 % confidence; None below 6 values.

    It assumes independent values and no distribution. Source: the sign test's interval, Conover, Practical
    Nonparametric Statistics, 3.2.
    """
    from scipy.stats import binom  # late: it takes most of a second

    if len(values) < 6:
        return None
    rank = int(binom.ppf(0.025, len(values), 0.5))  # of the lower end, counted from 1
    ordered = sorted(values)
    return ordered[rank - 1], ordered[-rank]
