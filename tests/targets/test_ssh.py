"""A device over ssh: a real `sshd` on loopback with its own keys, whose home is a temporary folder."""

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest

from potstill.targets import remote
from potstill.targets.device import BrokenOff, Device
from potstill.targets.devices import open_device
from potstill.targets.local import Local
from potstill.targets.profile import profile
from potstill.targets.ssh import Ssh
from potstill.targets.sustained import sustained, until_then
from potstill.targets.wire import DevicePredictor
from potstill.validate.errors import InputError, PotstillError, Unreachable
from tests.waiting import free_port, wait_for

MakePackage = Callable[..., Path]
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(not SSHD or not shutil.which("ssh"), reason="no sshd here: install openssh-server")


@dataclass
class Host:
    """A server with its own keys, and what a client needs to be let in."""

    folder: Path
    port: int
    server: subprocess.Popen[bytes]

    @property
    def cache(self) -> Path:
        return self.folder / "home" / ".cache" / "potstill" / "device"

    @property
    def jobs(self) -> list[Path]:
        return list(self.cache.glob("jobs/*"))

    @property
    def sets(self) -> dict[str, int]:
        """The sets' files, with what says whether one was written again."""
        return {path.name: path.stat().st_ino for path in (self.cache / "sets").glob("*/*")}

    def device(self, *options: str, ssh: str = "ssh", **fields: Any) -> Ssh:
        words = (ssh, "-F", str(self.folder / "config"), *options)
        return Ssh("127.0.0.1", port=self.port, **{"python": sys.executable, "ssh": words, **fields})

    def sessions(self) -> list[psutil.Process]:
        """The server's processes for connections, not what runs in them."""
        children = psutil.Process(self.server.pid).children(recursive=True)
        return [child for child in children if child.name().startswith("sshd")]

    def wrapper(self, name: str, script: str) -> str:
        """A stand-in for `ssh`; `$*` has the script that it is to run, and its last line is in `$call`."""
        path = self.folder / name
        path.write_text(f'#!/bin/sh\ncall=$(printf %s "$*" | tail -n 2)\n{script}\nexec ssh "$@"\n')
        path.chmod(0o700)
        return str(path)


def key(path: Path) -> str:
    """A new key; its public half."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return " ".join(path.with_suffix(".pub").read_text().split()[:2])


def answers_at(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    folder = tmp_path / "ssh"
    (folder / "home").mkdir(parents=True)
    port = free_port()
    (folder / "authorized").write_text(key(folder / "key") + "\n")
    (folder / "known").write_text(f"[127.0.0.1]:{port} {key(folder / 'host')}\n")
    server = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "authorized", "UsePAM": "no", "StrictModes": "no", "PidFile": "none",
        "SetEnv": f"HOME={folder / 'home'} XDG_CACHE_HOME={folder / 'home' / '.cache'} PATH={folder}:/usr/bin:/bin",
    }  # fmt: skip
    client = {
        "UserKnownHostsFile": folder / "known", "GlobalKnownHostsFile": "/dev/null", "IdentityFile": folder / "key",
        "IdentitiesOnly": "yes", "IdentityAgent": "none", "ConnectTimeout": 60,
    }  # fmt: skip
    for name, settings in {"sshd_config": server, "config": client}.items():
        (folder / name).write_text("".join(f"{word} {value}\n" for word, value in settings.items()))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    assert SSHD
    process = subprocess.Popen([SSHD, "-D", "-f", str(folder / "sshd_config"), "-E", str(folder / "log")])
    try:
        wait_for(lambda: process.poll() is not None or answers_at(port))
        assert process.poll() is None, (folder / "log").read_text()
        yield Host(folder, port, process)
    finally:
        process.terminate()
        process.wait()


def in_the_middle(when: Callable[[], object], then: Callable[[], object]) -> threading.Thread:
    """Do something as soon as something is so."""
    thread = threading.Thread(target=lambda: (wait_for(when), then()))
    thread.start()
    return thread


class Examples:
    """Rows as they are, under the graph's name."""

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        return {"x0": rows["x"]}


