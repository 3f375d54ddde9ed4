"""The pure pieces of `make bench-formats`: what a row says, its cells, what a command costs, the record."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parents[2] / "benchmarks"


def opened(name: str) -> ModuleType:
    """A file of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


verdicts, tables = opened("formats_verdict"), opened("formats_tables")


def made(side: str, wrong: int, ms: float = 1.0, size: int = 1000) -> Any:
    """A file that has the first `wrong` of 500 examples wrong."""
    return verdicts.File(side, np.arange(500) >= wrong, ms, size)


def test_a_file_as_good_as_the_best_holds_in_all() -> None:
    said = verdicts.verdict(made("ours", 50), [made("a", 50), made("b", 80, ms=2, size=2000)])
    assert (said.accuracy, said.latency, said.size) == (True, True, True)
    assert said.said == (
        "accuracy holds: +0.0 points [+0.0, +0.0] against a, the most accurate of the others",
        "latency holds: 1 ms, 1.00 × a",
        "size holds: 0.001 MB, 1.00 × a",
    )


def test_a_file_below_the_best_is_told_with_its_interval() -> None:
    said = verdicts.verdict(made("ours", 80), [made("a", 50), made("b", 90)])
    assert not said.accuracy
    low, high = -100 * np.array(stats.binom.interval(0.95, 500, 0.06))[::-1] / 500
    assert said.said[0].startswith("accuracy is below: -6.0 points [")
    shown = [float(end) for end in said.said[0].split("[")[1].split("]")[0].split(",")]
    assert shown == pytest.approx([low, high], abs=0.4)


def test_a_file_that_is_clearly_above_is_named_though_another_is_the_most_accurate() -> None:
    """The most accurate errs on other examples than ours, so its interval reaches 0; the other errs where ours does."""
    elsewhere = verdicts.File("elsewhere", np.arange(500) < 500 - 43, 1.0, 1000)
    said = verdicts.verdict(made("ours", 60), [elsewhere, made("clear", 45)])
    assert verdicts.gain(made("ours", 60), elsewhere).high > 0
    assert said.accuracy is False
    assert said.said[0].startswith("accuracy is below: -3.0 points [")
    assert said.said[0].endswith("against clear")


def test_a_file_above_the_float_graph_is_called_lucky() -> None:
    said = verdicts.verdict(made("ours", 60), [made("a", 40)], made("float", 50))
    assert said.said[0].endswith("against a, whose rounding lifts it 2.0 points above the float graph itself")


def test_a_faster_file_that_is_as_accurate_is_a_miss_and_a_less_accurate_one_is_told_of() -> None:
    as_accurate = verdicts.verdict(made("ours", 50), [made("a", 51, ms=0.9)])
    assert not as_accurate.latency
    assert as_accurate.said[1].startswith("latency is above: 1 ms, 1.11 × a, as accurate as ours within chance ([")
    assert as_accurate.said[1].endswith(" points), which has 0.001 MB, 1.00 × ours")
    worse = verdicts.verdict(made("ours", 50), [made("a", 50), made("b", 150, ms=0.5, size=500)])
    assert worse.latency
    assert worse.size
    assert worse.said[1] == "latency holds: 1 ms, 1.00 × a; b has 0.5 ms and 20.0 points less accuracy"
    alone = verdicts.verdict(made("ours", 50), [made("b", 150, ms=0.5)])
    assert alone.latency
    assert "all others are less accurate beyond chance; b has 0.5 ms" in alone.said[1]


def test_the_margin_is_three_hundredths() -> None:
    assert verdicts.verdict(made("ours", 50, size=1030), [made("a", 50)]).size
    assert not verdicts.verdict(made("ours", 50, size=1031), [made("a", 50)]).size


def test_without_another_file_the_row_says_so() -> None:
    assert verdicts.verdict(made("ours", 50), []).said == ("not compared: no other side made a file that runs",)


def test_a_side_without_a_file_says_why_in_its_cells() -> None:
    cost = {"seconds": 3.2, "cpu_seconds": 2.9, "peak_mb": 410.0}
    assert tables.cells({"why": "exit code 1: ValueError"} | cost) == [
        "exit code 1: ValueError", "", "", "", "", "3 (3)", "410",
    ]  # fmt: skip


def test_what_a_command_costs_is_its_own_and_not_its_starters() -> None:
    held = bytearray(400_000_000)
    held[::4096] = b"\1" * len(held[::4096])
    script = "x = bytearray(100_000_000); x[::4096] = b'1' * len(x[::4096]); raise SystemExit(3)"
    found = cost_of("20", sys.executable, "-c", script)
    assert found["code"] == 3
    assert 100 < found["peak_mb"] < 200 < len(held) / 1e6
    assert 0 < found["cpu_seconds"] < 20


def test_a_command_that_takes_too_long_is_stopped() -> None:
    assert cost_of("0.5", "sleep", "60")["code"] == 124


def cost_of(*words: str) -> dict[str, float]:
    """What cost_of.py says."""
    done = subprocess.run([sys.executable, ROOT / "cost_of.py", *words], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("formats*.json")), ids=lambda path: path.name)
def test_a_record_has_what_the_benchmark_promises(path: Path) -> None:
    record = json.loads(path.read_text())
    wanted = {"rows", "avx2", "calibration_memory_ratio", "calibration_ms_per_sample", "search", "export_seconds"}
    assert wanted | {"machine", "versions", "python", "commit", "quick"} <= record.keys()
    for row in record["rows"]:
        assert {"model", "n", "sides", "verdict"} == row.keys()
        assert {"accuracy", "latency", "size", "said"} == row["verdict"].keys()
        for figures in row["sides"].values():
            assert {"seconds", "cpu_seconds", "peak_mb"} < figures.keys()
            assert ("why" in figures) != ({"accuracy", "agreement", "bytes", "ms", "avx2"} < figures.keys())
