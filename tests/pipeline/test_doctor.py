"""What the doctor says of emulators and of what compiles context binaries."""

import importlib.metadata
import platform
import shutil
from pathlib import Path

import pytest

from potstill.pipeline import doctor
from potstill.targets import qemu
from potstill.targets.qemu import ARM64_ROOT


def test_how_to_get_an_emulator_names_the_script_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv(ARM64_ROOT, raising=False)
    found = {one.what: one for one in doctor._emulators()}["emulated cortex-a76"]
    assert (found.ok, found.optional) == (False, True)
    assert found.found.startswith("qemu-aarch64 needs a Python for ARM64, and none is here; packages for phone-arm64-")
    script = Path(qemu.__file__).with_name("arm64_root.sh")
    assert script.is_file()
    assert found.how == f"sh {script} FOLDER, then set {ARM64_ROOT} to that folder"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = {one.what: one for one in doctor._emulators()}["emulated cortex-a76"]
    assert (found.found.partition(";")[0], found.how) == ("qemu-aarch64 is not here", "apt-get install qemu-user")


def test_the_compiler_of_context_binaries_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", missing)
    found = doctor._context_compiler()
    assert (found.what, found.ok, found.optional) == ("onnxruntime-qnn", False, True)
    assert found.found == "not installed; packages for Snapdragon have no context binary"
    assert found.how == 'pip install "potstill[qnn]"'
    monkeypatch.setattr(doctor, "version", lambda name: "2.7.0")
    assert (doctor._context_compiler().ok, doctor._context_compiler().found) == (True, "2.7.0")