def outputs(device: Device, package: Path) -> Any:
    rows = {"x": np.random.default_rng(7).standard_normal((5, 64)).astype(np.float32)}
    return DevicePredictor(package / "model.onnx", Examples(), "it", device=device, threads=1)(rows)  # type: ignore[arg-type]


def test_there_is_as_here(host: Host, make_package: MakePackage) -> None:
    device, package = host.device(), make_package(width=64)
    found, here = profile(package, device=device, runs=20), profile(package, runs=20)
    assert found.to_json().keys() == here.to_json().keys()
    assert found.device == f"ssh://127.0.0.1:{host.port}"
    assert found.kind == "measured"
    assert [node.name for node in found.nodes] == [node.name for node in here.nodes]
    assert (found.where, found.versions) == (here.where, here.versions)
    assert outputs(device, package).tobytes() == outputs(Local(), package).tobytes()
    assert host.jobs == []
    assert device.clean() > package.joinpath("model.onnx").stat().st_size
    assert not host.cache.exists()
    assert wait_for(lambda: not host.sessions())  # nobody stays connected
    assert not list((host.folder / "home").rglob("__pycache__"))
    assert not list((host.folder / "home").rglob("*onnxruntime*"))  # its telemetry's files


def test_only_the_request_is_sent_twice(host: Host, make_package: MakePackage) -> None:
    counted = host.folder / "counted"
    counting = host.wrapper("counting", f'tee -a {counted} | ssh "$@"; exit')
    device, package = host.device(ssh=counting), make_package(width=256)
    sizes = []
    for _ in range(2):
        counted.write_bytes(b"")
        profile(package, device=device, runs=3)
        sizes.append(counted.stat().st_size)
    files = ("model.onnx", "golden/0.x0.bin")
    least = sum((package / name).stat().st_size for name in files)
    assert least < sizes[0] < least + 30_000  # the agent
    assert 100 < sizes[1] < 2_000


def test_an_interrupted_transfer_goes_on_later(host: Host, make_package: MakePackage) -> None:
    """`dirname`, which the device calls before it takes a file, waits: so the model is on its way until it is lost."""
    slow, begun = host.folder / "dirname", host.folder / "begun"
    slow.write_text(
        f'#!/bin/sh\ncase "$1" in *model.onnx) : >{begun}; while [ -e {begun} ]; do sleep 0.1; done;; esac\n'
        'exec /usr/bin/dirname "$@"\n'
    )
    slow.chmod(0o700)
    package = make_package(width=1500)  # 36 MB, more than ssh sends ahead
    killed = in_the_middle(begun.exists, lambda: ([one.kill() for one in host.sessions()], begun.unlink()))
    with pytest.raises(Unreachable, match=r"went away while it was to take 36\.\d MB \(.*\); run again when") as told:
        profile(package, device=host.device(), runs=3)
    killed.join()
    assert told.value.exit_code == 4
    wait_for(lambda: not host.jobs)
    assert list(host.sets) == ["agent.py"]
    before = host.sets["agent.py"]
    time.sleep(1.5)  # what was on its way has ended too, and has left nothing
    assert (host.jobs, list(host.sets)) == ([], ["agent.py"])
    slow.unlink()
    assert profile(package, device=host.device(), runs=3).runs == 3
    assert host.sets["agent.py"] == before
    assert sorted(host.sets) == ["0.x0.bin", "agent.py", "model.onnx"]


def agent_of(host: Host) -> int:
    """The agent's process once it has begun to run."""
    for job in host.jobs:
        with contextlib.suppress(OSError, ValueError):  # not begun, or ended
            return int((job / "agent").read_text())
    return 0


