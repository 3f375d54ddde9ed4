"""A float graph and the same graph in integers, side by side in one, fed by the same inputs."""

import onnx
from onnx import NodeProto, compose

from potstill.export.net import Net, refill

LEARNING = ("Conv", "Gemm", "MatMul")  # what AdaRound and bias correction know of
FLOAT = "potstill.float."  # before each name of the float graph but those of its inputs


def beside(float_: Net, int_: Net) -> onnx.ModelProto:
    """Both graphs in one, that in floats first.

    Args:
        float_: a float graph, as it is quantised.
        int_: the same graph in integers (QDQ), with the names of its nodes.
    """
    model, prefixed = onnx.ModelProto(), compose.add_prefix(float_.model, FLOAT, rename_inputs=False)
    model.CopyFrom(int_.model)
    refill(model.graph.node, [*prefixed.graph.node, *int_.model.graph.node])
    model.graph.initializer.extend(prefixed.graph.initializer)
    return model


def in_integers(float_: Net, int_: Net) -> list[NodeProto]:
    """The weighted nodes of the float graph, in order, whose inputs and weights are both in integers in the other."""
    return [node for node in float_.model.graph.node if node.name in int_.nodes and _held(int_, int_.nodes[node.name])]


def _held(int_: Net, node: NodeProto) -> bool:
    values, weights = (int_.source(node, place) for place in (0, 1))
    if node.op_type not in LEARNING or values is None or weights is None or weights.input[0] not in int_.tensors:
        return False
    return bool(values.op_type == weights.op_type == "DequantizeLinear")
