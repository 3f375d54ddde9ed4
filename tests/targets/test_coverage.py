"""Which nodes a provider takes: the shipped list read with its two errors mended, its notes, and the partitions."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from potstill.targets.coverage import Coverage, Left, estimated, weighed
from potstill.targets.target import load_target

FLOAT, FLOAT16, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64


def graph(
    path: Path, *nodes: onnx.NodeProto, batch: int | str = 1, dtype: int = FLOAT, **held: onnx.TensorProto
) -> Path:
    """A graph from x (batch, 4) to y, its nodes named by their operators."""
    for i, node in enumerate(nodes):
        node.name = f"{node.op_type}_{i}"
    body = helper.make_graph(
        list(nodes),
        "made",
        [helper.make_tensor_value_info("x", dtype, [batch, 4])],
        [helper.make_tensor_value_info("y", dtype, None)],
        [
            helper.make_tensor(name, one.data_type, one.dims, one.float_data or one.int64_data)
            for name, one in held.items()
        ],
    )
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def node(operator: str, inputs: str, output: str, **attributes: int) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), [output], **attributes)


def coreml(path: Path) -> Coverage:
    found = estimated(path, load_target("phone-iphone"))
    assert found
    return found


def test_a_graph_of_listed_operators_is_one_partition(tmp_path: Path) -> None:
    found = coreml(graph(tmp_path / "m.onnx", node("Relu", "x", "a"), node("Tanh", "a", "y")))
    assert (found.kind, found.nodes, found.partitions, found.left) == ("estimated", 2, 1, ())
    assert found.in_words().startswith("Estimated: CoreMLExecutionProvider takes 2 of 2 nodes in 1 partition (ONNX")


def test_an_operator_that_is_not_listed_breaks_it_in_two_and_is_named(tmp_path: Path) -> None:
    path = graph(tmp_path / "m.onnx", node("Relu", "x", "a"), node("Sign", "a", "b"), node("Tanh", "b", "y"))
    found = coreml(path)
    assert (found.nodes, found.partitions) == (3, 2)
    assert found.left == (Left("Sign_1", "Sign", "not in the list of operators"),)
    assert "takes 2 of 3 nodes in 2 partitions; to the CPU go 1 Sign (" in found.in_words()


def test_the_two_typing_errors_of_the_list_are_mended(tmp_path: Path) -> None:
    axes = helper.make_tensor("axes", INT64, [1], [1])
    found = coreml(graph(tmp_path / "m.onnx", node("ReduceSum", "x axes", "y"), axes=axes))
    assert found.left == ()
    assert coreml(graph(tmp_path / "n.onnx", node("ArgMax", "x", "y", axis=1), dtype=FLOAT)).left == ()


def test_a_free_batch_is_taken_by_no_node(tmp_path: Path) -> None:
    found = coreml(graph(tmp_path / "m.onnx", node("Relu", "x", "a"), node("Tanh", "a", "y"), batch="batch"))
    assert [one.operator for one in found.left] == ["Relu", "Tanh"]
    assert found.left[0].reason == "an input of no fixed shape or over 5-D"


@pytest.mark.parametrize(
    ("operator", "inputs", "why"),
    [
        ("Gemm", "x a", "input B is not constant"),
        ("Slice", "x i i", "starts, ends, axes or steps are not constant"),
        ("Split", "x i", "its split is not constant"),
        ("Where", "c i i", "what it chooses from is not float"),
    ],
)
def test_notes_of_the_list_are_asked_of_the_graph(tmp_path: Path, operator: str, inputs: str, why: str) -> None:
    four = helper.make_tensor("four", FLOAT, [4, 4], [1.0] * 16)
    nodes = [
        node("MatMul", "four four", "a"), node("Cast", "x", "i", to=INT64), node("Cast", "x", "c", to=TensorProto.BOOL),
    ]  # fmt: skip
    found = coreml(graph(tmp_path / "m.onnx", *nodes, node(operator, inputs, "y"), four=four))
    assert Left(f"{operator}_3", operator, why) in found.left


def test_pow_is_taken_in_float32_only(tmp_path: Path) -> None:
    assert coreml(graph(tmp_path / "m.onnx", node("Pow", "x x", "y"))).left == ()
    found = coreml(graph(tmp_path / "n.onnx", node("Pow", "x x", "y"), dtype=FLOAT16))
    assert found.left == (Left("Pow_0", "Pow", "an input is not float32"),)


def test_the_bias_of_a_convolution_must_be_constant(tmp_path: Path) -> None:
    shape, weight = helper.make_tensor("s", INT64, [3], [1, 1, 4]), helper.make_tensor("w", FLOAT, [1, 1, 1], [1.0])
    nodes = [node("Reshape", "x s", "a"), node("ReduceMean", "x", "m", keepdims=0), node("Identity", "w", "v")]
    one = helper.make_tensor("one", INT64, [1], [1])
    nodes += [node("Reshape", "m one", "b")]
    held = {"s": shape, "w": weight, "one": one}
    found = coreml(graph(tmp_path / "m.onnx", *nodes, node("Conv", "a w b", "y"), **held))
    assert [(left.operator, left.reason) for left in found.left] == [("Conv", "its bias is not constant")]
    found = coreml(graph(tmp_path / "n.onnx", *nodes, node("ConvTranspose", "a v", "y"), **held))
    assert [(left.operator, left.reason) for left in found.left] == [
        ("ConvTranspose", "its weight or bias is not constant")
    ]


def test_the_cpu_provider_needs_no_estimate_and_one_without_a_list_gets_none(tmp_path: Path) -> None:
    path = graph(tmp_path / "m.onnx", node("Relu", "x", "y"))
    assert estimated(path, load_target("laptop-x86-vnni")) is None
    assert estimated(path, load_target("browser-wasm")) is None
    found = estimated(path, load_target("laptop-amd-vitisai"))
    assert found
    assert (found.kind, found.nodes, found.nodes_left) == ("unknown", None, None)
    assert weighed(found, path, {}) == found
    assert found.in_words() == (
        "Which nodes VitisAIExecutionProvider takes is unknown: this machine has "
        "neither the provider nor a list of its operators."
    )


def test_a_graph_out_of_order_is_read(tmp_path: Path) -> None:
    found = coreml(graph(tmp_path / "m.onnx", node("Tanh", "a", "y"), node("Relu", "x", "a")))
    assert (found.partitions, found.left) == (1, ())
