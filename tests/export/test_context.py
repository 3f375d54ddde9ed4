"""The context binary: what is recorded without the compiler, of a compiler's reply, and by onnxruntime-qnn itself."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from potstill.export import context as module
from potstill.export.context import CONTEXT, Context, compile_context, on_npu
from potstill.targets.coverage import Coverage, Left
from potstill.targets.target import Target, load_target
from potstill.validate.files import sha256_file

QNN = "QNNExecutionProvider"
SNAPDRAGON = load_target("phone-snapdragon-v75")
X = np.random.default_rng(0).normal(size=(2, 1, 8)).astype(np.float32)
with_qnn = pytest.mark.skipif(find_spec("onnxruntime_qnn") is None, reason="onnxruntime-qnn is not installed")

# Written as onnxruntime-qnn 2.7.0 writes its trace.
TRACE = {
    "schema_version": 2,
    "summary": {"qnn_subgraphs": 2, "supported_nodes": 5, "total_onnx_nodes": 7, "unsupported_nodes": 1},
    "unsupported_nodes": [{"node_index": 1, "node_name": "odd", "op_type": "Det", "reason": "Failed to add node."}],
}
REPLY = {
    "versions": {"onnxruntime": "1.31.1", "onnxruntime-qnn": "2.7.0"},
    "assigned": {QNN: 5, "CPUExecutionProvider": 2},
    "left": [{"name": "odd", "operator": "Det"}, {"name": "other", "operator": "Cast"}],
    "outputs": [[[1.0, 4.0]], [[2.0, 2.5]]],
}
PROGRAM = """
import json, sys
from pathlib import Path
request = json.loads(Path(sys.argv[1]).read_text())
folder = Path(request["trace_folder"])
for name in {names!r}:
    (folder / name).write_text({trace!r})
