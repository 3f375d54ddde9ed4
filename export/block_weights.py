"""The matrices of a decoder's graph in blocks of 4 or 8 bits, its embedding and head among them.

Shapes: V tokens of the vocabulary, D the width of the model, K × N a matrix, S blocks in a row of an embedding.
"""

import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import NodeProto, helper
from pydantic.dataclasses import dataclass

from potstill.export.embeddings import CONTRIB, embeddings, embeddings_in_rows
from potstill.export.gptq import fit_integers
from potstill.export.graph import save_model
from potstill.export.net import Net, attribute, refill
from potstill.export.weight_only import ACCURACY_LEVEL, nbits_quantizer
from potstill.validate.errors import InputError

Algorithm = Literal["rtn", "k_quant", "hqq", "gptq"]


@dataclass(frozen=True)
class Blocks:
    """How the matrices of a decoder are stored.

    Attributes:
        bits: of each weight.
        algorithm: that chooses the integers of 4 bits: `rtn`, the nearest, symmetric around 0; `k_quant`, scale and
            zero by weighted least squares (llama.cpp); `hqq`, a zero that lets outliers go (Badri and Shaji 2023);
            `gptq`, the rest of a rounding is put on the weights that follow (Frantar 2022). 8 bits are the nearest.
        block_size: weights of a column that share a scale.
        eight: names of the nodes whose matrices have 8 bits all the same; of an embedding and a head that share one,
            either.
        in_float: names of the nodes whose matrices stay in float32.
    """

    bits: Literal[4, 8] = 4
    algorithm: Algorithm = "rtn"
    block_size: int = 32
    eight: tuple[str, ...] = ()
    in_float: tuple[str, ...] = ()


def decoder_in_blocks(path: Path, out: Path, blocks: Blocks, samples: Sequence[Sequence[int]] = ()) -> None:
    """Write a decoder's float graph with its matrices in blocks, by `onnxruntime.quantization`.

    Products become com.microsoft's MatMulNBits. An embedding whose matrix is the head's, turned over, reads the head's
    own blocks (GatherBlockQuantized); any other has integers by row (export/embeddings.py).
    Source: ONNX Runtime, docs/ContribOperators.md.

    Args:
        path: the float graph, with names for its nodes.
        out: the file to write.
        blocks: see there.
        samples: texts as token ids, for `gptq`.

    Raises:
        InputError: `gptq` without texts.
    """
    if blocks.algorithm == "gptq" and not samples:
        raise InputError("algorithm: gptq needs texts to calibrate on; give them, or say algorithm: k_quant")
    net = Net.read(path)
    tied, tables = untie(net), [node.name for node in embeddings(net.model.graph)]
    save_model(net.model, out)
    names = [node.name for node in products(net) if node.name not in blocks.in_float]
    wide = {*blocks.eight, *(head for table, head in tied.items() if table in blocks.eight)}
    many = names if blocks.bits == 8 else [name for name in names if name in wide]
    if many:
        _nearest(out, 8, blocks.block_size, many)
    if few := [name for name in names if name not in many]:
        _in_four(out, blocks, few, net, samples)
    for table, head in tied.items():
        if table in tables and head in names and _shares(out, table, head):
            tables.remove(table)
    tables = [name for name in tables if name not in blocks.in_float]
    own = [name for name in tables if blocks.bits == 8 or name in wide]
    if own:
        embeddings_in_rows(out, "int8", own)
    if rest := [name for name in tables if name not in own]:
        embeddings_in_rows(out, "int4", rest)


def products(net: Net) -> list[NodeProto]:
    """The products with a constant matrix (K, N)."""
    constant = (one for one in net.model.graph.node if one.op_type == "MatMul" and one.input[1] in net.tensors)
    return [node for node in constant if len(net.tensors[node.input[1]].dims) == 2]


def untie(net: Net) -> dict[str, str]:
    """Give an embedding and the head a matrix each, where one reads the other's turned over: embedding to head by name.

    Exporters store a tied matrix once, with a Transpose behind it, which no quantiser looks through.
    """
    pairs, nodes = dict[str, str](), net.model.graph.node
    for turn in [node for node in nodes if node.op_type == "Transpose" and node.input[0] in net.tensors]:
        name, made = f"{turn.input[0]}.turned", turn.output[0]
        net.hold(name, np.ascontiguousarray(net.array(turn.input[0]).transpose(attribute(turn, "perm", None))))
        readers = [*net.read_by[made], *net.read_by[turn.input[0]]]
        ends = {one.op_type: one.name for one in readers}
        for reader in net.read_by[made]:
            reader.input[:] = [name if one == made else one for one in reader.input]
        if {"Gather", "MatMul"} <= set(ends):
            pairs[ends["Gather"]] = ends["MatMul"]
        nodes.remove(turn)
    _drop_unread(net.model)
    return pairs


