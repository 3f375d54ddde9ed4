"""What devices behind a shell share: files sent by their hash, a folder for each job, nothing left but the cache.

The device's part is `remote.sh`. Where the device has all files, an ask is one round trip that tells so and holds the
job's folder until its standard input ends, whatever ended it; one that runs the agent; and one for each file that comes
back.
"""

import json
import secrets
import shlex
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

from potstill.targets.device import BrokenOff, Made, files_in, with_names
from potstill.targets.local import reply_of, too_slow
from potstill.validate.errors import InputError, PotstillError, Unreachable
from potstill.validate.external_data import files_of
from potstill.validate.files import sha256_file, sha256_json, whole_file

FUNCTIONS = Path(__file__).with_name("remote.sh").read_text(encoding="utf-8")
PATIENCE_S = 60.0  # for a step on the device, beside its bytes
LEAST_BYTES_S = 50_000  # that a device takes, hashes or gives in a second; a slower one hangs
CLEAN_S = 600.0  # to remove a cache
LET_GO_S = 15.0  # for a job's folder to be removed; a device that hangs does it when it can
LOST = 255  # the code of ssh where its connection was lost; adb then ends with 0
_ENDED = b"potstill: ended\n"  # the last words of a script that went well
KEPT_MB = 1.0  # larger inputs go with their job: those of a judge are many and seldom the same twice
_AGAIN = "run again when it is back: what it has is not sent again"
_FULL = ("No space left on device", "Disk quota exceeded")


class Shell(Protocol):
    """A device on which a POSIX sh runs scripts; their standard streams are bytes."""

    @property
    def where(self) -> str:
        """As the user names the device."""
        ...

    @property
    def root(self) -> str:
        """Where its cache is: a word of sh, which may hold "$HOME"."""
        ...

    @property
    def programs(self) -> Sequence[Path]:
        """The files that answer requests; they lie side by side on the device, and may be executed."""
        ...

    def command(self, folder: str) -> str:
        """The words of sh that answer `request.json` of the current folder; `folder` has the programs.

        They follow an `exec`. Paths in the request are relative to the current folder.
        """
        ...

    def argv(self, script: str) -> list[str]:
        """The command, here, that runs a script there."""
        ...

    def refusal(self, code: int, said: str) -> PotstillError | None:
        """Why a script or an agent ended with this code and last words, where the device or its set-up is at fault."""
        ...


@dataclass(frozen=True)
class _Set:
    """Files that must lie side by side on the device; its name there is the hash over their names and contents.

    What does not stay in the cache lies in the job's folder.
    """

    files: Mapping[str, Path]
    hashes: Mapping[str, str]
    stays: bool

    @property
    def id(self) -> str:
        return sha256_json(self.hashes)

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files.values())

    @property
    def folder(self) -> str:
        """Where it is, seen from the job's folder."""
        return f"../../sets/{self.id}" if self.stays else f"{self.id}.part"

    def call(self, function: str) -> str:
        """A call of one of the script's functions about this set."""
        pairs = [word for name, digest in self.hashes.items() for word in (name, digest)]
        return shlex.join([function, self.id, *pairs])


def _set_of(files: Mapping[str, Path], stays: bool) -> _Set:
    return _Set(files, {name: sha256_file(file) for name, file in sorted(files.items())}, stays)


def _beside(file: Path) -> _Set:
    """A file, and those that hold its weights, by their names relative to its folder."""
    model = file.suffix == ".onnx"
    files = files_of(file) if model else [file]
    stays = model or file.stat().st_size <= KEPT_MB * 1e6
    return _set_of({one.relative_to(file.parent).as_posix(): one for one in files}, stays)


