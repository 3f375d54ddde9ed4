"""Snapdragon's NPU simulated, as a device: what is asked and refused by a stand-in, what it gives by the package."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper

from potstill.pipeline.cli import call
from potstill.targets import qnn as module
from potstill.targets.device import Made
from potstill.targets.devices import Reach, open_device
from potstill.targets.local import AGENT
from potstill.targets.profile import compare, profile
from potstill.targets.qemu import Crashed
from potstill.targets.qnn import QnnSim
from potstill.targets.sustained import sustained
from potstill.targets.target import QNN, load_target
from potstill.targets.wire import EmulatedPredictor
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.errors import InputError, PotstillError

MakePackage = Callable[..., Path]
V75 = "phone-snapdragon-v75"
SNAPDRAGON = load_target(V75)
with_qnn = pytest.mark.skipif(find_spec("onnxruntime_qnn") is None, reason="onnxruntime-qnn is not installed")

# The CPU in the place of the NPU: what is asked of it is kept, and `took` nodes are said to be on it.
STAND_IN = """
import importlib.util, json, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("agent", {agent!r})
agent = importlib.util.module_from_spec(spec)
spec.loader.exec_module(agent)
used = agent.used
def there(spec, session):
    Path({kept!r}).write_text(json.dumps(spec))
    refused = {{"node_name": "odd", "reason": "No such node."}}
    trace = {{"summary": {{"qnn_subgraphs": 1}}, "unsupported_nodes": [refused]}}
    Path(spec["trace_folder"], "qnn_op_trace.json").write_text(json.dumps(trace))
    nodes = {{"QNNExecutionProvider": {took}, "CPUExecutionProvider": 3}}
    left = [{{"name": name, "operator": "IsInf"}} for name in ("odd", "other", "third")]
    found = {{"provider_nodes": nodes, "left": left, "versions": {{"onnxruntime-qnn": "2.7.0"}}}}
    return {{**used(spec, session), "missing_providers": [], **found}}
agent.used = there
{more}
agent.main()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put a stand-in in the place of the simulator; the file that keeps what it was asked."""

    def put(took: int = 7, more: str = "") -> Path:
        program, kept = tmp_path / "program.py", tmp_path / "asked.json"
        words = {"agent": str(AGENT), "kept": str(kept), "took": took, "more": more}
        program.write_text(STAND_IN.format(**words))
        monkeypatch.setattr(module, "AGENT", program)
        monkeypatch.setattr(module, "find_spec", lambda name: name)
        return kept

    return put


def fixed(package: Path, rows: int = 8, first: onnx.NodeProto | None = None) -> Path:
    """A package's graph with fixed shapes; `first` is put before the rest."""
    model = onnx.load(package / "model.onnx")
    for end in (*model.graph.input, *model.graph.output):
        end.type.tensor_type.shape.dim[0].dim_value = rows
    if first is not None:
        model.graph.node[0].input[0] = "back"
        model.graph.node.insert(0, helper.make_node("Cast", [first.output[0]], ["back"], name="cast_back", to=1))
        model.graph.node.insert(0, first)
    onnx.save(model, package / "model.onnx")
    return package


def answers(device: QnnSim, model: Path, examples: NDArray[np.float32], folder: Path, **more: Any) -> Any:
    """The reply, and the first outputs of the examples."""
    given, made = folder / "inputs.bin", folder / "outputs.bin"
    given.write_bytes(examples.tobytes())
    listed = [{"x0": {"dtype": "float32", "shape": list(examples.shape[1:])}}] * len(examples)
    answer = {"path": model, "inputs": given, "outputs": Made(made), "examples": listed, **more}
    reply = device.ask({"threads": 1, "answer": answer})
    return reply, np.frombuffer(made.read_bytes(), dtype="<f4").reshape(-1, *examples.shape[1:])


