"""Weights in blocks: the stored numbers against the formula in float64, and what ONNX Runtime computes with them."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from potstill.export.quantize import float_nodes, quantize
from potstill.export.weight_only import weights_in_blocks
from potstill.targets.target import Scheme
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.errors import InputError

RNG = np.random.default_rng(0)
HIGH, WIDE, OUT = 80, 48, 10  # of the two matrices; 80 and 48 are no whole numbers of blocks of 32
ONE = RNG.normal(size=(HIGH, WIDE)).astype(np.float32)
TWO = RNG.normal(size=(OUT, WIDE)).astype(np.float32)
X = RNG.normal(size=(5, HIGH)).astype(np.float32)
X[:, 3] *= 50  # it takes the others' bits where all values of a tensor share a scale, and only its block's where not


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A MatMul, and a Gemm of a transposed matrix and a bias."""
    nodes = [
        helper.make_node("MatMul", ["x", "one"], ["h"], "first"),
        helper.make_node("Gemm", ["h", "two", "bias"], ["y"], "second", transB=1),
    ]
    bias = np.arange(OUT, dtype=np.float32)
    weights = [numpy_helper.from_array(value, name) for name, value in (("one", ONE), ("two", TWO), ("bias", bias))]
    x, y = (helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("x", HIGH), ("y", OUT)))
    model = helper.make_model(
        helper.make_graph(nodes, "made", [x], [y], weights), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(model, tmp_path / "float.onnx")
    return tmp_path / "float.onnx"


def blocks(values: NDArray[Any], size: int) -> NDArray[np.float64]:
    """The columns (K, N) as blocks of consecutive values (N, K / size, size), filled up with zeros."""
    columns = values.T.astype(np.float64)
    return np.pad(columns, ((0, 0), (0, -columns.shape[1] % size))).reshape(len(columns), -1, size)


def rounded(values: NDArray[Any], bits: int, size: int) -> NDArray[np.float64]:
    """A matrix (K, N) as its integers hold it, by the formula of q4_dq.cpp in float64."""
    parts, most = blocks(values, size), 2 ** (bits - 1)
    largest = np.take_along_axis(parts, np.abs(parts).argmax(axis=2, keepdims=True), axis=2)
    scale = largest / -most
    whole = np.clip(np.rint(parts / scale), -most, most - 1)
    return np.asarray((whole * scale).reshape(len(parts), -1)[:, : len(values)].T)


def stored(path: Path, out: str) -> NDArray[np.float64]:
    """The matrix (K, N) that the file holds for the product that makes a tensor, by the operator's specification."""
    model = onnx.load(path).graph
    node = next(one for one in model.node if out in one.output)
    assert node.op_type == "MatMulNBits"
    how = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    assert how["accuracy_level"] == 4
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.initializer}
    packed, scales = (tensors[name] for name in node.input[1:3])
    if how["bits"] == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1)
    whole = packed.astype(np.float64) - 2 ** (how["bits"] - 1)
    values = whole * scales.reshape(how["N"], -1, 1)
    return np.asarray(values.reshape(how["N"], -1)[:, : how["K"]].T)


def run(path: Path) -> NDArray[np.float32]:
    return np.asarray(onnxruntime.InferenceSession(path).run(None, {"x": X})[0])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [16, 32, 128])
def test_the_stored_weights_are_those_of_the_formula(graph: Path, bits: int, size: int) -> None:
    weights_in_blocks(graph, bits, size)
    for values, out in ((ONE, "h"), (TWO.T, next(n.output[0] for n in onnx.load(graph).graph.node[1:]))):
        step = np.abs(values).max() / 2 ** (bits - 1)
        found, expected = stored(graph, out), rounded(values, bits, size)
        assert np.abs(found - expected).max() <= 1.01 * step  # float32 may round a tie the other way
        assert (np.abs(found - expected) < 1e-5 * step).mean() > 0.99
        assert 0.2 * step < np.abs(found - values).max() <= 1.01 * step


