"""Multiply-adds of each node, beside torch's own count and the formulas."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from potstill.targets.work import multiply_adds
from potstill.validate.errors import InputError

RNG = np.random.default_rng(0)


def graph(path: Path, nodes: list[onnx.NodeProto], shape: list[int | str], dtype: int = 1, **held: np.ndarray) -> Path:
    body = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", TensorProto.UNDEFINED, None)],
        [numpy_helper.from_array(value, name) for name, value in held.items()],
    )
    del body.output[:]
    body.output.append(onnx.ValueInfoProto(name="y"))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(body, opset_imports=opsets, ir_version=10), path)
    return path


def floats(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("core", "shape"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 9, 7)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (1, 4, 5, 5)),
        (nn.Linear(8, 5), (3, 8)),
        (nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2)), (2, 3, 8)),
    ],
)
def test_torch_counts_the_same(core: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.randn(shape)
    with FlopCounterMode(display=False) as counter:
        core(x)
    torch.onnx.export(core.eval(), (x,), tmp_path / "m.onnx", dynamo=True, verbose=False)
    (name,) = [one.name for one in onnx.load(tmp_path / "m.onnx").graph.input]
    assert sum(multiply_adds(tmp_path / "m.onnx", {name: x.numpy()}).values()) == counter.get_total_flops() // 2


def test_a_product_of_activations_counts_and_free_shapes_are_those_of_the_sample(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1], name="t"),
        helper.make_node("MatMul", ["x", "t"], ["y"], name="scores"),
    ]
    path = graph(tmp_path / "m.onnx", nodes, ["batch", "length", 8])
    assert multiply_adds(path, {"x": floats(2, 5, 8)}) == {"scores": 2 * 5 * 5 * 8}
    assert multiply_adds(path, {"x": floats(1, 3, 8), "unused": floats(1)}) == {"scores": 3 * 3 * 8}


def test_integers_count_as_floats_do(tmp_path: Path) -> None:
    weight = RNG.integers(-9, 9, (8, 5), dtype=np.int8)
    nodes = [
        helper.make_node("MatMulInteger", ["x", "w"], ["m"], name="integer"),
        helper.make_node("Cast", ["m"], ["f"], to=1, name="cast"),
        helper.make_node("Gemm", ["f", "g"], ["y"], transA=1, name="gemm"),
    ]
    path = graph(tmp_path / "m.onnx", nodes, [3, 8], TensorProto.UINT8, w=weight, g=floats(3, 4))
    found = multiply_adds(path, {"x": RNG.integers(0, 9, (3, 8), dtype=np.uint8)})
    assert found == {"integer": 3 * 8 * 5, "gemm": 5 * 3 * 4}


def test_blocks_and_recurrent_layers_count(tmp_path: Path) -> None:
    packed = RNG.integers(0, 255, (8, 1, 16), dtype=np.uint8)
    blocks = helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], K=32, N=8, bits=4, block_size=32, name="blocks")
    blocks.domain = "com.microsoft"
    path = graph(tmp_path / "b.onnx", [blocks], [2, 3, 32], b=packed, s=floats(8))
    assert multiply_adds(path, {"x": floats(2, 3, 32)}) == {"blocks": 2 * 3 * 8 * 32}
    gru = helper.make_node("GRU", ["x", "w", "r"], ["y"], hidden_size=4, name="gru")
    path = graph(tmp_path / "r.onnx", [gru], [6, 2, 5], w=floats(1, 12, 5), r=floats(1, 12, 4))
    assert multiply_adds(path, {"x": floats(6, 2, 5)}) == {"gru": 6 * 2 * 3 * 4 * (5 + 4)}


def test_external_data_is_read_where_it_lies(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    path = graph(tmp_path / "m.onnx", [node], [1, 64], w=floats(64, 32))
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.data", size_threshold=0)
    assert (tmp_path / "m.data").is_file()
    assert multiply_adds(path, {"x": floats(1, 64)}) == {"product": 64 * 32}


def test_nodes_without_names_go_by_their_outputs(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["y"], name="last"),
    ]
    path = graph(tmp_path / "n.onnx", nodes, [3, 2], w=floats(2, 2))
    assert multiply_adds(path, {"x": floats(3, 2)}) == {"a": 12, "last": 12}


def test_what_does_not_run_here_is_refused(tmp_path: Path) -> None:
    odd = helper.make_node("Odd", ["x"], ["y"], name="odd")
    with pytest.raises(InputError, match=r"m\.onnx does not run on ONNX Runtime 1\..*Odd"):
        multiply_adds(graph(tmp_path / "m.onnx", [odd], [1, 2]), {"x": floats(1, 2)})
