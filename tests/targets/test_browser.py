"""The browser as a device: onnxruntime-web in headless Chromium, against ONNX Runtime on this machine."""

import json
import os
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
import torch
from onnx import helper
from torch import nn

from potstill.export.checked import tolerance
from potstill.export.golden import GOLDEN, write_golden
from potstill.export.graph import export_graph
from potstill.export.package import package_encoder
from potstill.export.quantize import quantize, scheme_for
from potstill.targets import browser, browser_job
from potstill.targets.browser import Browser
from potstill.targets.device import BrokenOff, Made
from potstill.targets.local import Local
from potstill.targets.onnxruntime_web import runtime
from potstill.targets.profile import compare, profile
from potstill.targets.request import read_package
from potstill.targets.target import Scheme, load_target
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.errors import InputError, PotstillError, Unreachable
from potstill.validate.files import read_json, write_json
from potstill.validate.predictor import OnnxPredictor
from potstill.validate.task import TASKS, Model

MakePackage = Callable[..., Path]
SWIFTSHADER = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
SWIFTSHADER += ("--enable-features=Vulkan", "--use-vulkan=swiftshader")


@pytest.fixture(scope="session", autouse=True)
def ready() -> None:
    """A visible skip where there is no Chromium, or no runtime and none to fetch."""
    try:
        browser.chromium()
        runtime()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """After each test: no folder, no process of Chromium and no server. `tmp_path` is made before the folder moves."""
    with tempfile.TemporaryDirectory(prefix="made-", dir="/tmp") as name:  # a short one, as Chromium's socket wants
        monkeypatch.setattr(tempfile, "tempdir", name)
        before = _open_here()
        yield Path(name)
        assert list(Path(name).glob("potstill-*")) == []
        lines = [" ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])]
        assert [line for line in lines if name in line] == []
        assert _open_here() <= before


def _open_here() -> set[object]:
    """This process's children that live, and the ports on which it listens."""
    here = psutil.Process()
    children = {one for one in here.children(recursive=True) if _lives(one)}
    return children | {one.laddr for one in here.net_connections() if one.status == psutil.CONN_LISTEN}


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def measuring(package: Path, **more: Any) -> dict[str, Any]:
    return {"threads": 1, "warmup": 0, "runs": 2, "models": [read_package(package).spec()], **more}


def answers(device: Any, model: Path, examples: list[dict[str, Any]], folder: Path, **more: Any) -> tuple[Any, bytes]:
    """The reply of a device for some arrays, and the bytes of its outputs."""
    given, made = folder / "given.bin", folder / "made.bin"
    made.unlink(missing_ok=True)
    given.write_bytes(b"".join(array.tobytes() for one in examples for array in one.values()))
    said = [
        {name: {"dtype": array.dtype.name, "shape": array.shape} for name, array in one.items()} for one in examples
    ]
    asked = {"path": model, "inputs": given, "outputs": Made(made), "examples": said, **more}
    reply = device.ask({"threads": 1, "answer": asked}, timeout_s=120)
    return reply, made.read_bytes()


# Golden samples: what was expected on this machine, and what the browser gives.


def convnet() -> tuple[Model, Examples]:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 16, 3, groups=16), nn.Hardswish(),
        nn.Conv2d(16, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4),
    ).eval()  # fmt: skip
    x = np.random.default_rng(0).normal(size=(32, 3, 24, 24)).astype(np.float32)
    examples = Examples("made", Arrays({"x": x}), np.zeros(32, dtype=np.int64), None, "d")
    return Model(layers, ArrayEncoder(), ("x",), tuple("0123"), Checkpoint("made:up"), layers), examples


def text_model(request: pytest.FixtureRequest) -> tuple[Model, Examples]:
    task, teacher = TASKS["text-classification"], request.getfixturevalue("text_teacher")
    files = request.getfixturevalue("texts")
    return task.load(Checkpoint(str(teacher))), task.examples(str(files["eval"]), {"text": "sentence"})


STATIC = Scheme(method="static", activation="uint8", weight="int8", per_channel=True, why="test")


