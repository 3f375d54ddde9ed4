import platform
import re
from dataclasses import replace
from pathlib import Path

import pytest

from potstill.targets.host import Host, fits, here, runs_here
from potstill.targets.target import load_target, target_names

VNNI = Host("Linux", "x86_64", ("avx2", "avx512_vnni"), "a CPU", 2)


def test_here_is_this_machine() -> None:
    host = here()
    assert host.system == platform.system()
    assert host.cores >= 1
    assert host.arch in ("x86_64", "arm64")


def test_arm_flags_are_read_from_cpuinfo(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\nCPU part\t: 0xd0b\n\nprocessor\t: 1\n")
    assert here(file).isa == ("asimd", "asimddp", "fp", "i8mm")


def test_without_cpuinfo_nothing_is_claimed(tmp_path: Path) -> None:
    assert here(tmp_path / "missing").isa == ()


@pytest.mark.parametrize(
    ("target", "host", "runs", "reason"),
    [
        ("laptop-x86-vnni", VNNI, True, "has the instruction sets of laptop-x86-vnni"),
        ("laptop-x86-vnni", replace(VNNI, isa=("avx2", "avx_vnni")), True, "has the instruction sets"),
        ("laptop-x86-vnni", replace(VNNI, isa=("avx2",)), False, r"lacks avx_vnni\|avx512_vnni"),
        ("laptop-x86-avx2", VNNI, False, "has avx512_vnni, which laptop-x86-avx2 lacks"),
        ("laptop-x86-avx2", replace(VNNI, isa=("avx2",)), True, "has the instruction sets"),
        ("laptop-x86-avx2", replace(VNNI, isa=(), system="Darwin"), False, "cannot be read on Darwin"),
        ("phone-arm64", VNNI, False, "is for arm64 and this machine is x86_64"),
        ("phone-arm64-dotprod", Host("Linux", "arm64", ("asimd",), "a CPU", 2), False, "lacks asimddp"),
        ("phone-iphone", Host("Darwin", "arm64", (), "a CPU", 2), False, "not on a CPU provider"),
        ("phone-iphone", VNNI, False, "onnxruntime with CoreMLExecutionProvider and CPUExecutionProvider, not on"),
        ("browser-wasm", VNNI, False, "runs on onnxruntime-web"),
    ],
)
def test_runs_here(target: str, host: Host, runs: bool, reason: str) -> None:
    answer, sentence = runs_here(load_target(target), host)
    assert answer is runs
    assert re.search(reason, sentence)


ALL = [load_target(name) for name in target_names()]
AVX512 = ("avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl")
ARM = ("asimd", "asimddp", "fp")


@pytest.mark.parametrize(
    ("arch", "isa", "wanted"),
    [
        ("x86_64", (*AVX512, "avx512_vnni", "avx_vnni"), ["laptop-x86-avx512-vnni", "laptop-x86-vnni"]),
        ("x86_64", ("avx2", "avx_vnni"), ["laptop-x86-avx-vnni", "laptop-x86-vnni"]),
        ("x86_64", AVX512, ["laptop-x86-avx512", "laptop-x86-avx2"]),
        ("x86_64", ("avx2",), ["laptop-x86-avx2"]),
        ("x86_64", ("sse4_2",), []),
        ("arm64", (*ARM, "i8mm"), ["phone-arm64-i8mm", "phone-arm64-dotprod", "phone-iphone-cpu", "laptop-apple-cpu"]),
        ("arm64", ("asimd",), ["phone-arm64"]),
        ("riscv64", (), []),
    ],
)
def test_the_target_that_asks_for_most_fits_best(arch: str, isa: tuple[str, ...], wanted: list[str]) -> None:
    found = fits(ALL, Host("Linux", arch, isa, "a CPU", 2))
    assert [one.target.id for one in found if one.fits][: len(wanted)] == wanted
    assert [one.fits for one in found] == sorted((one.fits for one in found), reverse=True)
    assert len(found) == len(ALL)
    assert all(one.why.endswith(".") for one in found)
    if not wanted:
        assert not any(one.fits for one in found)


def test_why_a_target_does_not_fit() -> None:
    why = {one.target.id: one.why for one in fits(ALL, VNNI)}
    assert why["laptop-x86-avx512"].startswith("This machine's CPU lacks avx512f, avx512bw, avx512dq, avx512vl")
    assert why["laptop-x86-avx-vnni"].startswith("This machine's CPU lacks avx_vnni")
    assert "runs on onnxruntime-web with webgpu and wasm" in why["browser-webgpu"]
