"""An emulated CPU as a device: its instructions repeat, and what it cannot say is refused or said."""

import os
import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from potstill.pipeline.cli import call
from potstill.targets import emulate
from potstill.targets.devices import Reach, open_device
from potstill.targets.emulate import EmulatedCpu
from potstill.targets.measurement import Measurement
from potstill.targets.profile import compare, profile
from potstill.targets.qemu import ARM64_ROOT
from potstill.targets.sustained import sustained
from potstill.targets.target import load_target, target_names
from potstill.validate.errors import InputError, PotstillError

X86 = pytest.mark.skipif(
    not (shutil.which("qemu-x86_64") and platform.machine() == "x86_64"), reason="needs qemu-x86_64 on x86_64"
)
COUNTING = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler (cc)")
MakePackage = Callable[..., Path]
AVX2 = "laptop-x86-avx2"


def counts(found: Measurement) -> tuple[int, int, float]:
    assert found.instructions, found.notes
    return found.instructions.load, found.instructions.first_run, found.instructions.median


def on(target: str) -> Any:
    """A mark: that target's CPU can be emulated here, and its instructions counted."""
    try:
        EmulatedCpu(load_target(target))
    except InputError as error:
        return pytest.mark.skip(reason=str(error))
    return COUNTING


EMULATED = [name for name in target_names() if load_target(name).emulate]


@pytest.mark.parametrize("target", [pytest.param(name, marks=on(name)) for name in EMULATED])
def test_instructions_repeat_over_processes(make_package: MakePackage, target: str) -> None:
    package, device = make_package(width=256, layers=8, rows=(32,), target=target), EmulatedCpu(load_target(target))
    one, other = (profile(package, device=device) for _ in range(2))
    assert counts(one) == pytest.approx(counts(other), rel=1e-3)
    load, first, run = counts(one)
    assert load > first > run
    products = 8 * 32 * 256 * 256  # multiply-adds; a vector of AVX2 holds 8, one of NEON 4
    assert products / 8 < run < products
    assert one.instructions
    assert 0 <= one.instructions.spread < 0.01
    assert (one.kind, one.runs, one.warmup, one.threads, one.operators) == ("emulated", 5, 1, 1, [])
    assert one.where.cpu == f"{device.emulator.cpu}, emulated"
    assert one.where.arch == {"x86_64": "x86_64", "arm64": "aarch64"}[load_target(target).hardware.arch]
    assert one.versions["emulator"].startswith("qemu-")


@X86
@COUNTING
def test_twice_the_work_is_twice_the_instructions(make_package: MakePackage) -> None:
    device = EmulatedCpu(load_target(AVX2))
    few, many = (
        counts(profile(make_package(f"{n}", width=256, layers=n, rows=(64,)), device=device, runs=2))[2] for n in (4, 8)
    )
    assert 1.9 < many / few < 2.05


@X86
@COUNTING
def test_what_is_the_machines_is_not_told_of_the_emulated_cpu(make_package: MakePackage) -> None:
    found = profile(make_package(), device=EmulatedCpu(load_target(AVX2)), runs=1)
    assert (found.peak_memory_mb, found.energy_mj, found.sensors, found.where.cores) == (None, None, {}, 1)
    assert found.to_json()["instructions"]["median"] > 0


@X86
def test_by_the_command_line(make_package: MakePackage, capfd: pytest.CaptureFixture[str]) -> None:
    package = str(make_package(target=AVX2))
    assert call(["profile", package, "--on", "emulate", "--runs", "2", "--budget", "latency_p90=9s"]) == 3
    said = capfd.readouterr()
    assert "emulated on emulate: Haswell, emulated" in said.out
    assert "the emulator's own, no latency" in said.out
    assert ("million" in said.out) == bool(shutil.which("cc"))
    assert "the times of emulate are emulated and say nothing" in said.err
    vnni = str(make_package("vnni", target="laptop-x86-vnni"))
    assert call(["profile", vnni, "--on", f"emulate://{AVX2}", "--runs", "2"]) == 0
    assert f"emulated on emulate://{AVX2}: Haswell" in capfd.readouterr().out