@pytest.mark.parametrize("how", ["killed", "silent"])
def test_a_device_that_vanishes_while_it_runs(host: Host, make_package: MakePackage, how: str) -> None:
    pids = []

    def vanish() -> None:
        pids.append(agent_of(host))
        for session in host.sessions():
            session.kill() if how == "killed" else session.suspend()

    thread = in_the_middle(lambda: agent_of(host), vanish)
    device = host.device("-o", f"ServerAliveInterval={2 if how == 'silent' else 60}", "-o", "ServerAliveCountMax=1")
    with pytest.raises(
        Unreachable, match=r"ssh://127\S+ went away while it was to run the agent \(.*\); run again when"
    ):
        profile(make_package(width=64), device=device, runs=10**9, timeout_s=120)
    thread.join()
    for session in host.sessions():
        session.resume()  # it notices that nobody is there
    wait_for(lambda: not psutil.pid_exists(pids[0]))
    wait_for(lambda: not host.jobs)
    assert profile(make_package("again", width=64), device=device, runs=3).runs == 3


def test_an_agent_that_takes_too_long(host: Host, make_package: MakePackage) -> None:
    begun, python = host.folder / "begun", host.folder / "python"
    python.write_text(f"#!/bin/sh\necho $$ >{begun}\nexec sleep 600\n")
    python.chmod(0o700)
    for limit in (2, 20, 200):  # a busy machine may not have begun in the first of them
        with pytest.raises(Unreachable, match=f"did not finish within {limit} s; give it less to do"):
            host.device(python=str(python)).ask({}, timeout_s=limit)
        assert host.jobs == []
        if begun.exists() and begun.read_text().endswith("\n"):
            break
    assert not psutil.pid_exists(int(begun.read_text()))


