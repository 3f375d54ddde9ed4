"""The system's adb and Android's own adbd, on this machine: `sh tests/targets/adbd/build.sh FOLDER` builds that.

The phone's processor is this machine's, or a Cortex-A76 by an emulator, with the runner that a phone gets.
"""

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.targets import runner
from potstill.targets.adb import Adb
from potstill.targets.device import Device, Made
from potstill.targets.local import Local
from potstill.targets.profile import profile
from potstill.targets.qemu import ARM64_ROOT, emulator_of
from potstill.targets.target import load_target
from potstill.validate.errors import InputError, PotstillError, Unreachable

MakePackage = Callable[..., Path]
ADBD = os.environ.get("POTSTILL_ADBD", "")
pytestmark = pytest.mark.skipif(
    not (shutil.which("adb") and Path(ADBD).is_file()), reason="needs adb, and adbd named by POTSTILL_ADBD"
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def adb(*words: str) -> str:
    return subprocess.run(["adb", *words], capture_output=True, text=True, timeout=60, check=False).stdout


class Phone:
    """An adbd with some properties of its own, and the device that reaches it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.process = folder, free_port(), None
        self.root = folder / "data" / "potstill"
        self.device = Adb(f"127.0.0.1:{self.port}", root=str(self.root))
        self.write_property("ro.product.cpu.abi", "x86_64")

    def write_property(self, name: str, value: str) -> None:
        (self.folder / "bin").mkdir(parents=True, exist_ok=True)
        (self.folder / "bin/getprop").write_text(f'#!/bin/sh\n[ "$1" != {name} ] || echo {value}\n')
        (self.folder / "bin/getprop").chmod(0o755)

    def switch_on(self, state: str = "device", **more: str) -> None:
        environment = {
            **os.environ,
            **more,
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "ADBD_PORT": str(self.port),
        }
        self.process = subprocess.Popen([ADBD], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(100):
            adb("disconnect", self.device.serial or "")
            adb("connect", self.device.serial or "")
            if f"{self.device.serial}\t{state}\n" in adb("devices"):
                return
            time.sleep(0.1)
        pytest.fail(f"adb never said {state}")

    def switch_off(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    @property
    def jobs(self) -> list[Path]:
        return list((self.root / "jobs").iterdir())


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Phone]:
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")))
    monkeypatch.setenv("HOME", str(tmp_path))  # where adb keeps its key
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(free_port()))
    monkeypatch.setenv("ADB_LOCAL_TRANSPORT_MAX_PORT", "5554")  # it looks for no emulators of Android
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    found = Phone(tmp_path / "phone")
    yield found
    found.switch_off()
    adb("kill-server")


def answer(device: Device, model: Path, folder: Path, **more: Any) -> bytes:
    """The outputs of two examples."""
    folder.mkdir()
    (folder / "given.bin").write_bytes(np.random.default_rng(0).standard_normal((2, 512)).astype("<f4").tobytes())
    shape = {"x0": {"dtype": "float32", "shape": [1, 512]}}
    files = {"inputs": folder / "given.bin", "outputs": Made(folder / "made.bin")}
    device.ask({"threads": 1, "answer": {"path": model, "examples": [shape, shape], **files}}, **more)
    return (folder / "made.bin").read_bytes()


def built(arch: str) -> Path:
    try:
        return runner.built(arch)
    except InputError as error:
        pytest.skip(str(error))


def test_a_package_is_measured_and_answered(phone: Phone, make_package: MakePackage, tmp_path: Path) -> None:
    built("x86_64")
    phone.switch_on()
    package = make_package(width=512)
    found = profile(package, device=phone.device, runs=20)
    assert (found.where.system, found.runs, len(found.nodes)) == ("Android", 20, 8)
    assert found.sensors["before"]["battery_percent"] is None  # no dumpsys there
    ours = answer(phone.device, package / "model.onnx", tmp_path / "a")
    assert ours == answer(Local(), package / "model.onnx", tmp_path / "b")
    assert phone.jobs == []
    assert phone.device.clean() > 30_000_000
    assert not phone.root.exists()


def test_a_phone_that_goes_away_and_comes_back(phone: Phone, make_package: MakePackage, tmp_path: Path) -> None:
    built("x86_64")
    phone.switch_on()
    package = make_package(width=512)

    def go() -> None:
        while not list(phone.root.glob("jobs/*/agent")):
            time.sleep(0.02)
        time.sleep(0.3)
        phone.switch_off()

    watch = threading.Thread(target=go)
    watch.start()
    with pytest.raises(
        Unreachable, match="127.0.0.1:.* went away while it was to run the agent .*; run again when it is"
    ) as lost:
        profile(package, device=phone.device, runs=1_000_000)
    watch.join()
    assert lost.value.exit_code == 4
    with pytest.raises(
        Unreachable, match=r"127.0.0.1:\d+ is offline; connect it anew, or run: adb reconnect offline|adb lists no"
    ):
        profile(package, device=phone.device, runs=3)
    for _ in range(100):
        if not phone.jobs:
            break
        time.sleep(0.1)
    assert phone.jobs == []  # what ran there saw that nobody listens any more
    phone.switch_on()
    assert profile(package, device=phone.device, runs=3).runs == 3


def test_a_phone_that_does_not_trust_this_computer(phone: Phone) -> None:
    phone.switch_on("unauthorized", ADBD_SECURE="1")
    with pytest.raises(
        Unreachable, match="does not trust this computer; unlock it, and allow USB debugging where it asks"
    ):
        phone.device.ask({})


def test_a_phone_that_is_not_there(phone: Phone) -> None:
    with pytest.raises(Unreachable, match=r"adb lists no 127.0.0.1:\d+, only nothing; run: adb connect 127.0.0.1:\d+"):
        phone.device.ask({})


@pytest.mark.skipif(
    not (shutil.which("qemu-aarch64") and os.environ.get(ARM64_ROOT)), reason=f"needs qemu-aarch64 and {ARM64_ROOT}"
)
def test_an_arm64_phone(
    phone: Phone, make_package: MakePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loader is one of this machine that starts the loader of ARM64 in the emulator."""
    emulator = emulator_of(load_target("phone-arm64-dotprod"))
    real = built("arm64")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    shutil.copytree(real, runner.place("arm64"))
    loader = runner.place("arm64") / runner.loader("arm64")
    loader.rename(loader.with_name("loader-of-arm64"))
    words = " ".join(emulator.python[:-1])
    loader.write_text(f'#!/bin/sh\nexec {words} "$(dirname "$0")/loader-of-arm64" "$@"\n')
    phone.write_property("ro.product.cpu.abi", "arm64-v8a")
    phone.switch_on()
    package = make_package(width=512)
    found = profile(package, device=phone.device, runs=3)
    assert found.where.arch == "aarch64"
    assert [node.operator for node in found.nodes] == ["MatMul", "Tanh"] * 4
    agent = Local(python=emulator.python, environment=emulator.environment)
    theirs = answer(agent, package / "model.onnx", tmp_path / "b")
    assert answer(phone.device, package / "model.onnx", tmp_path / "a") == theirs
    with pytest.raises(PotstillError, match="the agent failed with exit code 1: agent: the request lacks 'warmup'"):
        phone.device.ask({"threads": 1, "models": []})
    assert phone.jobs == []
