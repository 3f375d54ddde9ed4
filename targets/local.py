"""This machine as a device: the agent runs here, in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill.targets.device import BrokenOff, Kind, Made, with_names
from potstill.validate.errors import InputError, PotstillError
from potstill.validate.files import write_json

AGENT = Path(__file__).with_name("agent.py")


@dataclass(frozen=True)
class Local:
    """A device of this machine.

    Attributes:
        python: an interpreter that has onnxruntime and numpy, or the words of a command that is one.
        environment: what is added to this process's own.
        program: what answers the requests.
    """

    python: tuple[str, ...] = (sys.executable,)
    environment: Mapping[str, str] = field(default_factory=dict)
    program: Path = AGENT
    where: str = "local"
    kind: Kind = "measured"

    def ask(self, request: Mapping[str, Any], *, timeout_s: float = 900) -> dict[str, Any]:
        """Run the agent in a fresh process and folder; see `Device`."""
        with tempfile.TemporaryDirectory(prefix="potstill-") as folder:
            file = Path(folder, "request.json")
            write_json(file, with_names(request, _as_it_is))
            try:
                done = subprocess.run(
                    [*self.python, "-P", str(self.program), str(file)],
                    cwd=folder,
                    env={**os.environ, **self.environment},
                    capture_output=True,
                    timeout=timeout_s,
                    check=False,
                )
            except subprocess.TimeoutExpired as late:
                raise too_slow(timeout_s, late.output) from None
            except OSError as error:
                raise InputError(
                    f"cannot start {self.python[0]!r}: {error.strerror}; give a Python with onnxruntime"
                ) from None
        return reply_of(done.returncode, done.stdout, done.stderr)


def _as_it_is(file: Path | Made) -> str:
    return str((file.path if isinstance(file, Made) else file).resolve())


def too_slow(timeout_s: float, said: bytes | None) -> BrokenOff:
    """What is raised where the agent takes too long; `said` is its output so far."""
    return BrokenOff(
        f"the agent did not finish within {timeout_s:g} s; give it less to do, or more time (profile --timeout)", said
    )


def reply_of(code: int, stdout: bytes, stderr: bytes) -> dict[str, Any]:
    """The reply of an agent that ended: the last line of its output.

    Raises:
        InputError: it cannot do there what was asked.
        PotstillError: it failed, or gave no JSON.
    """
    if code == 2 and (said := _tail(stderr, 1)).startswith("agent: "):
        raise InputError(said.removeprefix("agent: "))
    if code != 0:
        raise PotstillError(f"the agent {_ending(code)}: {_tail(stderr)}")
    try:
        return dict(json.loads(stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        raise PotstillError(f"the agent gave no JSON line: {_tail(stdout + stderr)}") from None


def _ending(code: int) -> str:
    if code == -9:
        return "was killed (signal 9, often for want of memory)"
    return f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"


def _tail(output: bytes, lines: int = 8) -> str:
    """The last lines of a program's output."""
    return "\n".join(output.decode("utf-8", errors="replace").strip().splitlines()[-lines:]) or "no output"
