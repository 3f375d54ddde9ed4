"""A phone over adb as a device: the system's own `adb`, and the runner, since there is no Python on a phone.

What runs there is the user `shell`, as when `adb shell` is typed: nothing is installed, and no app's limits apply.
"""

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult

from potstill.targets import remote, runner
from potstill.targets.device import Kind
from potstill.validate.errors import InputError, PotstillError, Unreachable, told

ABIS = {"arm64-v8a": "arm64", "x86_64": "x86_64"}
ANSWER_S = 30.0  # for a question to adb; it may have to start its server
THERMAL = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
_LOST = re.compile(
    r"^(adb: )?error: (device|closed|no devices|protocol fault|cannot connect|connect failed)", re.MULTILINE
)
_PROPERTIES = (
    "ro.product.cpu.abi",
    "ro.boot.qemu",  # Build.IS_EMULATOR since Android 12, and before that the next
    "ro.kernel.qemu",
    "ro.product.manufacturer",
    "ro.product.model",
    "ro.soc.model",
    "ro.build.version.release",
)
_AGAIN = "connect it anew, and see that `adb devices` lists it as device"
_STATE = "for service in battery thermalservice; do dumpsys $service 2>/dev/null || :; done"
_END = "that is all"
_CLOCKS = "cat /sys/devices/system/cpu/cpu[0-9]*/cpufreq/cpuinfo_max_freq 2>/dev/null || :"


@dataclass(frozen=True)
class Adb:
    """A device of a phone with Android 7 or newer, by USB or over a network.

    Attributes:
        serial: the phone's name in the list of `adb devices`; None is the only one there, or that of ANDROID_SERIAL.
        root: the cache's folder on the phone, of which the user `shell` is the owner.
    """

    serial: str | None = None
    root: str = "/data/local/tmp/potstill"

    @property
    def kind(self) -> Kind:
        """Emulated for the serial numbers that adb gives to Android's emulators."""
        return "emulated" if (self.serial or "").startswith("emulator-") else "measured"

    @property
    def where(self) -> str:
        """The address, as a user writes it."""
        return f"adb://{self.serial}" if self.serial else "adb"

    @classmethod
    def at(cls, parts: SplitResult) -> "Adb":
        """The phone of an address `adb` or `adb://serial`.

        Raises:
            InputError: it is none, or there is no `adb` here.
        """
        if shutil.which("adb") is None:
            raise InputError("there is no adb here; install Android's platform tools, such as apt-get install adb")
        if parts.path.strip("/") or parts.query or parts.fragment or parts.netloc.startswith("-"):
            raise InputError(
                f"{parts.geturl()} names no phone; expected adb, or adb://serial as `adb devices` lists it"
            )
        return cls(parts.netloc or None)

    def ask(self, request: Mapping[str, Any], *, timeout_s: float = 900) -> dict[str, Any]:
        """Run the runner there, in a folder that is removed; see `Device`.

        The reply's sensors have the battery and the thermal state too, read before and after the whole.

        Raises:
            InputError: the runner is not built, or not for such a phone.
            Unreachable, PotstillError: as of `Device.ask`.
        """
        phone = _Phone(self.where, _connected(self), self.root)
        properties = phone.properties()
        abi = properties["ro.product.cpu.abi"]
        if abi not in ABIS:
            raise InputError(
                f"{self.where} has the ABI {abi or 'unknown'}, and the runner is for {' and '.join(ABIS)}; "
                "take a phone of 64 bits"
            )
        if self.kind == "measured" and "1" in (properties["ro.boot.qemu"], properties["ro.kernel.qemu"]):
            raise InputError(
                f"{self.where} is Android's emulator, whose times are no phone's; name it as adb://emulator-5554, with "
                "the number that `adb devices` lists"
            )
        arch = ABIS[abi]
        before, clocks = phone.state(), phone.say(_CLOCKS)
        reply = remote.ask(_Runner(phone, arch, tuple(sorted(runner.built(arch).iterdir()))), request, timeout_s)
        try:
            after = phone.state()
        except Unreachable:
            after = state_in("")  # it went away, but its reply is whole
        _tell_machine(reply["machine"], properties, clocks)
        reply["machine"]["name"] = phone.serial
        for result in reply.get("models", []):
            if "sensors" in result:
                result["sensors"]["before"] |= before
                result["sensors"]["after"] |= after
        return reply

    def clean(self) -> int:
        """Remove the cache there; how many bytes it took. Errors: see `remote.clean`."""
        return remote.clean(_Runner(_Phone(self.where, _connected(self), self.root), "", ()))


def _connected(device: Adb) -> str:
    """The serial number of the phone that is meant.

    Raises:
        Unreachable: there is none, there are several, or it is not ready.
    """
    done = _adb(device.where, ["devices"])
    if done.returncode:
        raise Unreachable(f"adb does not work here: {_last(done)}; see what `adb devices` says")
    listed = dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)
    serial = device.serial or os.environ.get("ANDROID_SERIAL")
    if serial is None:
        if not listed:
            raise Unreachable(
                "adb lists no phone; switch on USB debugging in its developer options, connect it, and see that "
                "`adb devices` lists it"
            )
        if len(listed) > 1:
            raise Unreachable(
                f"adb lists {len(listed)} phones; name one: {' or '.join(f'adb://{one}' for one in listed)}"
            )
        (serial,) = listed
    if serial not in listed:
        do = f"run: adb connect {serial}" if ":" in serial else "connect it, and see that `adb devices` lists it"
        raise Unreachable(f"adb lists no {serial}, only {', '.join(listed) or 'nothing'}; {do}")
    state = listed[serial].strip()
    if state != "device":
        raise Unreachable(f"{serial} {_not_ready(state)}")
    if "shell_v2" not in _adb(device.where, ["-s", serial, "features"]).stdout:
        raise InputError(f"{serial} has an Android older than 7, whose adb tells no exit codes; take a newer one")
    return serial


