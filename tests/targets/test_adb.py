"""A phone over adb: by a program that stands in for adb, and by adb with Android's own adbd where that is built.

The stand-in's runner is the agent of this machine, so that the way there and back can be tested without a build.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from potstill.targets import adb, remote, runner
from potstill.targets.adb import Adb, state_in
from potstill.targets.device import BrokenOff, Made
from potstill.targets.devices import Cleanable, open_device
from potstill.targets.local import AGENT, Local
from potstill.targets.profile import compare, profile
from potstill.targets.sustained import sustained, until_then
from potstill.validate.errors import InputError, PotstillError, Unreachable
from tests.waiting import wait_for

MakePackage = Callable[..., Path]
HERE = Path(__file__).parent
SERIAL = "8A1X0B2C3"
BATTERY = """Current Battery Service state:
  AC powered: false
  status: 2
  level: 85
  scale: 100
  temperature: 287
  technology: Li-ion
"""
THERMAL = """IsStatusOverride: false
ThermalEventListeners:
\tcallbacks: 2
Thermal Status: 2
Cached temperatures:
\tTemperature{mValue=28.7, mType=2, mName=battery, mStatus=0}
"""
pytestmark = pytest.mark.skipif(platform.system() == "Windows", reason="needs a POSIX sh")


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def write_phone(folder: Path, abi: str = "x86_64") -> None:
    """The programs by which Android tells of itself."""
    properties = {
        "ro.product.cpu.abi": abi,
        "ro.product.manufacturer": "Google",
        "ro.product.model": "Pixel 8",
        "ro.soc.model": "Tensor G3",
        "ro.build.version.release": "14",
    }
    cases = "".join(f"{name}) echo '{value}' ;;\n" for name, value in properties.items())
    write_program(folder / "bin/getprop", f"case $1 in\n{cases}esac")
    (folder / "battery").write_text(BATTERY)
    (folder / "thermalservice").write_text(THERMAL)
    write_program(folder / "bin/dumpsys", f'cat "{folder}/$1"')


def write_runner(arch: str, command: str) -> None:
    """A built runner whose loader is a script; its fourth word is the request."""
    folder = runner.place(arch)
    write_program(folder / runner.loader(arch), command)
    (folder / runner.PROGRAM).write_bytes(os.urandom(100_000))


class Phone:
    """The stand-in's folder, and the device that reaches it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "data" / "potstill"
        self.device = Adb(SERIAL, root=str(self.root))

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def calls(self) -> list[str]:
        """The calls since the last time."""
        file = self.folder / "calls"
        said = file.read_text().split() if file.exists() else []
        file.unlink(missing_ok=True)
        return [word for word in said if word in ("take", "settle", "hold", "answer", "cat")]

    @property
    def jobs(self) -> list[Path]:
        return list((self.root / "jobs").iterdir())

    @property
    def sent(self) -> list[str]:
        return sorted(path.name for path in (self.root / "sets").glob("*/*"))


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Phone:
    folder = tmp_path / "phone"
    write_phone(folder)
    shutil.copy(HERE / "stand_in_adb.sh", tmp_path / "adb")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PHONE", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    write_runner("x86_64", f"exec '{sys.executable}' -P '{AGENT}' \"$4\"")
    found = Phone(folder)
    found.write("devices", f"{SERIAL}\tdevice\n")
    found.write("features", "shell_v2\ncmd\nstat_v2\n")
    return found


