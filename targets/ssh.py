"""A host over ssh as a device: the system's own `ssh`, so that the user's keys, configuration and known hosts apply."""

import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult

from potstill.targets import remote
from potstill.targets.device import Kind
from potstill.targets.local import AGENT
from potstill.validate.errors import InputError, PotstillError, Unreachable
from potstill.validate.files import short_folder

OPTIONS = {
    "StrictHostKeyChecking": "yes",
    "BatchMode": "yes",  # no questions: a missing key is an error
    "ConnectTimeout": "15",
    "ServerAliveInterval": "15",
    "ServerAliveCountMax": "4",  # a minute: a slow line may be full of what we send
    "ControlMaster": "auto",  # one connection for one ask
    "ControlPersist": "no",
    "LogLevel": "ERROR",  # its last line is quoted
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "RemoteCommand": "none",
    "RequestTTY": "no",
}


@dataclass(frozen=True)
class Ssh:
    """A device of a host that has a POSIX sh and a Python with onnxruntime and numpy.

    Attributes:
        host: a name or an address, as `ssh` takes it.
        user: None is whom ssh's own configuration says.
        port: None is the one that ssh's own configuration says.
        python: the interpreter there; one in the home folder may start with `~/`.
        ssh: the words of the command.
    """

    host: str
    user: str | None = None
    port: int | None = None
    python: str = "python3"
    ssh: tuple[str, ...] = ("ssh",)
    kind: Kind = "measured"

    @property
    def where(self) -> str:
        """The address, as a user writes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return "ssh://" + (f"{self.user}@" if self.user else "") + host + (f":{self.port}" if self.port else "")

    @classmethod
    def at(cls, parts: SplitResult) -> "Ssh":
        """The host of an address `ssh://user@host:port`.

        Raises:
            InputError: it is none, or there is no `ssh` here.
        """
        if shutil.which("ssh") is None:
            raise InputError("there is no ssh here; install OpenSSH's client, such as apt-get install openssh-client")
        address = parts.geturl()
        user, _, rest = parts.netloc.rpartition("@")
        try:
            port = parts.port
        except ValueError:
            port = 0
        host = rest[1:].partition("]")[0] if rest.startswith("[") else rest.partition(":")[0]
        fault = next(
            (
                words
                for words, wrong in {
                    "a password, which ssh does not take; use a key": ":" in user,
                    "a path or more; leave it out": parts.path.strip("/") or parts.query or parts.fragment,
                    "a port that is none": port == 0 or rest.endswith(":"),
                    "no host": not host,
                    "a name that starts with -": user.startswith("-") or host.startswith("-"),
                }.items()
                if wrong
            ),
            None,
        )
        if fault:
            raise InputError(
                f"{address} has {fault}; expected ssh://user@host:port, where user and port may be left out"
            )
        return cls(host, user or None, port)

    def ask(self, request: Mapping[str, Any], *, timeout_s: float = 900) -> dict[str, Any]:
        """Run the agent there, in a folder that is removed; see `Device`."""
        with tempfile.TemporaryDirectory(prefix="potstill-", dir=short_folder()) as folder:
            return remote.ask(_Connection(self, Path(folder, "s")), request, timeout_s)

    def clean(self) -> int:
        """Remove the cache there; how many bytes it took. Errors: see `remote.clean`."""
        with tempfile.TemporaryDirectory(prefix="potstill-", dir=short_folder()) as folder:
            return remote.clean(_Connection(self, Path(folder, "s")))


@dataclass(frozen=True)
class _Connection:
    """One connection to a host, that all commands of an ask share through a socket."""

    device: Ssh
    socket: Path
    root: str = '"${XDG_CACHE_HOME:-$HOME/.cache}"/potstill/device'
    programs: tuple[Path, ...] = (AGENT,)

    @property
    def where(self) -> str:
        return self.device.where

    def command(self, folder: str) -> str:
        python = self.device.python
        home = '"$HOME"/' if python.startswith("~/") else ""
        return f"{home}{shlex.quote(python.removeprefix('~/') if home else python)} {folder}/{AGENT.name} request.json"

    def argv(self, script: str) -> list[str]:
        options = [word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")]
        whom = [*(["-l", self.device.user] if self.device.user else []), "--", self.device.host]
        port = ["-p", str(self.device.port)] if self.device.port else []
        socket = ["-o", f'ControlPath="{self.socket}"']
        return [*self.device.ssh, *options, *socket, *port, *whom, f"exec sh -c {shlex.quote(script)}"]

    def refusal(self, code: int, said: str) -> PotstillError | None:
        """What is wrong with the connection (ssh ends with 255, or by a signal) or with the Python there."""
        last = said.splitlines()[-1].strip() if said else "ssh said nothing"
        device, python = self.device, self.device.python
        if code == 255 or code < 0:
            return Unreachable(f"{device.where} cannot be reached: {last}; {_advice(device, said)}")
        if code in (126, 127) and python.removeprefix("~/") in last:
            return InputError(f"{device.where} has no {python} ({last}); install it there, or name another Python")
        for module in ("numpy", "onnxruntime"):
            if f"No module named '{module}'" in last:
                return InputError(
                    f"{python} on {device.where} has no {module}; run there: {python} -m pip install onnxruntime "
                    "numpy, or name the Python of an environment that has them"
                )
        return None


def _advice(device: Ssh, said: str) -> str:
    """What to do about ssh's own words."""
    port = ["-p", str(device.port)] if device.port else []
    by_hand = shlex.join(["ssh", *port, f"{device.user}@{device.host}" if device.user else device.host])
    name = f"[{device.host}]:{device.port}" if device.port not in (None, 22) else device.host
    if "IDENTIFICATION HAS CHANGED" in said:
        return (
            "its host key is not the known one: somebody may be in between, or it was set up anew; if you know that it "
            f"was, run: {shlex.join(['ssh-keygen', '-R', name])}"
        )
    if "Host key verification failed" in said:
        return f"its host key is not known here: run {by_hand} once, and compare the key that it shows"
    if "Permission denied" in said:
        return f"it takes no key of yours: try {by_hand}, or put a key there with ssh-copy-id"
    return f"see that it is on, and that {by_hand} works"
