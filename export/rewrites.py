"""The same graph in operators that suit a provider: an NPU's graph does not fall into parts, a CPU's is faster.

Each rewrite computes the same numbers in float32; see docs/decisions.md for what each one cures.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from potstill.export.graph import data_file, save_model, too_large
from potstill.export.net import Net, attribute, needed, refill
from potstill.targets.operator_lists import COREML
from potstill.targets.target import QNN, Target
from potstill.validate.session import CPU, open_session

HUGE = 1e30  # what is less, added to the greatest float32, 3.4e38, rounds back to it: half its last bit is 1e31
MOVES = (
    *("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile", "Transpose", "Concat", "Split"),
    *("Slice", "Gather", "GatherND", "Where", "Max", "Min", "Clip"),
)  # gives no greater magnitude than it reads
ENDS = ("Softmax", "IsNaN", "IsInf", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Shape")  # nor huge


def _shape(net: Net, name: str) -> tuple[int, ...] | None:
    """A fixed shape; None of one that is free or unknown."""
    kind = net.types.get(name)
    if kind is None or not kind.HasField("shape"):
        return None
    dims = kind.shape.dim
    return tuple(dim.dim_value for dim in dims) if all(dim.HasField("dim_value") for dim in dims) else None


def _finite(graph: onnx.GraphProto) -> bool:
    """Whether constants make nothing infinite or NaN: all are finite, and no two are added that are `HUGE`.

    Huge ones may be chosen from, moved, and added to what is not huge, which rounds back to them. Activations
    count as smaller than `HUGE`.
    """
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    held = [one for one in graph.initializer if one.data_type in floats]
    most = {one.name: float(np.abs(numpy_helper.to_array(one)).max(initial=0)) for one in held}
    huge = {name for name, value in most.items() if not value < HUGE}  # NaN too
    if not all(np.isfinite(most[name]) for name in huge):
        return False
    for node in graph.node:
        read = [name for name in node.input if name in huge]
        if not read or node.op_type in ENDS:
            continue
        if node.op_type not in MOVES and not (node.op_type in ("Add", "Sub", "Sum") and len(read) == 1):
            return False
        huge.update(node.output)
    return True


Rewrite = Callable[[NodeProto, Net], list[NodeProto] | None]


def _gather_nd(node: NodeProto, net: Net) -> list[NodeProto] | None:
    """GatherND whose constant indices name every element in order is a Reshape: a mask is read so."""
    indices, shape, out = net.constant(node.input[1]), _shape(net, node.input[0]), _shape(net, node.output[0])
    if (
        any(one.i for one in node.attribute)
        or indices is None
        or shape is None
        or out is None
        or indices.shape[-1] != len(shape)
    ):
        return None
    in_order = np.stack(np.unravel_index(np.arange(int(np.prod(shape))), shape), axis=-1)
    if not np.array_equal(indices.reshape(-1, len(shape)), in_order):
        return None
    wanted = net.hold(f"{node.name}_shape", np.array(out, dtype=np.int64))
    return [helper.make_node("Reshape", [node.input[0], wanted], node.output, name=node.name)]


def _gather_one(node: NodeProto, net: Net) -> list[NodeProto] | None:
    """Gather of one place along an axis is a Slice and a Squeeze: the first token is read so."""
    index, shape = net.constant(node.input[1]), _shape(net, node.input[0])
    if index is None or index.ndim or shape is None or net.constant(node.input[0]) is not None:
        return None
    axis = attribute(node, "axis", 0) % len(shape)
    place = int(index) % shape[axis]
    ends = {"starts": place, "ends": place + 1, "axes": axis}
    held = [net.hold(f"{node.name}_{name}", np.array([value], dtype=np.int64)) for name, value in ends.items()]
    cut = f"{node.output[0]}_cut"
    return [
        helper.make_node("Slice", [node.input[0], *held], [cut], name=f"{node.name}_slice"),
        helper.make_node("Squeeze", [cut, held[-1]], node.output, name=node.name),
    ]


def _pad(node: NodeProto, net: Net) -> list[NodeProto] | None:
    """Pad with a constant along one axis is a Concat: a shortcut with more channels is padded so."""
    pads, shape = net.constant(node.input[1]), _shape(net, node.input[0])
    value = net.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(())
    plain = attribute(node, "mode", b"constant") == b"constant" and len(node.input) <= 3
    if not plain or pads is None or value is None or shape is None:
        return None
    ends = pads.reshape(2, len(shape))
    padded = np.flatnonzero(ends.any(axis=0))
    if len(padded) != 1 or ends.min() < 0:
        return None
    axis, parts = int(padded[0]), [node.input[0]]
    kind = helper.tensor_dtype_to_np_dtype(net.types[node.input[0]].elem_type)
    for side, count in enumerate(ends[:, axis].tolist()):
        if count:
            block = np.full((*shape[:axis], count, *shape[axis + 1 :]), value, dtype=kind)
            parts.insert(side * len(parts), net.hold(f"{node.name}_{('before', 'after')[side]}", block))
    return [helper.make_node("Concat", parts, node.output, name=node.name, axis=axis)]


def _safe_softmax(node: NodeProto, net: Net) -> list[NodeProto] | None:
    """Where(IsNaN(s), c, s) of a Softmax s is s where constants make nothing infinite: a row has a finite maximum.

    It guards rows that are masked with minus infinity everywhere; one mask of finite numbers gives no NaN, two whose
    sum overflows do.
    """
    asked, source = net.made_by.get(node.input[0]), net.made_by.get(node.input[2])
    if asked is None or asked.op_type != "IsNaN" or asked.input[0] != node.input[2]:
        return None
    if source is None or source.op_type != "Softmax" or not _finite(net.model.graph):
        return None
    return [helper.make_node("Identity", [node.input[2]], node.output, name=node.name)]


def _loose_sum(node: NodeProto, net: Net) -> list[NodeProto] | None:
    """Add of two activations before a layer norm is a Sum, which ONNX Runtime does not fuse into a slower operator."""
    normalised = any(one.op_type == "LayerNormalization" and one.input[0] in node.output for one in net.readers(node))
    if normalised and not set(node.input) & set(net.tensors):
        return [helper.make_node("Sum", node.input, node.output, name=node.name)]
    return None


REWRITES: dict[str, dict[str, Rewrite]] = {
    CPU: {"Add": _loose_sum},
    QNN: {"GatherND": _gather_nd},
    COREML: {"GatherND": _gather_nd, "Gather": _gather_one, "Pad": _pad, "Where": _safe_softmax},
}


def suit(path: Path, target: Target) -> dict[str, int]:
    """Rewrite a graph in place for the target's first provider; count by operator what was replaced.

    Of a graph with fixed shapes constants are folded first, by ONNX Runtime's basic optimisations, as its quantiser
    does too. A provider without rewrites leaves the file as it is.
    """
    rewrites = REWRITES.get(target.runtime.providers[0])
    if not rewrites:
        return {}
    model = _folded(path) if target.model.shapes == "static" else onnx.load(str(path))
    net, counted = Net(model), Counter[str]()
    kept: list[NodeProto] = []
    for node in model.graph.node:
        rewrite = rewrites.get(node.op_type)
        new = rewrite(node, net) if rewrite else None
        counted[node.op_type] += new is not None
        kept += [node] if new is None else new
    refill(model.graph.node, needed(kept, [value.name for value in model.graph.output]))
    save_model(model, path)
    return {operator: count for operator, count in counted.items() if count}


def _folded(path: Path) -> onnx.ModelProto:
    """The model with its constants folded and every shape that follows from them."""
    import onnxruntime

    plain = path.with_name("plain.onnx")
    beside = {"session.optimized_model_external_initializers_file_name": data_file(plain).name}
    open_session(
        path,
        beside if too_large(path) else {},
        optimized_model_filepath=str(plain),
        graph_optimization_level=onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        disabled_optimizers=["MatMulAddFusion"],  # done once more on the same file, it makes the same names again
    )
    onnx.shape_inference.infer_shapes_path(str(plain))  # in place; infer_shapes takes 2 GB at most
    model = onnx.load(str(plain))
    for part in (plain, data_file(plain)):
        part.unlink(missing_ok=True)
    return model
