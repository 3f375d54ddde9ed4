"""A target's CPU, emulated by QEMU's user mode: the same file by that CPU's instructions, so with its rounding.

What is emulated is arithmetic. Its time says nothing of the device's.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

from potstill.targets.target import Target
from potstill.validate.errors import InputError, PotstillError

ARM64_ROOT = "POTSTILL_ARM64_ROOT"
INSTALL = "apt-get install qemu-user"


@dataclass(frozen=True)
class Emulator:
    """A command that runs Python with onnxruntime and numpy as another CPU does.

    Attributes:
        cpu: that CPU, by QEMU's name.
        python: the words of the command, before those of Python.
        environment: what it needs in its environment.
    """

    cpu: str
    python: tuple[str, ...]
    environment: Mapping[str, str]


class NoEmulator(InputError):
    """Nothing emulates a CPU here. The message goes into a package, so it names no path of this machine; `how` may."""

    def __init__(self, why: str, how: str) -> None:
        super().__init__(f"{why}; `potstill doctor` says how to get it")
        self.why, self.how = why, how


class Crashed(PotstillError):
    """A file ended, as another CPU, without an answer: it does not open, or meets an instruction that is not there."""


def emulator_of(target: Target) -> Emulator:
    """What emulates a target's CPU here.

    Raises:
        InputError: nothing does: why, and what to do.
    """
    if target.emulate is None:
        raise InputError(f"no emulator is known for {target.id}; run the package's golden samples on the device")
    if platform.system() != "Linux":
        raise InputError(f"{target.emulate.binary} runs programs of Linux, and this is {platform.system()}; use Linux")
    if shutil.which(target.emulate.binary) is None:
        raise InputError(f"{target.emulate.binary} is not here: {INSTALL}")
    if target.hardware.arch == "arm64":
        return _arm64(target.emulate.binary, target.emulate.cpu)
    if platform.machine() != "x86_64":
        raise InputError(
            f"{target.emulate.binary} needs a Python for x86_64, and this machine is {platform.machine()}; use x86_64"
        )
    return _x86(target.emulate.binary, target.emulate.cpu)


def _x86(binary: str, cpu: str) -> Emulator:
    """This very Python, without its virtual environment's launcher, which the emulator would leave."""
    places = dict.fromkeys(str(distribution(name).locate_file("")) for name in ("onnxruntime", "numpy"))
    python = (binary, "-cpu", cpu, str(Path(sys.executable).resolve()))
    return Emulator(cpu, python, {"PYTHONPATH": os.pathsep.join(places)})


def _arm64(binary: str, cpu: str) -> Emulator:
    """The Python of the folder that `arm64_root.sh` fills; its /proc/cpuinfo must be that of the CPU.

    ONNX Runtime chooses its kernels by that file: with another CPU's it meets instructions that are not there.
    """
    script = Path(__file__).with_name("arm64_root.sh")
    how = f"sh {script} FOLDER, then set {ARM64_ROOT} to that folder"
    if not (given := os.environ.get(ARM64_ROOT)):
        raise NoEmulator(f"{binary} needs a Python for ARM64, and none is here", how)
    root = Path(given).resolve() / cpu
    wanted = f"onnxruntime-{distribution('onnxruntime').version}.dist-info"
    for path in (root / "proc/cpuinfo", root / "usr/bin/python3", root / "opt/packages" / wanted):
        if not path.exists():
            raise NoEmulator(f"the folder of {ARM64_ROOT} has no {path.relative_to(root.parent)}", how)
    python = (binary, "-L", str(root), "-cpu", cpu, str((root / "usr/bin/python3").resolve()))
    packages = root / "opt/packages"
    return Emulator(cpu, python, {"PYTHONHOME": str(root / "usr"), "PYTHONPATH": str(packages)})


def emulator_version(target: Target) -> str:
    """The version of what emulates a target's CPU here, as it says itself in its first line.

    Raises:
        InputError: as of `emulator_of`.
    """
    return _version(emulator_of(target).python[0])


@cache
def _version(binary: str) -> str:
    asked = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=60, check=False)
    if asked.returncode or not asked.stdout.strip():
        raise InputError(f"{binary} --version failed with exit code {asked.returncode}; install it anew: {INSTALL}")
    return asked.stdout.strip().splitlines()[0]
