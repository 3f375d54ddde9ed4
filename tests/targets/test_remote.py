"""Jobs on a device behind a shell; the shell is one of this machine, so that every step can be looked at."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import external_data_helper

from potstill.targets import remote
from potstill.targets.device import BrokenOff, Kind, Made
from potstill.targets.local import AGENT, Local
from potstill.targets.profile import profile
from potstill.validate.errors import InputError, PotstillError, Unreachable
from potstill.validate.files import sha256_file
from tests.waiting import wait_for

MakePackage = Callable[..., Path]
PROGRAM = """
import json, os, pathlib, signal, sys, time
request = json.loads(pathlib.Path(sys.argv[1]).read_text())
do = request.get("do")
if do == "wait":
    time.sleep(60)
if do == "fail":
    sys.exit(request["words"])
if do == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if do == "fill":
    pathlib.Path("large").write_bytes(bytes(30_000_000))
given = {key: pathlib.Path(name).read_bytes() for key, name in request.get("given", {}).items()}
if "made" in request and do != "nothing":
    pathlib.Path(request["made"]).write_bytes(b"".join(given.values())[::-1])
keys = ("TMPDIR", "ORT_DISABLE_TELEMETRY", "PYTHONDONTWRITEBYTECODE")
print("noise")
print(json.dumps({"files": sorted(os.listdir()), "cwd": os.getcwd(), **{key: os.environ.get(key) for key in keys}}))
"""


@dataclass
class Here:
    """A shell of this machine that notes what goes through it."""

    root: str
    programs: Sequence[Path]
    sh: tuple[str, ...] = ("sh",)
    before: str = ""  # words of sh, of this machine, that stand before every script's command
    where: str = "here"
    kind: Kind = "measured"
    scripts: list[str] = field(default_factory=list)

    def command(self, folder: str) -> str:
        return f"{sys.executable} {folder}/{self.programs[0].name} request.json"

    def argv(self, script: str) -> list[str]:
        self.scripts.append(script.removeprefix(remote.FUNCTIONS).strip())
        return ["sh", "-c", f"{self.before} {shlex.join([*self.sh, '-c', script])}"]

    def refusal(self, code: int, said: str) -> PotstillError | None:
        return None

    def ask(self, request: Any, *, timeout_s: float = 60) -> dict[str, Any]:
        self.scripts.clear()
        return remote.ask(self, request, timeout_s)

    def sent(self) -> list[str]:
        """The names of the files of the last request that were sent."""
        words = [shlex.split(script.splitlines()[-1]) for script in self.scripts]
        return [word[1].partition("/")[2] for word in words if word[0] == "take"]

    @property
    def jobs(self) -> list[str]:
        return [path.name for path in Path(self.root, "jobs").iterdir()]

    @property
    def sets(self) -> dict[str, str]:
        return {path.parent.name: path.name for path in sorted(Path(self.root, "sets").glob("*/*"))}


@pytest.fixture
def here(tmp_path: Path) -> Here:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    return Here(str(tmp_path / "cache"), [program])


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """A request with two files of this machine and an output."""
    (tmp_path / "a.bin").write_bytes(b"abc" * 1000)
    (tmp_path / "b c'd.bin").write_bytes(b"\0\r\n\xff")
    given = {"first": tmp_path / "a.bin", "second": tmp_path / "b c'd.bin", "again": tmp_path / "a.bin"}
    return {"given": given, "made": Made(tmp_path / "out" / "made.bin")}


SHELLS = [("dash",), ("bash", "--posix"), ("busybox", "sh"), ("mksh",)]


@pytest.fixture(params=SHELLS, ids=lambda words: str(words[0]))
def sh(request: pytest.FixtureRequest) -> tuple[str, ...]:
    words: tuple[str, ...] = request.param
    if shutil.which(words[0]) is None:
        pytest.skip(f"no {words[0]} here")
    return words


def test_files_go_there_and_come_back(here: Here, files: dict[str, Any], sh: tuple[str, ...]) -> None:
    here.sh = sh
    reply = here.ask(files)
    expected = (b"abc" * 1000 + b"\0\r\n\xff" + b"abc" * 1000)[::-1]
    assert files["made"].path.read_bytes() == expected
    assert [path.name for path in files["made"].path.parent.iterdir()] == ["made.bin"]
    assert here.sent() == ["program.py", "a.bin", "b c'd.bin"]
    assert reply["files"] == ["agent", "made-0", "request.json"]
    assert reply["TMPDIR"] == reply["cwd"]
    assert (reply["ORT_DISABLE_TELEMETRY"], reply["PYTHONDONTWRITEBYTECODE"]) == ("1", "1")
    assert here.jobs == []
    assert sorted(here.sets.values()) == ["a.bin", "b c'd.bin", "program.py"]
    assert here.ask(files).keys() == reply.keys()
    assert here.sent() == []
    assert len(here.scripts) == 3  # hold, answer, bring back


def test_what_is_not_made_is_not_brought_back(here: Here, files: dict[str, Any]) -> None:
    here.ask(files | {"do": "nothing"})
    assert not files["made"].path.exists()


def test_the_agent_measures_there_what_it_measures_here(here: Here, make_package: MakePackage) -> None:
    here.programs = [AGENT]
    package = make_package()
    there, locally = profile(package, device=here, runs=20), profile(package, runs=20)
    assert there.to_json().keys() == locally.to_json().keys()
    assert there.device == "here"
    for key in ("operators", "nodes"):
        assert [row.operator for row in getattr(there, key)] == [row.operator for row in getattr(locally, key)]
    assert (there.weights_mb, there.activations_mb) == (locally.weights_mb, locally.activations_mb)
    assert (there.where, there.versions, there.runs) == (locally.where, locally.versions, 20)


def test_weights_beside_a_model_go_with_it(here: Here, make_package: MakePackage, tmp_path: Path) -> None:
    here.programs = [AGENT]
    path = make_package(width=8, layers=2) / "model.onnx"
    model = onnx.load(path)
    for number, tensor in enumerate(model.graph.initializer):
        external_data_helper.set_external_data(tensor, f"weights of/{number} it's.data")
    (path.parent / "weights of").mkdir()
    onnx.save(model, str(path))
    (tmp_path / "inputs").write_bytes(np.ones(8, "<f4").tobytes())
    outputs = []
    for device in (here, Local()):
        made = tmp_path / f"outputs-{device.where}"
        shape = {"dtype": "float32", "shape": [1, 8]}
        answer = {"path": path, "inputs": tmp_path / "inputs", "outputs": Made(made), "examples": [{"x0": shape}]}
        device.ask({"threads": 1, "answer": answer})
        outputs.append(made.read_bytes())
    assert outputs[0] == outputs[1]
    assert here.sent() == ["agent.py", "model.onnx", "weights of/0 it's.data", "weights of/1 it's.data", "inputs"]


def test_large_inputs_do_not_fill_the_device(here: Here, tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(os.urandom(1_000_000))
    large.write_bytes(os.urandom(1_000_001))
    for sent in (["program.py", "small", "large"], ["large"]):
        made = tmp_path / f"made-{len(sent)}"
        here.ask({"given": {"small": small, "large": large}, "made": Made(made)})
        assert made.read_bytes() == (small.read_bytes() + large.read_bytes())[::-1]
        assert here.sent() == sent
        assert sorted(here.sets.values()) == ["program.py", "small"]
        assert here.jobs == []


@pytest.mark.parametrize("name", ["a.bin", "large"])
def test_a_file_that_is_changed_on_its_way_is_not_used(here: Here, tmp_path: Path, name: str) -> None:
    here.ask({})
    (tmp_path / name).write_bytes(b"abc" * (1000 if name == "a.bin" else 400_000))
    here.before = "tr abc xbc |"
    words = rf"{name} came to here changed \(SHA-256\); nothing was run: try again"
    with pytest.raises(Unreachable, match=words) as told:
        here.ask({"given": {"it": tmp_path / name}, "made": Made(tmp_path / "made")})
    assert told.value.exit_code == 4
    assert (here.jobs, list(here.sets.values())) == ([], ["program.py"])
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("change", [lambda file: file.write_text("import os"), lambda file: file.unlink()])
def test_what_was_changed_there_is_sent_again(
    here: Here, files: dict[str, Any], change: Callable[[Path], object]
) -> None:
    here.ask(files)
    program = next(Path(here.root, "sets").glob("*/program.py"))
    program.chmod(0o700)
    change(program)
    here.ask(files)
    assert here.sent() == ["program.py"]
    assert sha256_file(program) == sha256_file(here.programs[0])


def test_an_output_that_is_changed_on_its_way_is_not_kept(here: Here, files: dict[str, Any]) -> None:
    """The stand-in flips bytes of what comes back of `cat` alone."""
    argv = here.argv
    here.argv = lambda script: (  # type: ignore[method-assign]
        ["sh", "-c", f"{shlex.join(argv(script))} | tr a x"] if "\ncat made-0" in script else argv(script)
    )
    with pytest.raises(Unreachable, match=r"made.bin came back from here changed \(SHA-256\); try again"):
        here.ask(files)
    assert list(files["made"].path.parent.iterdir()) == []
    assert here.jobs == []


def test_a_failing_agent_is_quoted(here: Here) -> None:
    with pytest.raises(PotstillError, match="^the agent failed with exit code 1: it is too warm$") as told:
        here.ask({"do": "fail", "words": "it is too warm"})
    assert told.value.exit_code == 1
    with pytest.raises(PotstillError, match=r"the agent was killed \(signal 9, often for want of memory\)"):
        here.ask({"do": "die"})
    assert here.jobs == []


def test_an_agent_whose_disk_was_full_is_no_fault_of_ours(here: Here) -> None:
    with pytest.raises(Unreachable, match="here is full: it could not run the agent .*No space left on device.; make"):
        here.ask({"do": "fail", "words": "OSError: [Errno 28] No space left on device"})


# What is left behind.


def agent_of(here: Here) -> int:
    """The process of the agent, as soon as there is one."""
    return int(wait_for(lambda: started(here)))


def started(here: Here) -> int:
    for file in Path(here.root).glob("jobs/*/agent"):
        with contextlib.suppress(OSError, ValueError):  # not begun, or ended
            return int(file.read_text())
    return 0


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_an_agent_that_takes_too_long_is_ended(here: Here, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    here.programs[0].write_text(
        f"import os, pathlib, time\npathlib.Path({str(begun)!r}).write_text(f'{{os.getpid()}}.')\ntime.sleep(600)\n"
    )
    for limit in (1, 10, 100):  # a busy machine may not have begun in the first of them
        with pytest.raises(Unreachable, match=f"the agent did not finish within {limit} s; give it less to do, or mo"):
            here.ask({}, timeout_s=limit)
        assert here.jobs == []
        if begun.exists() and begun.read_text().endswith("."):
            break
    assert wait_for(lambda: has_ended(int(begun.read_text().removesuffix("."))))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_when_this_process_is_ended_the_agent_is_too(here: Here, how: signal.Signals) -> None:
    """Even by signal 9: the device sees that nobody holds its job any more."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.targets.test_remote import Here
