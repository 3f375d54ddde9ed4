"""Latency over time under load: whether a device grows hot and slow."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from potstill.targets.device import BrokenOff, Device, Kind
from potstill.targets.measurement import Measurement, Where
from potstill.targets.profile import HERE, settings
from potstill.targets.request import Package, read_package
from potstill.validate.errors import InputError

START_S = 10  # what the rest is compared with
SLOWER = 1.1  # than the start, for `HELD_S` seconds on end: the device throttles
HELD_S = 5
LEAST_S = 20
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class Second:
    """The runs of about one second, which ended `at_s` after the start; None is what the device does not say."""

    at_s: float
    runs: int
    median_ms: float
    p90_ms: float
    temperature_c: float | None = None
    governor: str | None = None


@dataclass(frozen=True, config=_STRICT)
class Sustained:
    """One package run without a pause on one device from `began` on (ISO 8601, UTC), second by second.

    Where the device went away `broken_off` says how; there are fewer seconds then than were asked for, and no drift
    and no throttling can be told of fewer than 20.
    """

    kind: Kind
    package: str
    device: str
    where: Where
    providers: list[str]
    threads: int
    seconds: list[Second]
    versions: dict[str, str]
    began: str
    broken_off: str | None = None

    @property
    def start_ms(self) -> float:
        """The median of the medians of the first ten seconds."""
        return _median(self.seconds[:START_S])

    @property
    def drift(self) -> float | None:
        """How much slower the last ten seconds are than the first ten, as a share: 0.1 is 10 % slower."""
        return None if len(self.seconds) < LEAST_S else _median(self.seconds[-START_S:]) / self.start_ms - 1

    @property
    def throttles_at_s(self) -> float | None:
        """When five seconds on end begin whose medians are all 10 % above the start; None where there are none."""
        if self.drift is None:
            return None
        slow = [one.median_ms > SLOWER * self.start_ms for one in self.seconds]
        for first in range(len(slow) - HELD_S + 1):
            if all(slow[first : first + HELD_S]):
                return self.seconds[first].at_s
        return None

    def to_json(self) -> dict[str, Any]:
        """A JSON value of all fields, and of what follows from them."""
        return asdict(self) | {
            "start_ms": self.start_ms,
            "drift": self.drift,
            "throttles_at_s": self.throttles_at_s,
        }


def _median(seconds: Sequence[Second]) -> float:
    return float(np.median([one.median_ms for one in seconds]))


def check_sustained(seconds: float, device: Device) -> None:
    """Whether a device can be run so long.

    Raises:
        InputError: the time is too short, or the device's times say nothing.
    """
    if seconds < LEAST_S:
        raise InputError(f"{seconds:g} s under load are asked for, expected {LEAST_S} s or more")
    if device.kind != "measured":
        raise InputError(
            f"the times of {device.where} are {device.kind} and say nothing of heat; leave out --sustained"
        )


def sustained(
    package: Path | Package,
    seconds: float,
    *,
    device: Device = HERE,
    threads: int | None = None,
    cores: Sequence[int] = (),
    timeout_s: float = 900,
) -> Sustained:
    """Run a package without a pause for some seconds, 20 at least.

    `threads` and `cores` as of `profile`; `timeout_s` is for what is not those seconds.
    Raises InputError for a bad package or setting, and as of `Device.ask`; `until_then` has the seconds of a BrokenOff.
    """
    check_sustained(seconds, device)
    opened = read_package(package)
    said = settings([opened], device, runs=1, threads=threads, warmup=0, cores=cores)
    request = {**said, "models": [opened.spec()], "sustained": round(seconds)}
    began = now()
    reply = device.ask(request, timeout_s=timeout_s + seconds)
    (result,) = reply["models"]
    return Sustained(
        kind=device.kind,
        package=opened.folder.name,
        device=device.where,
        where=Where(**reply["machine"]),
        providers=result["providers"],
        threads=reply["threads"],
        seconds=[Second(**one) for one in result["seconds"]],
        versions=reply["versions"],
        began=began,
    )


def now() -> str:
    """The time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def until_then(broken: BrokenOff, before: Measurement, began: str) -> Sustained | None:
    """What a device under load had told when it went away; None where no second was over.

    Args:
        broken: what was raised.
        before: a measurement of the same package there, with the same settings.
        began: when the load began.
    """
    seconds = list(_seconds_in(broken.said))
    if not seconds:
        return None
    why = str(broken).partition("; ")[0]  # without what to do now
    known = {key: getattr(before, key) for key in ("kind", "package", "device", "where", "providers", "threads")}
    return Sustained(**known, seconds=seconds, versions=before.versions, began=began, broken_off=why)


def _seconds_in(said: bytes) -> Iterator[Second]:
    """The seconds in an agent's output, of which the last line may be cut off."""
    for line in said.splitlines():
        try:
            yield Second(**json.loads(line)["second"])
        except (ValueError, LookupError, TypeError):
            continue
