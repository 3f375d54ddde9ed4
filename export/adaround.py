"""AdaRound: whether each weight is rounded up or down, learned for each layer's output on calibration examples.

Nagel et al. 2020, "Up or down? Adaptive rounding for post-training quantization" (arXiv:2004.10568), section 3.

Shapes: P places of a layer's output, M outputs, G groups, K weights of one output.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import NodeProto
from torch import Tensor
from torch.nn import functional

from potstill.export.beside import FLOAT, beside, in_integers
from potstill.export.calibrate import Reader
from potstill.export.net import Net, attribute, session
from potstill.validate.encoder import Inputs
from potstill.validate.progress import track

ZETA, GAMMA = 1.1, -0.1  # the stretch of the sigmoid, equation 23
LAMBDA, BETAS, WARM = 0.01, (20.0, 2.0), 0.2  # of the regulariser, equation 24; without it for the first fifth
STEPS, RATE, BATCH = 300, 0.05, 256
FEWER = 4  # of so many batches one is read for a layer
PLACES, MOST_VALUES = 4096, 8 * 10**6  # places of an output that are looked at; float32 values of inputs kept for them


@dataclass(frozen=True)
class Layer:
    """A layer, and what it reads and should give at some places.

    Attributes:
        weight: (M, K) float.
        scale: (M, 1) of its integers.
        most: the largest integer.
        inputs: (P, G, K) of the graph in integers.
        outputs: (P, M) of the float graph, after the activation.
        bias: (M,).
        activation: what follows.
    """

    weight: Tensor
    scale: Tensor
    most: int
    inputs: Tensor
    outputs: Tensor
    bias: Tensor
    activation: Callable[[Tensor], Tensor]


def learned_weights(
    float_: Net, int_: Net, batches: Reader | Sequence[Inputs], seed: int
) -> dict[str, NDArray[np.float64]]:
    """Weights by name, each an integer times its scale, rounded as was learned layer after layer.

    Each layer is fed by the graph in integers as it is after those before it were learned, and aims at what the float
    graph gives (the asymmetric reconstruction of equation 25, activation included). One pass over the examples for each
    layer keeps `PLACES` places of its output, so that memory grows neither with the examples nor with the layers.

    Args:
        float_: a float graph, as it is quantised.
        int_: the same graph in integers (QDQ), symmetric weights; its weights are changed to the learned ones.
        batches: that calibrate; read once for each layer.
        seed: of the places and the batches.
    """
    nodes = [node for node in in_integers(float_, int_) if float_.own(node, 1)]
    nodes = [node for node in nodes if attribute(node, "auto_pad", b"NOTSET") == b"NOTSET"]
    found = {}
    generator = np.random.default_rng(seed)
    with track("adaround", len(nodes)) as advance:
        for node in nodes:
            layer = _layer(float_, int_, node, batches, generator)
            integers = learn(layer, seed)
            name, made_by = str(node.input[1]), int_.made_by[int_.nodes[node.name].input[1]]
            shape = float_.array(name).shape
            int_.put(made_by.input[0], _from_rows(node, integers.numpy(), shape))
            found[name] = _from_rows(node, (integers.double() * layer.scale.double()).numpy(), shape)
            advance(1)
    return found


def learn(layer: Layer, seed: int) -> Tensor:
    """The integers (M, K) of a layer.

    The largest of a row stays where rounding to the nearest puts it, so that the scale is still the one of this layer.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = layer.weight / layer.scale
    floor, nearest = steps.floor(), steps.round().clamp(-layer.most, layer.most)
    rest = (steps - floor).clamp(1e-4, 1 - 1e-4)
    v = torch.logit((rest - GAMMA) / (ZETA - GAMMA)).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=RATE)
    for step in range(STEPS):
        index = torch.randint(len(layer.inputs), (BATCH,), generator=generator)
        up = rectified(v)
        given = _apply((floor + up) * layer.scale, layer.inputs[index]) + layer.bias
        loss = (layer.activation(given) - layer.outputs[index]).square().sum(1).mean()
        if step >= WARM * STEPS:
            loss = loss + LAMBDA * regulariser(up, _beta(step / STEPS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        learned = (floor + (rectified(v) >= 0.5)).clamp(-layer.most, layer.most)
        return torch.where(nearest.abs() == layer.most, nearest, learned)


def rectified(v: Tensor) -> Tensor:
    """h(V) of equation 23: a sigmoid that is stretched and then cut off at 0 and 1."""
    return (v.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def regulariser(up: Tensor, beta: float) -> Tensor:
    """Equation 24: the sum of 1 − |2h − 1|^β, zero where all are rounded."""
    return (1 - (2 * up - 1).abs().pow(beta)).sum()


def _beta(share: float) -> float:
    """β after a share of the steps, from the first to the last by a half cosine."""
    high, low = BETAS
    return low + (high - low) * (1 + math.cos(math.pi * max(0.0, share - WARM) / (1 - WARM))) / 2


def _apply(weight: Tensor, inputs: Tensor) -> Tensor:
    """Outputs (P, M) of weights (M, K) on inputs (P, G, K), each group of outputs on its own inputs."""
    groups = inputs.shape[1]
    return torch.einsum("pgk,gmk->pgm", inputs, weight.reshape(groups, -1, weight.shape[1])).flatten(1)


def _layer(
    float_: Net, int_: Net, node: NodeProto, batches: Reader | Sequence[Inputs], generator: np.random.Generator
) -> Layer:
    """A layer with what is looked at of one pass."""
    own = int_.nodes[node.name]
    weights = int_.made_by[own.input[1]]
    rows = _rows(node, float_.array(node.input[1]))
    scale = int_.array(weights.input[1]).astype(np.float32).reshape(-1, 1)
    bias = float_.array(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(len(rows))
    run = session(beside(float_, int_), [own.input[0], FLOAT + node.output[0]])
    some = -(-len(batches) // FEWER)
    count = max(1, min(PLACES, MOST_VALUES // rows.shape[1] // _groups(node)) // some)
    both = (run.run(None, inputs) for inputs in islice(batches, some))
    taken = [_places(node, float_, x, y, count, generator) for x, y in both]
    inputs, outputs = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*taken, strict=True))
    activation = _activation(float_, node)
    return Layer(
        torch.from_numpy(rows.copy()),
        torch.from_numpy(scale).expand(len(rows), 1),
        int(np.abs(int_.array(weights.input[0]).astype(int)).max()),
        inputs,
        activation(outputs),
        torch.from_numpy(bias.astype(np.float32)),
        activation,
    )


def _places(
    node: NodeProto, net: Net, x: NDArray[np.float32], y: NDArray[np.float32], count: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What a layer reads (P, G, K) and gives (P, M) at P random places of a batch."""
    if node.op_type != "Conv":
        flat, outputs = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        chosen = rng.integers(len(flat), size=count)
        return flat[chosen][:, None], outputs[chosen]
    weight = net.tensors[node.input[1]].dims
    space, groups = len(weight) - 2, _groups(node)
    pads, steps, gaps = (
        attribute(node, name, [default] * wide)
        for name, default, wide in (("pads", 0, 2 * space), ("strides", 1, space), ("dilations", 1, space))
    )
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:space], pads[space:], strict=True)])
    at = [rng.integers(size, size=count) for size in (len(y), *y.shape[2:])]
    index = [at[0].reshape(-1, *[1] * space)]
    for axis in range(space):
        reach = at[1 + axis][:, None] * steps[axis] + np.arange(weight[2 + axis]) * gaps[axis]
        index.append(reach.reshape(count, *[1] * axis, -1, *[1] * (space - 1 - axis)))
    patches = np.moveaxis(np.moveaxis(x, 1, -1)[tuple(index)], -1, 1)  # (P, channels, …)
    return patches.reshape(count, groups, -1), np.moveaxis(y, 1, -1)[tuple(at)]


def _groups(node: NodeProto) -> int:
    return int(attribute(node, "group", 1))


def _rows(node: NodeProto, weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weights (M, K)."""
    if node.op_type == "Conv" or attribute(node, "transB", 0):
        return weight.reshape(len(weight), -1)
    return weight.T


def _from_rows(node: NodeProto, rows: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Weights (M, K) in their own shape."""
    return rows.reshape(shape) if node.op_type == "Conv" or attribute(node, "transB", 0) else rows.T


def _activation(net: Net, node: NodeProto) -> Callable[[Tensor], Tensor]:
    """What follows a layer alone and goes into its integers."""
    after = net.reader(node)
    if after is not None and after.op_type == "Relu":
        return functional.relu
    ends = [net.array(name) for name in after.input[1:] if name in net.tensors] if after is not None else []
    if after is not None and after.op_type == "Clip" and len(ends) == 2:
        return partial(torch.clamp, min=float(ends[0]), max=float(ends[1]))
    return torch.nn.Identity()
