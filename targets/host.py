"""This machine's processor, and whether it computes as a target's does."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from potstill.targets.target import Target
from potstill.validate.session import CPU

_ARCH = {"amd64": "x86_64", "x64": "x86_64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Host:
    """A machine: `isa` holds the CPU flags as Linux names them, sorted; empty where they cannot be read."""

    system: str
    arch: str
    isa: tuple[str, ...]
    cpu: str
    cores: int


def here(cpuinfo: Path = Path("/proc/cpuinfo")) -> Host:
    """This machine, read from /proc/cpuinfo on Linux and from `platform` elsewhere.

    `cores` are physical ones, or logical ones where the system does not tell them apart.
    """
    fields: dict[str, str] = {}
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    arch = platform.machine().lower()
    return Host(
        system=platform.system(),
        arch=_ARCH.get(arch, arch),
        isa=tuple(sorted({*fields.get("flags", "").split(), *fields.get("Features", "").split()})),
        cpu=fields.get("model name") or platform.processor() or "unknown",
        cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
    )


def runs_here(target: Target, host: Host | None = None) -> tuple[bool, str]:
    """Whether this machine's CPU computes as the target's does, and the reason in one sentence.

    It does when the target runs on ONNX Runtime's CPU provider, the architecture is the same, each instruction
    set of `hardware.isa` is here and none of `hardware.without`: int8 kernels round by the instruction set.
    Source: ONNX Runtime, onnxruntime/core/mlas/lib/platform.cpp.
    """
    host = host or here()
    wanted = target.hardware
    if target.runtime.name != "onnxruntime" or target.runtime.providers[:1] != [CPU]:
        return (
            False,
            f"{target.id} runs on {target.runtime.name} with {' and '.join(target.runtime.providers)}, "
            "not on a CPU provider.",
        )
    if wanted.arch != host.arch:
        return False, f"{target.id} is for {wanted.arch} and this machine is {host.arch}."
    if not host.isa and (wanted.isa or wanted.without):
        return False, f"The instruction sets of this machine cannot be read on {host.system}."
    missing = [flag for flag in wanted.isa if not set(flag.split("|")) & set(host.isa)]
    if missing:
        return False, f"This machine's CPU lacks {', '.join(missing)}, which {target.id} has."
    extra = [flag for flag in wanted.without if flag in host.isa]
    if extra:
        return False, f"This machine's CPU has {', '.join(extra)}, which {target.id} lacks: int8 results may differ."
    return True, f"This machine's CPU ({host.cpu}) has the instruction sets of {target.id}."


@dataclass(frozen=True)
class Fit:
    """Whether a target fits a machine, and why, in one sentence."""

    target: Target
    fits: bool
    why: str


def fits(targets: Sequence[Target], host: Host | None = None) -> list[Fit]:
    """The targets that compute as this machine does, the one that asks for most of its CPU first; then all others.

    An instruction set that must be there or may not counts one, `a|b` a half. Of equals the one that others extend
    comes first.
    """
    host = host or here()
    by_id = {target.id: target for target in targets}

    def asked(target: Target) -> float:
        wanted = sum(1 / len(flag.split("|")) for flag in target.hardware.isa)
        return wanted + len(target.hardware.without)

    def depth(target: Target | None) -> int:
        return 0 if target is None else 1 + depth(by_id.get(target.extends or ""))

    found = [Fit(target, *runs_here(target, host)) for target in targets]
    return sorted(found, key=lambda one: (not one.fits, -asked(one.target), depth(one.target), one.target.id))