@X86
def test_without_a_compiler_the_counts_are_not_available(
    make_package: MakePackage, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    package = make_package(target=AVX2)
    monkeypatch.setattr(emulate, "COMPILER", "no-such-compiler")
    found = profile(package, device=EmulatedCpu(load_target(AVX2)), runs=2)
    assert found.instructions is None
    assert found.runs == 2
    (note,) = found.notes
    assert note == (
        "instructions were not counted: there is no C compiler (no-such-compiler) for QEMU's plugin; "
        "apt-get install gcc libc6-dev"
    )
    assert call(["profile", str(package), "--on", "emulate", "--runs", "2"]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "instructions not available" in said
    assert "there is no C compiler" in said


@X86
@COUNTING
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("qemu_plugin_version = 1", "qemu_plugin_version = 99", "does not take the plugin: .*API version 99"),
        ("#include <stdio.h>", "#include <no_such.h>", "cc failed on QEMU's plugin: .*no_such.h"),
    ],
)
def test_a_plugin_of_another_qemu(
    make_package: MakePackage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, old: str, new: str, words: str
) -> None:
    source = emulate.PLUGIN.read_text()
    assert old in source
    (tmp_path / "other.c").write_text(source.replace(old, new))
    monkeypatch.setattr(emulate, "PLUGIN", tmp_path / "other.c")
    found = profile(make_package(), device=EmulatedCpu(load_target(AVX2)), runs=1)
    assert found.instructions is None
    (note,) = found.notes
    assert re.search(words, note), note


@X86
@COUNTING
def test_marks_that_are_missing_are_no_counts(make_package: MakePackage, monkeypatch: pytest.MonkeyPatch) -> None:
    source = emulate.PLUGIN.read_text()
    other = make_package().parent / "other.c"
    other.write_text(source.replace("WHICH 0x5150", "WHICH 0x5151"))
    monkeypatch.setattr(emulate, "PLUGIN", other)
    with pytest.raises(PotstillError, match="the emulator noted 0 marks, expected 8 for 2 runs"):
        profile(other.parent / "package", device=EmulatedCpu(load_target(AVX2)), runs=2)


@X86
@COUNTING
def test_a_file_that_fails_there_is_no_fault_of_the_plugin(make_package: MakePackage) -> None:
    package = make_package()
    model = onnx.load(package / "model.onnx")
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, package / "model.onnx")
    with pytest.raises(PotstillError, match="the agent failed with exit code 1"):
        profile(package, device=EmulatedCpu(load_target(AVX2)))


@X86
def test_figures_of_time_are_refused(make_package: MakePackage) -> None:
    package, device = make_package(), EmulatedCpu(load_target(AVX2))
    with pytest.raises(InputError, match="say nothing of heat; leave out --sustained"):
        sustained(package, 20, device=device)
    with pytest.raises(InputError, match="says nothing of time under load"):
        profile(package, device=device, throughput=[1])
    with pytest.raises(InputError, match="nothing of which package is faster; profile each alone"):
        compare([package, package], device=device)
    with pytest.raises(InputError, match="2 threads are asked for, and an emulated CPU runs one"):
        profile(package, device=device, threads=2)


def test_a_target_without_an_emulator() -> None:
    with pytest.raises(InputError, match="no emulator is known for the CPU of laptop-x86-vnni; name another target's"):
        open_device("emulate", Reach(load_target("laptop-x86-vnni")))
    with pytest.raises(InputError, match="no target named 'laptop'"):
        open_device("emulate://laptop")
    with pytest.raises(InputError, match="emulate is the CPU of a package's target, and there is none here; name it"):
        open_device("emulate")


def test_no_profile_takes_the_whole_cpu_of_qemu() -> None:
    """Its SME gives wrong numbers, and its vectors are wider than any phone's."""
    for name in EMULATED:
        emulated = load_target(name).emulate
        assert emulated
        cpu, *features = emulated.cpu.split(",")
        assert cpu != "max" or {"sme=off", "sve-default-vector-length=16"} <= set(features)


@pytest.mark.skipif(
    not (shutil.which("qemu-aarch64") and os.environ.get(ARM64_ROOT)), reason=f"needs qemu-aarch64 and {ARM64_ROOT}"
)
@COUNTING
def test_newer_arm_cores_take_fewer_instructions_for_int8(tmp_path: Path, make_package: MakePackage) -> None:
    from onnxruntime.quantization import quantize_dynamic

    runs = []
    for name in ("phone-arm64", "phone-arm64-dotprod"):
        package = make_package(name, width=256, layers=2, rows=(64,), target=name)
        quantize_dynamic(package / "model.onnx", package / "q.onnx")
        (package / "q.onnx").rename(package / "model.onnx")
        runs.append(counts(profile(package, device=EmulatedCpu(load_target(name)), runs=2))[2])
    assert runs[1] < 0.8 * runs[0]
    assert np.isfinite(runs).all()