def _drop_unread(model: onnx.ModelProto) -> None:
    """Remove the constants that no node reads."""
    read = {name for node in model.graph.node for name in node.input}
    refill(model.graph.initializer, [one for one in model.graph.initializer if one.name in read])


def _nearest(path: Path, bits: int, block_size: int, names: Sequence[str]) -> None:
    """Put the matrices of some products into the nearest integers, symmetric around 0, in place."""
    _run(path, names, bits=bits, block_size=block_size, is_symmetric=True, accuracy_level=ACCURACY_LEVEL)


def _in_four(path: Path, blocks: Blocks, names: Sequence[str], net: Net, samples: Sequence[Sequence[int]]) -> None:
    """Put the matrices of some products into 4 bits by an algorithm, in place."""
    if blocks.algorithm in ("rtn", "gptq"):
        _nearest(path, 4, blocks.block_size, names)
        if blocks.algorithm == "gptq":
            fit_integers(path, net, samples)
        return
    nbits_quantizer()  # first: it keeps the module from logging
    from onnxruntime.quantization import matmul_nbits_quantizer as tools

    if blocks.algorithm == "hqq":
        _run(path, names, algo_config=tools.HQQWeightOnlyQuantConfig(block_size=blocks.block_size))
        return
    _check_even(net, names, blocks)
    how = tools.KQuantWeightOnlyQuantConfig()
    _run(path, names, block_size=blocks.block_size, accuracy_level=ACCURACY_LEVEL, algo_config=how)


def _check_even(net: Net, names: Sequence[str], blocks: Blocks) -> None:
    """Refuse what ONNX Runtime cannot store: two zeros of a column share a byte, and it leaves none half full."""
    for name in names:
        high = net.tensors[net.nodes[name].input[1]].dims[0]
        if -(-high // blocks.block_size) % 2:
            raise InputError(
                f"the matrix of {name} is {high} high, an odd number of blocks of {blocks.block_size}, which k_quant "
                "does not store; choose another block_size, or algorithm: gptq"
            )


def _run(path: Path, names: Sequence[str], **how: Any) -> None:
    """Run ONNX Runtime's quantiser on some products of a file, in place."""
    model = onnx.load(str(path))
    others = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.name not in names]
    quantizer = nbits_quantizer()(model, nodes_to_exclude=others, **how)
    with redirect_stdout(StringIO()), warnings.catch_warnings():  # some print their progress
        warnings.simplefilter("ignore")
        quantizer.process()
    made: onnx.ModelProto = quantizer.model.model
    _drop_unread(made)
    save_model(made, path)


def _shares(path: Path, table: str, head: str) -> bool:
    """Let an embedding read the blocks of the head, in place; False where they are not of whole rows and integers."""
    net = Net.read(path)
    (product,) = (node for node in net.model.graph.node if node.name.rpartition("_Q")[0] == head)
    how = {one: int(attribute(product, one, 0)) for one in ("bits", "block_size")}
    wide, zeros = int(attribute(product, "K", 0)), product.input[3:4]
    if wide % how["block_size"] or (zeros and net.tensors[zeros[0]].data_type != onnx.TensorProto.UINT8):
        return False
    gather, rows = net.nodes[table], f"{product.input[1]}.rows"
    shape = net.hold(f"{rows}.shape", np.array([-1, wide * how["bits"] // 8], dtype=np.int64))
    new = [
        helper.make_node("Reshape", [product.input[1], shape], [rows], f"{table}_rows"),
        helper.make_node(
            "GatherBlockQuantized", [rows, gather.input[1], product.input[2], *zeros], list(gather.output), table,
            domain=CONTRIB, gather_axis=0, quantize_axis=1, **how,
        ),
    ]  # fmt: skip
    net.replace(gather, new)
    _drop_unread(net.model)
    save_model(net.model, path)
    return True
