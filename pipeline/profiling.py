"""What `potstill profile` does: measure on a device, judge there, keep what was found."""

import re
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from rich.console import Console

from potstill.pipeline.cache import run_of
from potstill.pipeline.going_on import earlier_try, readable
from potstill.targets.budget import parse_budget, within
from potstill.targets.device import BrokenOff, Device
from potstill.targets.devices import Reach, open_device
from potstill.targets.measurement import Measurement
from potstill.targets.profile import made_there, profile
from potstill.targets.request import Package, read_package
from potstill.targets.sustained import Sustained, check_sustained, now, sustained, until_then
from potstill.validate.errors import GateFailed, InputError, PotstillError, Unreachable
from potstill.validate.files import write_json
from potstill.validate.verdict import Verdict

if TYPE_CHECKING:
    from potstill.pipeline.on_device import OnDevice

FORMAT = "potstill-profile/1"
PROFILES = "profiles"


@dataclass(frozen=True)
class Wish:
    """What is to be found out of a package on a device."""

    where: str = "local"
    runs: int | None = None
    threads: int | None = None
    cores: tuple[int, ...] = ()
    throughput: tuple[int, ...] = ()
    sustained_s: float | None = None
    accuracy: bool = False
    budget: tuple[str, ...] = ()
    python: str | None = None
    serve: bool = False
    timeout_s: float = 900

    def device(self, package: Package) -> Device:
        """The device, opened for a package."""
        return open_device(self.where, Reach(package.target, self.python, self.serve))

    def settings(self) -> dict[str, Any]:
        """A JSON value of what makes the figures what they are."""
        found: dict[str, Any] = TypeAdapter(Wish).dump_python(self, mode="json", exclude={"budget", "timeout_s"})
        return found