@pytest.mark.parametrize("bits", [8, 4])
def test_onnxruntime_multiplies_by_the_stored_weights(graph: Path, bits: int) -> None:
    """Its activations are rounded to 8 bits by block of 32; the bound is half a step of each, times the weights."""
    model = onnx.load(graph)
    model.graph.output.append(helper.make_tensor_value_info("h", 1, ["n", WIDE]))
    onnx.save(model, graph)
    weights_in_blocks(graph, bits, 32)
    held = stored(graph, "h")
    found = np.asarray(onnxruntime.InferenceSession(graph).run(["h"], {"x": X})[0])
    steps = np.abs(blocks(X.T, 32)).max(axis=2) / 127
    bound = np.repeat(steps / 2, 32, axis=1)[:, :HIGH] @ np.abs(held)
    error = np.abs(found - X.astype(np.float64) @ held)
    assert (error <= 1.01 * bound).all()
    assert error.max() > 0


@pytest.mark.parametrize(("weight", "least_db"), [("int8", 32), ("int4", 12)])
def test_the_method_weights(graph: Path, tmp_path: Path, weight: Any, least_db: float) -> None:
    before, out = run(graph), tmp_path / "q.onnx"
    made = quantize(graph, out, Scheme(method="weights", weight=weight, why="test"), None, ArrayEncoder(), 0)
    assert (made.weighted, made.left_float, made.calibration_examples, made.more_bits) == (2, 0, 0, 0)
    assert made.scheme == f"{weight} weights in blocks of 32"
    error = run(out) - before
    assert 10 * np.log10((before**2).sum() / (error**2).sum()) > least_db


@pytest.mark.parametrize("kept", ["first", "second"])
def test_a_product_that_is_kept_stays_in_float(graph: Path, tmp_path: Path, kept: str) -> None:
    scheme = Scheme(method="weights", weight="int8", why="test")
    made = quantize(graph, tmp_path / "q.onnx", scheme, None, ArrayEncoder(), 0, keep_float=[kept])
    assert made.left_float == 1
    assert [name.removesuffix("_MatMul") for name in float_nodes(tmp_path / "q.onnx")] == [kept]


def test_a_dynamic_scheme_gives_kept_products_blocks(graph: Path, tmp_path: Path) -> None:
    scheme = Scheme(method="dynamic", weight="int8", per_channel=True, more_bits="int8_blocks", why="test")
    out, before, encode = tmp_path / "q.onnx", run(graph), ArrayEncoder()
    errors = []
    for kept in ((), ("first",), ("second",), ("first", "second")):
        made = quantize(graph, out, scheme, None, encode, 0, keep_float=kept)
        assert (made.left_float, made.more_bits) == (0, len(kept))
        errors.append(float(((run(out) - before) ** 2).sum()))
    assert errors[1] < errors[0] / 2  # it has the input whose one large value takes the others' bits
    plain = quantize(graph, out, scheme.model_copy(update={"more_bits": None}), None, encode, 0, keep_float=["first"])
    assert (plain.left_float, plain.more_bits) == (1, 0)


def test_a_graph_without_products_has_nothing_to_put_into_blocks(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv")
    weight = numpy_helper.from_array(RNG.normal(size=(4, 3, 3, 3)).astype(np.float32), "w")
    x, y = (helper.make_tensor_value_info(name, 1, ["n", c, s, s]) for name, c, s in (("x", 3, 8), ("y", 4, 6)))
    made = helper.make_graph([node], "made", [x], [y], [weight])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "c.onnx")
    scheme = Scheme(method="weights", weight="int4", block_size=64, why="test")
    with pytest.raises(
        InputError, match="none of the 1 weighted nodes could be quantised as int4 weights in blocks of 64"
    ):
        quantize(tmp_path / "c.onnx", tmp_path / "q.onnx", scheme, None, ArrayEncoder(), 0)


def test_the_quantiser_says_nothing_and_leaves_logging_as_it_was(graph: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    weights_in_blocks(graph, 4, 32)
    assert (root.level, root.handlers[:]) == before
    assert caplog.records == []
