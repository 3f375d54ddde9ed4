"""float16, with the nodes that must stay in float32 found by measurement.

float16 (IEEE 754 binary16) ends at 65,504 and has its full precision from 2^-14 on. ONNX Runtime's CPU provider
computes most operators of a float16 file in float32 and hands float32 on, so that its answers do not tell what a device
would give: the float graph, rounded after each node, does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.quant_utils import load_model_with_shape_infer
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from pydantic.dataclasses import dataclass

from potstill.export.graph import save_model
from potstill.export.net import floats, mend, open_model, refill
from potstill.validate.encoder import Inputs
from potstill.validate.errors import InputError
from potstill.validate.session import open_session

EXAMPLES = 32  # that nodes are measured on
TOLERANCE = 2e-2  # of the largest output; that of a float16 package's golden samples
MOST_HALF, LEAST_HALF = 65504.0, 2.0**-14  # the largest float16 and the least with all its bits
ENDLESS = 1e37  # from here on a number stands for infinity, as in a mask; float16 has one too
MOST_TRIES = 40  # passes over the examples to find nodes which ranges do not show
ROUNDED = "potstill.rounded"  # the input that says so
SQUARING = ("LayerNormalization", "InstanceNormalization", "GroupNormalization", "ReduceL2", "LpNormalization")


@dataclass(frozen=True)
class Half:
    """What became of a graph in float16.

    Attributes:
        float32_nodes: names of the nodes that stay in float32, in the graph's order: those that were measured to need
            it, and those that were still untried after `MOST_TRIES` passes.
        nodes: of all.
    """

    float32_nodes: list[str]
    nodes: int


def to_float16(path: Path, out: Path, batches: Sequence[Inputs]) -> Half:
    """Write a float graph in float16 to `out`; its inputs and outputs stay float32.

    A node stays in float32 where one of its activations is beyond float16's numbers, or it squares one whose square
    is, or reads weights that are too small. If the outputs, rounded after each node, are then further from the float
    graph's than `TOLERANCE` of its largest output, sets of nodes are halved until those are found that cost it, in at
    most `MOST_TRIES` passes; what was not tried stays in float32. Weights are not rounded there: that costs each at
    most 2^-11 of itself, which the file shows on the CPU too.

    Args:
        path: the float graph.
        out: the file to write.
        batches: inputs of the graph, by name, to measure on.

    Raises:
        InputError: there are no inputs to measure on, or an output of the float graph is not finite.
    """
    if not batches:
        raise InputError("float16 needs at least 1 real example, to find the nodes that must stay in float32")
    wanted = _outputs(path, batches)
    if not all(np.isfinite(one).all() for one in wanted):
        raise InputError(
            f"an output of {path.name} in float32 is not finite on a real example; look for an overflow in the model"
        )
    model = _named(path)
    names = [node.name for node in model.graph.node if node.op_type not in DEFAULT_OP_BLOCK_LIST]
    kept = _beyond(model, _peaks(model, batches)) & set(names)
    rounded = _Rounded(path, names, batches, wanted)
    if not rounded.fits(kept):
        kept |= rounded.least([name for name in names if name not in kept], kept)
    _write(path, out, kept)
    return Half([name for name in names if name in kept], len(model.graph.node))


def _named(path: Path) -> onnx.ModelProto:
    """A graph with the shapes of its activations, every node with a name."""
    return mend(load_model_with_shape_infer(path))


def _join(model: onnx.ModelProto) -> None:
    """Let what one float32 node hands to another stay in float32.

    ONNX Runtime's converter puts a Cast to float16 and one back between them, where an overflow would be as before, and
    one Cast with the same name for each reader.
    """
    graph = model.graph
    down = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.name.endswith("_cast_to_fp16_node") or node.name.startswith("graph_input_cast")
    }
    direct, kept = dict[str, str](), dict[str, onnx.NodeProto]()
    for node in graph.node:
        if node.name.endswith("_cast_to_fp32_node") and node.input[0] in down:
            direct[node.output[0]] = down[node.input[0]]
        else:
            kept.setdefault(node.name, node)
        if node.name.startswith("graph_output_cast") and node.input[0] in down:
            node.input[0] = down[node.input[0]]
    for node in kept.values():
        for place, name in enumerate(node.input):
            node.input[place] = direct.get(name, name)
    read = {name for node in kept.values() for name in node.input} | {value.name for value in graph.output}
    refill(graph.node, [node for node in kept.values() if read & set(node.output) or not set(node.output) & set(down)])
    refill(graph.value_info, list({value.name: value for value in graph.value_info}.values()))


def _peaks(model: onnx.ModelProto, batches: Sequence[Inputs]) -> dict[str, float]:
    """The largest finite magnitude of each float activation; the graph itself finds it."""
    names = floats(model)
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    graph = watched.graph
    del graph.output[:]
    for word, number in (("zero", 0.0), ("endless", ENDLESS)):
        graph.initializer.append(numpy_helper.from_array(np.float32(number), f"potstill.{word}"))
    for i, name in enumerate(names):
        one = [f"potstill.{i}.{part}" for part in ("abs", "there", "kept", "peak")]
        graph.node.extend(
            [
                helper.make_node("Abs", [name], [one[0]]),
                helper.make_node("Less", [one[0], "potstill.endless"], [one[1]]),
                helper.make_node("Where", [one[1], one[0], "potstill.zero"], [one[2]]),
                helper.make_node("ReduceMax", [one[2]], [one[3]], keepdims=0),
            ]
        )
        graph.output.append(helper.make_tensor_value_info(one[3], TensorProto.FLOAT, []))
    found = np.max([[float(peak) for peak in outputs] for outputs in _run(open_model(watched), batches)], axis=0)
    return dict(zip(names, np.maximum(found, 0).tolist(), strict=True))


def _beyond(model: onnx.ModelProto, peaks: dict[str, float]) -> set[str]:
    """Names of the nodes with an activation or weights that float16 cannot hold, or cannot square."""
    weights = {
        tensor.name: float(np.abs(numpy_helper.to_array(tensor)).max(initial=0))
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT
    }
    kept = set()
    for node in model.graph.node:
        ends = [peaks[name] for name in [*node.input, *node.output] if name in peaks]
        ends += [weights[name] for name in node.input if weights.get(name, ENDLESS) < ENDLESS]
        squared = node.op_type in SQUARING and peaks.get(node.input[0], 0) ** 2 > MOST_HALF
        if squared or any(end > MOST_HALF or 0 < end < LEAST_HALF for end in ends):
            kept.add(node.name)
    return kept


def _write(path: Path, out: Path, kept: set[str]) -> None:
    """The file with some nodes in float32."""
    model = convert_float_to_float16(
        _named(path), keep_io_types=True, disable_shape_infer=True, node_block_list=sorted(kept)
    )
    _join(model)
    ordered = ONNXModel(model)
    ordered.topological_sort()
    save_model(ordered.model, out)


def _distance(found: list[NDArray[np.float32]], wanted: list[NDArray[np.float32]]) -> float:
    """The largest difference of an output, as a share of the largest output; infinite where one is not finite."""
    largest = max(float(np.finfo(np.float32).tiny), *(float(np.abs(one).max()) for one in wanted))
    pairs = zip(found, wanted, strict=True)
    return max(float(np.nan_to_num(np.abs(mine - one), nan=np.inf).max()) for mine, one in pairs) / largest


class _Rounded:
    """The float graph in one session, in which an input says whose outputs are rounded to float16."""

    def __init__(
        self, path: Path, names: list[str], batches: Sequence[Inputs], wanted: list[NDArray[np.float32]]
    ) -> None:
        self.names, self.batches, self.wanted, self.tries = names, batches, wanted, 0
        model = _named(path)
        _gate(model, names)
        self.session = open_model(model)

    def fits(self, kept: set[str]) -> bool:
        """Whether the outputs are near enough with some nodes in float32."""
        self.tries += 1
        on = {ROUNDED: np.array([name not in kept for name in self.names])}
        found = [outputs[0] for outputs in _run(self.session, [{**batch, **on} for batch in self.batches])]
        return _distance(found, self.wanted) <= TOLERANCE

    def least(self, names: list[str], kept: set[str]) -> set[str]:
        """Of some nodes, those that must be in float32 beside `kept`: all were, halves are given back while it fits."""
        must = set(names)
        waiting = [names]
        while waiting and self.tries < MOST_TRIES:
            group = waiting.pop()
            if self.fits(kept | must - set(group)):
                must -= set(group)
            elif len(group) > 1:
                middle = len(group) // 2
                waiting += [group[middle:], group[:middle]]
        return must


def _gate(model: onnx.ModelProto, names: list[str]) -> None:
    """Let a node read an activation rounded to float16, unless it and the node that made it are both in float32.

    ONNX Runtime leaves a pair of Casts alone that the graph has.
    """
    graph, rounded = model.graph, set(floats(model))
    on = {name: f"potstill.{i}.on" for i, name in enumerate(names)}
    makers = {name: on[node.name] for node in graph.node for name in node.output if node.name in on}
    nodes = [helper.make_node("Gather", [ROUNDED, f"{one}.place"], [one]) for one in on.values()]
    nodes += [cast for value in graph.input if value.name in rounded for cast in _casts(value.name)]
    for node in graph.node:
        for name in sorted({*node.input} & rounded):
            by = [one for one in (makers.get(name), on.get(node.name)) if one]
            if by:
                gated = f"{name}.{node.name}"
                nodes.append(helper.make_node("Or", [by[0], by[-1]], [f"{gated}.on"]))
                nodes.append(helper.make_node("Where", [f"{gated}.on", f"{name}.back", name], [gated]))
                node.input[:] = [gated if one == name else one for one in node.input]
        nodes += [node, *(cast for name in node.output if name in rounded for cast in _casts(name))]
    refill(graph.node, nodes)
    graph.initializer.extend(numpy_helper.from_array(np.int64(i), f"{one}.place") for i, one in enumerate(on.values()))
    graph.input.append(helper.make_tensor_value_info(ROUNDED, TensorProto.BOOL, [len(names)]))


def _casts(name: str) -> list[onnx.NodeProto]:
    """An activation to float16 and back."""
    return [
        helper.make_node("Cast", [name], [f"{name}.half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", [f"{name}.half"], [f"{name}.back"], to=TensorProto.FLOAT),
    ]


def _run(session: Any, batches: Sequence[Inputs]) -> list[list[NDArray[np.float32]]]:
    """All outputs of each batch."""
    names = {one.name for one in session.get_inputs()}
    return [session.run(None, {name: batch[name] for name in names}) for batch in batches]


def _outputs(path: Path, batches: Sequence[Inputs]) -> list[NDArray[np.float32]]:
    """The first output of each batch."""
    return [outputs[0] for outputs in _run(open_session(path), batches)]
