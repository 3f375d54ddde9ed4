"""The shipped lists as they are read: typing errors, notes, versions, and what is said where one is not there."""

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from potstill.targets.coverage import estimated
from potstill.targets.operator_lists import OperatorList, list_for
from potstill.targets.target import Target, load_target

WEBGPU = """## Operators Support Table
| Operator | Opset | Comments |
|:--------:|:-------------:|-----|
| Gelu | ai.onnx(20+); com.microsoft(1+) |  |
| GridSample | ai.onnx(16-19); com.ms.internal.nhwc(16-19) |  |
| Relu | ai.onnx(6-12,13,14+) |  |
| Clip | ai.onnx(6-10,11,12) |  |
"""


def on(provider: str, **options: str) -> Target:
    target = load_target("phone-iphone")
    runtime = target.runtime.model_copy(update={"providers": [provider], "provider_options": {provider: options}})
    return target.model_copy(update={"runtime": runtime})


def read(target: Target, start: Path | None = None) -> OperatorList:
    found = list_for(target, start)
    assert isinstance(found, OperatorList)
    return found


def node(operator: str, *inputs: str, domain: str = "") -> onnx.NodeProto:
    return helper.make_node(operator, list(inputs) or ["x"], ["y"], domain=domain)


def refusal(listed: OperatorList, one: onnx.NodeProto, opset: int = 20, dtype: int = TensorProto.FLOAT) -> str:
    held = [helper.make_tensor("w", dtype, [1], [1.0])]
    values = [helper.make_tensor_value_info(name, dtype, [1]) for name in ("x", "y")]
    graph = helper.make_graph([one], "made", values[:1], values[1:], held)
    return listed.of(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), graph)(one)


@pytest.mark.parametrize(
    ("target", "file", "count"),
    [
        (on("CoreMLExecutionProvider", ModelFormat="MLProgram"), "coreml_supported_mlprogram_ops.md", 50),
        (on("CoreMLExecutionProvider"), "coreml_supported_neuralnetwork_ops.md", 35),
        (on("NnapiExecutionProvider"), "nnapi_supported_ops.md", 50),
    ],
)
def test_every_row_of_a_shipped_list_is_read(target: Target, file: str, count: int) -> None:
    path = Path(onnxruntime.__file__).parent / "tools/mobile_helpers" / file
    rows = [line for line in path.read_text().splitlines() if line.startswith(("|ai.onnx", "|com.microsoft"))]
    listed = read(target)
    assert len(listed.operators) == len(rows) > count
    assert listed.source == f"ONNX Runtime {onnxruntime.__version__}, {file}"
    assert listed.fixed_shapes
    assert not {one for one in listed.operators if one.endswith("Argmax") or one.startswith("ai.onnx.")}


def test_both_typing_errors_are_mended() -> None:
    program, network = on("CoreMLExecutionProvider", ModelFormat="MLProgram"), on("CoreMLExecutionProvider")
    for target in (program, network):
        assert refusal(read(target), node("ArgMax")) == ""
        assert refusal(read(target), node("ReduceSum")) == ""


@pytest.mark.parametrize(
    ("provider", "one", "why"),
    [
        ("CoreMLExecutionProvider", node("MatMul", "x", "x"), "input B is not constant"),
        ("CoreMLExecutionProvider", node("PRelu", "x", "x"), "its slope is not constant"),
        ("CoreMLExecutionProvider", node("Conv", "x", "w"), ""),
        ("CoreMLExecutionProvider", node("QuantizeLinear", "x", "w"), "not in the list of operators"),
        ("NnapiExecutionProvider", node("QuantizeLinear", "x", "w"), ""),
        ("NnapiExecutionProvider", node("QuantizeLinear", "x", "x"), "its scale or zero point is not constant"),
        ("NnapiExecutionProvider", node("Conv", "x", "x"), "its weight or bias is not constant"),
        ("NnapiExecutionProvider", node("MatMul", "x", "x"), ""),
        ("NnapiExecutionProvider", node("Gelu"), "not in the list of operators"),
    ],
)
def test_notes_of_the_other_lists(provider: str, one: onnx.NodeProto, why: str) -> None:
    assert refusal(read(on(provider)), one) == why


def test_float16_is_for_mlprogram_alone() -> None:
    network, program = on("CoreMLExecutionProvider"), on("CoreMLExecutionProvider", ModelFormat="MLProgram")
    assert refusal(read(network), node("Relu"), dtype=TensorProto.FLOAT16) == "float16 is for MLProgram alone"
    assert refusal(read(program), node("Relu"), dtype=TensorProto.FLOAT16) == ""


@pytest.fixture
def web(tmp_path: Path) -> Path:
    """A folder below one whose node_modules has onnxruntime-web."""
    package = tmp_path / "node_modules" / "onnxruntime-web"
    (package / "docs").mkdir(parents=True)
    (package / "docs" / "webgpu-operators.md").write_text(WEBGPU)
    (package / "package.json").write_text(json.dumps({"version": "9.8.7"}))
    (tmp_path / "app" / "src").mkdir(parents=True)
    return tmp_path / "app" / "src"


@pytest.mark.parametrize(
    ("one", "opset", "why"),
    [
        (node("Relu"), 20, ""),
        (node("Gelu"), 20, ""),
        (node("Gelu", domain="com.microsoft"), 17, ""),
        (node("GridSample", "x", "x"), 19, ""),
        (node("GridSample", "x", "x"), 20, "version 20 of it is not in the list of operators"),
        (node("Clip"), 20, "version 13 of it is not in the list of operators"),
        (node("Clip"), 12, ""),
        (node("QuantizeLinear", "x", "w"), 20, "not in the list of operators"),
    ],
)
def test_webgpu_by_the_versions_of_its_list(web: Path, one: onnx.NodeProto, opset: int, why: str) -> None:
    listed = read(load_target("browser-webgpu"), web)
    assert listed.source == "onnxruntime-web 9.8.7, webgpu-operators.md"
    assert refusal(listed, one, opset) == why


def test_webgpu_by_the_newest_list_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for version in ("1.9.0", "1.30.0"):
        folder = tmp_path / "cache" / "potstill" / f"onnxruntime-web-{version}"
        folder.mkdir(parents=True)
        (folder / "webgpu-operators.md").write_text(WEBGPU)
    listed = read(load_target("browser-webgpu"), tmp_path)
    assert listed.source == "onnxruntime-web 1.30.0, webgpu-operators.md"
    assert len(listed.operators) == 6


def test_webgpu_takes_free_shapes(web: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [helper.make_tensor_value_info(name, 1, ["batch", 4]) for name in ("x", "y")]
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Tanh", ["a"], ["y"])]
    model = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:]))
    model.opset_import[0].version = 20
    onnx.save(model, tmp_path / "m.onnx")
    monkeypatch.chdir(web)
    found: Any = estimated(tmp_path / "m.onnx", load_target("browser-webgpu"))
    assert [one.operator for one in found.left] == ["Tanh"]
    assert (found.kind, found.nodes_left) == ("estimated", 0.5)


def test_without_a_list_it_is_said_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert list_for(load_target("browser-webgpu"), tmp_path) == (
        "neither a node_modules here nor the cache has its list of operators; npm install onnxruntime-web"
    )
    assert (
        list_for(load_target("laptop-directml")) == "this machine has neither the provider nor a list of its operators"
    )
    unknown = list_for(on("CoreMLExecutionProvider", ModelFormat="Other"))
    assert unknown == f"ONNX Runtime {onnxruntime.__version__} comes without coreml_supported_other_ops.md"
