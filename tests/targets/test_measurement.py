import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from potstill.targets.local import AGENT, Local
from potstill.targets.measurement import compared, median_interval, medians, noise
from potstill.targets.operators import Profile, read_profile
from potstill.validate.errors import PotstillError


@pytest.fixture(scope="module")
def agent() -> ModuleType:
    spec = importlib.util.spec_from_file_location("agent_under_test", AGENT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def event(name: str, start: int, dur: int, op: str = "") -> dict[str, Any]:
    if not op:
        return {"cat": "Session", "name": name, "ts": start, "dur": dur, "args": {}}
    args = {"op_name": op, "provider": "CPUExecutionProvider"}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": dur, "args": args}


def profile_of(events: list[dict[str, Any]], folder: Path) -> Profile:
    (folder / "profile.json").write_text(json.dumps(events))
    return read_profile(folder / "profile.json")


def test_median_interval_is_the_sign_tests() -> None:
    assert median_interval([float(n) for n in range(1, 21)]) == (6.0, 15.0)  # the tables' ranks for n = 20
    assert median_interval([1.0] * 5) is None
    assert median_interval([3, 1, 2, 6, 5, 4]) == (1, 6)


def test_median_interval_covers() -> None:
    rng = np.random.default_rng(0)
    intervals = [median_interval(rng.exponential(size=50).tolist()) for _ in range(1000)]
    held = sum(low <= np.log(2) <= high for low, high in filter(None, intervals))
    assert 940 <= held <= 990


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that slows down threefold half-way leaves the ratio alone."""
    pace = [1.0] * 10 + [3.0] * 11
    model = {"path": "", "providers": [], "missing_providers": []}
    reply = {
        "machine": {"system": "Linux", "arch": "x86_64", "cpu": "a CPU", "cores": 2},
        "threads": 1,
        "warmup": 0,
        "versions": {},
        "models": [{**model, "times_ms": pace}, {**model, "times_ms": [2 * p for p in pace]}],
    }
    assert medians(reply) == [3.0, 6.0]
    second = compared(reply, ["a", "b"], Local()).packages[1]
    assert (second.ratio, second.ratio_low, second.ratio_high) == (2, 2, 2)


def test_noise_is_half_the_range_of_the_tenths() -> None:
    assert noise([1.0] * 49) is None
    assert noise([1.0] * 50) == 0
    slower = [1.0] * 90 + [1.5] * 10  # one tenth of ten
    assert noise(slower) == pytest.approx(0.25)
    one_outlier = [1.0] * 99 + [100.0]
    assert noise(one_outlier) == 0


def test_first_run_is_dropped_and_a_holder_keeps_its_own_time(tmp_path: Path) -> None:
    events = [event("model_run", 0, 900), event("a", 1, 800, "Conv")]
    for start in (1000, 2000):
        events += [
            event("loop", start + 10, 50, "Loop"),
            event("inner", start + 20, 30, "MatMul"),
            event("after", start + 60, 20, "Conv"),
            event("model_run", start, 100),
        ]
    found = profile_of(events, tmp_path)
    assert {row.operator: (row.count, row.share) for row in found.operators} == {
        "MatMul": (1, 0.3),
        "Loop": (1, 0.2),
        "Conv": (1, 0.2),
    }
    assert [(node.name, node.share) for node in found.nodes] == [("loop", 0.2), ("inner", 0.3), ("after", 0.2)]
    assert found.unattributed == pytest.approx(0.3)
    assert found.activations_mb is None


def test_activations_are_the_peak_above_the_rest(tmp_path: Path) -> None:
    events = [event("model_run", 0, 9)]
    for held, delta, peak in ((5_000_000, 1_000_000, 5_000_000), (6_500_000, 1_500_000, 7_000_000)):
        one = event("a", 11, 5, "Conv")
        one["args"] |= {"mem_bytes_in_use": str(held), "mem_in_use_delta": str(delta), "mem_in_use_peak": str(peak)}
        events.append(one)
    assert profile_of([*events, event("model_run", 10, 20)], tmp_path).activations_mb == 3.0


@pytest.mark.parametrize("written", [None, "", "[]", "{}", '[{"cat": "Node"}]'])
def test_no_profile(written: str | None, tmp_path: Path) -> None:
    if written is not None:
        (tmp_path / "profile.json").write_text(written)
    with pytest.raises(PotstillError, match="the device gave no profile of its operators"):
        read_profile(tmp_path / "profile.json")


def test_without_assignments_there_is_no_count(agent: ModuleType) -> None:
    assert agent.assigned_nodes(object()) is None


def test_peak_falls_back_to_rusage(agent: ModuleType) -> None:
    peak, method = agent.peak_mb(False)
    assert method == "ru_maxrss since the start"
    assert peak > 10
