"""Embedding tables in int8 or int4, each row with scales of its own.

One scale for a whole table, as `quantize_dynamic` and `quantize_static` have it, leaves a frequent word as many levels
as the largest value of the rarest one allows.

Shapes: V rows of width D, S scales for each row.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from potstill.export.graph import save_model
from potstill.export.net import attribute, refill
from potstill.validate.errors import InputError

Embedding = Literal["int8", "int4"]
ROW_BLOCK = 16  # values of a row that share a scale in int4; see docs/decisions.md
CONTRIB = "com.microsoft"


def embeddings(graph: GraphProto) -> list[NodeProto]:
    """The nodes that read rows of more than one value from a constant float32 matrix."""
    floats = [tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT]
    tables = {tensor.name for tensor in floats if len(tensor.dims) == 2 and tensor.dims[1] > 1}
    by_row = [node for node in graph.node if node.op_type == "Gather" and not attribute(node, "axis", 0)]
    return [node for node in by_row if node.input[0] in tables]


def quantize_rows(table: NDArray[np.floating[Any]]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A table (V, D) as integers (V, D) from −127 to 127 and row scales (V, 1): the greatest magnitude / 127."""
    scales = np.abs(table).max(axis=1, keepdims=True).astype(np.float32) / np.float32(127)
    return np.rint(table / np.where(scales == 0, 1, scales)).astype(np.int8), scales


def quantize_row_blocks(table: NDArray[np.floating[Any]]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A table (V, D) as 4-bit integers, two in a byte (V, D / 2), the first in the lower half, and scales (V, S).

    As `weights_in_blocks` has them, but along a row: of a block's value m of greatest magnitude the scale is −m / 8.
    The integers are stored with 8 added.
    """
    width = table.shape[1]
    blocks = np.pad(table, ((0, 0), (0, -width % ROW_BLOCK))).reshape(len(table), -1, ROW_BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2, keepdims=True), axis=2)
    scales = (largest / -8).astype(np.float32)
    whole = np.rint(blocks / np.where(scales == 0, 1, scales)).clip(-8, 7) + 8
    stored = whole.astype(np.uint8).reshape(len(table), -1)[:, :width]
    packed: NDArray[np.uint8] = stored[:, ::2] | stored[:, 1::2] << np.uint8(4)
    return packed, scales[:, :, 0]


def embeddings_in_rows(path: Path, kind: Embedding, names: Collection[str]) -> None:
    """Put the tables of some embeddings into integers by row, in place.

    int8: a row and its scale are gathered and multiplied, by operators of the ONNX standard. int4: com.microsoft's
    GatherBlockQuantized (ONNX Runtime, docs/ContribOperators.md).

    Args:
        path: the graph, which is written anew.
        kind: of integers.
        names: of nodes that `embeddings` finds in it.

    Raises:
        InputError: int4 of a table of an odd width.
    """
    model = onnx.load(str(path))
    graph = model.graph
    mine = {node.name for node in embeddings(graph) if node.name in names}
    tables = {node.input[0] for node in graph.node if node.name in mine}
    new: list[NodeProto] = []
    for node in graph.node:
        new += (_rows(node) if kind == "int8" else _blocks(node)) if node.name in mine else [node]
    read = {name for node in new for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    stored = [one for tensor in graph.initializer if tensor.name in tables for one in _stored(tensor, kind)]
    refill(graph.node, new)
    refill(graph.initializer, [*kept, *stored])
    if kind == "int4" and all(one.domain != CONTRIB for one in model.opset_import):
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    save_model(model, path)


def _stored(tensor: TensorProto, kind: Embedding) -> Iterator[TensorProto]:
    """A table's integers and scales."""
    table = numpy_helper.to_array(tensor)
    if kind == "int4" and table.shape[1] % 2:
        raise InputError(
            f"the embedding {tensor.name!r} is {table.shape[1]} wide, and int4 stores two values in a byte; "
            "set embedding: int8 in the target"
        )
    whole, scales = quantize_rows(table) if kind == "int8" else quantize_row_blocks(table)
    yield numpy_helper.from_array(whole, f"{tensor.name}.{kind}")
    yield numpy_helper.from_array(scales, f"{tensor.name}.scales")


def _rows(node: NodeProto) -> list[NodeProto]:
    table, which, out = node.input[0], node.input[1], node.output[0]
    return [
        helper.make_node("Gather", [f"{table}.int8", which], [f"{out}.int8"], f"{node.name}_rows", axis=0),
        helper.make_node("Gather", [f"{table}.scales", which], [f"{out}.scales"], f"{node.name}_scales", axis=0),
        helper.make_node("Cast", [f"{out}.int8"], [f"{out}.cast"], f"{node.name}_cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{out}.cast", f"{out}.scales"], [out], node.name),
    ]


def _blocks(node: NodeProto) -> list[NodeProto]:
    inputs = [f"{node.input[0]}.int4", node.input[1], f"{node.input[0]}.scales"]
    how = {"bits": 4, "block_size": ROW_BLOCK, "gather_axis": 0, "quantize_axis": 1}
    made = helper.make_node("GatherBlockQuantized", inputs, list(node.output), node.name, domain=CONTRIB, **how)
    return [made]
