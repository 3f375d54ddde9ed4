"""What each node's integers cost at a model's output, in one pass over a few examples.

A graph is made that holds, beside each weighted node, that node in integers, fed by the same floats; an input says
which of them are in integers. So one session answers for all N nodes: each batch is run once in float and once for
each node in integers alone, and nothing is quantised or opened again. docs/decisions.md compares cheaper figures.

Shapes: E examples, R rows of all of them that are judged, C classes, N weighted nodes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper
from pydantic.dataclasses import dataclass

from potstill.export.net import WEIGHTED, Net, attribute, open_model, refill
from potstill.validate.decoder import takes_past, with_past
from potstill.validate.examples import Examples, Rows
from potstill.validate.metrics import divergences
from potstill.validate.model import Model
from potstill.validate.progress import track

ON = "potstill.on"
FOLLOWERS = ("Relu", "Clip")  # they go into the integers of the node before


@dataclass(frozen=True)
class Sensitivity:
    """What one node's integers cost.

    Attributes:
        node: its name in the graph.
        module: of the weights, where the graph names it; else the node's name.
        macs: multiply-adds for one example; 0 of an embedding.
        cost: how far the output is from the float model's with this node alone in integers; see `apart`.
    """

    node: str
    module: str
    macs: int
    cost: float


def end_of(net: Net, node: NodeProto) -> str:
    """The tensor that others read of a node: after an activation that its integers take in."""
    readers = net.readers(node)
    follows = len(readers) == 1 and readers[0].op_type in FOLLOWERS
    return str((readers[0] if follows else node).output[0])


def nodes_between(net: Net, names: AbstractSet[str]) -> list[str]:
    """Names of the nodes without weights all of whose neighbours with weights are among some nodes.

    With those in float, integers there would be a detour. An activation belongs to the node before it.
    """
    heavy = [node for node in net.model.graph.node if node.op_type in WEIGHTED]
    owner, weighted = {net.made_by[end_of(net, node)].name: node.name for node in heavy}, set(net.float_nodes)
    found = []
    for node in net.model.graph.node:
        if node.name not in weighted:
            neighbours = [*net.sources(node), *([] if node.name in owner else net.readers(node))]
            near = {owner.get(one.name, one.name) for one in neighbours} & weighted
            found += [node.name] if near and near <= names else []
    return found


def noisy_graph(path: Path, quantized: Path, nodes: Sequence[str]) -> onnx.ModelProto:
    """The float graph in which each of some nodes adds what its integers change, times an input.

    Args:
        path: the float graph, as `prepare` leaves it.
        quantized: the same graph in integers.
        nodes: names of N nodes that compute in integers there.

    Returns:
        The float graph with one more input, `ON` (N,) float32: of all zeros it is the float graph; a 1 for node i puts
        its inputs, weights and output into integers.
    """
    float_, int_ = Net.read(path), Net.read(quantized)
    kept: list[NodeProto] = []
    waiting: dict[str, list[NodeProto]] = {}  # by the tensor that they come after
    weights: dict[str, onnx.TensorProto] = {}
    for node in float_.model.graph.node:
        kept.append(node)
        if node.name in nodes:
            place, end = nodes.index(node.name), end_of(float_, node)
            branch, result = _branch(node, float_, int_, f"potstill.{place}.", weights)
            waiting[end] = [*branch, *_gate(end, result, place)]
        for name in node.output:
            if name in waiting:
                kept[-1] = _renamed(node, "", {name: f"{name}.float"})
                kept += waiting.pop(name)
    graph = float_.model.graph
    refill(graph.node, kept)
    graph.initializer.extend(weights.values())
    graph.initializer.extend(
        numpy_helper.from_array(np.array(i, dtype=np.int64), f"potstill.{i}.place") for i in range(len(nodes))
    )
    graph.input.append(helper.make_tensor_value_info(ON, onnx.TensorProto.FLOAT, [len(nodes)]))
    del graph.value_info[:]
    del float_.model.opset_import[:]
    float_.model.opset_import.extend(int_.model.opset_import)
    return float_.model


def _branch(
    node: NodeProto, float_: Net, int_: Net, prefix: str, weights: dict[str, onnx.TensorProto]
) -> tuple[list[NodeProto], str]:
    """Copies of what the integer graph makes a node's result of, back to float tensors; and the result's name there."""
    own = {str(node.output[0]), end_of(float_, node)}
    last = end_of(float_, node)
    for operator in ("QuantizeLinear", "DequantizeLinear"):
        last = next((str(one.output[0]) for one in int_.read_by.get(last, []) if one.op_type == operator), last)
    new: dict[str, str] = {"": ""}
    found: set[str] = set()
    open_ = [last]
    while open_:
        name = open_.pop()
        if name in new:
            continue
        if float_.computed(name) and name not in own:
            new[name] = name
        elif name in int_.tensors:
            new[name] = prefix + name
            weights[new[name]] = onnx.TensorProto()
            weights[new[name]].CopyFrom(int_.tensors[name])
            weights[new[name]].name = new[name]
        else:
            new[name] = prefix + name
            found.add(int_.made_by[name].output[0])
            open_ += int_.made_by[name].input
    return [_renamed(one, prefix, new) for one in int_.model.graph.node if one.output[0] in found], new[last]


def _gate(end: str, result: str, place: int) -> list[NodeProto]:
    """Nodes that make `end` of its float value and a part of the difference to the value in integers."""
    prefix = f"potstill.{place}."
    return [
        helper.make_node("Sub", [result, f"{end}.float"], [f"{prefix}difference"]),
        helper.make_node("Gather", [ON, f"{prefix}place"], [f"{prefix}on"]),
        helper.make_node("Mul", [f"{prefix}difference", f"{prefix}on"], [f"{prefix}part"]),
        helper.make_node("Add", [f"{end}.float", f"{prefix}part"], [end]),
    ]


def _renamed(node: NodeProto, prefix: str, names: dict[str, str]) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.name = prefix + node.name
    for one in (copy.input, copy.output):
        one[:] = [names.get(name, name) for name in one]
    return copy


def sensitivities(
    path: Path,
    quantized: Path,
    model: Model,
    examples: Examples,
    session_options: Mapping[str, str] | None = None,
    before_run: Callable[[], None] = lambda: None,
) -> list[Sensitivity]:
    """What the integers of each weighted node cost at the output, the dearest for its multiply-adds first.

    Args:
        path: the float graph, as `prepare` leaves it.
        quantized: the same graph in integers.
        model: whose graph it is, with the encoder that feeds it.
        examples: E of them, not those that judge.
        session_options: of the target's runtime.
        before_run: called before each run, N + 1 of a batch; an error that it raises ends all.
    """
    names = candidates(path, quantized)
    session = open_model(noisy_graph(path, quantized, names), session_options)
    inputs = session.get_inputs()
    together = isinstance(inputs[0].shape[0], str) and not takes_past(inputs)
    size = min(16, len(examples)) if together else 1
    costs = np.zeros(len(names))
    with track("sensitivities", len(examples)) as advance:
        for start in range(0, len(examples), size):
            batch = range(start, min(start + size, len(examples)))
            run = _fed(session, model, examples.rows(batch), before_run)
            base = run(np.zeros(len(names)))
            costs += [apart(base, run(on), model).mean() * len(batch) / len(examples) for on in np.eye(len(names))]
            advance(len(batch))
    macs, graph = multiply_adds(path, model, examples.rows([0])), Net.read(path)
    modules = {node.name: _module(node, graph.tensors) for node in graph.model.graph.node if node.name in names}
    found = [Sensitivity(n, modules[n], macs.get(n, 0), float(cost)) for n, cost in zip(names, costs, strict=True)]
    return sorted(found, key=lambda one: -one.cost / max(one.macs, 1))


def candidates(path: Path, quantized: Path) -> list[str]:
    """Names of the nodes, embeddings too, whose float weights are not in the graph in integers any more."""
    graph, left = Net.read(path), Net.read(quantized).tensors
    taken = set(graph.tensors) - set(left)
    of = (*WEIGHTED, "Gather")
    return [node.name for node in graph.model.graph.node if node.op_type in of and taken & {*node.input[:2]}]


def apart(mine: NDArray[np.floating], theirs: NDArray[np.floating], model: Model) -> NDArray[np.float64]:
    """How far each of a model's rows (R, C) is from the float model's, (R,).

    KL(mine ‖ theirs) in nats of logits; of vectors half the squared distance of the unit vectors, 1 − cosine.
    """
    if model.output == "logits":
        return divergences(mine, theirs)
    unit = [rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True) for rows in (mine, theirs)]
    found: NDArray[np.float64] = 1 - (unit[0] * unit[1]).sum(axis=1)
    return found


def _fed(
    session: Any, model: Model, rows: Rows, before_run: Callable[[], None]
) -> Callable[[NDArray[np.float64]], NDArray[np.float32]]:
    """Rows (R, C) that are judged of some examples, for the nodes that are on (N,)."""
    inputs = model.encode(rows)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}

    def run(on: NDArray[np.float64]) -> NDArray[np.float32]:
        before_run()
        outputs = session.run(None, with_past(session, {**inputs, ON: on.astype(np.float32)}))[0]
        found: NDArray[np.float32] = model.read(torch.from_numpy(outputs), tensors).numpy()
        return found

    return run


def _module(node: NodeProto, weights: Mapping[str, onnx.TensorProto]) -> str:
    """The module that a node's weights are of, by their name; the node's own name where that does not tell."""
    weight = next(name for name in node.input if name in weights)
    return weight.removesuffix(".weight") if weight.endswith(".weight") else str(node.name)


def multiply_adds(path: Path, model: Model, rows: Rows) -> dict[str, int]:
    """Multiply-adds of each weighted node for one example, by the shapes of one run.

    Args:
        path: a float graph.
        model: whose graph it is.
        rows: of one example.
    """
    graph = Net.read(path)
    nodes = [graph.nodes[name] for name in graph.float_nodes]
    asked = [node.input[0] if node.op_type == "ConvTranspose" else node.output[0] for node in nodes]
    for name in dict.fromkeys(asked):
        graph.model.graph.node.append(helper.make_node("Size", [name], [f"{name}.size"]))
        graph.model.graph.output.append(helper.make_tensor_value_info(f"{name}.size", onnx.TensorProto.INT64, []))
    session = open_model(graph.model)
    sizes = session.run([f"{name}.size" for name in asked], with_past(session, model.encode(rows)))
    return {node.name: int(size) * _each(node, graph.tensors) for node, size in zip(nodes, sizes, strict=True)}


def _each(node: NodeProto, weights: Mapping[str, onnx.TensorProto]) -> int:
    """Multiply-adds for each value of a node's output; of a ConvTranspose, of its input."""
    shape = next(list(weights[name].dims) for name in node.input if name in weights)
    if node.op_type in ("Conv", "ConvTranspose"):
        return math.prod(shape[1:])
    return int(shape[-1] if attribute(node, "transB", 0) else shape[-2])
