"""An emulated CPU as a device: its arithmetic, and the instructions that it runs. Its times say nothing of a device."""

import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill.targets.device import Kind, only_arithmetic
from potstill.targets.local import Local
from potstill.targets.qemu import Emulator, emulator_of, emulator_version
from potstill.targets.target import Target, load_target, target_names
from potstill.validate.errors import InputError, PotstillError, told

PLUGIN = Path(__file__).with_name("count_instructions.c")
COMPILER = "cc"
_STILL = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}  # so that counts repeat


@dataclass(frozen=True)
class EmulatedCpu:
    """A target's CPU under QEMU's user mode; see `Device`.

    Attributes:
        target: whose CPU.
        where: as the user names it.
    """

    target: Target
    where: str = "emulate"
    kind: Kind = "emulated"
    emulator: Emulator = field(init=False)

    def __post_init__(self) -> None:
        """Look for the emulator.

        Raises:
            InputError: nothing emulates that CPU here: why, and what to do.
        """
        if self.target.emulate is None:
            every = [one for one in map(load_target, target_names()) if one.emulate]
            arch = self.target.hardware.arch
            known = [one.id for one in sorted(every, key=lambda one: one.hardware.arch != arch)]  # its like first
            raise InputError(
                f"no emulator is known for the CPU of {self.target.id}; name another target's, such as "
                f"emulate://{known[0]} (known: {', '.join(known)})"
            )
        object.__setattr__(self, "emulator", emulator_of(self.target))

    def ask(self, request: Mapping[str, Any], *, timeout_s: float = 900) -> dict[str, Any]:
        """As of `Device`; to measure is to count the instructions of one model's load and runs, in one thread.

        Raises:
            InputError: what is asked for is a figure of time, or several threads.
        """
        if "answer" in request:
            reply = self._local(()).ask(request, timeout_s=timeout_s)
        else:
            _check(request)
            reply = self._measured(request, timeout_s)
        reply["machine"] |= {"cpu": f"{self.emulator.cpu}, emulated", "cores": 1, "name": None}
        reply["versions"]["emulator"] = emulator_version(self.target)
        return reply

    def _measured(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """A reply with `instructions`, or a note that says why there are none."""
        with tempfile.TemporaryDirectory(prefix="potstill-") as folder:
            plugin, out = Path(folder, "count.so"), Path(folder, "counts")
            missing = _compile(plugin)
            reply = None
            if missing is None:
                try:
                    words = ("-plugin", f"file={_quoted(plugin)},out={_quoted(out)}")
                    reply = self._local(words).ask({**request, "marks": True}, timeout_s=timeout_s)
                except PotstillError as error:
                    if type(error) is not PotstillError or out.exists():
                        raise
                    missing = f"{self.emulator.python[0]} does not take the plugin: {told(error, 9)}"
            if reply is None:
                reply = self._local(()).ask(request, timeout_s=timeout_s)
            result = reply["models"][0]
            if missing is None:
                result["instructions"] = _counts(out, len(result["times_ms"]))
            else:
                reply["notes"] = [*reply.get("notes", []), f"instructions were not counted: {missing}"]
        # What follows is the emulator's or this machine's.
        return reply | {"models": [result | {"memory_method": "unavailable", "sensors": {}, "energy_uj": None}]}

    def _local(self, words: Sequence[str]) -> Local:
        """The agent under the emulator, which gets further words."""
        binary, *rest = self.emulator.python
        return Local((binary, *words, *rest), {**self.emulator.environment, **_STILL})


def _check(request: Mapping[str, Any]) -> None:
    only_arithmetic(request, "an emulated CPU")
    if request["threads"] != 1:
        raise InputError(
            f"{request['threads']} threads are asked for, and an emulated CPU runs one: waiting threads would count too"
        )


def _compile(plugin: Path) -> str | None:
    """Make the plugin; why not, where there is no compiler or it fails."""
    if shutil.which(COMPILER) is None:
        return f"there is no C compiler ({COMPILER}) for QEMU's plugin; apt-get install gcc libc6-dev"
    words = [COMPILER, "-O2", "-shared", "-fPIC", "-o", str(plugin), str(PLUGIN)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return f"{COMPILER} failed on QEMU's plugin: {' '.join(done.stderr.split())[:300]}" if done.returncode else None


def _quoted(path: Path) -> str:
    """A path among QEMU's options, where a comma is written twice."""
    return str(path).replace(",", ",,")


def _counts(file: Path, runs: int) -> dict[str, Any]:
    """Instructions of the load, the first run and each timed run, from the counts at both ends of each."""
    marks = [int(line) for line in file.read_text(encoding="ascii").splitlines()[1:]]
    if len(marks) != 2 * (2 + runs):
        raise PotstillError(f"the emulator noted {len(marks)} marks, expected {2 * (2 + runs)} for {runs} runs")
    load, first, *each = (end - start for start, end in zip(marks[::2], marks[1::2], strict=True))
    return {"load": load, "first_run": first, "runs": each}
