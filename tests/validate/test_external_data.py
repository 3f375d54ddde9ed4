"""Weights in a file of their own: what is refused, and that ONNX itself opens what is not."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from potstill.validate.errors import InputError
from potstill.validate.external_data import files_of, streamed_bytes, weight_bytes


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model in a folder of its own, its weights in `weights.bin` there."""
    weights = numpy_helper.from_array(np.ones((64, 64), dtype=np.float32), "w")
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", io[:1], io[1:], [weights])
    path = tmp_path / "model" / "m.onnx"
    path.parent.mkdir()
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, str(path), save_as_external_data=True, location="weights.bin")
    return path


def test_whole_weights_beside_the_model_pass(model: Path) -> None:
    assert files_of(model) == [model, model.parent / "weights.bin"]
    onnx.load(str(model))


def test_weights_of_a_graph_inside_a_node(model: Path) -> None:
    made = onnx.load(str(model), load_external_data=False)
    inner = helper.make_graph([helper.make_node("Identity", ["w2"], ["o"])], "i", [], [])
    inner.initializer.add().CopyFrom(made.graph.initializer[0])
    inner.initializer[0].name = "w2"
    inner.initializer[0].external_data[0].value = "gone.bin"
    made.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner))
    model.write_bytes(made.SerializeToString())
    with pytest.raises(InputError, match="keeps weights in 'gone.bin', which is not in"):
        files_of(model)


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\xff\xfe not a model")
    with pytest.raises(
        InputError, match="cannot be read as ONNX .*; expected a whole .onnx file: copy or export it again"
    ):
        files_of(tmp_path / "m.onnx")


def test_what_a_run_reads_whole() -> None:
    """A table that is looked up by row is not read whole, unless something else reads it, too."""
    tensors = [
        numpy_helper.from_array(np.ones((100, 8), np.float32), "table"),
        numpy_helper.from_array(np.ones((50, 8), np.float32), "tied"),
        numpy_helper.from_array(np.ones((8, 50), np.float32), "matrix"),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["a"]), helper.make_node("Gather", ["tied", "ids"], ["b"]),
        helper.make_node("MatMul", ["a", "matrix"], ["c"]), helper.make_node("Shape", ["tied"], ["d"]),
    ]  # fmt: skip
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [1])
    out = helper.make_tensor_value_info("c", TensorProto.FLOAT, [1, 50])
    model = helper.make_model(helper.make_graph(nodes, "g", [ids], [out], tensors))
    assert streamed_bytes(model) == sum(one.ByteSize() for one in tensors[1:])
    del model.graph.node[3]
    assert streamed_bytes(model) == tensors[2].ByteSize()
    assert weight_bytes(model) == sum(one.ByteSize() for one in tensors)