@pytest.mark.parametrize("case", ["text", "convnet", "static convnet", "float16 text"])
def test_golden_samples_are_predicted_as_here(case: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """As an app does: every golden sample within its tolerance, and the same class."""
    model, examples = text_model(request) if "text" in case else convnet()
    target, package = load_target("browser-wasm"), tmp_path / "package"
    package.mkdir()
    export_graph(model, examples, tmp_path / "graph.onnx", 20)
    scheme = scheme_for(tmp_path / "graph.onnx", target)
    if case == "static convnet":
        scheme = STATIC
    if case == "float16 text":
        scheme = Scheme(method="float16", why="test")
    encode = package_encoder(model.encode, target)
    quantize(tmp_path / "graph.onnx", package / "model.onnx", scheme, examples, encode, 0)
    native = OnnxPredictor(package / "model.onnx", encode, "native", read=model.read)
    write_golden(package / GOLDEN, native, examples, tolerance(scheme.method).largest)
    write_json(package / "manifest.json", {"target": target.model_dump(mode="json")})
    samples = read_json(package / GOLDEN / "golden.json")["samples"]
    given = [{name: array_of(package, one) for name, one in sample["inputs"].items()} for sample in samples]
    wanted = [next(iter(sample["outputs"].values())) for sample in samples]
    reply, found = answers(Browser(), package / "model.onnx", given, tmp_path, providers=target.runtime.providers)
    assert len(given) == 4
    assert (reply["answer"]["providers"], reply["answer"]["missing_providers"]) == (["wasm"], [])
    assert [one["shape"] for one in reply["answer"]["outputs"]] == [one["shape"] for one in wanted]
    rows = np.frombuffer(found, np.float32).reshape(4, -1)
    expected = np.stack([array_of(package, one).ravel() for one in wanted])
    atol = np.array([one["atol"] for one in wanted])
    assert (np.abs(rows - expected).max(axis=1) <= atol).all()
    assert (rows.argmax(axis=1) == expected.argmax(axis=1)).all()
    assert len(np.unique(rows, axis=0)) == 4  # no constant


def array_of(package: Path, entry: dict[str, Any]) -> Any:
    return np.fromfile(package / GOLDEN / entry["file"], entry["dtype"]).reshape(entry["shape"])


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "int64", "uint64", "bool"])
def test_every_type_arrives_and_comes_back_bit_by_bit(dtype: str, tmp_path: Path) -> None:
    """The model puts two arrays together, so that no value is computed."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    *given, made = (helper.make_tensor_value_info(name, kind, ["n", 3]) for name in "aby")
    graph = helper.make_graph([helper.make_node("Concat", ["a", "b"], ["y"], axis=0)], "g", given, [made])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    rng = np.random.default_rng(0)
    width = np.dtype(dtype).itemsize
    a, b = (
        np.frombuffer(bytes(rng.integers(0, 2 if dtype == "bool" else 256, 6 * width, np.uint8)), dtype) for _ in "ab"
    )
    examples = [{"a": a.reshape(2, 3), "b": b.reshape(2, 3)}, {"a": b[:3].reshape(1, 3), "b": a.reshape(2, 3)}]
    reply, there = answers(Browser(), tmp_path / "m.onnx", examples, tmp_path)
    assert reply["answer"]["outputs"] == [{"dtype": dtype, "shape": [4, 3]}, {"dtype": dtype, "shape": [3, 3]}]
    assert there == b"".join([a.tobytes(), b.tobytes(), b[:3].tobytes(), a.tobytes()])
    assert there == answers(Local(), tmp_path / "m.onnx", examples, tmp_path)[1]


def test_weights_in_a_file_of_their_own(make_package: MakePackage, tmp_path: Path) -> None:
    model = make_package(width=64) / "model.onnx"
    given = [{"x0": np.ones((2, 64), np.float32)}]
    whole = answers(Browser(), model, given, tmp_path)[1]
    onnx.save(onnx.load(model), str(model), save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    assert (model.parent / "model.onnx.data").stat().st_size == 4 * 64 * 64 * 4
    assert answers(Browser(), model, given, tmp_path)[1] == whole


def test_examples_are_answered_until_the_time_is_over(make_package: MakePackage, tmp_path: Path) -> None:
    given = [{"x0": np.full((1, 256), i, np.float32)} for i in range(50)]
    model = make_package() / "model.onnx"
    reply, found = answers(Browser(), model, given, tmp_path, seconds=0)
    assert len(reply["answer"]["outputs"]) == 1
    assert len(found) == 256 * 4
    reply, found = answers(Browser(), model, given, tmp_path, seconds=100)
    assert len(reply["answer"]["outputs"]) == 50


# What it costs.


def test_a_profile(make_package: MakePackage) -> None:
    package = make_package(width=512, rows=(64,), target="browser-wasm")
    found = profile(package, device=Browser(), runs=60, threads=2, throughput=[1, 2])
    assert (found.kind, found.device, found.where.arch) == ("measured", "browser", "wasm32")
    assert found.where.cores >= 1
    assert "Chrom" in found.where.cpu
    assert (found.providers, found.missing_providers) == (["wasm"], [])
    assert (found.runs, found.warmup, found.threads) == (60, 10, 2)
    assert 0 < found.min_ms <= found.median_ms <= found.p90_ms <= max(found.times_ms)
    assert found.load_ms > 0
    assert found.first_run_ms > 0
    assert found.peak_memory_mb is not None
    assert 4 < found.peak_memory_mb < 40  # weights of 4.2 MB, into what is free of the 16.8 MB at the start
    assert {row.operator: (row.count, row.provider) for row in found.operators} == {
        "MatMul": (4, "wasm"), "Tanh": (4, "wasm"),
    }  # fmt: skip
    assert found.operators[0].operator == "MatMul"
    assert [node.name for node in found.nodes] == [f"{kind}{n}" for n in range(4) for kind in ("matmul", "tanh")]
    assert found.provider_nodes == {"wasm": 8}
    assert found.versions["onnxruntime-web"] == "1.30.0"
    assert "HeadlessChrome" in found.versions["browser"]
    assert (found.energy_mj, found.sensors, found.activations_mb) == (None, {}, None)
    assert found.throughput.keys() == {1, 2}
    assert found.throughput[1] > 1
    assert found.notes[0] == "threads are on: the page is cross-origin isolated, and 2 of 2 ran"
    assert found.notes[1].startswith("onnxruntime-web 1.30.0 itself has 14.3 MB that an app ships beside its model")
    value = found.to_json()
    assert json.loads(json.dumps(value)) == {**value, "throughput": {str(n): r for n, r in found.throughput.items()}}


def test_memory_that_fits_into_what_is_free_is_not_known(make_package: MakePackage) -> None:
    found = profile(make_package(width=16, target="browser-wasm"), device=Browser(), runs=2)
    assert (found.peak_memory_mb, found.memory_method) == (None, "unavailable")


@pytest.mark.timing
def test_packages_in_turns(make_package: MakePackage) -> None:
    small, large = make_package("small", layers=2), make_package("large", layers=40)
    found = compare([small, large, small], device=Browser(), runs=30, threads=1, warmup=2)
    assert [one.package for one in found.packages] == ["small", "large", "small"]
    assert found.packages[1].ratio > 3
    assert 0.7 < found.packages[2].ratio < 1.4
    assert found.runs == 30
    assert "threads are on" in found.notes[0]


def test_under_load(make_package: MakePackage) -> None:
    package = make_package()
    reply = Browser().ask(measuring(package, sustained=2))
    first, second = reply["models"][0]["seconds"]
    assert first["runs"] > 0
    assert 0 < first["median_ms"] <= first["p90_ms"]
    assert 1 <= first["at_s"] <= second["at_s"]
    for limit in (3, 20, 100):  # a busy machine may not have begun in the first of them
        with pytest.raises(BrokenOff, match=f"did not finish within {limit} s") as late:
            Browser().ask(measuring(package, sustained=600), timeout_s=limit)
        if told := [json.loads(line)["second"] for line in late.value.said.splitlines()]:
            break
    assert [one.keys() for one in told] == [first.keys()] * len(told)
    assert all(one["at_s"] >= second for second, one in enumerate(told, 1))
    assert all(one["at_s"] < other["at_s"] for one, other in pairwise(told))
    assert told


def test_waiting_for_a_browser_is_not_counted(
    make_package: MakePackage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(browser, "_lan_address", lambda: "127.0.0.1")
    urls: list[str] = []
    monkeypatch.setattr(browser, "_announce", urls.append)

    def come() -> None:
        while not urls:
            time.sleep(0.02)
        time.sleep(1.5)  # longer than the limit
        urllib.request.urlopen(f"{urls[0]}claim", b"").close()

    threading.Thread(target=come, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(Unreachable, match="did not finish within 1 s"):
        Browser(serve=True).ask(measuring(make_package()), timeout_s=1)
    assert time.monotonic() > start + 2.5


def test_a_provider_that_is_not_there_is_told(make_package: MakePackage) -> None:
    package = make_package(target="phone-iphone")
    found = profile(package, device=Browser(), runs=2)
    assert (found.providers, found.missing_providers) == (["wasm"], ["CoreMLExecutionProvider"])
    assert any(note.startswith("CoreMLExecutionProvider is not here: ") for note in found.notes)


def test_webgpu_needs_an_adapter(make_package: MakePackage, tmp_path: Path) -> None:
    """SwiftShader is one: the same numbers, and times that are said to be none of a GPU's."""
    model, given = make_package() / "model.onnx", [{"x0": np.ones((4, 256), np.float32)}]
    wanted = ["webgpu", "wasm"]
    reply, _ = answers(Browser(flags=("--disable-gpu",)), model, given, tmp_path, providers=wanted)
    assert reply["answer"]["missing_providers"] == ["webgpu"]
    assert any("webgpu is not here: " in note and "GPU adapter" in note for note in reply["notes"])
    here = answers(Local(), model, given, tmp_path)[1]
    reply, there = answers(Browser(flags=SWIFTSHADER), model, given, tmp_path, providers=wanted)
    if reply["answer"]["missing_providers"]:
        pytest.skip("this Chromium has no SwiftShader")
    assert reply["answer"]["providers"] == ["webgpu", "wasm"]
    np.testing.assert_allclose(np.frombuffer(there, np.float32), np.frombuffer(here, np.float32), atol=1e-5)
    assert any("WebGPU ran on google swiftshader, which is software" in note for note in reply["notes"])


