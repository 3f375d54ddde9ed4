"""This machine's processor, and whether it computes as a target's does."""

import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

from potstill.targets.target import Target

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
    if target.runtime.name != "onnxruntime" or target.runtime.providers[:1] != ["CPUExecutionProvider"]:
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
