"""What works on this machine: versions, devices, emulators; what is missing and how to get it."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from potstill.targets import runner
from potstill.targets.browser import INSTALL, chromium
from potstill.targets.host import fits, here, runs_here
from potstill.targets.onnxruntime_web import NAME, TARBALL, VERSION, cache_folder
from potstill.targets.qemu import NoEmulator, emulator_of
from potstill.targets.target import Target, load_target, target_names
from potstill.validate.errors import InputError
from potstill.validate.units import counted


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: its name.
        ok: whether it is there and usable.
        optional: whether the main road goes without it.
        found: what was seen.
        how: how to get it.
    """

    what: str
    ok: bool
    optional: bool
    found: str
    how: str = ""


QNN_PACKAGE = "onnxruntime-qnn"
PROGRAMS = (
    ("adb", "Android phones", "apt-get install adb, or Android's platform-tools"),
    ("ssh", "other machines", "apt-get install openssh-client"),
)


def examine() -> list[Finding]:
    """Look at everything once; nothing is installed or changed."""
    fixed = [_python(), *_packages(), _accelerator(), _runtime(), _memory(), _targets()]
    programs = [*map(_program, PROGRAMS), _runner(), _browser(), _browser_runtime()]
    return [*fixed, *_emulators(), _context_compiler(), *programs]


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding("python", ok, False, sys.version.split()[0], "Python 3.11 or newer")


def _packages() -> list[Finding]:
    findings = []
    for text in requires("potstill") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
            ok = requirement.specifier.contains(found.partition("+")[0], prereleases=True)
        except PackageNotFoundError:
            found, ok = "not installed", False
        findings.append(Finding(requirement.name, ok, False, found, f'pip install "{text}"'))
    return findings


def _accelerator() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding(
            "CUDA",
            False,
            True,
            f"none seen by torch {torch.__version__}; training runs on the CPU",
            "a CUDA device and a torch built for it",
        )
    kind = "bf16" if torch.cuda.is_bf16_supported() else "float32"
    return Finding("CUDA", True, True, f"{torch.cuda.get_device_name()}, training in {kind}")


def _runtime() -> Finding:
    import onnxruntime

    return Finding("ONNX Runtime providers", True, False, ", ".join(onnxruntime.get_available_providers()))


def _memory() -> Finding:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(".")
    found = f"{memory.available / 1e9:.1f} GB of memory and {disk.free / 1e9:.1f} GB of disk free"
    return Finding("room", memory.available > 2e9 and disk.free > 2e9, False, found, "2 GB of each for small models")


def _targets() -> Finding:
    host = here()
    alike = [one.target.id for one in fits([load_target(name) for name in target_names()], host) if one.fits]
    found = f"{host.cpu}, {counted(host.cores, 'core')}; computes as {', '.join(alike) or 'none of the targets'}"
    return Finding("this machine", bool(alike), True, found, "packages are judged here by another CPU's arithmetic")


def _emulators() -> list[Finding]:
    """For each CPU that a target emulates and this machine is not: whether packages are checked by its arithmetic."""
    findings, by_cpu = [], dict[str, list[Target]]()
    for target in map(load_target, target_names()):
        if target.emulate and not runs_here(target)[0]:
            by_cpu.setdefault(target.emulate.cpu, []).append(target)
    for cpu, alike in by_cpu.items():
        what, names = f"emulated {cpu}", ", ".join(target.id for target in alike)
        try:
            emulator_of(alike[0])
            findings.append(Finding(what, True, True, f"packages for {names} are checked by its arithmetic"))
        except InputError as error:
            why, _, how = str(error).partition(": ")
            if isinstance(error, NoEmulator):
                why, how = error.why, error.how
            findings.append(Finding(what, False, True, f"{why}; packages for {names} are not checked", how))
    return findings


def _context_compiler() -> Finding:
    """What compiles context binaries for Snapdragon."""
    try:
        return Finding(QNN_PACKAGE, True, True, version(QNN_PACKAGE))
    except PackageNotFoundError:
        found = "not installed; packages for Snapdragon have no context binary, and there is no qnn-sim"
        return Finding(QNN_PACKAGE, False, True, found, 'pip install "potstill[qnn]"')


def _runner() -> Finding:
    """What runs on phones of 64-bit ARM."""
    try:
        return Finding("runner for phones", True, True, str(runner.built("arm64")))
    except InputError as error:
        why, _, how = str(error).partition(": ")
        return Finding("runner for phones", False, True, why.partition(";")[0], how)


def _browser() -> Finding:
    """A Chromium under any of its names."""
    try:
        return _program((Path(chromium()).name, "browsers", INSTALL))
    except InputError:
        return Finding("chromium", False, True, "not found; it reaches browsers", INSTALL)


def _browser_runtime() -> Finding:
    """The runtime that a package meets in a browser."""
    if cache_folder().is_dir():
        return Finding(NAME, True, True, f"{VERSION} in {cache_folder()}")
    how = f"npm pack {NAME}@{VERSION}, and put {TARBALL} into {cache_folder().parent}"
    return Finding(NAME, False, True, "not here yet; it is fetched when a browser is first used", how)


def _program(program: Sequence[str]) -> Finding:
    name, use, how = program
    path = shutil.which(name)
    if path is None:
        return Finding(name, False, True, f"not found; it reaches {use}", how)
    try:
        reply = subprocess.run(
            [path, "-V" if name == "ssh" else "--version"], capture_output=True, text=True, timeout=10, check=False
        )
        lines = (reply.stdout or reply.stderr).strip().splitlines()
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name, False, True, f"does not start: {error}", how)
    return Finding(name, True, True, lines[0] if lines else path)