assert request["options"]["soc_model"] == "57" and Path(request["samples"][1]["x"]["file"]).is_file()
{more}
print({reply!r})
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a small float graph, x (1, 8) to y (1, 2), and two golden samples of it."""
    weight = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)
    write(tmp_path / "model.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], w=weight)
    return golden(tmp_path)


def write(path: Path, nodes: list[onnx.NodeProto], **held: Any) -> None:
    ends = [helper.make_tensor_value_info(name, 1, shape) for name, shape in (("x", [1, 8]), ("y", [1, 2]))]
    constants = [numpy_helper.from_array(value, name) for name, value in held.items()]
    body = helper.make_graph(nodes, "made", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def golden(folder: Path, factor: float = 1) -> Path:
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (folder / "golden").mkdir()
    samples = []
    for i, x in enumerate(X):
        y = session.run(None, {"x": x})[0] * np.float32(factor)
        for name, array in (("x", x), ("y", y)):
            (folder / "golden" / f"{i}.{name}.bin").write_bytes(array.tobytes())
        files = {
            n: {"file": f"{i}.{n}.bin", "dtype": "float32", "shape": list(a.shape)} for n, a in (("x", x), ("y", y))
        }
        samples.append({"inputs": {"x": files["x"]}, "outputs": {"y": files["y"]}})
    (folder / "golden" / "golden.json").write_text(json.dumps({"samples": samples}))
    return folder


def compiled(folder: Path, target: Target = SNAPDRAGON) -> tuple[Context, Coverage]:
    return compile_context(folder / "model.onnx", folder / "golden", target, 0.02)


def pretend(folder: Path, monkeypatch: pytest.MonkeyPatch, reply: Any = REPLY, more: str = "", **files: str) -> None:
    """A compiler that gives a reply and writes files, instead of onnxruntime-qnn."""
    names = files.get("names", f"{CONTEXT} model_ctx_qnn.bin qnn_op_trace.json").split()
    program = folder.parent / "program.py"
    program.write_text(PROGRAM.format(names=names, trace=json.dumps(TRACE), reply=json.dumps(reply), more=more))
    monkeypatch.setattr(module, "AGENT", program)
    monkeypatch.setattr(module, "find_spec", lambda name: name)


def test_without_the_compiler_nothing_is_written_and_the_record_says_how(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    before = sorted(package.rglob("*"))
    context, coverage = compiled(package)
    assert sorted(package.rglob("*")) == before
    assert (context.compiled, context.files, context.emulated) == (False, (), None)
    assert context.in_words() == (
        "No context binary was compiled: onnxruntime-qnn is not installed; "
        'pip install "potstill[qnn]" and export again.'
    )
    assert (coverage.kind, coverage.nodes) == ("unknown", None)
    assert "Which nodes QNNExecutionProvider takes is unknown: onnxruntime-qnn is not installed" in coverage.in_words()


def test_other_targets_have_no_context(package: Path) -> None:
    model, samples = package / "model.onnx", package / "golden"
    assert on_npu(model, samples, load_target("laptop-x86-vnni"), 0.02) == (None, None)
    context, coverage = on_npu(model, samples, load_target("phone-iphone"), 0.02)
    assert context is None
    assert coverage
    assert coverage.kind == "estimated"


def test_the_trace_is_read_and_each_node_left_is_named(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(package, monkeypatch)
    context, coverage = compiled(package)
    assert coverage == Coverage(
        "compiled",
        QNN,
        "onnxruntime-qnn 2.7.0, qnn_op_trace.json",
        7,
        2,
        (Left("odd", "Det", "Failed to add node."), Left("other", "Cast", "the compiler gives no reason")),
    )
    assert coverage.in_words() == (
        "Compiled: QNNExecutionProvider takes 5 of 7 nodes in 2 partitions; to the CPU go 1 Det, 1 Cast "
        "(onnxruntime-qnn 2.7.0, qnn_op_trace.json)."
    )
    assert context.compiled
    assert context.files == (CONTEXT, "model_ctx_qnn.bin")
    assert all((package / name).is_file() for name in context.files)
    assert sorted(path.name for path in package.iterdir()) == ["golden", "model.onnx", *context.files]


def test_the_emulated_outputs_are_held_beside_the_golden_ones(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [np.fromfile(package / "golden" / f"{i}.y.bin", dtype=np.float32).astype(float) for i in range(2)]
    off = np.abs(wanted[1]).max() * 0.015
    near = REPLY | {"outputs": [[wanted[0].tolist()], [(wanted[1] + off).tolist()]]}
    pretend(package, monkeypatch, near)
    emulated = compiled(package)[0].emulated
    assert emulated
    assert emulated.difference == pytest.approx(0.015, rel=1e-3)
    assert (emulated.samples, emulated.same, emulated.within) == (2, 2, True)
    assert "up to 1.5% of the largest logit from the CPU, within the 2% that they allow" in emulated.in_words()
    pretend(package, monkeypatch, REPLY | {"outputs": [[(-wanted[0]).tolist()], [[float("nan")] * 2]]})
    emulated = compiled(package)[0].emulated
    assert emulated
    assert (emulated.same, emulated.within) == (0, False)
    assert "more than the 2% that they allow" in emulated.in_words()


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (
            {"more": "sys.exit('no such chip')"},
            "onnxruntime-qnn refused the graph: the agent failed with exit code 1: no such chip.",
        ),
        ({"reply": REPLY | {"assigned": {"CPUExecutionProvider": 7}}}, "took no node of the graph; check soc_model"),
        ({"names": "qnn_op_trace.json"}, "took no node of the graph; check soc_model"),
    ],
)
def test_a_graph_that_is_refused(
    package: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], note: str
) -> None:
    pretend(package, monkeypatch, **settings)
    context, coverage = compiled(package)
    assert not context.compiled
    assert note in context.in_words()
    assert coverage.kind == "unknown"
    assert sorted(path.name for path in package.iterdir()) == ["golden", "model.onnx"]


@with_qnn
def test_the_compiler_takes_the_graph_and_repeats_itself(package: Path) -> None:
    context, coverage = compiled(package)
    assert (coverage.kind, coverage.nodes, coverage.partitions, coverage.left) == ("compiled", 1, 1, ())
    assert context.emulated
    assert (context.emulated.samples, context.emulated.same, context.emulated.within) == (2, 2, True)
    first = {name: sha256_file(package / name) for name in context.files}
    assert set(first) == {CONTEXT, "model_ctx_qnn.bin"}
    assert str(package).encode() not in (package / CONTEXT).read_bytes()
    assert {name: sha256_file(package / name) for name in compiled(package)[0].files} == first
    compiled(package, load_target("phone-snapdragon-v79"))
    assert sha256_file(package / "model_ctx_qnn.bin") != first["model_ctx_qnn.bin"]


@with_qnn
def test_outputs_of_another_model_are_found_out(tmp_path: Path) -> None:
    weight = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)
    write(tmp_path / "model.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], w=weight)
    emulated = compiled(golden(tmp_path, factor=2))[0].emulated
    assert emulated
    assert not emulated.within
    assert emulated.difference == pytest.approx(0.5, rel=0.02)


@with_qnn
def test_a_node_that_the_npu_cannot_run_is_named(tmp_path: Path) -> None:
    weight = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="first"),
        helper.make_node("IsInf", ["a"], ["i"], name="odd"),
        helper.make_node("Cast", ["i"], ["b"], name="back", to=1),
        helper.make_node("MatMul", ["b", "w"], ["y"], name="product"),
    ]
    write(tmp_path / "model.onnx", nodes, w=weight)
    context, coverage = compiled(golden(tmp_path))
    assert context.compiled
    assert [(left.name, left.operator) for left in coverage.left] == [("odd", "IsInf")]
    assert coverage.left[0].reason != "the compiler gives no reason"
    assert coverage.partitions == 2


@with_qnn
def test_a_chip_that_nobody_knows(package: Path) -> None:
    options = {QNN: {"backend_type": "htp", "soc_model": "99999", "htp_arch": "75"}}
    runtime = SNAPDRAGON.runtime.model_copy(update={"provider_options": options})
    context, _ = compiled(package, SNAPDRAGON.model_copy(update={"runtime": runtime}))
    assert "took no node of the graph; check soc_model and htp_arch of the target" in context.in_words()