@pytest.fixture
def request_of_two(make_package: MakePackage, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """To answer two examples by a model of some megabytes."""
    model = make_package(width=512, layers=3) / "model.onnx"
    given = np.random.default_rng(0).standard_normal((2, 512)).astype("<f4")
    (tmp_path / "given.bin").write_bytes(given.tobytes())
    shape = {"x0": {"dtype": "float32", "shape": [1, 512]}}

    def request(name: str = "made.bin") -> dict[str, Any]:
        files = {"inputs": tmp_path / "given.bin", "outputs": Made(tmp_path / name)}
        return {"threads": 1, "answer": {"path": model, "examples": [shape, shape], **files}}

    return request


def test_a_package_is_measured_there(phone: Phone, make_package: MakePackage) -> None:
    found = profile(make_package(), device=phone.device, runs=20)
    assert (found.kind, found.device, found.runs) == ("measured", f"adb://{SERIAL}", 20)
    assert found.where.system == "Android 14"
    assert found.where.cpu.startswith("Google Pixel 8 (Tensor G3")
    assert {row.operator for row in found.operators} == {"MatMul", "Tanh"}
    for said in (found.sensors["before"], found.sensors["after"]):
        assert said.keys() == {
            "temperature_c",
            "governor",
            "battery_percent",
            "battery_temperature_c",
            "thermal_status",
        }
        assert (said["battery_percent"], said["battery_temperature_c"]) == (85, 28.7)
        assert said["thermal_status"] == "moderate"
    assert phone.jobs == []
    assert {"model.onnx", runner.PROGRAM, runner.loader("x86_64")} <= set(phone.sent)


def test_the_command_line_tells_of_its_battery(
    phone: Phone, make_package: MakePackage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from potstill.pipeline import profiling
    from potstill.pipeline.cli import call

    monkeypatch.setattr(profiling, "open_device", lambda where, reach: phone.device)
    words = ["profile", str(make_package()), "--on", f"adb://{SERIAL}", "--runs", "5"]
    assert call(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "battery 85 %, 28.7 °C thermal state: moderate" in said
    phone.write("battery", "")
    phone.write("thermalservice", "")
    assert call(words) == 0
    assert "battery not available thermal state: not available" in " ".join(capsys.readouterr().out.split())
    phone.write("devices", "")
    assert call(words) == 4


def test_packages_take_turns_there(phone: Phone, make_package: MakePackage) -> None:
    packages = [make_package("a"), make_package("b", width=64)]
    found = compare(packages, device=phone.device, runs=8)
    assert [row.package for row in found.packages] == ["a", "b"]
    assert found.where.system == "Android 14"


def test_answers_come_back_and_nothing_is_sent_twice(phone: Phone, request_of_two: Any, tmp_path: Path) -> None:
    phone.device.ask(request_of_two())
    assert phone.calls().count("take") == 4  # the runner's two files, the model and the inputs
    Local().ask(request_of_two("local.bin"))
    assert (tmp_path / "made.bin").read_bytes() == (tmp_path / "local.bin").read_bytes()
    phone.device.ask(request_of_two("again.bin"))
    assert phone.calls() == ["hold", "answer", "cat"]
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "local.bin").read_bytes()
    assert phone.jobs == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            "cut take",
            r"adb://8A1X0B2C3 went away while it was to take \d\.\d MB \(it said nothing\); run again when it is",
        ),
        (
            "change take",
            r"(potstill-runner|ld-linux).* came to adb://8A1X0B2C3 changed \(SHA-256\); nothing was run: try",
        ),
        (
            "lose answer",
            r"adb://8A1X0B2C3 went away while it was to run the agent \(it said nothing\); run again when it",
        ),
        ("lose cat made", r"adb://8A1X0B2C3 went away while it was to give what it made"),
        ("alter cat made", r"made.bin came back from adb://8A1X0B2C3 changed \(SHA-256\); try again"),
    ],
)
def test_what_goes_wrong_on_the_way(phone: Phone, request_of_two: Any, tmp_path: Path, fault: str, words: str) -> None:
    phone.write("fault", fault + "\n")
    with pytest.raises(Unreachable, match=words) as told:
        phone.device.ask(request_of_two())
    assert told.value.exit_code == 4
    assert not (tmp_path / "made.bin").exists()
    wait_for(lambda: phone.jobs == [])
    for name in ("gone", "fault"):
        (phone.folder / name).unlink(missing_ok=True)
    had = len(phone.sent)
    phone.calls()
    phone.device.ask(request_of_two())  # it is back
    assert phone.calls().count("take") == 4 - had
    assert had == (0 if "take" in fault else 4)