def _not_ready(state: str) -> str:
    """Why a phone in a state of `adb devices` cannot be used, and what to do."""
    advice = {
        "unauthorized": "does not trust this computer; unlock it, and allow USB debugging where it asks",
        "offline": "is offline; connect it anew, or run: adb reconnect offline",
        "no permissions": "may not be used by you; on Linux: apt-get install android-sdk-platform-tools-common",
    }
    for start, words in advice.items():
        if state.startswith(start):
            return words
    return f"is in the state {state!r}; start it as usual, and see that `adb devices` lists it as device"


@dataclass(frozen=True)
class _Phone:
    """A phone that is connected, by its serial number; `where` is as the user named it."""

    where: str
    serial: str
    root: str

    def argv(self, script: str) -> list[str]:
        return ["adb", "-s", self.serial, "shell", "-T", script]

    def say(self, script: str) -> str:
        """What a short script writes, to its end: adb ends with code 0 where it loses the phone."""
        done = _adb(self.where, self.argv(f"{script}; echo {_END}")[1:])
        if done.returncode or not done.stdout.rstrip().endswith(_END):
            raise Unreachable(f"{self.where} cannot be reached: {_last(done)}; {_AGAIN}")
        return done.stdout.rstrip().removesuffix(_END)

    def properties(self) -> dict[str, str]:
        """Some of Android's properties; empty is one that it has not."""
        said = self.say("; ".join(f'echo "{name} $(getprop {name})"' for name in _PROPERTIES))
        found = dict(line.split(" ", 1) for line in said.splitlines() if " " in line)
        return {name: found.get(name, "").strip() for name in _PROPERTIES}

    def state(self) -> dict[str, Any]:
        """Battery and thermal state now; see `state_in`."""
        return state_in(self.say(_STATE))


@dataclass(frozen=True)
class _Runner:
    """A phone as a place where the runner answers; see `remote.Shell`."""

    phone: _Phone
    arch: str
    programs: tuple[Path, ...]

    @property
    def where(self) -> str:
        return self.phone.where

    @property
    def root(self) -> str:
        return self.phone.root

    def command(self, folder: str) -> str:
        return f"{folder}/{runner.loader(self.arch)} --library-path {folder} {folder}/{runner.PROGRAM} request.json"

    def argv(self, script: str) -> list[str]:
        return self.phone.argv(script)

    def refusal(self, code: int, said: str) -> PotstillError | None:
        """Whether adb lost the phone."""
        lost = _LOST.search(said)
        if lost or code == remote.LOST or code < 0:
            words = said[lost.start() :].splitlines()[0] if lost else "the connection was lost"
            return Unreachable(f"{self.where} cannot be reached: {words}; {_AGAIN}")
        return None


def _adb(where: str, words: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["adb", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{where} did not answer in {ANSWER_S:g} s; {_AGAIN}") from None
    except OSError as error:
        raise InputError(f"adb cannot be started here: {told(error)}; install Android's platform tools") from None


def _last(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of what adb said."""
    return next(reversed((done.stderr.strip() or done.stdout.strip()).splitlines()), "it said nothing")


def state_in(dumped: str) -> dict[str, Any]:
    """Battery and thermal state in what `dumpsys` writes; None is what it does not.

    The battery's temperature is in tenths of a degree there (BatteryManager); the thermal state is one of seven
    numbers (PowerManager, THERMAL_STATUS_NONE to THERMAL_STATUS_SHUTDOWN).
    """

    def number(name: str) -> int | None:
        found = re.search(rf"^ *{name}: *(-?\d+) *$", dumped, re.MULTILINE)
        return int(found[1]) if found else None

    tenths, status = number("temperature"), number("Thermal Status")
    return {
        "battery_percent": number("level"),
        "battery_temperature_c": None if tenths is None else tenths / 10,
        "thermal_status": THERMAL[status] if status is not None and 0 <= status < len(THERMAL) else None,
    }


def _tell_machine(machine: dict[str, Any], properties: Mapping[str, str], clocks: str) -> None:
    """Say of a machine which phone it is, by Android's properties and the highest clocks of its cores in kHz."""
    release, soc = properties["ro.build.version.release"], properties["ro.soc.model"]
    name = f"{properties['ro.product.manufacturer']} {properties['ro.product.model']}".strip()
    groups = sorted(Counter(int(word) for word in clocks.split() if word.isdigit()).items())
    cores = " + ".join(f"{count}×{clock / 1e6:.2f}" for clock, count in groups)
    inside = ", ".join(part for part in (soc, f"{cores} GHz" if cores else "") if part)
    machine["system"] = f"Android {release}" if release else "Android"
    if name or inside:
        machine["cpu"] = f"{name or 'unknown'} ({inside})" if inside else name
