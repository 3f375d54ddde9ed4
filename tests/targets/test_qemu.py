"""Another CPU's arithmetic: against the instruction's own definition, in numpy."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from potstill.targets import qemu
from potstill.targets.qemu import ARM64_ROOT, Crashed, NoEmulator, emulator_of, emulator_version
from potstill.targets.target import Emulate, load_target
from potstill.targets.wire import EmulatedPredictor
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.errors import InputError

AVX2, PHONE = load_target("laptop-x86-avx2"), load_target("phone-arm64-dotprod")
X86 = pytest.mark.skipif(
    not (shutil.which("qemu-x86_64") and platform.machine() == "x86_64"), reason="needs qemu-x86_64 on x86_64"
)
ARM64 = pytest.mark.skipif(
    not (shutil.which("qemu-aarch64") and os.environ.get(ARM64_ROOT)), reason=f"needs qemu-aarch64 and {ARM64_ROOT}"
)
COLUMNS, CLASSES = 64, 16


def write_product(path: Path, weights: NDArray[Any]) -> None:
    """`x` (rows, COLUMNS) as uint8 times integer weights (COLUMNS, CLASSES), as float."""
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.UINT8),
        helper.make_node("MatMulInteger", ["a", "w"], ["c"]),
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", COLUMNS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", CLASSES])],
        [numpy_helper.from_array(weights, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def saturated(a: NDArray[np.int64], w: NDArray[np.int64]) -> NDArray[np.int64]:
    """VPMADDUBSW (Intel's manual, volume 2): neighbours' products are added in 16 bits, and stay at the ends."""
    products = a[:, :, None] * w[None]
    return np.clip(products[:, 0::2] + products[:, 1::2], -(2**15), 2**15 - 1).sum(axis=1)


@pytest.mark.parametrize(
    ("target", "dtype", "overflows"),
    [
        pytest.param(AVX2, np.int8, True, marks=X86),
        pytest.param(AVX2, np.uint8, False, marks=X86),
        pytest.param(PHONE, np.int8, False, marks=ARM64),
    ],
)
def test_products_are_those_of_the_emulated_cpu(target: Any, dtype: Any, overflows: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    a = random.integers(100, 256, size=(6, COLUMNS))
    w = random.integers(60, 128, size=(COLUMNS, CLASSES)) * random.choice([-1, 1] if dtype is np.int8 else [1], CLASSES)
    write_product(tmp_path / "model.onnx", w.astype(dtype))
    predictor = EmulatedPredictor(target, tmp_path / "model.onnx", ArrayEncoder(), "the product")
    found = predictor({"x": a.astype(np.float32)})
    assert not np.array_equal(saturated(a, w), a @ w) or dtype is np.uint8
    np.testing.assert_array_equal(found, saturated(a, w) if overflows else a @ w)


@X86
def test_in_a_given_time_the_first_examples_are_answered(tmp_path: Path) -> None:
    write_product(tmp_path / "model.onnx", np.ones((COLUMNS, CLASSES), np.int8))
    predictor = EmulatedPredictor(AVX2, tmp_path / "model.onnx", ArrayEncoder(), "the product")
    rows = {"x": np.arange(5 * COLUMNS, dtype=np.float32).reshape(5, COLUMNS) % 100}
    (only,) = predictor.first(rows, 0.0)
    np.testing.assert_array_equal(only, rows["x"][:1].sum(axis=1, keepdims=True).repeat(CLASSES, axis=1))
    assert len(predictor.first(rows, 60.0)) == 5


@X86
def test_a_file_that_crashes_is_told_from_an_emulator_that_is_missing(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    rows = {"x": np.zeros((1, COLUMNS), dtype=np.float32)}
    predictor = EmulatedPredictor(AVX2, tmp_path / "model.onnx", ArrayEncoder(), "the package")
    with pytest.raises(Crashed, match=f"the package crashed as {predictor.chip}: the agent failed with") as file:
        predictor(rows)
    assert str(file.value).endswith("Load model from model.onnx failed:Protobuf parsing failed.")
    assert "\n" not in str(file.value)
    assert str(tmp_path) not in str(file.value)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="qemu-x86_64 is not here"):
        EmulatedPredictor(AVX2, tmp_path / "model.onnx", ArrayEncoder(), "the package")


@X86
def test_an_instruction_that_is_not_there(tmp_path: Path) -> None:
    """numpy itself needs SSE4.2, which the first CPU of 64 bits does not have."""
    write_product(tmp_path / "model.onnx", np.ones((COLUMNS, CLASSES), np.int8))
    assert AVX2.emulate
    old = AVX2.model_copy(update={"emulate": AVX2.emulate.model_copy(update={"cpu": "qemu64-v1"})})
    predictor = EmulatedPredictor(old, tmp_path / "model.onnx", ArrayEncoder(), "the package")
    with pytest.raises(Crashed, match="the package crashed as qemu64-v1: "):
        predictor({"x": np.zeros((1, COLUMNS), dtype=np.float32)})


@X86
def test_the_version_is_what_the_emulator_says() -> None:
    asked = subprocess.run(["qemu-x86_64", "--version"], capture_output=True, text=True, check=True)
    assert emulator_version(AVX2) == asked.stdout.splitlines()[0]
    assert re.match(r"qemu-x86_64 version \d", emulator_version(AVX2))


def test_an_emulator_that_does_not_start(tmp_path: Path) -> None:
    broken = tmp_path / "qemu"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(InputError, match="qemu --version failed with exit code 3; install it anew: apt-get install"):
        qemu._version(str(broken))


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux on x86_64 with every program."""
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv(ARM64_ROOT, raising=False)


@pytest.mark.usefixtures("linux")
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no emulator is known for browser-wasm; run the package's golden samples on"):
        emulator_of(load_target("browser-wasm"))
    with pytest.raises(
        NoEmulator, match="qemu-aarch64 needs a Python for ARM64, and none is here; `pots.* doctor` says"
    ) as bare:
        emulator_of(PHONE)
    monkeypatch.setenv(ARM64_ROOT, str(tmp_path))
    with pytest.raises(
        NoEmulator, match=f"the folder of {ARM64_ROOT} has no cortex-a76/proc/cpuinfo; `potstill doc"
    ) as empty:
        emulator_of(PHONE)
    for one in (bare.value, empty.value):  # what a package's card says, and what the doctor does
        assert "/" not in str(one).replace("cortex-a76/proc/cpuinfo", "")
        assert (
            one.how
            == f"sh {Path(qemu.__file__).with_name('arm64_root.sh')} FOLDER, then set {ARM64_ROOT} to that folder"
        )
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(InputError, match="qemu-x86_64 needs a Python for x86_64, and this machine is aarch64"):
        emulator_of(AVX2)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="qemu-x86_64 is not here: apt-get install qemu-user"):
        emulator_of(AVX2)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    with pytest.raises(InputError, match="qemu-x86_64 runs programs of Linux, and this is Darwin"):
        emulator_of(AVX2)


@pytest.mark.usefixtures("linux")
def test_a_root_without_this_onnxruntime_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(ARM64_ROOT, str(tmp_path))
    for name in ("proc/cpuinfo", "usr/bin/python3", "opt/packages/onnxruntime-0.1.dist-info"):
        (tmp_path / "cortex-a76" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cortex-a76" / name).touch()
    with pytest.raises(InputError, match=r"has no cortex-a76/opt/packages/onnxruntime-[1-9].*.dist-info"):
        emulator_of(PHONE)


def test_each_arm64_cpu_of_a_profile_has_its_cpuinfo() -> None:
    script = Path(qemu.__file__).with_name("arm64_root.sh").read_text()
    for name in ("phone-arm64", "phone-arm64-dotprod", "phone-arm64-i8mm"):
        emulate = load_target(name).emulate
        assert isinstance(emulate, Emulate)
        assert f"\ncpu {emulate.cpu} 0x" in script
