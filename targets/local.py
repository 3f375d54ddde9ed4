"""This machine as a device: the agent runs here, in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.targets.measurement import Comparison, Measurement, compared, from_agent
from potstill.targets.request import Package, read_package
from potstill.validate.errors import InputError, PotstillError, Unreachable
from potstill.validate.files import write_json

AGENT = Path(__file__).with_name("agent.py")
_ENOUGH = {"seconds": 3.0, "min_runs": 50, "max_runs": 2000}


def profile(
    package: Path,
    *,
    runs: int | None = None,
    threads: int | None = None,
    warmup: int = 10,
    python: str = sys.executable,
    timeout_s: float = 900,
) -> Measurement:
    """What a package costs on this machine: latency, load, memory, operators and providers.

    Without `runs`, as many as fill 3 s, from 50 to 2000. Without `threads`, those of the target's profile, or 1.
    `python` is an interpreter that has onnxruntime and numpy. A provider that is not here is in `missing_providers`.
    Raises InputError for a bad package or setting, Unreachable when the agent takes longer than `timeout_s`,
    PotstillError when it fails.
    """
    opened = read_package(package)
    request = {**_settings([opened], runs, threads, warmup), "models": [opened.spec()], "operators": True}
    reply = ask_agent(request, python=python, timeout_s=timeout_s)
    return from_agent(reply, package=package.name, file_mb=opened.file_mb, inputs=opened.input_texts())


def compare(
    packages: Sequence[Path],
    *,
    runs: int | None = None,
    threads: int | None = None,
    warmup: int = 10,
    python: str = sys.executable,
    timeout_s: float = 900,
) -> Comparison:
    """Packages timed in turns in one process, so that noise falls on all alike; ratios are to the first.

    Settings and errors are those of `profile`; `runs` are rounds.
    """
    if len(packages) < 2:
        raise InputError(f"{len(packages)} packages given, expected two or more to compare; use profile for one")
    opened = [read_package(package) for package in packages]
    request = {**_settings(opened, runs, threads, warmup), "models": [package.spec() for package in opened]}
    reply = ask_agent(request, python=python, timeout_s=timeout_s)
    return compared(reply, [package.name for package in packages])


def ask_agent(
    request: dict[str, Any],
    *,
    python: str | Sequence[str] = sys.executable,
    timeout_s: float = 900,
    environment: Mapping[str, str] | None = None,
    program: Path = AGENT,
) -> dict[str, Any]:
    """Run the agent, or another program like it, on a request in a fresh process and folder, and return its reply.

    `python` is an interpreter, or the words of a command that is one; `environment` is added to this process's own.
    """
    command = [python] if isinstance(python, str) else [*python]
    with tempfile.TemporaryDirectory(prefix="potstill-") as folder:
        file = Path(folder, "request.json")
        write_json(file, request)
        try:
            done = subprocess.run(
                [*command, "-P", str(program), str(file)],
                cwd=folder,
                env={**os.environ, **(environment or {})},
                capture_output=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Unreachable(
                f"the agent did not finish within {timeout_s:g} s; give it less to do, or more time"
            ) from None
        except OSError as error:
            raise InputError(f"cannot start {command[0]!r}: {error.strerror}; give a Python with onnxruntime") from None
    if done.returncode != 0:
        raise PotstillError(f"the agent {_ending(done.returncode)}: {_tail(done.stderr)}")
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        raise PotstillError(f"the agent gave no JSON line: {_tail(done.stdout + done.stderr)}") from None


def _settings(packages: Sequence[Package], runs: int | None, threads: int | None, warmup: int) -> dict[str, Any]:
    """The request's settings, the defaults filled in."""
    for name, value, least in (("runs", runs, 1), ("threads", threads, 1), ("warmup", warmup, 0)):
        if value is not None and value < least:
            raise InputError(f"{name} is {value}, expected {least} or more")
    if threads is None:
        wanted = {package.target.profile.threads or 1 for package in packages}
        if len(wanted) > 1:
            raise InputError(f"the packages' targets want {sorted(wanted)} threads; give one number of threads")
        threads = wanted.pop()
    return {"threads": threads, "warmup": warmup, **(_ENOUGH if runs is None else {"runs": runs})}


def _ending(code: int) -> str:
    if code == -9:
        return "was killed (signal 9, often for want of memory)"
    return f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"


def _tail(output: bytes, lines: int = 8) -> str:
    """The last lines of a program's output."""
    return "\n".join(output.decode("utf-8", errors="replace").strip().splitlines()[-lines:]) or "no output"
