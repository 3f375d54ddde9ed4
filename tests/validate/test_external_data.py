"""Weights in a file of their own: what is refused, and that ONNX itself opens what is not."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from potstill.validate.errors import InputError
from potstill.validate.external_data import check_external_data


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


def relocate(path: Path, location: str) -> None:
    made = onnx.load(str(path), load_external_data=False)
    (entry,) = (one for one in made.graph.initializer[0].external_data if one.key == "location")
    entry.value = location
    path.write_bytes(made.SerializeToString())


def test_whole_weights_beside_the_model_pass(model: Path) -> None:
    check_external_data(model)
    onnx.load(str(model))


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "a/../../weights.bin", ""])
def test_a_location_outside_the_folder(model: Path, location: str) -> None:
    (model.parent.parent / "weights.bin").write_bytes((model.parent / "weights.bin").read_bytes())
    relocate(model, location)
    with pytest.raises(
        InputError, match=r"m.onnx: the weights 'w' are said to be in '.*', expected a file in the folder"
    ):
        check_external_data(model)


def test_a_link_out_of_the_folder(model: Path) -> None:
    outside = model.parent.parent / "weights.bin"
    (model.parent / "weights.bin").rename(outside)
    (model.parent / "weights.bin").symlink_to(outside)
    with pytest.raises(InputError, match="this is not a model to trust"):
        check_external_data(model)


def test_weights_that_are_missing_or_cut_off(model: Path) -> None:
    weights = model.parent / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="'w' end at byte 16384 of 'weights.bin', which has 100; copy that file again"):
        check_external_data(model)
    weights.unlink()
    with pytest.raises(InputError, match="'weights.bin', which is not there; put that file beside the model"):
        check_external_data(model)


def test_weights_of_a_graph_inside_a_node(model: Path) -> None:
    made = onnx.load(str(model), load_external_data=False)
    inner = helper.make_graph([helper.make_node("Identity", ["w2"], ["o"])], "i", [], [])
    inner.initializer.add().CopyFrom(made.graph.initializer[0])
    inner.initializer[0].name = "w2"
    inner.initializer[0].external_data[0].value = "gone.bin"
    made.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner))
    model.write_bytes(made.SerializeToString())
    with pytest.raises(InputError, match="'w2' are in 'gone.bin', which is not there"):
        check_external_data(model)


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\xff\xfe not a model")
    with pytest.raises(InputError, match=r"m.onnx is not an ONNX model; give a file that an ONNX exporter wrote"):
        check_external_data(tmp_path / "m.onnx")
