"""Int8 products that a CPU without VNNI adds in 16 bits, where they overflow: found in a file's weights, not by a run.

Source: ONNX Runtime, docs/performance/model-optimizations/quantization.md, "When and why do I need to try U8U8?".
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from potstill.targets.target import Target
from potstill.validate.external_data import graphs_of, read_graph

VNNI = {"avx512_vnni", "avx_vnni"}
EXACT = "session.x64quantprecision"  # ONNX Runtime's option for exact sums on x86 without VNNI
HELD = 64  # the largest weight of a scheme with reduce_range: 2 · 255 · 64 fits into 16 bits, 2 · 255 · 65 does not
_INTEGER = {  # the input that holds the weight, by operator
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QGemm"), 3),
    **dict.fromkeys(("MatMulInteger", "ConvInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QAttention"), 1),
}
_FLOAT = {"Conv": 1, "MatMul": 1, "Gemm": 1}  # between DequantizeLinear, which ONNX Runtime fuses into integers


@dataclass(frozen=True)
class Saturation:
    """Of the nodes that multiply by int8 weights, `products` of them, how many have weights of all 8 bits: `full`."""

    full: int
    products: int

    def in_words(self, target: Target) -> str:
        """What overflows there, as a clause."""
        lacks = " and ".join(flag for flag in target.hardware.without if flag in VNNI)
        return (
            f"saturation: {self.full} of its {self.products} int8 products have weights of all 8 bits, and this CPU, "
            f"without {lacks}, adds two neighbours in 16 bits, where they overflow"
        )


def overflows(target: Target) -> bool:
    """Whether a target's CPU adds pairs of int8 products in 16 bits, as ONNX Runtime's session is set there."""
    exact = target.runtime.session_options.get(EXACT) == "1"
    return target.hardware.arch == "x86_64" and VNNI.issubset(target.hardware.without) and not exact


def saturation(model: Path, target: Target) -> Saturation | None:
    """What of a file overflows on a target's CPU; None where nothing does.

    Raises:
        InputError: the file is no ONNX model.
    """
    if not overflows(target):
        return None
    largest = [_largest(weight, model.parent) for weight in _weights(read_graph(model).graph)]
    full = sum(one > HELD for one in largest)
    return Saturation(full, len(largest)) if full else None


def _weights(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """The int8 weight of each node that multiplies it by activations of 8 bits."""
    constants: dict[str, TensorProto] = {}
    for part in graphs_of(graph):
        constants |= {tensor.name: tensor for tensor in part.initializer}
        constants |= {
            node.output[0]: a.t
            for node in part.node
            if node.op_type == "Constant"
            for a in node.attribute
            if a.HasField("t")
        }
    for part in graphs_of(graph):
        made = {name: node for node in part.node if node.op_type == "DequantizeLinear" for name in node.output}
        for node in part.node:
            weight = ""
            if node.op_type in _INTEGER:
                weight = node.input[_INTEGER[node.op_type]]
            elif (
                node.op_type in _FLOAT
                and all(name in made for name in node.input[:2])
                and _of_8_bits(made[node.input[0]], constants)
            ):
                weight = made[node.input[1]].input[0]
            if weight in constants and constants[weight].data_type == TensorProto.INT8:
                yield constants[weight]


def _of_8_bits(node: onnx.NodeProto, constants: dict[str, TensorProto]) -> bool:
    """Whether what a DequantizeLinear takes has 8 bits, by its zero point; without one it is taken to."""
    zero = constants.get(node.input[2]) if len(node.input) > 2 else None
    return zero is None or zero.data_type in (TensorProto.INT8, TensorProto.UINT8)


def _largest(weight: TensorProto, folder: Path) -> int:
    values = numpy_helper.to_array(weight, str(folder))
    return int(np.abs(values.astype(np.int16)).max(initial=0))