@dataclass
class Profiled:
    """What was found so far of one package on one device, from `taken` on; `file` is where it is kept.

    `broken_off` are the series under load in which the device went away.
    """

    package: Package
    wish: Wish
    measurement: Measurement
    taken: str
    broken_off: list[Sustained] = field(default_factory=list)
    sustained: Sustained | None = None
    there: "OnDevice | None" = None
    budget: Verdict | None = None
    file: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON value: null where it was not asked for or is not known yet."""
        return {
            **key_of(self.package, self.wish),
            "package": self.package.name,
            "target": self.package.target.id,
            "model_sha256": self.package.model_sha256,
            "taken": self.taken,
            "unfinished": self.unfinished(),
            "measurement": self.measurement.to_json(),
            "broken_off": [one.to_json() for one in self.broken_off],
            "sustained": self.sustained.to_json() if self.sustained else None,
            "accuracy": None
            if self.there is None
            else {
                "scorecard": TypeAdapter(type(self.there.judged.scorecard)).dump_python(
                    self.there.judged.scorecard, mode="json"
                ),
                "verdict": asdict(self.there.verdict) if self.there.verdict else None,
                "emulated": TypeAdapter(type(self.there.emulated)).dump_python(self.there.emulated, mode="json"),
            },
            "budget": asdict(self.budget) if self.budget else None,
        }

    def unfinished(self) -> list[str]:
        """What was asked for and is not there yet."""
        wanted = {"sustained": self.wish.sustained_s is not None, "accuracy": self.wish.accuracy}
        found = {"sustained": self.sustained, "accuracy": self.there}
        return [name for name in wanted if wanted[name] and found[name] is None]

    def failed(self) -> PotstillError | None:
        """What a missed budget or gate makes of it."""
        missed = [one for one in (self.budget, self.there.verdict if self.there else None) if one and not one.passed]
        where = self.measurement.device
        why = "; ".join(one.reason for one in missed)
        return GateFailed(f"{self.package.name} on {where}: {why}") if missed else None


def profile_package(package: Path, wish: Wish, console: Console) -> Profiled:
    """Profile one package by a wish; what was found is kept as soon as it is.

    Where the last try of the same did not finish, its measurement, and its time under load, are taken from there.

    Raises:
        InputError: the package, the wish or the device cannot be used.
        Unreachable: the device cannot be reached, or went away; what it said before is kept.
    """
    budget = parse_budget(wish.budget)
    if wish.accuracy and run_of(package) is None:
        raise InputError(
            f"{package} does not lie in the folder of a run, whose evaluation set and teacher would judge it; give "
            "RUN/packages/NAME, or leave out --accuracy"
        )
    opened = read_package(package)
    device = wish.device(opened)
    if wish.sustained_s is not None:
        check_sustained(wish.sustained_s, device)
    found = _earlier(opened, wish, device, console) or _measured(opened, wish, device)
    found.budget = within(budget, found.measurement) if budget else None
    found.file = _keep(found)
    try:
        if wish.sustained_s is not None and found.sustained is None:
            _under_load(found, wish.sustained_s, device)
        if wish.accuracy:
            from potstill.pipeline.on_device import judge_on  # torch comes with it

            found.there = judge_on(package, device, found.measurement, console, timeout_s=wish.timeout_s)
            _keep(found)
    except Unreachable:
        again = "" if wish.serve else "; the same command goes on from there"
        console.print(f"kept so far: {found.file}{again}", highlight=False, soft_wrap=True, markup=False)
        raise
    return found


def key_of(package: Package, wish: Wish) -> dict[str, Any]:
    """What a try must have the same to go on from another, beside the device that answers."""
    return {
        "format": FORMAT,
        "potstill": version("potstill"),
        "package_sha256": package.sha256,
        "asked": wish.settings(),
    }


def _measured(package: Package, wish: Wish, device: Device) -> Profiled:
    taken = now()
    measurement = profile(
        package,
        device=device,
        runs=wish.runs,
        threads=wish.threads,
        cores=wish.cores,
        throughput=wish.throughput,
        timeout_s=wish.timeout_s,
    )
    return Profiled(package, wish, measurement, taken)


def _earlier(package: Package, wish: Wish, device: Device, console: Console) -> Profiled | None:
    """What the last try of the same had found, where it did not finish and the same device answers.

    Which browser comes to an address, nobody can tell.
    """
    found = None if wish.serve else earlier_try(_folder(package), package.name, key_of(package, wish))
    if found is None:
        return None
    words = found.in_words()
    same = made_there(
        found.measurement,
        package,
        device=device,
        threads=wish.threads,
        cores=wish.cores,
        timeout_s=wish.timeout_s,
    )
    if not same:
        words = f"the try of {readable(found.taken)} was on another machine, or with other versions there: all anew"
    console.print(words, highlight=False, soft_wrap=True, markup=False)
    if not same:
        return None
    return Profiled(
        package, wish, found.measurement, found.taken, found.broken_off, sustained=found.sustained, file=found.file
    )


def _under_load(found: Profiled, seconds: float, device: Device) -> None:
    """The time under load; where the device goes away, the series up to then is kept as broken off."""
    wish, began = found.wish, now()
    try:
        found.sustained = sustained(
            found.package, seconds, device=device, threads=wish.threads, cores=wish.cores, timeout_s=wish.timeout_s
        )
    except BrokenOff as broken:
        series = until_then(broken, found.measurement, began)
        found.broken_off += [series] if series else []
        raise
    finally:
        _keep(found)


def _folder(package: Package) -> Path:
    """Where a package's profiles are kept."""
    return (run_of(package.folder) or package.folder.resolve().parent) / PROFILES


def fresh_file(package: Package, name: str, device: str) -> Path:
    """A new file in the folder `profiles` of the run, or beside a package that is in none; it is named by the time."""
    folder, where = _folder(package), re.sub(r"[^\w.-]+", "-", device)
    taken = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    folder.mkdir(exist_ok=True)
    return folder / f"{name}-{where}-{taken}.json"


def _keep(found: Profiled) -> Path:
    """Write what was found."""
    found.file = found.file or fresh_file(found.package, found.package.name, found.measurement.device)
    write_json(found.file, found.to_json())
    return found.file
