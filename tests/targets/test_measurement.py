import importlib.util
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from potstill.targets.local import AGENT
from potstill.targets.measurement import compared, median_interval, medians


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
    second = compared(reply, ["a", "b"]).packages[1]
    assert (second.ratio, second.ratio_low, second.ratio_high) == (2, 2, 2)


def test_first_run_is_dropped_and_a_holder_keeps_its_own_time(agent: ModuleType) -> None:
    events = [event("model_run", 0, 900), event("a", 1, 800, "Conv")]
    for start in (1000, 2000):
        events += [
            event("loop", start + 10, 50, "Loop"),
            event("inner", start + 20, 30, "MatMul"),
            event("after", start + 60, 20, "Conv"),
            event("model_run", start, 100),
        ]
    rows, unattributed = agent.operator_shares(events)
    shares = {row["operator"]: (row["count"], row["share"]) for row in rows}
    assert shares == {"MatMul": (1, 0.3), "Loop": (1, 0.2), "Conv": (1, 0.2)}
    assert unattributed == pytest.approx(0.3)


def test_without_assignments_the_profile_counts_nodes(agent: ModuleType) -> None:
    assert agent.assigned_nodes(object()) is None


def test_peak_falls_back_to_rusage(agent: ModuleType) -> None:
    peak, method = agent.peak_mb(False)
    assert method == "ru_maxrss since the start"
    assert peak > 10