def test_a_phone_that_hangs(phone: Phone, request_of_two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    phone.write("fault", "hang answer\n")
    with pytest.raises(Unreachable, match="the agent did not finish within 1 s; give it less to do, or more time"):
        phone.device.ask(request_of_two(), timeout_s=1)
    wait_for(lambda: phone.jobs == [])
    monkeypatch.setattr(adb, "ANSWER_S", 0.2)
    write_program(phone.folder / "bin/getprop", "sleep 1")
    with pytest.raises(Unreachable, match=rf"adb://{SERIAL} did not answer in 0.2 s; connect it anew, and see that"):
        phone.device.ask(request_of_two())


@pytest.mark.parametrize(
    ("word", "steps", "doing"), [("take", 1, r"take \d\.\d MB"), ("cat made", 8, "give what it made")]
)
def test_a_phone_that_hangs_with_a_file(
    phone: Phone,
    request_of_two: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    word: str,
    steps: int,
    doing: str,
) -> None:
    """`steps` that are told of bytes go well, and the next one does not end."""
    phone.write("fault", f"hang {word}\n")
    limits = iter([60.0] * steps + [0.5])
    monkeypatch.setattr(remote, "within_s", lambda size: next(limits))
    words = rf"adb://{SERIAL} hangs: it was to {doing}, and did not within 0\.5 s; run again when it is back"
    with pytest.raises(Unreachable, match=words) as told:
        phone.device.ask(request_of_two())
    assert told.value.exit_code == 4
    assert phone.jobs == []
    assert not (tmp_path / "made.bin").exists()
    monkeypatch.undo()


def test_what_a_phone_told_under_load_is_not_lost_with_it(phone: Phone, make_package: MakePackage) -> None:
    package = make_package(width=8)
    before = profile(package, device=phone.device, runs=3)
    assert before.where.name == SERIAL
    write_runner(
        "x86_64",
        """first='{"second": {"at_s": 1.0, "runs": 9, "median_ms": 2.0, "p90_ms": 2.5}}'
printf '%s\\n%s' "$first" '{"second": {"at_s": 2.0, "ru'
exec sleep 60""",
    )
    phone.write("fault", "lose answer\n")
    with pytest.raises(BrokenOff, match="went away while it was to run the agent") as lost:
        sustained(package, 20, device=phone.device)
    series = until_then(lost.value, before, "2026-11-23T00:00:00+00:00")
    assert series
    assert [one.at_s for one in series.seconds] == [1.0]
    assert (series.drift, series.throttles_at_s, series.where) == (None, None, before.where)
    wait_for(lambda: phone.jobs == [])


def test_a_phone_that_goes_before_anything_is_asked(phone: Phone) -> None:
    phone.write("fault", "quit echo\n")
    with pytest.raises(
        Unreachable, match=f"adb://{SERIAL} cannot be reached: it said nothing; connect it anew, and see"
    ):
        phone.device.ask({})
    phone.write("fault", "")
    write_program(phone.folder / "bin/getprop", f"touch '{phone.folder}/gone'; echo x86_64")
    with pytest.raises(
        Unreachable,
        match=f"adb://{SERIAL} cannot be reached: error: device '{SERIAL}' not found; connect it anew",
    ):
        phone.device.ask({})


def test_a_phone_that_goes_while_its_cache_is_removed(phone: Phone) -> None:
    phone.write("fault", "quit clean\n")
    with pytest.raises(Unreachable, match=f"adb://{SERIAL} cannot be reached: the connection was lost; connect it"):
        phone.device.clean()


def test_a_phone_that_goes_when_all_is_done(phone: Phone, make_package: MakePackage) -> None:
    tell = (
        f'cat "{phone.folder}/$1"; echo "quit for" >"{phone.folder}/fault"'  # the next question stays without an answer
    )
    write_program(phone.folder / "bin/dumpsys", tell)
    found = profile(make_package(), device=phone.device, runs=5)
    assert [found.sensors[when]["battery_percent"] for when in ("before", "after")] == [85, None]


def test_a_full_phone(phone: Phone, request_of_two: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        device = Adb(SERIAL, root=str(disk / "potstill"))
        with pytest.raises(
            Unreachable,
            match=rf"adb://{SERIAL} is full: it could not take \d\.\d MB \(.*No space left on device\); make",
        ):
            device.ask(request_of_two())
        assert list((disk / "potstill/jobs").iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_the_runners_own_words(phone: Phone, request_of_two: Any) -> None:
    request = request_of_two()
    del request["threads"]
    with pytest.raises(PotstillError, match="the agent failed with exit code 1: agent: the request lacks 'threads'"):
        phone.device.ask(request)
    assert phone.jobs == []


def test_the_cache_is_removed(phone: Phone, request_of_two: Any) -> None:
    phone.device.ask(request_of_two())
    assert phone.device.clean() > 3_000_000
    assert not phone.root.exists()
    assert phone.device.clean() == 0


def test_with_androids_own_shell_and_tools(phone: Phone, request_of_two: Any, tmp_path: Path) -> None:
    """Which are mksh and toybox; the functions of `remote.sh` meet no other program."""
    mksh, toybox = shutil.which("mksh"), shutil.which("toybox")
    if not (mksh and toybox):
        pytest.skip("needs mksh and toybox")
    tools = phone.folder / "bin"
    for name in subprocess.run([toybox], capture_output=True, text=True, check=True).stdout.split():
        if not (tools / name).exists():
            (tools / name).symlink_to(toybox)
    (tools / "sh").unlink(missing_ok=True)
    (tools / "sh").symlink_to(mksh)
    for _ in range(2):
        phone.device.ask(request_of_two())
        assert phone.jobs == []
    assert phone.calls().count("take") == 4
    phone.write("fault", "lose answer\n")
    with pytest.raises(Unreachable, match="went away while it was to run the agent"):
        phone.device.ask(request_of_two("more.bin"))
    wait_for(lambda: phone.jobs == [])
    for name in ("gone", "fault"):
        (phone.folder / name).unlink()
    assert phone.device.clean() > 3_000_000


# Which phone.


@pytest.mark.parametrize(
    ("listed", "serial", "words"),
    [
        (
            "",
            None,
            "adb lists no phone; switch on USB debugging in its developer options, connect it, and see that `adb dev",
        ),
        ("A\tdevice\nB\toffline\n", None, "adb lists 2 phones; name one: adb://A or adb://B"),
        ("A\tdevice\n", "B", "adb lists no B, only A; connect it, and see that `adb devices` lists it"),
        ("", "10.0.0.7:5555", "adb lists no 10.0.0.7:5555, only nothing; run: adb connect 10.0.0.7:5555"),
        ("A\tunauthorized\n", None, "A does not trust this computer; unlock it, and allow USB debugging where it asks"),
        ("A\toffline\n", "A", "A is offline; connect it anew, or run: adb reconnect offline"),
        (
            "A\tno permissions; see [x]\n",
            None,
            "A may not be used by you; on Linux: apt-get install android-sdk-platform",
        ),
        (
            "A\trecovery\n",
            None,
            "A is in the state 'recovery'; start it as usual, and see that `adb devices` lists it as",
        ),
    ],
)
def test_a_phone_that_is_not_ready(phone: Phone, listed: str, serial: str | None, words: str) -> None:
    phone.write("devices", listed)
    for do in (lambda: Adb(serial).ask({}), Adb(serial).clean):
        with pytest.raises(Unreachable, match=words) as told:
            do()
        assert told.value.exit_code == 4


def test_the_only_phone_or_the_one_that_adb_is_told_of(
    phone: Phone, request_of_two: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = Adb(root=str(phone.root))
    assert only.where == "adb"
    assert only.ask(request_of_two("a.bin"))["machine"]["system"] == "Android 14"
    phone.write("devices", f"{SERIAL}\tdevice\nother\tdevice\n")
    monkeypatch.setenv("ANDROID_SERIAL", SERIAL)
    assert only.ask(request_of_two("b.bin"))["machine"]["system"] == "Android 14"


def test_an_old_android_and_one_of_32_bits_are_refused(phone: Phone) -> None:
    write_phone(phone.folder, abi="armeabi-v7a")
    with pytest.raises(
        InputError, match=f"adb://{SERIAL} has the ABI armeabi-v7a, and the runner is for arm64-v8a and x86"
    ):
        phone.device.ask({})
    (phone.folder / "bin/getprop").unlink()
    write_program(phone.folder / "bin/getprop", "exit 0")
    with pytest.raises(
        InputError, match="has the ABI unknown, and the runner is for arm64-v8a and x86_64; take a phone of"
    ):
        phone.device.ask({})
    phone.write("features", "cmd\n")
    with pytest.raises(
        InputError, match=f"{SERIAL} has an Android older than 7, whose adb tells no exit codes; take a new"
    ):
        phone.device.ask({})


@pytest.mark.parametrize("name", ["ro.boot.qemu", "ro.kernel.qemu"])
def test_times_of_androids_emulator_are_emulated(phone: Phone, make_package: MakePackage, name: str) -> None:
    getprop = phone.folder / "bin/getprop"
    getprop.write_text(getprop.read_text().replace("case $1 in", f"case $1 in\n{name}) echo 1 ;;"))
    with pytest.raises(
        InputError, match=f"adb://{SERIAL} is Android's emulator, whose times are no phone's; name it as ad"
    ):
        phone.device.ask({})
    phone.write("devices", "emulator-5554\tdevice\n")
    emulator = Adb("emulator-5554", root=str(phone.root))
    found = profile(make_package(), device=emulator)
    assert (found.kind, found.warmup) == ("emulated", 10)  # as on any machine, but its times are no phone's
    assert found.runs >= 50
    assert found.operators


def test_without_a_runner_nothing_is_sent(phone: Phone) -> None:
    write_phone(phone.folder, abi="arm64-v8a")
    with pytest.raises(
        InputError, match="none for arm64 and ONNX Runtime .* is built here; build it once: python.* -m pots"
    ):
        phone.device.ask({})
    assert not phone.root.exists()


def test_an_adb_that_does_not_work(phone: Phone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_program(tmp_path / "adb", "echo '* daemon not running' >&2; echo 'cannot bind' >&2; exit 1")
    with pytest.raises(Unreachable, match="adb does not work here: cannot bind; see what `adb devices` says"):
        phone.device.ask({})
    (tmp_path / "adb").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="adb cannot be started here: .*; install Android's platform tools"):
        phone.device.ask({})


def test_an_address(phone: Phone, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_device("adb") == Adb()
    assert isinstance(Adb(), Cleanable)
    assert open_device("adb://10.0.0.7:5555") == Adb("10.0.0.7:5555")
    for address in ("adb://A/b", "adb://A?b", "adb://-s"):
        with pytest.raises(
            InputError, match=r"names no phone; expected adb, or adb://serial as `adb devices` lists it"
        ):
            open_device(address)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        InputError, match="there is no adb here; install Android's platform tools, such as apt-get install"
    ):
        Adb.at(urlsplit("adb://"))


# What a phone says of itself.


def test_a_state_is_read_where_it_is_told() -> None:
    told = {"battery_percent": 85, "battery_temperature_c": 28.7, "thermal_status": "moderate"}
    assert state_in(BATTERY + THERMAL) == told
    assert state_in(BATTERY) == told | {"thermal_status": None}
    assert state_in("Can't find service: battery\n") == dict.fromkeys(told)
    assert state_in("  temperature: -5\nThermal Status: 9\n") == dict.fromkeys(told) | {"battery_temperature_c": -0.5}


@pytest.mark.parametrize(
    ("given", "clocks", "system", "cpu"),
    [
        (("Google", "Pixel 8", "Tensor G3", "14"), "1704000\n2367000\n1704000\n2914000\n", "Android 14",
         "Google Pixel 8 (Tensor G3, 2×1.70 + 1×2.37 + 1×2.91 GHz)"),
        (("", "SM-G960F", "", "10"), "", "Android 10", "SM-G960F"),
        (("", "", "", ""), "2000000\n", "Android", "unknown (1×2.00 GHz)"),
        (("", "", "", ""), "", "Android", "as it was"),
    ],
)  # fmt: skip
def test_a_machine_is_named(given: tuple[str, ...], clocks: str, system: str, cpu: str) -> None:
    names = ("ro.product.manufacturer", "ro.product.model", "ro.soc.model", "ro.build.version.release")
    machine = {"system": "Linux", "cpu": "as it was"}
    adb._tell_machine(machine, dict(zip(names, given, strict=True)), clocks)
    assert machine == {"system": system, "cpu": cpu}
