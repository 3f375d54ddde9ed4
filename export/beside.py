"""A float graph and the same graph in integers, side by side in one, fed by the same inputs."""

import onnx
from onnx import NodeProto, compose

from potstill.export.net import Net

WEIGHTED = ("Conv", "Gemm", "MatMul")

FLOAT = "potstill.float."  # before each name of the float graph but those of its inputs


def beside(float_: Net, int_: Net) -> onnx.ModelProto:
    """Both graphs in one, that in floats first.

    Args:
        float_: a float graph, as it is quantised.
        int_: the same graph in integers (QDQ), with the names of its nodes.
    """
    model, prefixed = onnx.ModelProto(), compose.add_prefix(float_.model, FLOAT, rename_inputs=False)
    model.CopyFrom(int_.model)
    del model.graph.node[:]
    model.graph.node.extend([*prefixed.graph.node, *int_.model.graph.node])
    model.graph.initializer.extend(prefixed.graph.initializer)
    return model


def in_integers(float_: Net, int_: Net) -> list[NodeProto]:
    """The weighted nodes of the float graph, in order, whose inputs and weights are both in integers in the other."""
    return [node for node in float_.model.graph.node if node.name in int_.nodes and _held(int_, int_.nodes[node.name])]


def _held(int_: Net, node: NodeProto) -> bool:
    sources = [int_.made_by.get(name) for name in node.input[:2]]
    values, weights = [one if one and one.op_type == "DequantizeLinear" else None for one in [*sources, None][:2]]
    return node.op_type in WEIGHTED and values is not None and weights is not None and weights.input[0] in int_.tensors