def test_what_is_told_of_a_simulated_npu(
    make_package: MakePackage, stand_in: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    kept = stand_in()
    package = make_package(target=V75)
    assert call(["profile", str(package), "--on", "qnn-sim", "--json", "--budget", "latency_p90=9s"]) == 3
    said = capfd.readouterr()
    found = json.loads(said.out)["measurement"]
    assert "the times of qnn-sim are emulated and say nothing" in said.err
    assert (found["kind"], found["device"], found["runs"], found["warmup"]) == ("emulated", "qnn-sim", 5, 1)
    assert found["where"]["cpu"] == "Hexagon v75, soc_model 57, simulated"
    assert (found["peak_memory_mb"], found["energy_mj"], found["sensors"]) == (None, None, {})
    assert found["provider_nodes"] == {QNN: 7, "CPUExecutionProvider": 3}
    assert found["versions"]["onnxruntime-qnn"] == "2.7.0"
    assert found["notes"] == [
        f"Compiled: {QNN} takes 7 of 10 nodes in 1 partition; to the CPU go 3 IsInf "
        "(onnxruntime-qnn 2.7.0, qnn_op_trace.json).",
        "IsInf odd: No such node.",
        "IsInf other and 1 more: the compiler gives no reason",
    ]
    asked = json.loads(kept.read_text())
    assert asked["provider_options"] == SNAPDRAGON.runtime.provider_options
    assert not Path(asked["trace_folder"]).exists()


def test_answers_get_the_targets_chip_and_a_limit_of_time(
    make_package: MakePackage, stand_in: Callable[..., Path], tmp_path: Path
) -> None:
    kept = stand_in()
    model = make_package(target=V75) / "model.onnx"
    x = np.random.default_rng(1).standard_normal((3, 8, 256)).astype(np.float32)
    reply, found = answers(QnnSim(SNAPDRAGON), model, x, tmp_path)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(found, np.concatenate([session.run(None, {"x0": one}) for one in x]))
    assert reply["answer"]["missing_providers"] == []
    assert json.loads(kept.read_text())["provider_options"][QNN]["soc_model"] == "57"
    (tmp_path / "outputs.bin").unlink()
    assert len(answers(QnnSim(SNAPDRAGON), model, x, tmp_path, seconds=0)[1]) == 1


@pytest.mark.parametrize(
    ("took", "more", "said"),
    [
        (0, "", f"took no node of the graph for {V75}; check soc_model and htp_arch of the target, and that"),
        (
            7,
            "sys.exit('onnxruntime-qnn refused the graph: no such type')",
            "^onnxruntime-qnn refused the graph: no such type; ",
        ),
        (7, "sys.exit('agent: other')", "^the agent failed with exit code 1: agent: other$"),
    ],
)
def test_the_cpu_never_runs_alone(
    make_package: MakePackage, stand_in: Callable[..., Path], took: int, more: str, said: str
) -> None:
    stand_in(took, more)
    with pytest.raises(PotstillError, match=said) as caught:
        profile(make_package(target=V75), device=QnnSim(SNAPDRAGON), runs=1)
    assert caught.value.exit_code == 1


def test_an_export_judges_by_the_simulated_npu(make_package: MakePackage, stand_in: Callable[..., Path]) -> None:
    kept = stand_in()
    model = make_package(target=V75) / "model.onnx"
    predictor = EmulatedPredictor(SNAPDRAGON, model, ArrayEncoder(name="x0"), "the package")
    assert (predictor.chip, predictor.emulator) == ("Hexagon v75, soc_model 57", "onnxruntime-qnn")
    x = np.random.default_rng(1).standard_normal((5, 256)).astype(np.float32)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    expected = [session.run(None, {"x0": one[None]})[0] for one in x]
    np.testing.assert_array_equal(predictor.first({"x": x}, 60), expected)
    assert json.loads(kept.read_text())["provider_options"][QNN]["soc_model"] == "57"
    stand_in(took=0)
    with pytest.raises(PotstillError, match="took no node of the graph") as caught:
        predictor({"x": x})
    assert not isinstance(caught.value, Crashed)


def test_an_export_without_the_simulator_says_how_to_get_it(
    make_package: MakePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'is not installed; pip install "potstill\[qnn\]"'):
        EmulatedPredictor(SNAPDRAGON, make_package(target=V75) / "model.onnx", ArrayEncoder(), "the package")


def test_figures_of_time_are_refused(make_package: MakePackage, stand_in: Callable[..., Path]) -> None:
    stand_in()
    package, device = make_package(target=V75), QnnSim(SNAPDRAGON)
    with pytest.raises(InputError, match="time under load; leave out --sustained and --throughput"):
        profile(package, device=device, throughput=[1])
    with pytest.raises(InputError, match="say nothing of heat; leave out --sustained"):
        sustained(package, 20, device=device)
    with pytest.raises(InputError, match="which package is faster; profile each alone"):
        compare([package, package], device=device)


def test_what_cannot_be_opened(stand_in: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in()
    with pytest.raises(InputError, match="qnn-sim is the NPU of a package's target, and there is no package here"):
        open_device("qnn-sim")
    with pytest.raises(InputError, match="qnn-sim has no address"):
        open_device("qnn-sim://v75", Reach(SNAPDRAGON))
    with pytest.raises(InputError, match="laptop-x86-vnni is not compiled by onnxruntime-qnn; qnn-sim wants a package"):
        open_device("qnn-sim", Reach(load_target("laptop-x86-vnni")))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'is not installed; pip install "potstill\[qnn\]"'):
        open_device("qnn-sim", Reach(SNAPDRAGON))


@with_qnn
def test_the_npu_computes_nearly_as_the_cpu_and_the_same_each_time(make_package: MakePackage, tmp_path: Path) -> None:
    model = fixed(make_package(width=32, target=V75)) / "model.onnx"
    x = np.random.default_rng(1).standard_normal((3, 8, 32)).astype(np.float32)
    reply, found = answers(QnnSim(SNAPDRAGON), model, x, tmp_path)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    here = np.concatenate([session.run(None, {"x0": one}) for one in x])
    assert 0 < np.abs(found - here).max() < 0.05 * np.abs(here).max()  # the NPU's own arithmetic ran
    assert reply["answer"]["provider_nodes"] == {QNN: 8}
    (tmp_path / "outputs.bin").unlink()
    np.testing.assert_array_equal(answers(QnnSim(SNAPDRAGON), model, x, tmp_path)[1], found)


@with_qnn
def test_a_node_that_the_npu_leaves_is_told_with_the_compilers_reason(make_package: MakePackage) -> None:
    odd = helper.make_node("IsInf", ["x0"], ["inf"], name="odd")
    found = profile(fixed(make_package(width=32, target=V75), first=odd), device=QnnSim(SNAPDRAGON), runs=1)
    assert found.provider_nodes["CPUExecutionProvider"] == 1
    assert "to the CPU go 1 IsInf" in found.notes[0]
    (note,) = found.notes[1:]
    assert note.startswith("IsInf odd: ")
    assert "gives no reason" not in note


@with_qnn
def test_a_graph_of_free_shapes_does_not_run_on_the_cpu_instead(make_package: MakePackage) -> None:
    with pytest.raises(PotstillError, match="took no node of the graph"):
        profile(make_package(width=32, target=V75), device=QnnSim(SNAPDRAGON), runs=1)


@with_qnn
def test_a_file_that_is_no_graph_is_refused(make_package: MakePackage) -> None:
    package = fixed(make_package(width=32, target=V75), first=helper.make_node("NoSuchOperator", ["x0"], ["inf"]))
    with pytest.raises(PotstillError, match="^onnxruntime-qnn refused the graph: .*NoSuchOperator"):
        profile(package, device=QnnSim(SNAPDRAGON), runs=1)