Here({here.root!r}, [Path({str(here.programs[0])!r})]).ask({{"do": "wait"}})
"""
    asking = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    pid = agent_of(here)
    asking.send_signal(how)
    asking.communicate()
    assert asking.returncode != 0
    assert wait_for(lambda: has_ended(pid))
    assert wait_for(lambda: not here.jobs)


def test_the_job_of_a_holder_that_died_is_removed_by_the_next(here: Here) -> None:
    def end() -> None:
        agent_of(here)
        os.kill(int(here.jobs[0].rpartition(".")[2]), signal.SIGKILL)
        os.kill(agent_of(here), signal.SIGKILL)

    watch = threading.Thread(target=end)
    watch.start()
    before = time.monotonic()
    with pytest.raises(PotstillError, match="the agent was killed"):
        here.ask({"do": "wait"})
    watch.join()
    assert time.monotonic() < before + 30
    assert len(here.jobs) == 1  # nobody was there to remove it
    here.ask({})
    assert here.jobs == []  # the next job does


def test_jobs_of_the_dead_are_removed_and_others_are_not(here: Here) -> None:
    here.ask({})
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = os.uname().nodename
    names = [f"0123abcd.{host}.{dead.pid}", f"0123abcd.{host}.{os.getpid()}", f"0123abcd.another.{dead.pid}"]
    for name in names:
        Path(here.root, "jobs", name, "x.part").mkdir(parents=True)
    here.ask({})
    assert sorted(here.jobs) == sorted(names[1:])


def test_many_may_begin_a_cache_at_once(sh: tuple[str, ...], tmp_path: Path) -> None:
    for number in range(20):
        script = remote._script(f"enter {shlex.quote(str(tmp_path / str(number)))}")
        begun = [subprocess.Popen([*sh, "-c", script], stderr=subprocess.PIPE) for _ in range(8)]
        assert [one.communicate()[1] for one in begun] == [b"potstill: ended\n"] * 8
        assert sorted(one.name for one in (tmp_path / str(number)).iterdir()) == ["CACHEDIR.TAG", "jobs", "sets"]


def test_two_at_once_do_not_disturb_each_other(here: Here, files: dict[str, Any], tmp_path: Path) -> None:
    others = [replace(here, scripts=[]) for _ in range(3)]
    requests = [files | {"made": Made(tmp_path / f"made-{number}")} for number in range(3)]
    asked = [threading.Thread(target=one.ask, args=(request,)) for one, request in zip(others, requests, strict=True)]
    for thread in asked:
        thread.start()
    for thread in asked:
        thread.join()
    assert len({sha256_file(request["made"].path) for request in requests}) == 1
    assert here.jobs == []
    assert sorted(path.name for path in Path(here.root, "sets").glob("*/*")) == ["a.bin", "b c'd.bin", "program.py"]


# The cache.


def test_clean_removes_the_cache_and_tells_its_size(here: Here, tmp_path: Path) -> None:
    assert remote.clean(here) == 0
    (tmp_path / "input").write_bytes(os.urandom(1_000_000))
    here.ask({"given": {"it": tmp_path / "input"}})
    assert 1_000_000 <= remote.clean(here) < 1_200_000
    assert not Path(here.root).exists()


def test_a_folder_that_is_no_cache_is_left_alone(here: Here) -> None:
    mine = Path(here.root, "mine")
    mine.parent.mkdir()
    mine.write_text("important")
    with pytest.raises(InputError, match=r"here: .*/cache is no cache of potstill; nothing was removed"):
        remote.clean(here)
    with pytest.raises(InputError, match=r"here: .*/cache is no cache of potstill; move it out of the way"):
        here.ask({})
    assert [path.name for path in mine.parent.iterdir()] == ["mine"]


def test_clean_keeps_what_somebody_put_into_the_cache(here: Here) -> None:
    here.ask({})
    mine = Path(here.root, "mine")
    mine.write_text("important")
    assert remote.clean(here) > 0
    assert [path.name for path in mine.parent.iterdir()] == ["mine"]


def test_a_cache_in_use_is_not_removed(here: Here) -> None:
    def ask() -> None:
        with pytest.raises(PotstillError, match="the agent was killed"):
            here.ask({"do": "wait"})

    asked = threading.Thread(target=ask)
    asked.start()
    pid = agent_of(here)
    with pytest.raises(InputError, match=r"cache is in use; wait until the other run has ended"):
        remote.clean(here)
    os.kill(pid, signal.SIGKILL)
    asked.join()
    assert list(here.sets.values()) == ["program.py"]


def test_a_root_that_cannot_be(here: Here) -> None:
    here.root = "/dev/null/cache"
    with pytest.raises(Unreachable, match=r"here could not make a folder for the job: .*/dev/null.*Not a directory"):
        here.ask({})


def test_a_device_that_says_nothing(here: Here) -> None:
    here.before = "exit 3;"
    with pytest.raises(Unreachable, match=r"here could not make a folder for the job: it said nothing"):
        here.ask({})
    with pytest.raises(Unreachable, match=r"here could not remove its cache: it said nothing"):
        remote.clean(here)


def test_a_shell_that_talks(here: Here) -> None:
    here.before = "echo welcome home;"
    with pytest.raises(InputError, match="here prints 'welcome home' before every command, .*; silence its shell"):
        here.ask({})
    assert here.jobs == []


def test_a_device_that_hangs(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE_S", 0.3)
    here.before = "exec sleep 60;"
    words = "here hangs: it was to make a folder for the job, and did not within 0.3 s; run again when it is back"
    with pytest.raises(Unreachable, match=words) as told:
        here.ask({})
    assert told.value.exit_code == 4
    monkeypatch.setattr(remote, "CLEAN_S", 0.3)
    with pytest.raises(Unreachable, match="here hangs: it was to remove its cache, and did not within 0.3 s; run"):
        remote.clean(here)


@pytest.mark.parametrize(
    ("word", "before", "doing"),
    [("take", 1, "take 1.5 MB"), ("look", 2, "take 1.5 MB"), ("cat made", 3, "give what it made")],
)
def test_a_device_that_hangs_with_a_file(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, before: int, doing: str
) -> None:
    """`before` steps that are told of bytes go well, and the next one never ends."""
    here.ask({})
    large = tmp_path / "large"
    large.write_bytes(bytes(1_500_000))
    made, argv, limits = tmp_path / "made" / "it", here.argv, iter([60.0] * before + [0.3])
    monkeypatch.setattr(remote, "within_s", lambda size: next(limits))
    here.argv = lambda script: ["sleep", "60"] if f"\n{word}" in script.removeprefix(remote.FUNCTIONS) else argv(script)  # type: ignore[method-assign]
    with pytest.raises(
        Unreachable, match=f"here hangs: it was to {doing}, and did not within 0.3 s; run again"
    ) as told:
        here.ask({"given": {"it": large}, "made": Made(made)})
    assert told.value.exit_code == 4
    assert here.jobs == []
    assert not made.parent.exists() or list(made.parent.iterdir()) == []
    monkeypatch.undo()
    here.argv = argv  # type: ignore[method-assign]
    here.ask({"given": {"it": large}, "made": Made(made)})
    assert made.stat().st_size == 1_500_000


def test_the_time_for_a_file_grows_with_its_bytes(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert remote.within_s(0) == 60
    assert remote.within_s(36_000_000) == 60 + 720
    (tmp_path / "large").write_bytes(bytes(1_500_000))
    (tmp_path / "small").write_bytes(bytes(10))
    asked: list[int] = []
    monkeypatch.setattr(remote, "within_s", lambda size: asked.append(size) or 60.0)
    here.ask({"given": {"a": tmp_path / "large", "b": tmp_path / "small"}, "made": Made(tmp_path / "made")})
    program = here.programs[0].stat().st_size
    stays = program + 10
    assert asked == [stays, program, program, 1_500_000, 1_500_000, 10, 10, 1_500_010]


def test_what_an_agent_said_until_the_device_went_away(here: Here) -> None:
    program = here.programs[0]
    program.write_text("import time\nprint('one', flush=True)\nprint('two', flush=True)\ntime.sleep(60)\n")

    for limit in (2, 20, 200):  # a busy machine may not have said it in the first of them
        with pytest.raises(BrokenOff, match=f"the agent did not finish within {limit} s") as late:
            here.ask({}, timeout_s=limit)
        if late.value.said == b"one\ntwo\n":
            break
    assert late.value.said == b"one\ntwo\n"
    argv = here.argv
    here.argv = lambda script: (  # type: ignore[method-assign]
        ["sh", "-c", "echo one; echo tw; exit 3"]
        if "\nanswer" in script.removeprefix(remote.FUNCTIONS)
        else argv(script)
    )
    here.refusal = lambda code, said: Unreachable("lost") if code == 3 else None  # type: ignore[method-assign]
    with pytest.raises(BrokenOff, match="here went away while it was to run the agent") as lost:
        here.ask({})
    assert lost.value.said == b"one\ntw\n"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a small disk here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(here: Here, small_disk: Path, tmp_path: Path) -> None:
    here.root = str(small_disk / "cache")
    large = tmp_path / "large"
    large.write_bytes(bytes(3_000_000))
    with pytest.raises(
        Unreachable, match=r"here is full: it could not take 3.0 MB \(.*No space left on device\); make room there"
    ):
        here.ask({"given": {"large": large}})
    assert (here.jobs, list(here.sets.values())) == ([], ["program.py"])
    with pytest.raises(Unreachable, match=r"here is full: it could not run the agent"):
        here.ask({"do": "fill"})
    assert here.jobs == []
    here.ask({})


def test_a_device_whose_hashes_come_from_perl_or_nowhere(here: Here, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    words = "sh cat mkdir rm mv ls uname dirname chmod sleep env"
    for word in (*words.split(), "shasum", "perl"):
        found = shutil.which(word)
        if found is None:
            pytest.skip(f"no {word} here")
        (tools / word).symlink_to(found)
    here.before = f"PATH={tools}"
    assert here.ask({})["cwd"]
    (tools / "shasum").unlink()
    with pytest.raises(InputError, match="here: there is neither sha256sum nor shasum; install one"):
        here.ask({})
