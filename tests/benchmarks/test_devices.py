"""The pure pieces of `make bench-devices`: which examples are taken, what counts as caught, and the bare loop."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

ROOT = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def devices() -> ModuleType:
    """The benchmark, whose neighbours it imports by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        spec = importlib.util.spec_from_file_location("bench_devices", ROOT / "devices.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def test_some_examples_are_drawn_alike_and_stay_whole(devices: Any, tmp_path: Path) -> None:
    x = np.arange(50, dtype=np.float32)[:, None]
    np.savez(tmp_path / "test.npz", x=x, y=np.arange(50))
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\n" + "".join(f'a "quoted {i}\t{i}\n' for i in range(50)))
    with np.load(devices.some(tmp_path / "test.npz", 20, tmp_path)) as drawn:
        chosen = drawn["y"].tolist()
        assert drawn["x"][:, 0].tolist() == chosen
    assert len(set(chosen)) == 20
    head, *rows = devices.some(tmp_path / "dev.tsv", 20, tmp_path).read_text().splitlines()
    assert head == "sentence\tlabel"
    assert rows == [f'a "quoted {i}\t{i}' for i in chosen]
    assert devices.some(tmp_path, 20, tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("bad", "good", "caught"),
    [((3, True), 0, True), ((3, False), 0, False), ((0, False), 0, False), ((3, True), 3, False)],
)
def test_the_trap_is_caught_when_one_fails_for_saturation_and_the_other_passes(
    devices: Any, bad: tuple[int, bool], good: int, caught: bool
) -> None:
    found = {"for_vnni": {"exit_code": bad[0], "saturation": bad[1]}, "for_avx2": {"exit_code": good}}
    assert devices.caught(found) is caught


def test_the_bare_loop_prints_a_median(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "nothing", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "inputs.npz", x=np.zeros(1, np.float32))
    words = [
        sys.executable,
        str(ROOT / "bare_loop.py"),
        str(tmp_path / "model.onnx"),
        str(tmp_path / "inputs.npz"),
        "9",
    ]
    median = float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert 0 < median < 1000