def ask(shell: Shell, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """The reply of the agent on a device; see `Device.ask`. Time is limited for the agent, not for the files' way."""
    programs = _set_of({file.name: file for file in shell.programs}, True)
    paths = dict.fromkeys(file for file in files_in(request) if isinstance(file, Path))
    sets = {path: _beside(path) for path in paths}
    made = list(dict.fromkeys(file for file in files_in(request) if isinstance(file, Made)))

    def name(file: Path | Made) -> str:
        if isinstance(file, Made):
            return f"made-{made.index(file)}"
        return f"{sets[file].folder}/{file.name}"

    wanted = {one.id: one for one in (programs, *sets.values())}
    with _job(shell, list(wanted.values())) as job:
        job.send([one for one in wanted.values() if one.id not in job.there])
        command = shell.command(programs.folder)
        reply, found = job.answer(command, with_names(request, name), len(made), timeout_s)
        for number, (file, (digest, size)) in enumerate(zip(made, found, strict=True)):
            if digest != "-":
                job.bring_back(f"made-{number}", file.path, digest, size)
    return reply


def clean(shell: Shell) -> int:
    """Remove a device's cache; how many bytes it took there.

    Raises:
        InputError: the folder is no cache of Potstill, or in use.
        Unreachable: the device is not there.
    """
    with _in_time(shell, "remove its cache"):
        done = _run(shell, f"clean {shell.root}", CLEAN_S)
    if done.returncode:
        _fail(shell, done, "remove its cache")
    return int(done.stdout.split()[-1]) * 1024


@dataclass(frozen=True)
class _Job:
    """A folder on the device for one request; `there` are the sets that it has, `holder` keeps the folder."""

    shell: Shell
    holder: subprocess.Popen[bytes]
    folder: str
    there: set[str]

    def run(self, call: str, doing: str, limit_s: float, **streams: Any) -> subprocess.CompletedProcess[bytes]:
        """One round trip in the job's folder."""
        script = f"cd {self.shell.root}/{shlex.quote(self.folder)}\n{call}"
        done = _run(self.shell, script, limit_s, **streams)
        if done.returncode:
            self.failed(done, doing)
        return done

    def failed(self, done: subprocess.CompletedProcess[bytes], doing: str) -> NoReturn:
        """Raise what went wrong; where the holder has ended as well, the connection was lost."""
        said = _words(done.stderr)
        if isinstance(self.shell.refusal(done.returncode, said), Unreachable) or self.holder.poll() is not None:
            raise BrokenOff(
                f"{self.shell.where} went away while it was to {doing} ({_last(said)}); {_AGAIN}", done.stdout
            )
        _fail(self.shell, done, doing)

    def send(self, missing: Sequence[_Set]) -> None:
        """Bring sets to the device, where their hashes are checked before they take their place."""
        doing = f"take {sum(one.bytes for one in missing) / 1e6:.1f} MB"
        for one in missing:
            for name, file in one.files.items():
                with file.open("rb") as content, _in_time(self.shell, doing):
                    limit_s = within_s(file.stat().st_size)
                    self.run(shlex.join(["take", f"{one.id}.part/{name}"]), doing, limit_s, stdin=content)
            with _in_time(self.shell, doing):
                done = self.run(one.call("settle" if one.stays else "look"), doing, within_s(one.bytes))
            if f"there {one.id}" not in _words(done.stdout).splitlines():
                raise Unreachable(
                    f"{', '.join(one.files)} came to {self.shell.where} changed (SHA-256); nothing was run: try again"
                )

    def answer(
        self, command: str, request: Any, made: int, timeout_s: float
    ) -> tuple[dict[str, Any], list[tuple[str, int]]]:
        """The agent's reply; of each file that it made the hash, "-" for one that it did not, and the bytes."""
        call = shlex.join(["answer", command, *(f"made-{number}" for number in range(made))])
        try:
            done = self.run(call, "run the agent", timeout_s, input=json.dumps(request).encode())
        except subprocess.TimeoutExpired as late:
            raise too_slow(timeout_s, late.output) from None
        lines = done.stdout.splitlines()
        (first, *_), *ends = (line.decode().split() for line in lines[len(lines) - made - 1 :])
        code = int(first)
        if code:
            fault = self.shell.refusal(code, _words(done.stderr))
            if fault or any(word in _words(done.stderr) for word in _FULL):
                _fail(self.shell, subprocess.CompletedProcess([], code, b"", done.stderr), "run the agent")
        stdout = b"\n".join(lines[: -made - 1]).rstrip()
        files = [(words[0], int(words[-1])) if words != ["-"] else ("-", 0) for words in ends]
        return reply_of(128 - code if code > 128 else code, stdout, done.stderr), files

    def bring_back(self, name: str, path: Path, digest: str, size: int) -> None:
        """A file that the agent made, whole or not at all."""
        doing = "give what it made"
        with whole_file(path) as aside:
            with aside.open("wb") as into, _in_time(self.shell, doing):
                self.run(shlex.join(["cat", name]), doing, within_s(size), stdout=into, stderr=subprocess.PIPE)
            if sha256_file(aside) != digest:
                raise Unreachable(f"{path.name} came back from {self.shell.where} changed (SHA-256); try again")


@contextmanager
def _job(shell: Shell, sets: Sequence[_Set]) -> Iterator[_Job]:
    """A job's folder; the device removes it, and ends the agent, as soon as nobody here holds it."""
    calls = [f"enter {shell.root}", *(one.call("tell") for one in sets if one.stays), f"hold {secrets.token_hex(4)}"]
    holder = subprocess.Popen(
        shell.argv(_script("\n".join(calls))), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert holder.stdin
    assert holder.stdout
    try:
        limit_s = within_s(sum(one.bytes for one in sets if one.stays))  # it hashes them
        told = _first_words(shell, holder, holder.stdout, limit_s)
        if not told or not told[-1].startswith("ready "):
            _, stderr = holder.communicate()
            _fail(shell, subprocess.CompletedProcess([], holder.returncode, b"", stderr), "make a folder for the job")
        if noise := [line for line in told if not line.startswith(("there ", "ready "))]:
            raise InputError(
                f"{shell.where} prints {noise[0]!r} before every command, which would get into its files; "
                "silence its shell where nobody types"
            )
        there = {line.removeprefix("there ") for line in told}
        yield _Job(shell, holder, told[-1].removeprefix("ready "), there)
    finally:
        _let_go(holder)


def _first_words(shell: Shell, holder: subprocess.Popen[bytes], stdout: IO[bytes], limit_s: float) -> list[str]:
    """What the holder tells until it is ready, or ends."""
    late = threading.Timer(limit_s, holder.kill)
    late.start()
    told = []
    try:
        for line in stdout:
            told.append(line.decode("utf-8", errors="replace").strip())
            if told[-1].startswith("ready "):
                break
    finally:
        hangs = late.finished.is_set()
        late.cancel()
    if hangs:
        raise _hung(shell, "make a folder for the job", limit_s)
    return told


def _let_go(holder: subprocess.Popen[bytes]) -> None:
    """End the holder's input, and wait until it has cleaned up."""
    try:
        holder.communicate(timeout=LET_GO_S)
    except subprocess.TimeoutExpired:
        holder.kill()
        holder.wait()


def within_s(size: int) -> float:
    """How long a device may take for some bytes, in s."""
    return PATIENCE_S + size / LEAST_BYTES_S


def _hung(shell: Shell, doing: str, limit_s: float) -> Unreachable:
    return Unreachable(f"{shell.where} hangs: it was to {doing}, and did not within {round(limit_s, 1):g} s; {_AGAIN}")


@contextmanager
def _in_time(shell: Shell, doing: str) -> Iterator[None]:
    """Say of a step that took too long that the device hangs."""
    try:
        yield
    except subprocess.TimeoutExpired as late:
        raise _hung(shell, doing, late.timeout) from None


def _run(shell: Shell, script: str, limit_s: float, **streams: Any) -> subprocess.CompletedProcess[bytes]:
    """One round trip; raises subprocess.TimeoutExpired where it takes longer."""
    if not streams.keys() & {"stdin", "input"}:
        streams["stdin"] = subprocess.DEVNULL
    if "stdout" not in streams:
        streams["capture_output"] = True
    done = subprocess.run(shell.argv(_script(script)), check=False, timeout=limit_s, **streams)
    if done.returncode == 0 and _ENDED not in done.stderr:
        done.returncode = LOST
    done.stderr = done.stderr.replace(_ENDED, b"")
    return done


def _script(calls: str) -> str:
    return f"{FUNCTIONS}\n{calls}\n"


def _fail(shell: Shell, done: subprocess.CompletedProcess[bytes], doing: str) -> NoReturn:
    """Raise why a script ended as it did."""
    said = _words(done.stderr)
    if refused := shell.refusal(done.returncode, said):
        raise refused
    if _last(said).startswith("potstill: "):
        raise InputError(f"{shell.where}: {_last(said).removeprefix('potstill: ')}")
    if any(word in said for word in _FULL):
        raise Unreachable(f"{shell.where} is full: it could not {doing} ({_last(said)}); make room there")
    raise Unreachable(f"{shell.where} could not {doing}: {_last(said)}")


def _words(output: bytes) -> str:
    return output.decode("utf-8", errors="replace").strip()


def _last(said: str) -> str:
    """The last line of what a program said."""
    return said.splitlines()[-1].strip() if said else "it said nothing"