# A browser of another device.


def served(monkeypatch: pytest.MonkeyPatch, request: dict[str, Any]) -> tuple[str, list[Any], threading.Thread]:
    """An address to open, and the outcome when it is there; the thread that waits for it."""
    urls: list[str] = []
    outcome: list[Any] = []
    monkeypatch.setattr(browser, "_lan_address", lambda: "127.0.0.1")
    monkeypatch.setattr(browser, "_announce", urls.append)

    def ask() -> None:
        try:
            outcome.append(Browser(serve=True).ask(request, timeout_s=300))
        except PotstillError as error:
            outcome.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not urls:
        time.sleep(0.01)
    return urls[0], outcome, thread


def test_a_phone_opens_an_address(make_package: MakePackage, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a name that is not this machine's own, over plain HTTP, as on a local network."""
    url, outcome, thread = served(monkeypatch, measuring(make_package(), threads=2))
    named = url.replace("127.0.0.1", "phone.test")
    with browser._chromium(named, ("--host-resolver-rules=MAP phone.test 127.0.0.1",)):
        thread.join(300)
    (reply,) = outcome
    assert reply["browser"]["isolated"] is False
    assert reply["threads"] == 1
    assert reply["notes"][0] == (
        "threads are off: the page is not cross-origin isolated, which needs HTTPS or this machine itself; 1 of 2 ran"
    )
    assert len(reply["models"][0]["times_ms"]) == 2
    assert reply["browser"]["clock_ms"] >= 0.05  # a coarse clock, which is said beside short runs


def test_what_is_said_of_a_coarse_clock() -> None:
    said = {"isolated": True, "start_ms": 9.0, "clock_ms": 0.1, "refused": {}}
    reply: dict[str, Any] = {"browser": said, "threads": 1, "versions": {"onnxruntime-web": "1"}}
    short, long = ({**reply, "models": [{"times_ms": [median] * 3}]} for median in (0.5, 11.0))
    assert browser._notes(short, 1, 10**6)[2:] == ["the browser's clock goes in steps of 0.1 ms, beside 0.5 ms a run"]
    assert browser._notes(long, 1, 10**6)[2:] == []


def test_a_second_browser_disturbs_nothing(make_package: MakePackage, monkeypatch: pytest.MonkeyPatch) -> None:
    request = measuring(make_package(), runs=None, seconds=3, min_runs=1, max_runs=10**6)
    del request["runs"]
    url, outcome, thread = served(monkeypatch, request)
    with browser._chromium(url, ()):
        time.sleep(2)
        with browser._chromium(url, ()):
            thread.join(300)
    (reply,) = outcome
    assert len(reply["models"][0]["times_ms"]) > 1


def test_an_open_page_takes_further_requests(
    make_package: MakePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each under a token of its own, and the address is printed once."""
    urls: list[str] = []
    monkeypatch.setattr(browser, "_lan_address", lambda: "127.0.0.1")
    monkeypatch.setattr(browser, "_announce", urls.append)
    device, model, found = Browser(serve=True), make_package() / "model.onnx", []
    given = [{"x0": np.ones((2, 256), np.float32)}]

    def ask() -> None:
        found.extend(answers(device, model, given, tmp_path)[1] for _ in range(3))

    thread = threading.Thread(target=ask)
    thread.start()
    while not urls:
        time.sleep(0.01)
    with browser._chromium(urls[0], ()):
        thread.join(300)
    assert len(found) == 3
    assert len(set(found)) == 1
    assert len(urls) == 1


def test_the_address_is_printed_with_a_code(capsys: pytest.CaptureFixture[str]) -> None:
    browser._announce("http://192.168.1.5:4321/token/")
    said = capsys.readouterr().err
    assert said.startswith("Open http://192.168.1.5:4321/token/ in a browser on the local network; it is good for one")
    assert len([line for line in said.splitlines() if set(line) & set("█▀▄")]) > 10


def test_the_local_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise OSError(101, "Network is unreachable")

    mine = {one.address for them in psutil.net_if_addrs().values() for one in them}
    try:
        assert browser._lan_address() in mine
    except InputError:
        assert mine <= {"127.0.0.1", "::1"}
    monkeypatch.setattr(browser.socket.socket, "connect", unreachable)
    with pytest.raises(InputError, match="this machine has no address on a local network; connect it to the phone's"):
        browser._lan_address()


# What goes wrong.


def test_a_model_that_does_not_open(make_package: MakePackage) -> None:
    package = make_package()
    model = onnx.load(package / "model.onnx")
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, package / "model.onnx")
    with pytest.raises(PotstillError, match="the page failed: .*NoSuchOperator"):
        profile(package, device=Browser())


def test_a_model_that_needs_more_memory_than_there_is(tmp_path: Path) -> None:
    """4.29 GB of floats, of the 4.29 GB that WebAssembly has at most with all that is in it."""
    x, n = helper.make_tensor_value_info("x", 1, [1]), helper.make_tensor_value_info("n", 7, [2])
    out = helper.make_tensor_value_info("y", 1, None)
    nodes = [helper.make_node("Expand", ["x", "n"], ["w"]), helper.make_node("ReduceMax", ["w"], ["y"], keepdims=0)]
    graph = helper.make_graph(nodes, "g", [x, n], [out])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    given = [{"x": np.ones(1, np.float32), "n": np.array([30_000, 35_780])}]
    with pytest.raises(PotstillError, match="the page failed: .*(alloc|memory|of size)"):
        answers(Browser(), tmp_path / "m.onnx", given, tmp_path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([{"x0": np.ones((1, 8), np.float32), "more": np.ones(1, np.float32)}], None),
        ([{"other": np.ones((1, 8), np.float32)}], "Error: example 1 lacks 'x0'"),
        ([{"x0": np.ones((1, 8), np.complex64)}], "Error: onnxruntime-web takes no input of dtype complex64"),
    ],
)
def test_examples_that_do_not_fit(given: Any, words: str | None, make_package: MakePackage, tmp_path: Path) -> None:
    model = make_package(width=8, layers=1) / "model.onnx"
    if words is None:
        assert len(answers(Browser(), model, given, tmp_path)[1]) == 32
        return
    with pytest.raises(PotstillError, match=words):
        answers(Browser(), model, given, tmp_path)


@pytest.mark.parametrize(
    ("length", "words"), [(31, "the inputs end within example 1"), (33, "the inputs hold more than their 1 examples")]
)
def test_inputs_of_another_length(length: int, words: str, make_package: MakePackage, tmp_path: Path) -> None:
    (tmp_path / "given").write_bytes(bytes(length))
    asked = {
        "path": make_package(width=8, layers=1) / "model.onnx", "inputs": tmp_path / "given",
        "outputs": Made(tmp_path / "made"), "examples": [{"x0": {"dtype": "float32", "shape": [1, 8]}}],
    }  # fmt: skip
    with pytest.raises(PotstillError, match=words):
        Browser().ask({"threads": 1, "answer": asked})


def test_a_model_that_gives_words(tmp_path: Path) -> None:
    n, y = helper.make_tensor_value_info("n", 1, [1]), helper.make_tensor_value_info("y", 8, [1])
    text = helper.make_node("Constant", [], ["t"], value=helper.make_tensor("t", 8, [1], [b"word"]))
    graph = helper.make_graph([text, helper.make_node("Identity", ["t"], ["y"])], "g", [n], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    with pytest.raises(PotstillError, match="the model's first output is no array of numbers"):
        answers(Browser(), tmp_path / "m.onnx", [{"n": np.ones(1, np.float32)}], tmp_path)


def kill_when_it_runs(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill Chromium, or its tabs, once the page has the request and says that it lives."""
    lives, beat = threading.Event(), browser_job._Handler._beat

    def beats(handler: browser_job._Handler) -> None:
        lives.set()
        beat(handler)

    monkeypatch.setattr(browser_job._Handler, "_beat", beats)

    def go() -> None:
        lives.wait()
        for one in psutil.process_iter(["cmdline"]):
            line = " ".join(one.info["cmdline"] or ())
            if str(folder) in line and (("--type=renderer" in line) if kind == "tab" else ("--type=" not in line)):
                one.kill()

    threading.Thread(target=go, daemon=True).start()


@pytest.mark.parametrize(
    ("kind", "words"),
    [("tab", "the page went away before it answered"), ("browser", "Chromium was ended by signal 9 before the page")],
)
def test_a_browser_that_dies(
    kind: str, words: str, make_package: MakePackage, nothing_is_left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_when_it_runs(kind, nothing_is_left, monkeypatch)
    with pytest.raises(Unreachable, match=words):
        profile(make_package(), device=Browser(), runs=10**8, timeout_s=300)


def test_a_long_folder_for_temporary_ones(
    make_package: MakePackage, nothing_is_left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = nothing_is_left / ("long" * 20)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert profile(make_package(), device=Browser(), runs=2).runs == 2


def test_a_page_that_takes_too_long(make_package: MakePackage) -> None:
    with pytest.raises(Unreachable, match="did not finish within 1 s"):
        profile(make_package(), device=Browser(), runs=10**8, timeout_s=1)


def fake_chromium(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "bin" / "chromium"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def test_a_browser_that_does_not_start(
    make_package: MakePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_chromium(tmp_path, "echo No usable sandbox >&2; exit 3", monkeypatch)
    with pytest.raises(Unreachable, match="ended with exit code 3 before the page answered: No usable sandbox"):
        Browser().ask(measuring(make_package()))


def test_a_browser_that_opens_nothing(
    make_package: MakePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_chromium(tmp_path, "sleep 100", monkeypatch)
    monkeypatch.setattr(browser, "_OPEN_S", 0.5)
    with pytest.raises(Unreachable, match=r"Chromium did not open the page within 0\.5 s: no output"):
        Browser().ask(measuring(make_package()))


def test_no_browser_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no browser is here, looked for chromium, chromium-browser, google-chrome"):
        Browser()
    assert Browser(serve=True).where == "browser"


def test_cores_cannot_be_kept_to(make_package: MakePackage) -> None:
    with pytest.raises(InputError, match=r"a browser cannot keep to the cores \[0\]; leave the cores out"):
        profile(make_package(), device=Browser(), cores=[0])
