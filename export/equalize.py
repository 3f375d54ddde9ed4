"""Cross-layer equalisation: the channels between two layers scaled so that the weights of both have alike ranges.

Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction" (arXiv:1906.04721), section
4.1. Shapes: C channels between a first and a second layer.
"""

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from potstill.export.net import Net, attribute

Array = NDArray[np.float64]
SWEEPS, SETTLED = 100, 1e-3  # sweeps over all pairs at most; ended where no factor of one changes more than this
KEEP_SCALE = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Flatten")


def equalize(net: Net) -> int:
    """Equalise each pair of layers of a graph in place, and say how many there were.

    A pair is a Conv or Gemm that one other reads, through nothing but `KEEP_SCALE`, means over space, and clipping at 0
    and a greatest value. That Clip becomes a Relu and a Min with a value for each channel, so that the function stays.
    """
    chains = [chain for node in net.model.graph.node if (chain := _chain(net, node))]
    factors = [np.ones(_outputs(net, chain[0])) for chain in chains]
    weights = {n.name: net.array(n.input[1]).astype(np.float64) for chain in chains for n in (chain[0], chain[-1])}
    for _ in range(SWEEPS):
        changed = 0.0
        for chain, all_factors in zip(chains, factors, strict=True):
            first, second = _out_first(chain[0], weights), _in_first(chain[-1], weights, len(all_factors))
            factor = scales(first, second)
            _scale(chain, weights, factor)
            all_factors *= factor
            changed = max(changed, float(np.abs(np.log(factor)).max()))
        if changed < SETTLED:
            break
    for name, weight in weights.items():
        net.put(net.nodes[name].input[1], weight)
    for chain, factor in zip(chains, factors, strict=True):
        _finish(net, chain, factor)
    return len(chains)


def scales(first: Array, second: Array) -> Array:
    """s of equation 11, r1 / √(r1 r2): by what the first layer's rows are divided and the second's multiplied.

    Args:
        first: (C, …) weights that make each channel.
        second: (C, …) weights that read each channel.
    """
    r1, r2 = (np.abs(one.reshape(len(one), -1)).max(axis=1) for one in (first, second))
    dead = (r1 == 0) | (r2 == 0)
    found: Array = np.where(dead, 1.0, np.sqrt(np.where(dead, 1, r1) / np.where(dead, 1, r2)))
    return found


def _chain(net: Net, first: NodeProto) -> list[NodeProto]:
    """A layer, what lies between, and the next layer; empty where they make no pair."""
    chain = [first]
    if not _scalable(net, first) or (len(first.input) > 2 and first.input[2] and net.own(first, 2) is None):
        return []
    while (after := net.reader(chain[-1])) is not None:
        if _scalable(net, after) and after.input[0] == chain[-1].output[0]:
            inputs = _inputs(net, after)
            return [*chain, after] if inputs % _outputs(net, first) == 0 else []
        if after.input[0] != chain[-1].output[0] or not _keeps_scale(net, after):
            return []
        chain.append(after)
    return []


def _scalable(net: Net, node: NodeProto) -> bool:
    plain = node.op_type == "Gemm" and not attribute(node, "transA", 0) and attribute(node, "alpha", 1.0) == 1.0
    beta = attribute(node, "beta", 1.0) == 1.0
    return (node.op_type == "Conv" or (plain and beta)) and net.own(node, 1) is not None


def _keeps_scale(net: Net, node: NodeProto) -> bool:
    """Whether what a node makes of a channel that is multiplied by a positive number is multiplied by it too."""
    if node.op_type == "ReduceMean":
        axes = net.array(node.input[1]) if len(node.input) > 1 and node.input[1] in net.tensors else np.zeros(1)
        return bool((axes > 1).all())
    if node.op_type == "Clip":
        ends = [net.array(name) for name in node.input[1:] if name in net.tensors]
        return len(ends) == 2 and float(ends[0]) == 0
    return node.op_type in KEEP_SCALE and attribute(node, "axis", 1) == 1


def _outputs(net: Net, node: NodeProto) -> int:
    shape = net.tensors[node.input[1]].dims
    return int(shape[0] if node.op_type == "Conv" or attribute(node, "transB", 0) else shape[1])


def _inputs(net: Net, node: NodeProto) -> int:
    shape = net.tensors[node.input[1]].dims
    if node.op_type == "Conv":
        return int(shape[1]) * int(attribute(node, "group", 1))
    return int(shape[1] if attribute(node, "transB", 0) else shape[0])


def _out_first(node: NodeProto, weights: dict[str, Array]) -> Array:
    """A view of the weights of a layer, (outputs, …)."""
    weight = weights[node.name]
    return weight if node.op_type == "Conv" or attribute(node, "transB", 0) else weight.T


def _in_first(node: NodeProto, weights: dict[str, Array], channels: int) -> Array:
    """A view of the weights of a layer, (C, …); a Gemm after a Flatten has several inputs for a channel."""
    weight = weights[node.name]
    if node.op_type == "Gemm":
        inputs = weight.T if attribute(node, "transB", 0) else weight
        return inputs.reshape(channels, -1, inputs.shape[1])
    groups = int(attribute(node, "group", 1))
    parts = weight.reshape(groups, -1, *weight.shape[1:])  # (groups, outputs of one, inputs of one, …)
    return parts.swapaxes(1, 2).reshape(channels, parts.shape[1], -1)


def _scale(chain: list[NodeProto], weights: dict[str, Array], factor: Array) -> None:
    """Divide the first layer's outputs by a factor (C,), and multiply the second's inputs by it."""
    first, last = chain[0], chain[-1]
    out = _out_first(first, weights)
    out /= factor.reshape(-1, *[1] * (out.ndim - 1))
    weight = weights[last.name]
    if last.op_type == "Gemm":
        inputs = weight.T if attribute(last, "transB", 0) else weight
        inputs *= np.repeat(factor, len(inputs) // len(factor))[:, None]
        return
    groups = int(attribute(last, "group", 1))
    each = factor.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
    weights[last.name] = (weight.reshape(groups, -1, *weight.shape[1:]) * each).reshape(weight.shape)


def _finish(net: Net, chain: list[NodeProto], factor: Array) -> None:
    """Scale the bias of the first layer and what its channels are clipped at."""
    first = chain[0]
    if (name := net.own(first, 2)) is not None:
        net.put(name, net.array(name) / factor)
    for node in chain[1:-1]:
        if node.op_type == "Clip":
            after_flatten = any(one.op_type in ("Flatten", "ReduceMean") for one in chain[1 : chain.index(node)])
            shape = (-1,) if first.op_type == "Gemm" or after_flatten else (-1, 1, 1)
            caps = (float(net.array(node.input[2])) / factor).astype(np.float32).reshape(shape)
            held, out = f"{node.output[0]}_uncapped", node.output[0]
            least = helper.make_node("Min", [held, net.hold(f"{out}_caps", caps)], [out], name=f"{node.name}_caps")
            net.replace(node, [helper.make_node("Relu", [node.input[0]], [held], name=node.name), least])
