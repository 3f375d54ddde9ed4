"""SmoothQuant: the large channels of a LayerNormalization's output moved into the weights that read it.

Xiao et al. 2023, "SmoothQuant: accurate and efficient post-training quantization for large language models"
(arXiv:2211.10438). Shapes: C channels.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from potstill.export.net import Net, attribute, session
from potstill.validate.encoder import Inputs

ALPHA = 0.5  # the paper's for most models
LEAST_MAGNITUDE = 1e-5  # of a channel's magnitude


def smooth(net: Net, batches: Iterable[Inputs]) -> int:
    """Smooth a graph in place over some batches, and say how many LayerNormalizations were smoothed.

    Where all that read one are matrix products with weights of their own, its scale and bias take the factors up; where
    others read it too, as the residual connection after it, a Mul goes before the products.
    """
    found = {node.output[0]: products for node in net.model.graph.node if (products := _products(net, node))}
    if not found:
        return 0
    largest = _largest(net, list(found), batches)
    for name, products in found.items():
        weights = [net.array(node.input[1]).astype(np.float64) for node in products]
        sides = [one.T if _transposed(node) else one for one, node in zip(weights, products, strict=True)]
        factor = scales(largest[name], np.concatenate(sides, axis=1))
        for node, one in zip(products, sides, strict=True):
            scaled = factor[:, None] * one
            net.put(node.input[1], scaled.T if _transposed(node) else scaled)
        _take_up(net, net.made_by[name], products, factor)
    return len(found)


def scales(largest: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """s of equation 4, max|X|^α / max|W|^(1−α), (C,).

    Args:
        largest: (C,) magnitude of each channel over the calibration examples.
        weights: (C, outputs) that read it.
    """
    found: NDArray[np.float64] = np.maximum(largest, LEAST_MAGNITUDE) ** ALPHA
    found /= np.maximum(np.abs(weights).max(axis=1), LEAST_MAGNITUDE) ** (1 - ALPHA)
    return found


def _products(net: Net, node: NodeProto) -> list[NodeProto]:
    """The matrix products with weights of their own that read a LayerNormalization."""
    if node.op_type != "LayerNormalization" or attribute(node, "axis", -1) != -1:
        return []
    readers = net.read_by.get(node.output[0], [])
    kinds = [one for one in readers if one.op_type in ("MatMul", "Gemm") and one.input[0] == node.output[0]]
    return [one for one in kinds if net.own(one, 1) is not None and not attribute(one, "transA", 0)]


def _transposed(node: NodeProto) -> bool:
    return bool(attribute(node, "transB", 0))


def _largest(net: Net, names: list[str], batches: Iterable[Inputs]) -> dict[str, NDArray[np.float64]]:
    """The largest magnitude (C,) of each channel of some activations; only that is kept of a batch."""
    run, found = session(net.model, names), dict[str, NDArray[np.float64]]()
    for inputs in batches:
        for name, values in zip(names, run.run(None, inputs), strict=True):
            most = np.abs(values).reshape(-1, values.shape[-1]).max(axis=0).astype(np.float64)
            found[name] = np.maximum(found.get(name, most), most)
    return found


def _take_up(net: Net, norm: NodeProto, products: list[NodeProto], factor: NDArray[np.float64]) -> None:
    """Divide what the products read by a factor (C,)."""
    name, graph = norm.output[0], net.model.graph
    last = len(norm.input) > 2 and bool(norm.input[2])
    owned = net.own(norm, 1) and (not last or net.own(norm, 2))
    given_out = name in {value.name for value in graph.output}
    if len(products) == len(net.read_by[name]) and owned and not given_out:
        for one in norm.input[1:]:
            net.put(one, net.array(one) / factor)
        return
    smoothed = f"{name}_smoothed"
    factors = net.hold(f"{name}_factors", (1 / factor).astype(np.float32))
    net.replace(norm, [norm, helper.make_node("Mul", [name, factors], [smoothed], name=f"{norm.name}_smoothing")])
    inside = {node.name for node in products}
    for node in graph.node:
        if node.name in inside:
            node.input[0] = smoothed
