"""What packages cost on a device, and against each other."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from potstill.targets.device import Device, Made, by_instruction
from potstill.targets.local import Local
from potstill.targets.measurement import Comparison, Measurement, Where, compared, measured
from potstill.targets.modules import by_module, read_modules
from potstill.targets.operators import read_profile
from potstill.targets.request import Package, read_package
from potstill.targets.version import check_version
from potstill.validate.errors import InputError
from potstill.validate.units import counted

HERE = Local()


class _Usual(NamedTuple):
    """What is done where nothing is said; `threads` None: as the target says."""

    runs: dict[str, float]
    warmup: int
    threads: int | None


USUAL = _Usual({"seconds": 3.0, "min_runs": 50, "max_runs": 2000}, warmup=10, threads=None)
SLOW = _Usual({"runs": 5}, warmup=1, threads=1)  # of a device that emulates by instruction


def profile(
    package: Path | Package,
    *,
    device: Device = HERE,
    runs: int | None = None,
    threads: int | None = None,
    warmup: int | None = None,
    cores: Sequence[int] = (),
    throughput: Sequence[int] = (),
    timeout_s: float = 900,
) -> Measurement:
    """What a package costs on a device: latency, load, memory, operators, modules and providers.

    Without `runs`, as many as fill 3 s, from 50 to 2000, and `warmup` is 10; on an emulated CPU 5 and 1, whose
    instructions are counted, with no profile of its operators. Without `threads`, those of the target's profile, or 1.
    The process keeps to `cores`, where they are given. `throughput` lists numbers of threads, each tried for a second.
    A provider that is not there is in `missing_providers`.
    Raises InputError for a bad package or setting, or a runtime that is too old there, and as of `Device.ask`.
    """
    opened = read_package(package)
    with tempfile.TemporaryDirectory(prefix="potstill-") as folder:
        profiled, graph = Path(folder, "profile.json"), Path(folder, "graph.onnx")
        request = {
            **settings([opened], device, runs=runs, threads=threads, warmup=warmup, cores=cores),
            "models": [opened.spec()],
            **({"operators": Made(profiled), "graph": Made(graph)} if not by_instruction(device) else {}),
            "throughput": [_at_least("threads", one, 1) for one in throughput],
        }
        reply = device.ask(request, timeout_s=timeout_s)
        if not profiled.exists():
            return measured(reply, opened, device)
        found = read_profile(profiled)
        modules = by_module(found.nodes, read_modules(opened.folder), graph if graph.exists() else None)
        return measured(reply, opened, device, found, modules)


def made_there(
    measurement: Measurement,
    package: Path | Package,
    *,
    device: Device,
    threads: int | None = None,
    cores: Sequence[int] = (),
    timeout_s: float = 900,
) -> bool:
    """Whether a measurement is of the device that answers now: address, machine, versions, providers, threads.

    The device is asked for one run. Settings and errors are those of `profile`.
    """
    opened = read_package(package)
    said = settings([opened], device, runs=1, threads=threads, warmup=0, cores=cores)
    reply = device.ask({**said, "models": [opened.spec()]}, timeout_s=timeout_s)
    now = (
        device.where,
        Where(**reply["machine"]),
        reply["versions"],
        reply["models"][0]["providers"],
        reply["threads"],
    )
    then = (measurement.device, measurement.where, measurement.versions, measurement.providers, measurement.threads)
    return now == then


def compare(
    packages: Sequence[Path | Package],
    *,
    device: Device = HERE,
    runs: int | None = None,
    threads: int | None = None,
    warmup: int | None = None,
    cores: Sequence[int] = (),
    timeout_s: float = 900,
) -> Comparison:
    """Packages timed in turns in one process, so that noise falls on all alike; ratios are to the first.

    Settings and errors are those of `profile`; `runs` are rounds.
    """
    if len(packages) < 2:
        raise InputError(
            f"{counted(len(packages), 'package')} given, expected two or more to compare; use profile for one"
        )
    opened = [read_package(package) for package in packages]
    request = {
        **settings(opened, device, runs=runs, threads=threads, warmup=warmup, cores=cores),
        "models": [package.spec() for package in opened],
    }
    reply = device.ask(request, timeout_s=timeout_s)
    notes = [note for package in opened for note in check_version(package.target, reply["versions"])]
    reply = {**reply, "notes": [*reply.get("notes", []), *dict.fromkeys(notes)]}
    return compared(reply, [package.name for package in opened], device)


def settings(
    packages: Sequence[Package],
    device: Device,
    *,
    runs: int | None,
    threads: int | None,
    warmup: int | None,
    cores: Sequence[int],
) -> dict[str, Any]:
    """What every request of the agent says of its runs, the defaults filled in; raises InputError for a bad one."""
    usual = SLOW if by_instruction(device) else USUAL
    for name, value, least in (("runs", runs, 1), ("threads", threads, 1), ("warmup", warmup, 0)):
        if value is not None:
            _at_least(name, value, least)
    threads = threads or usual.threads
    for core in cores:
        _at_least("a core", core, 0)
    if threads is None:
        wanted = {package.target.profile.threads or 1 for package in packages}
        if len(wanted) > 1:
            raise InputError(f"the packages' targets want {sorted(wanted)} threads; give one number of threads")
        threads = wanted.pop()
    enough = usual.runs if runs is None else {"runs": runs}
    return {"threads": threads, "warmup": usual.warmup if warmup is None else warmup, "cores": list(cores), **enough}


def _at_least(name: str, value: int, least: int) -> int:
    if value < least:
        raise InputError(f"{name} is {value}, expected {least} or more")
    return value
