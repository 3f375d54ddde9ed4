"""The runner for phones, against the agent: the same library, so the same numbers to the bit, in the same words."""

import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from potstill.targets import runner
from potstill.targets.device import Made, with_names
from potstill.targets.local import Local, reply_of
from potstill.targets.operators import read_profile
from potstill.targets.qemu import ARM64_ROOT, emulator_of
from potstill.targets.target import load_target
from potstill.validate.errors import InputError, PotstillError, Unreachable

Ask = Callable[[dict[str, Any]], dict[str, Any]]
MakeModel = Callable[..., Path]
Start = Callable[[str], list[str]]


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """The words that start the runner of an architecture; a visible skip where it is not built."""
    folders: dict[str, Path] = {}

    def started(arch: str) -> list[str]:
        if arch not in folders:
            try:
                folders[arch] = Path(shutil.copytree(runner.built(arch), tmp_path_factory.mktemp("runner") / arch))
            except InputError as error:
                pytest.skip(str(error))
            (folders[arch] / runner.loader(arch)).chmod(0o755)
        here = folders[arch]
        return [str(here / runner.loader(arch)), "--library-path", str(here), str(here / runner.PROGRAM)]

    return started


def run(words: list[str], request: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    file = folder / "request.json"
    names = with_names(request, lambda one: str(one.path if isinstance(one, Made) else one))
    file.write_text(json.dumps(names))
    return subprocess.run([*words, str(file)], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def native(started: Start) -> list[str]:
    """The words that start the runner as this machine's processor runs it."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("needs Linux on x86_64")
    return started("x86_64")


@pytest.fixture
def ask(native: list[str], tmp_path: Path) -> Ask:
    """The reply of the runner to a request."""

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        done = run(native, request, tmp_path)
        return reply_of(done.returncode, done.stdout.encode(), done.stderr.encode())

    return ask


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    def make(kind: str = "float32") -> Path:
        """`a` (rows, 32) times a matrix, plus `b` (rows, 8), through a softmax; as int8 where `kind` says so."""
        rng = np.random.default_rng(0)
        weights = numpy_helper.from_array(rng.standard_normal((32, 8)).astype(np.float32), "w")
        nodes = [
            helper.make_node("MatMul", ["a", "w"], ["m"]),
            helper.make_node("Cast", ["b"], ["c"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["m", "c"], ["s"]),
            helper.make_node("Softmax", ["s"], ["p"]),
            helper.make_node("Cast", ["p"], ["y"], to=TensorProto.FLOAT16 if kind == "float16" else TensorProto.FLOAT),
            helper.make_node("Shape", ["p"], ["size"]),
        ]
        inputs = [
            helper.make_tensor_value_info("b", TensorProto.INT64, ["rows", 8]),
            helper.make_tensor_value_info("a", TensorProto.FLOAT, ["rows", 32]),
        ]
        made = TensorProto.FLOAT16 if kind == "float16" else TensorProto.FLOAT
        outputs = [
            helper.make_tensor_value_info("y", made, ["rows", 8]),
            helper.make_tensor_value_info("size", TensorProto.INT64, [2]),
        ]
        graph = helper.make_graph(nodes, "small", inputs, outputs, [weights])
        path = tmp_path / f"{kind}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        if kind == "int8":
            quantize_dynamic(path, path, weight_type=QuantType.QInt8, per_channel=True)
        return path

    return make


def examples(count: int) -> list[dict[str, NDArray[Any]]]:
    """Their inputs in another order than the model's, with one that it has not."""
    rng = np.random.default_rng(1)
    return [
        {
            "a": rng.standard_normal((rows, 32)).astype("<f4"),
            "more": np.ones(rows, "?"),
            "b": rng.integers(-3, 3, (rows, 8)),
        }
        for rows in range(1, count + 1)
    ]


def to_answer(model: Path, given: list[dict[str, NDArray[Any]]], folder: Path, **more: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    (folder / "in.bin").write_bytes(b"".join(array.tobytes() for one in given for array in one.values()))
    listed = [{name: {"dtype": a.dtype.name, "shape": list(a.shape)} for name, a in one.items()} for one in given]
    files = {"inputs": folder / "in.bin", "outputs": Made(folder / "out.bin")}
    return {"threads": 1, "answer": {"path": model, "examples": listed, **files, **more}}


def to_measure(model: Path, folder: Path, **more: Any) -> dict[str, Any]:
    (one,) = examples(1)
    inputs = {}
    for name in ("a", "b"):
        (folder / f"{name}.bin").write_bytes(one[name].tobytes())
        inputs[name] = {"file": folder / f"{name}.bin", "dtype": one[name].dtype.name, "shape": list(one[name].shape)}
    spec = {"path": model, "inputs": inputs, "session_options": {"session.intra_op.allow_spinning": "0"}}
    return {"threads": 1, "warmup": 2, "runs": 5, "models": [spec], **more}


def form(value: Any) -> Any:
    """A reply without its numbers: the keys, and the types of what they hold."""
    if isinstance(value, dict):
        return {key: form(one) for key, one in value.items()}
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_answers_are_the_agents_to_the_bit(ask: Ask, make_model: MakeModel, kind: str, tmp_path: Path) -> None:
    model, given = make_model(kind), examples(4)
    ours = ask(to_answer(model, given, tmp_path / "a"))
    theirs = Local().ask(to_answer(model, given, tmp_path / "b"))
    assert ours["answer"] == theirs["answer"]
    assert ours["answer"]["outputs"][1] == {"dtype": "float16" if kind == "float16" else "float32", "shape": [2, 8]}
    assert (tmp_path / "a/out.bin").read_bytes() == (tmp_path / "b/out.bin").read_bytes()
    assert len((tmp_path / "a/out.bin").read_bytes()) == 10 * 8 * (2 if kind == "float16" else 4)


def test_in_a_given_time_the_first_examples_are_answered(ask: Ask, make_model: MakeModel, tmp_path: Path) -> None:
    model, given = make_model(), examples(4)
    assert len(ask(to_answer(model, given, tmp_path / "a", seconds=0.0))["answer"]["outputs"]) == 1
    assert len(ask(to_answer(model, given, tmp_path / "b", seconds=60.0))["answer"]["outputs"]) == 4


def test_a_measurement_has_the_form_of_the_agents(ask: Ask, make_model: MakeModel, tmp_path: Path) -> None:
    request = to_measure(make_model(), tmp_path, throughput=[1], providers=["XnnpackExecutionProvider"], cores=[])
    ours = ask({**request, "operators": Made(tmp_path / "a.json")})
    theirs = Local().ask({**request, "operators": Made(tmp_path / "b.json")})
    (model,) = ours["models"]
    assert model["provider_nodes"] is None  # this version of the interface does not tell them before fusion
    del model["provider_nodes"], theirs["models"][0]["provider_nodes"], theirs["versions"]["python"]
    del theirs["machine"]["name"]  # a phone's serial number, which adb tells
    for reply in (ours, theirs):  # it may be a number or nothing by what else runs
        del reply["models"][0]["energy_uj"]
    assert form(ours) == form(theirs)
    for key in ("machine", "threads", "warmup", "versions"):
        assert ours[key] == theirs[key]
    assert model["missing_providers"] == ["XnnpackExecutionProvider"]
    assert len(model["times_ms"]) == 5
    assert 0 < min(model["times_ms"]) <= model["first_run_ms"] < model["load_ms"] < 10_000
    assert 1 < model["baseline_mb"] < 200
    assert 0 < model["peak_memory_mb"] < 200
    ours, theirs = read_profile(tmp_path / "a.json"), read_profile(tmp_path / "b.json")
    assert [(n.name, n.operator, n.provider) for n in ours.nodes] == [
        (n.name, n.operator, n.provider) for n in theirs.nodes
    ]
    assert sorted(one.count for one in ours.operators) == sorted(one.count for one in theirs.operators)
    assert ours.activations_mb == theirs.activations_mb
    assert not list(tmp_path.glob("*.ort*"))


def test_until_a_time_is_over_within_bounds(ask: Ask, make_model: MakeModel, tmp_path: Path) -> None:
    request = to_measure(make_model(), tmp_path, runs=None, seconds=0.0, min_runs=3, max_runs=100)
    assert len(ask(request)["models"][0]["times_ms"]) == 3
    assert len(ask({**request, "seconds": 60.0})["models"][0]["times_ms"]) == 100


def test_several_models_take_turns(ask: Ask, make_model: MakeModel, tmp_path: Path) -> None:
    request = to_measure(make_model(), tmp_path)
    request["models"].append({**request["models"][0], "path": make_model("int8")})
    ours, theirs = ask(request), Local().ask(request)
    assert form(ours["models"][1]) == form(theirs["models"][1])
    assert [model["path"] for model in ours["models"]] == [model["path"] for model in theirs["models"]]
    assert [len(model["times_ms"]) for model in ours["models"]] == [5, 5]


def test_under_load_each_second_is_told(ask: Ask, make_model: MakeModel, tmp_path: Path) -> None:
    request = to_measure(make_model(), tmp_path, sustained=2)
    (ours,), (theirs,) = ask(request)["models"], Local().ask(request)["models"]
    assert form(ours["seconds"][0]) == form(theirs["seconds"][0])
    assert [round(second["at_s"]) for second in ours["seconds"]] == [1, 2]
    for second in ours["seconds"]:
        assert second["runs"] > 10
        assert 0 < second["median_ms"] <= second["p90_ms"] < 1000


def test_more_threads_are_used_and_cores_kept_to(ask: Ask, make_model: MakeModel, tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    assert ask(to_measure(make_model(), tmp_path, threads=2, cores=[core]))["threads"] == 2


def test_what_is_wrong_is_said(ask: Ask, make_model: MakeModel, tmp_path: Path) -> None:
    """In the words of the agent, where both of them can meet it."""
    model, given = make_model(), examples(2)
    measuring, answering = to_measure(model, tmp_path), to_answer(model, given, tmp_path / "a")
    (spec,), answer = measuring["models"], answering["answer"]

    def changed(**entry: Any) -> dict[str, Any]:
        return {**measuring, "models": [{**spec, "inputs": {**spec["inputs"], "a": {**spec["inputs"]["a"], **entry}}}]}

    def refused(request: dict[str, Any], words: str) -> None:
        with pytest.raises(PotstillError, match=words):
            ask(request)

    refused({"threads": 1, "warmup": 1}, "agent: the request lacks 'models'$")
    refused({key: measuring[key] for key in ("threads", "warmup", "models")}, "lacks 'runs', or 'seconds' with 'min_ru")
    with pytest.raises(InputError, match=r"^there are no cores \[1000\] here$"):
        ask({**measuring, "cores": [1000]})
    refused(
        {**measuring, "models": [{**spec, "path": tmp_path / "a/in.bin"}]}, "agent: .*Load model from .*in.bin fail"
    )
    refused(changed(dtype="complex64"), "a.bin has an input that is no array of numbers: .*complex64")
    refused(changed(shape=[-1, 32]), r"a.bin has an input that is no array of numbers: .*\[-1,32\]")
    refused(changed(shape=[2, 32]), "agent: the inputs end within .*a.bin")
    refused(changed(shape=[1, 31]), "agent: .*a.bin holds more than .*31")
    refused(changed(file=tmp_path / "none.bin"), "agent: cannot read .*none.bin")
    refused({"answer": answer}, "agent: the request lacks 'threads'")
    refused({"threads": 1, "answer": {"path": model}}, "agent: the answer asked for lacks 'examples'")
    lacking = [{"a": answer["examples"][0]["a"]}]
    refused({"threads": 1, "answer": {**answer, "examples": lacking}}, "agent: example 1 lacks 'b'")
    (tmp_path / "a/out.bin").unlink()
    refused(
        {"threads": 1, "answer": {**answer, "examples": answer["examples"][:1]}}, "in.bin holds more than its 1 exa"
    )
    refused(answering, "agent: .*out.bin is there already; outputs go into a new file")
    (tmp_path / "a/out.bin").unlink()
    (tmp_path / "a/in.bin").write_bytes((tmp_path / "a/in.bin").read_bytes()[:-1])
    refused(answering, "agent: the inputs end within example 2")
    (tmp_path / "a/out.bin").unlink()
    refused({"threads": 1, "answer": {**answer, "inputs": tmp_path / "none"}}, "agent: cannot open .*none")


def test_an_output_of_words_is_refused(ask: Ask, tmp_path: Path) -> None:
    node = helper.make_node("Identity", ["w"], ["y"])
    words = helper.make_tensor("w", TensorProto.STRING, [1], [b"a"])
    put = [helper.make_tensor_value_info("y", TensorProto.STRING, [1])]
    graph = helper.make_graph([node], "words", [], put, [words])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "w.onnx")
    with pytest.raises(PotstillError, match="agent: the model's first output is no array of numbers"):
        ask(to_answer(tmp_path / "w.onnx", [{}], tmp_path / "a"))


def test_it_is_started_with_one_request(native: list[str]) -> None:
    done = subprocess.run(native, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (1, b"agent: give one request, a file of JSON\n")


@pytest.mark.skipif(
    not (shutil.which("qemu-aarch64") and os.environ.get(ARM64_ROOT)), reason=f"needs qemu-aarch64 and {ARM64_ROOT}"
)
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_on_arm64_answers_are_the_agents_to_the_bit(
    started: Start, make_model: MakeModel, kind: str, tmp_path: Path
) -> None:
    emulator = emulator_of(load_target("phone-arm64-dotprod"))
    words = [*emulator.python[:-1], *started("arm64")]
    model, given = make_model(kind), examples(3)
    done = run(words, to_answer(model, given, tmp_path / "a"), tmp_path)
    assert done.returncode == 0, done.stderr
    ours = json.loads(done.stdout.splitlines()[-1])
    agent = Local(python=emulator.python, environment=emulator.environment)
    theirs = agent.ask(to_answer(model, given, tmp_path / "b"))
    assert ours["answer"] == theirs["answer"]
    assert ours["machine"]["arch"] == "aarch64"
    assert (tmp_path / "a/out.bin").read_bytes() == (tmp_path / "b/out.bin").read_bytes()


# What builds it.


def deb(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> str:
    """A package of Debian with some files; its SHA-256."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as tar:
        for name, target in (links or {}).items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    whole = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0"), ("data.tar.xz", inner.getvalue())):
        whole += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
            + content
            + b"\n" * (len(content) % 2)
        )
    path.write_bytes(whole)
    return hashlib.sha256(whole).hexdigest()


def test_a_file_of_a_package_is_found_behind_its_link(tmp_path: Path) -> None:
    files = {"./lib/a/libx.so.6.0.1": b"code", "./usr/include/x.h": b"head"}
    sha256 = deb(tmp_path / "x.deb", files, {"./lib/libx.so.6": "a/libx.so.6.0.1"})
    with runner._package({"path": "x.deb", "sha256": sha256}, tmp_path.as_uri()) as package:
        assert runner._file(package, "libx.so.6") == b"code"
        assert [member.name for member in runner._under(package, "./usr/include/")] == ["./usr/include/x.h"]


def test_a_part_that_is_not_what_was_expected(tmp_path: Path) -> None:
    sha256 = deb(tmp_path / "x.deb", {"./x": b""})
    with pytest.raises(Unreachable, match=f"x.deb has SHA-256 {sha256}, expected 0; it was changed on the way"):
        runner._package({"path": "x.deb", "sha256": "0"}, tmp_path.as_uri())
    with pytest.raises(
        Unreachable, match="cannot fetch file:.*none.deb: .*; try again, or give another mirror with --m"
    ):
        runner._package({"path": "none.deb", "sha256": "0"}, tmp_path.as_uri())


def test_a_wheel_that_pip_cannot_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runner.parts()["wheels"], "no-such==1", ["0" * 64])
    with pytest.raises(Unreachable, match="pip cannot get no-such==1: ERROR.*; the runner is built with a network"):
        runner._pip(tmp_path, "no-such==1", "--no-index")


def test_a_wheel_of_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "wheels/made-1-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("made.py", "")
        file.writestr("made-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: made\nVersion: 1\n")
        file.writestr("made-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("made-1.dist-info/RECORD", "")
    only = ("--no-index", "--find-links", str(wheel.parent))
    monkeypatch.setitem(runner.parts()["wheels"], "made==1", ["0" * 64])
    with pytest.raises(Unreachable, match=r"the wheel of made==1 is none of those in runner.yaml \(SHA-256\)"):
        runner._pip(tmp_path / "into", "made==1", *only)
    assert not (tmp_path / "into").exists()
    monkeypatch.setitem(runner.parts()["wheels"], "made==1", [hashlib.sha256(wheel.read_bytes()).hexdigest()])
    runner._pip(tmp_path / "into", "made==1", *only)
    assert (tmp_path / "into/made.py").is_file()


def test_a_runtime_without_a_known_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(runner, "version", lambda name: "1.99.0")
    with pytest.raises(InputError, match=r"of onnxruntime==1.99.0; install onnxruntime==\d\S+ to build the runner"):
        runner.build("arm64")


def test_a_source_that_does_not_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a compiler that is none, so that it is not fetched."""
    (tmp_path / "zig" / "ziglang").mkdir(parents=True)
    (tmp_path / "zig/ziglang/__main__.py").write_text("raise SystemExit('no such header')")
    monkeypatch.setattr(runner, "_pip", lambda *words: None)
    with pytest.raises(
        PotstillError, match=r"the runner for riscv64 does not compile with ziglang==\S+: no such header"
    ):
        runner._compile("riscv64", tmp_path, tmp_path, tmp_path / "program")


def test_a_wheel_without_a_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    deb(tmp_path / "x.deb", {"./x": b""})
    read = runner._package
    monkeypatch.setattr(runner, "_package", lambda part, mirror: read(part | {"path": "x.deb"}, mirror))
    for part in runner.parts()["headers"]:
        monkeypatch.setitem(part, "sha256", hashlib.sha256((tmp_path / "x.deb").read_bytes()).hexdigest())
    monkeypatch.setattr(runner, "_pip", lambda *words: None)
    monkeypatch.setattr(runner, "_compile", lambda *words: None)
    with pytest.raises(PotstillError, match=r"the wheel of onnxruntime \d\S+ has no library; take another version"):
        runner.build("arm64", tmp_path.as_uri())


def test_a_runner_that_is_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        InputError, match=r"none for arm64 and ONNX Runtime \S+ is built here; build it once: python.* -m"
    ):
        runner.built("arm64")
    assert runner.main(["arm64", "--mirror", tmp_path.as_uri()]) == 4
    assert capsys.readouterr().err.startswith(f"error: cannot fetch {tmp_path.as_uri()}/pool/main/o/onnxruntime/")
    assert [path.name for path in (tmp_path / "potstill/runner").iterdir()] == []
    runner.place("arm64").mkdir()
    assert runner.build("arm64") == runner.built("arm64")


def test_the_mirror_is_that_of_apt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    apt = tmp_path / "apt-get"
    apt.write_text('#!/bin/sh\n[ "$1" = indextargets ] && echo http://mirror.example/debian/\n')
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert runner._mirror() == "http://mirror.example/debian"
    apt.write_text("#!/bin/sh\n")
    with pytest.raises(InputError, match="apt names no mirror of Debian here.*; give one with --mirror"):
        runner._mirror()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(InputError, match="apt names no mirror"):
        runner._mirror()


def test_every_part_is_pinned_with_its_licence() -> None:
    for arch in runner.ARCHS:
        names = [name for part in runner.parts()[arch]["packages"] for name in part["files"]]
        assert runner.loader(arch) in names
        notes = runner._notes(arch)
        assert all(f"\n{name}: " in notes for name in [*names, runner.LIBRARY])
    listed = [part for key in ("headers", "arm64", "x86_64") for part in _parts_of(runner.parts()[key])]
    assert len(listed) == 8
    assert all(len(part["sha256"]) == 64 and part["licence"] for part in listed)


def _parts_of(entry: Any) -> list[dict[str, Any]]:
    return list(entry if isinstance(entry, list) else entry["packages"])


@pytest.mark.slow
@pytest.mark.parametrize("arch", runner.ARCHS)
def test_it_is_built_whole(arch: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        folder = runner.build(arch)
    except Unreachable as error:
        pytest.skip(str(error))
    names = [name for part in runner.parts()[arch]["packages"] for name in part["files"]]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*names, runner.PROGRAM, runner.LIBRARY, runner.NOTES]
    )
    machine = {"arm64": 0xB7, "x86_64": 0x3E}[arch]  # e_machine of elf(5)
    for name in [*names, runner.PROGRAM, runner.LIBRARY]:
        head = (folder / name).read_bytes()[:20]
        assert (head[:4], int.from_bytes(head[18:20], sys.byteorder)) == (b"\x7fELF", machine), name
