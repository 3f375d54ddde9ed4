from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from potstill.targets.budget import BUDGETS, parse_budget, within
from potstill.targets.measurement import Measurement
from potstill.targets.profile import profile
from potstill.validate.errors import InputError


@pytest.fixture
def measurement(make_package: Callable[..., Path]) -> Measurement:
    return profile(make_package(width=8, layers=1), runs=5)


def test_limits_are_seconds_and_bytes() -> None:
    found = parse_budget(["latency_p90=20ms", "load = 2s", "peak_memory=0.15GB", "size=500kB"])
    assert found == pytest.approx({"latency_p90": 0.02, "load": 2.0, "peak_memory": 1.5e8, "size": 5e5})


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["latency=20ms"], "no budget is called 'latency'; did you mean"),
        (["latency_p90"], "the budget latency_p90: '' is not a limit here; write a number above 0 with its unit"),
        (["latency_p90=20"], "'20' is not a limit here"),
        (["latency_p90=20MB"], "'20MB' is not a limit here"),
        (["size=1MB", "size=2MB"], "the budget size is given twice"),
    ],
)
def test_a_bad_budget(texts: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_budget(texts)


@pytest.mark.parametrize("name", BUDGETS)
def test_each_budget_is_of_its_own_field(name: str, measurement: Measurement) -> None:
    unit = "ms" if BUDGETS[name][3] == "ms" else "MB"
    at = replace(measurement, **{BUDGETS[name][0]: 7.0})
    assert within(parse_budget([f"{name}=7{unit}"]), at).outcome == "pass"
    missed = within(parse_budget([f"{name}=6.9{unit}"]), at)
    assert (missed.outcome, missed.passed) == ("fail", False)
    assert f"7 {unit} on local, 6.9 {unit} allowed" in missed.reason


def test_what_is_not_said_or_not_measured_holds_nothing(measurement: Measurement) -> None:
    silent = within(parse_budget(["peak_memory=1GB"]), replace(measurement, peak_memory_mb=None))
    assert (silent.outcome, silent.passed) == ("undecided", False)
    assert "local does not say" in silent.reason
    emulated = replace(measurement, kind="emulated", device="emulate")
    slow = within(parse_budget(["latency_p90=9s", "size=1GB"]), emulated)
    assert [(check.limit, check.passed) for check in slow.checks] == [("latency_p90", False), ("size", True)]
    assert "the times of emulate are emulated and say nothing" in slow.reason
