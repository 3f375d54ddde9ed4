"""What the doctor says of emulators and of what compiles context binaries."""

import importlib.metadata
import platform
import shutil
from pathlib import Path

import pytest

from potstill.pipeline import doctor
from potstill.targets import qemu, runner
from potstill.targets.qemu import ARM64_ROOT


def test_how_to_get_an_emulator_names_the_script_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv(ARM64_ROOT, raising=False)
    found = {one.what: one for one in doctor._emulators()}["emulated cortex-a76"]
    assert (found.ok, found.optional) == (False, True)
    assert found.found.startswith("qemu-aarch64 needs a Python for ARM64, and none is here; packages for ")
    assert "phone-arm64-dotprod" in found.found
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
    assert found.found == "not installed; packages for Snapdragon have no context binary, and there is no qnn-sim"
    assert found.how == 'pip install "potstill[qnn]"'
    monkeypatch.setattr(doctor, "version", lambda name: "2.7.0")
    assert (doctor._context_compiler().ok, doctor._context_compiler().found) == (True, "2.7.0")


def test_a_browser_by_any_of_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = doctor._browser()
    assert (missing.what, missing.ok, missing.optional) == ("chromium", False, True)
    assert (missing.found, missing.how.partition(",")[0]) == (
        "not found; it reaches browsers",
        "apt-get install chromium",
    )
    (tmp_path / "google-chrome").write_text("#!/bin/sh\necho Chrome 1.2\n")
    (tmp_path / "google-chrome").chmod(0o755)
    found = doctor._browser()
    assert (found.what, found.ok, found.found) == ("google-chrome", True, "Chrome 1.2")


def test_the_runtime_of_browsers_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    missing = doctor._browser_runtime()
    assert (missing.what, missing.ok, missing.optional) == ("onnxruntime-web", False, True)
    assert missing.found == "not here yet; it is fetched when a browser is first used"
    assert missing.how == (
        f"npm pack onnxruntime-web@1.30.0, and put onnxruntime-web-1.30.0.tgz into {tmp_path / 'potstill'}"
    )
    folder = tmp_path / "potstill" / "onnxruntime-web-1.30.0"
    folder.mkdir(parents=True)
    assert (doctor._browser_runtime().ok, doctor._browser_runtime().found) == (True, f"1.30.0 in {folder}")


def test_the_runner_for_phones_is_found_once_it_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = doctor._runner()
    assert (found.ok, found.optional) == (False, True)
    assert found.found.startswith("a phone needs a runner, and none for arm64 and ONNX Runtime")
    assert found.how.endswith(" -m potstill.targets.runner arm64")
    runner.place("arm64").mkdir(parents=True)
    assert (doctor._runner().ok, doctor._runner().found) == (True, str(runner.place("arm64")))