def test_a_host_that_hangs_while_its_connection_lives(
    host: Host, make_package: MakePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dirname`, which the device calls before it takes a file, does not end."""
    stuck = host.folder / "dirname"
    stuck.write_text(f"#!/bin/sh\n: >{host.folder}/begun\nwhile [ -e {stuck} ]; do sleep 0.1; done\n")
    stuck.chmod(0o700)
    limits = iter([60.0, 2.0])  # to prepare, and for the agent's file
    monkeypatch.setattr(remote, "within_s", lambda size: next(limits))
    monkeypatch.setattr(remote, "LET_GO_S", 0.5)
    words = r"ssh://127\S+ hangs: it was to take \d\.\d MB, and did not within 2 s; run again when it is back"
    with pytest.raises(Unreachable, match=words) as told:
        profile(make_package(width=64), device=host.device(), runs=3)
    assert told.value.exit_code == 4
    assert (host.folder / "begun").exists()
    assert list(host.sets) == []
    stuck.unlink()
    wait_for(lambda: not host.jobs)
    wait_for(lambda: not host.sessions())
    monkeypatch.undo()
    assert profile(make_package("again", width=64), device=host.device(), runs=3).runs == 3


SAYS = """#!/bin/sh
echo '{"second": {"at_s": 1.0, "runs": 9, "median_ms": 2.0, "p90_ms": 2.5}}'
echo '{"second": {"at_s": 2.0, "runs": 8, "median_ms": 2.1, "p90_ms": 2.6}}'
exec sleep 60
"""


def test_what_was_told_under_load_is_not_lost_with_the_device(host: Host, make_package: MakePackage) -> None:
    python, came, package = host.folder / "python", host.folder / "came", make_package(width=8)
    python.write_text(SAYS)
    python.chmod(0o700)
    noting = host.wrapper("noting", f'case "$call" in *answer*) ssh "$@" | tee {came}; exit 255;; esac')
    killed = in_the_middle(
        lambda: came.exists() and came.read_text().count("second") == 2,
        lambda: [one.kill() for one in host.sessions()],
    )
    with pytest.raises(BrokenOff, match="went away while it was to run the agent") as lost:
        sustained(package, 20, device=host.device(ssh=noting, python=str(python)))
    killed.join()
    before = profile(package, runs=3)
    series = until_then(lost.value, before, "2026-11-23T00:00:00+00:00")
    assert series
    assert [(one.at_s, one.runs, one.median_ms) for one in series.seconds] == [(1.0, 9, 2.0), (2.0, 8, 2.1)]
    assert series.broken_off
    assert series.broken_off.endswith("went away while it was to run the agent (it said nothing)")
    wait_for(lambda: not host.jobs)


def test_a_package_that_is_changed_on_its_way(host: Host, make_package: MakePackage) -> None:
    flipping = host.wrapper("flipping", 'case "$call" in *take*model.onnx*) tr "\\000" "\\001" | ssh "$@"; exit;; esac')
    package = make_package(width=64)
    with pytest.raises(Unreachable, match=r"model.onnx came to ssh://\S+ changed \(SHA-256\); nothing was run") as told:
        profile(package, device=host.device(ssh=flipping), runs=3)
    assert told.value.exit_code == 4
    assert (host.jobs, list(host.sets)) == ([], ["agent.py"])
    assert profile(package, device=host.device(), runs=3).runs == 3


def test_what_else_a_host_keeps_for_potstill_stays(host: Host, make_package: MakePackage) -> None:
    """A host may itself reach devices: the runner for phones and the browser's runtime lie beside its cache."""
    own = host.cache.parent / "runner" / "program"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert profile(make_package(), device=host.device(), runs=3).runs == 3
    assert host.device().clean() > 0
    assert own.read_text() == "mine"


def test_a_full_disk(host: Host, make_package: MakePackage) -> None:
    host.cache.parent.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(host.cache.parent)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        with pytest.raises(
            Unreachable, match=r"is full: it could not take 4\.2 MB \(.*No space left on device\); make"
        ):
            profile(make_package(width=512), device=host.device(), runs=3)
        assert (host.jobs, list(host.sets)) == ([], ["agent.py"])
    finally:
        subprocess.run(["umount", "-l", str(host.cache.parent)], check=True)


# Who is let in, and where.


def refused(device: Ssh) -> str:
    with pytest.raises(Unreachable, match="cannot be reached: ") as told:
        device.ask({})
    assert told.value.exit_code == 4
    with pytest.raises(Unreachable) as again:
        device.clean()
    assert str(again.value) == str(told.value)
    return str(told.value)


def test_a_wrong_key(host: Host) -> None:
    (host.folder / "authorized").write_text(key(host.folder / "other") + "\n")
    words = refused(host.device())
    assert "Permission denied (publickey" in words
    assert f"it takes no key of yours: try ssh -p {host.port} 127.0.0.1, or put a key there with ssh-copy-id" in words


def test_an_unknown_host_key(host: Host) -> None:
    (host.folder / "known").write_text("")
    words = refused(host.device(user="somebody"))
    assert "Host key verification failed.; its host key is not known here" in words
    assert f"run ssh -p {host.port} somebody@127.0.0.1 once, and compare the key that it shows" in words
    assert (host.folder / "known").read_text() == ""


def test_a_configuration_for_other_uses_is_in_nobodys_way(host: Host, make_package: MakePackage) -> None:
    with (host.folder / "config").open("a") as config:
        config.write("LogLevel DEBUG3\nRequestTTY force\nRemoteCommand false\nForwardX11 yes\nControlMaster no\n")
        config.write(
            f"ControlPath {host.folder}/mine\nLocalForward {host.port} 127.0.0.1:9\nExitOnForwardFailure yes\n"
        )
    assert profile(make_package(width=8), device=host.device(), runs=3).runs == 3
    with pytest.raises(PotstillError, match="^the agent failed with exit code 1: agent: the request lacks 'models'"):
        host.device().ask({})


def test_a_changed_host_key(host: Host) -> None:
    (host.folder / "known").write_text(f"[127.0.0.1]:{host.port} {key(host.folder / 'other')}\n")
    words = refused(host.device())
    assert "its host key is not the known one: somebody may be in between" in words
    assert f"ssh-keygen -R '[127.0.0.1]:{host.port}'" in words


def test_nobody_is_there(host: Host) -> None:
    host.server.terminate()
    host.server.wait()
    words = refused(host.device())
    assert "Connection refused; see that it is on, and that ssh -p" in words


def test_somebody_who_says_nothing_is_there() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        ssh = ("ssh", "-F", "none", "-o", "ConnectTimeout=1")
        words = refused(Ssh("127.0.0.1", port=silent.getsockname()[1], ssh=ssh))
    assert "Connection timed out during banner exchange; see that it is on" in words


def test_a_name_that_nobody_has(host: Host) -> None:
    words = refused(replace(host.device(), host="no-such-host.invalid", port=None))
    assert "ssh://no-such-host.invalid cannot be reached: " in words
    assert "Could not resolve hostname" in words


# The Python there.


def test_a_python_that_is_not_there(host: Host) -> None:
    with pytest.raises(InputError, match=r"has no python9 \(.*not found\); install it there, or name another Python"):
        host.device(python="python9").ask({})
    assert host.jobs == []


@pytest.mark.parametrize("module", ["numpy", "onnxruntime"])
def test_a_python_that_lacks_a_module(host: Host, module: str) -> None:
    python = host.folder / "python"
    without = host.folder / "without" / module
    without.mkdir(parents=True)
    without.joinpath("__init__.py").write_text(f"raise ModuleNotFoundError(\"No module named '{module}'\")")
    python.write_text(f'#!/bin/sh\nPYTHONPATH={without.parent} exec {sys.executable} "$@"\n')
    python.chmod(0o700)
    words = rf"python on ssh://\S+ has no {module}; run there: \S+ -m pip install onnxruntime numpy, or name the Python"
    with pytest.raises(InputError, match=words):
        host.device(python=str(python)).ask({})


def test_a_python_in_the_home_folder(host: Host, make_package: MakePackage) -> None:
    python = host.folder / "home" / "my env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o700)
    device = host.device(python="~/my env/bin/python")
    assert profile(make_package(width=8), device=device, runs=3).runs == 3


def test_a_failing_agent_is_quoted(host: Host) -> None:
    with pytest.raises(
        PotstillError, match="the agent failed with exit code 1: agent: the request lacks 'models'"
    ) as told:
        host.device().ask({})
    assert told.value.exit_code == 1
    assert host.jobs == []


# Addresses.


@pytest.mark.parametrize(
    ("where", "device"),
    [
        ("ssh://kitchen", Ssh("kitchen")),
        ("ssh://Kitchen/", Ssh("Kitchen")),
        ("ssh://pi@kitchen:2222", Ssh("kitchen", "pi", 2222)),
        ("ssh://pi@[::1]:2222", Ssh("::1", "pi", 2222)),
        ("ssh://[fe80::1%25eth0]", Ssh("fe80::1%25eth0")),
    ],
)
def test_addresses(where: str, device: Ssh) -> None:
    opened = open_device(where)
    assert opened == device
    assert opened.where == where.rstrip("/")


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("ssh://", "no host"),
        ("ssh://pi@:22", "no host"),
        ("ssh://pi:secret@kitchen", "a password, which ssh does not take; use a key"),
        ("ssh://kitchen/home", "a path or more; leave it out"),
        ("ssh://kitchen:0", "a port that is none"),
        ("ssh://kitchen:", "a port that is none"),
        ("ssh://kitchen:ssh", "a port that is none"),
        ("ssh://kitchen:70000", "a port that is none"),
        ("ssh://-oProxyCommand=true", "a name that starts with -"),
        ("ssh://-l@kitchen", "a name that starts with -"),
    ],
)
def test_bad_addresses(where: str, words: str) -> None:
    with pytest.raises(
        InputError, match=rf"{words}; expected ssh://user@host:port, where user and port may be left out"
    ):
        Ssh.at(urlsplit(where))


def test_no_ssh_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="there is no ssh here; install OpenSSH's client"):
        Ssh.at(urlsplit("ssh://kitchen"))
