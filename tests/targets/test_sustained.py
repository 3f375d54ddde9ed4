from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from potstill.targets.device import Kind
from potstill.targets.sustained import Sustained, sustained
from potstill.validate.errors import InputError

MakePackage = Callable[..., Path]


@dataclass(frozen=True)
class Told:
    """A device that tells of seconds with these medians, and keeps what it was asked."""

    medians: tuple[float, ...]
    asked: list[Mapping[str, Any]]
    where: str = "told"
    kind: Kind = "measured"

    def ask(self, request: Mapping[str, Any], *, timeout_s: float = 900) -> dict[str, Any]:
        self.asked.append({**request, "timeout_s": timeout_s})
        seconds = [{"at_s": n + 1.0, "runs": 9, "median_ms": m, "p90_ms": m} for n, m in enumerate(self.medians)]
        machine = {"system": "Linux", "arch": "arm64", "cpu": "a CPU", "cores": 8}
        model = {"path": "", "providers": ["CPUExecutionProvider"], "missing_providers": [], "seconds": seconds}
        return {"machine": machine, "threads": 1, "warmup": 0, "versions": {}, "models": [model]}


def of(package: Path, *medians: float) -> Sustained:
    return sustained(package, 20, device=Told(medians, []))


def test_drift_and_throttling_are_against_the_first_ten_seconds(make_package: MakePackage) -> None:
    package = make_package(width=8, layers=1)
    steady = of(package, *[2.0] * 30)
    assert (steady.start_ms, steady.drift, steady.throttles_at_s) == (2.0, 0.0, None)
    hot = of(package, *[2.0] * 15, *[3.0] * 15)
    assert hot.drift == pytest.approx(0.5)
    assert hot.throttles_at_s == 16.0
    assert hot.to_json()["throttles_at_s"] == 16.0
    bursts = of(package, *[2.0] * 12, *[3.0] * 4, *[2.0] * 12)  # a neighbour, not heat: four seconds only
    assert bursts.throttles_at_s is None
    slightly = of(package, *[2.0] * 15, *[2.19] * 15)
    assert slightly.throttles_at_s is None


def test_the_time_under_load_is_not_counted_as_delay(make_package: MakePackage) -> None:
    device = Told((1.0,) * 40, [])
    sustained(make_package(width=8, layers=1), 40, device=device, timeout_s=10)
    (asked,) = device.asked
    assert (asked["timeout_s"], asked["sustained"]) == (50, 40)


def test_too_short(make_package: MakePackage) -> None:
    with pytest.raises(InputError, match="5 s under load are asked for, expected 20 s or more"):
        sustained(make_package(), 5)


def test_emulated_seconds_say_nothing(make_package: MakePackage) -> None:
    device = Told((1.0,) * 40, [], where="emulate", kind="emulated")
    with pytest.raises(InputError, match="the times of emulate are emulated and say nothing of heat"):
        sustained(make_package(), 40, device=device)
    assert device.asked == []
