"""How much of a file's work each of its nodes does: multiply-adds by the shapes of one run."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper

from potstill.validate.errors import InputError, told
from potstill.validate.external_data import read_graph
from potstill.validate.session import open_session

Shapes = Mapping[str, Sequence[int]]
SILENT = 4  # what fails is an error of ours


def _all(shape: Sequence[int]) -> int:
    return int(math.prod(shape))


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((int(one.i) for one in node.attribute if one.name == name), default)


def _convolution(node: NodeProto, shapes: Shapes, weight: int = 1) -> int:
    return _all(shapes[node.output[0]]) * _all(shapes[node.input[weight]][1:])


def _product(node: NodeProto, shapes: Shapes) -> int:
    return _all(shapes[node.output[0]]) * shapes[node.input[0]][-1]


def _gemm(node: NodeProto, shapes: Shapes) -> int:
    return _all(shapes[node.output[0]]) * shapes[node.input[0]][0 if _attribute(node, "transA", 0) else -1]


def _recurrent(node: NodeProto, shapes: Shapes) -> int:
    return _all(shapes[node.input[0]][:2]) * sum(_all(shapes[name]) for name in node.input[1:3])


COUNTED: Mapping[str, Callable[[NodeProto, Shapes], int]] = {
    "Conv": _convolution,
    "ConvInteger": _convolution,
    "QLinearConv": lambda node, shapes: _convolution(node, shapes, 3),
    "ConvTranspose": lambda node, shapes: _all(shapes[node.input[0]]) * _all(shapes[node.input[1]][1:]),
    "MatMul": _product,
    "MatMulInteger": _product,
    "QLinearMatMul": _product,
    "MatMulNBits": _product,
    "Gemm": _gemm,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
}


def name_of(node: NodeProto) -> str:
    """A node's name, or that of its first output where it has none."""
    return str(node.name or node.output[0])


def multiply_adds(path: Path, feeds: Mapping[str, Any]) -> dict[str, int]:
    """Multiply-adds of each convolution, matrix product and recurrent layer for some inputs, by `name_of` the node.

    Fused attention is not counted, nor is what lies inside a branch or a loop. It runs once on the CPU provider.

    Raises:
        InputError: ONNX Runtime does not open or run the file here.
    """
    import onnxruntime

    model = read_graph(path)
    nodes = [node for node in model.graph.node if node.op_type in COUNTED]
    wanted = dict.fromkeys(name for node in nodes for name in (*node.input, node.output[0]) if name)
    del model.graph.output[:]
    for i, name in enumerate(wanted):
        model.graph.node.append(helper.make_node("Shape", [name], [f"potstill.shape.{i}"]))
        model.graph.output.append(helper.make_tensor_value_info(f"potstill.shape.{i}", onnx.TensorProto.INT64, None))
    beside = {"session.model_external_initializers_file_folder_path": str(path.parent.resolve())}
    unchanged = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = open_session(
            model.SerializeToString(), beside, graph_optimization_level=unchanged, log_severity_level=SILENT
        )
        known = {one.name for one in session.get_inputs()}
        found = session.run(None, {name: value for name, value in feeds.items() if name in known})
    except Exception as error:  # ONNX Runtime's errors share no base of their own
        raise InputError(f"{path.name} does not run on ONNX Runtime {onnxruntime.__version__}: {told(error)}") from None
    shapes = {name: np.asarray(shape).tolist() for name, shape in zip(wanted, found, strict=True)}
    return {name_of(node): COUNTED[node.op_type](node, shapes) for node in nodes}
