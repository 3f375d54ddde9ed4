"""Bias correction: what integers change in the mean of each channel, taken back by the bias.

Nagel et al. 2019 (arXiv:1906.04721), section 4.2 and appendix D: empirical, each layer after those before it were
corrected.
"""

from collections.abc import Iterable

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from potstill.export.beside import FLOAT, beside, in_integers
from potstill.export.net import Net, refill, session
from potstill.validate.encoder import Inputs

Array = NDArray[np.float64]


def corrected_biases(float_: Net, int_: Net, batches: Iterable[Inputs]) -> dict[str, Array]:
    """Biases by name, each less what the integers add to the mean of its channel.

    Both graphs run in one, and behind each node in integers the mean difference of the batch is taken off before the
    next reads it. So all are corrected in order in one pass; their means over the batches are the corrections. Nodes
    without a bias of their own are left as they are.

    Args:
        float_: a float graph, as it is quantised.
        int_: the same graph in integers (QDQ).
        batches: that calibrate.
    """
    nodes = [node for node in in_integers(float_, int_) if float_.bias(node)]
    if not nodes:
        return {}
    model = _correcting(float_, int_, nodes)
    asked = [_mean(node) for node in nodes]
    run, total = session(model, asked), 0
    sums: list[Array] = [np.zeros(1) for _ in asked]
    for inputs in batches:
        weight = next(iter(inputs.values())).size
        total += weight
        sums = [one + weight * got.astype(np.float64) for one, got in zip(sums, run.run(None, inputs), strict=True)]
    names = [str(float_.bias(node)) for node in nodes]
    return {name: float_.array(name) - one.reshape(-1) / total for name, one in zip(names, sums, strict=True)}


def _mean(node: NodeProto) -> str:
    return f"potstill.{node.name}.mean"


def _correcting(float_: Net, int_: Net, nodes: list[NodeProto]) -> onnx.ModelProto:
    """Both graphs; behind each node in integers the mean difference (1, C, …) of the batch, named by `_mean`, off."""
    model, found = beside(float_, int_), list[NodeProto]()
    ours = {node.name: node for node in nodes}
    for node in model.graph.node:
        found.append(node)
        if node.name not in ours:
            continue
        one, name = ours[node.name], str(node.output[0])
        raw, apart, mean, axes = f"{name}.raw", f"{name}.apart", _mean(one), f"{name}.axes"
        dims = float_.tensors[one.input[1]].dims
        node.output[0] = raw
        found.append(helper.make_node("Sub", [raw, FLOAT + one.output[0]], [apart]))
        rest = (0, *range(2, len(dims)))
        if one.op_type != "Conv":  # the channels are last
            wide = float_.array(str(float_.bias(one))).size
            shape = numpy_helper.from_array(np.array([-1, wide], dtype=np.int64), f"{name}.shape")
            model.graph.initializer.append(shape)
            found.append(helper.make_node("Reshape", [apart, shape.name], [f"{apart}.flat"]))
            apart, rest = f"{apart}.flat", (0,)
        model.graph.initializer.append(numpy_helper.from_array(np.array(rest, dtype=np.int64), axes))
        found.append(helper.make_node("ReduceMean", [apart, axes], [mean], keepdims=1))
        found.append(helper.make_node("Sub", [raw, mean], [name]))
    refill(model.graph.node, found)
    return model
