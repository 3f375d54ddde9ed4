"""The .ort file and the operators beside it: what it computes, and what is in the list."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from potstill.export.graph import data_file
from potstill.export.ort_format import OPERATORS, ORT, write_ort
from potstill.validate.errors import InputError, PotstillError

X = {"x": np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A convolution, with an activation and a sum; ONNX Runtime would block its channels for this processor."""
    weights = numpy_helper.from_array(np.random.default_rng(1).normal(size=(16, 3, 3, 3)).astype(np.float32), "w")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("ReduceSum", ["r"], ["y"], keepdims=0),
    ]
    io = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8]), helper.make_tensor_value_info("y", 1, [])
    made = helper.make_model(
        helper.make_graph(nodes, "g", io[:1], io[1:], [weights]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(made, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("arch", ["arm64", "x86_64"])
def test_it_computes_the_same_and_names_its_operators(model: Path, arch: str) -> None:
    write_ort(model, arch, [X], 1e-4)
    assert sorted(path.name for path in model.parent.iterdir()) == ["model.onnx", ORT, OPERATORS]
    assert (model.parent / ORT).read_bytes()[4:8] == b"ORTM"
    sides = [onnxruntime.InferenceSession(model.parent / name).run(None, X)[0] for name in ("model.onnx", ORT)]
    np.testing.assert_allclose(*sides, rtol=1e-5)
    listed = (model.parent / OPERATORS).read_text()
    assert "Conv" in listed
    assert "ReduceSum" in listed
    assert "nchwc" not in listed.lower()


def test_another_result_is_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxruntime.tools import convert_onnx_models_to_ort as tool

    convert = tool.convert_onnx_models_to_ort
    other = onnx.load(model)
    other.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((16, 3, 3, 3), dtype=np.float32), "w"))
    onnx.save(other, model.parent / "other.onnx")
    monkeypatch.setattr(
        tool,
        "convert_onnx_models_to_ort",
        lambda path, *rest, **more: convert(model.parent / "other.onnx", *rest, **more),
    )
    with pytest.raises(PotstillError, match=r"model.ort does not compute what model.onnx does: an output differs by"):
        write_ort(model, "arm64", [X], 1e-4)


def test_a_large_model_has_none(model: Path) -> None:
    shutil.copy(model, data_file(model))
    with pytest.raises(InputError, match=r"model.onnx is larger than 2 GB, which an .ort file cannot be"):
        write_ort(model, "arm64", [X], 1e-4)
