"""Weights of matrix products in blocks of 8 or 4 bits, each block with its own scale (MatMulNBits)."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import onnx

from potstill.export.graph import save_model

MORE_BITS = 8  # of a node that a search gives more than its scheme's integers
BLOCK = 32  # weights that share a scale
ACCURACY_LEVEL = 4  # activations in 8 bits by block as the product runs; the only level that is faster than float


def weights_in_blocks(path: Path, bits: int, block_size: int, keep_float: Sequence[str] = ()) -> None:
    """Put the constant matrices of a float graph's products into blocks, in place, by `onnxruntime.quantization`.

    A block is `block_size` values of one column one below another. With b bits and m its value of greatest magnitude,
    the scale is −m / 2^(b−1), and each value is a whole number from −2^(b−1) to 2^(b−1) − 1 times the scale. The
    products are com.microsoft's MatMulNBits; each Gemm becomes a MatMul and an Add first.
    Source: ONNX Runtime, docs/ContribOperators.md, MatMulNBits; onnxruntime/core/mlas/lib/q4_dq.cpp.

    Args:
        path: the graph, which is written anew.
        bits: 8 or 4.
        block_size: a power of two from 16 on.
        keep_float: names of nodes that stay as they are.
    """
    from onnxruntime.quantization.onnx_model import ONNXModel

    model = ONNXModel(onnx.load(str(path)))
    model.replace_gemm_with_matmul()
    quantizer = nbits_quantizer()(
        model.model,
        bits=bits,
        block_size=block_size,
        is_symmetric=True,
        accuracy_level=ACCURACY_LEVEL,
        nodes_to_exclude=[*keep_float, *as_products(keep_float)],
    )
    quantizer.process()
    save_model(quantizer.model.model, path)


def nbits_quantizer() -> type:
    """MatMulNBitsQuantizer, without the lines that its module writes for each node."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    from onnxruntime.quantization import matmul_nbits_quantizer  # it calls logging.basicConfig

    root.setLevel(level)
    root.handlers[:] = handlers
    for name in (matmul_nbits_quantizer.logger.name, "neural_compressor"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found: type = matmul_nbits_quantizer.MatMulNBitsQuantizer
    return found


def as_products(names: Iterable[str]) -> list[str]:
    """The names that Gemm nodes have when ONNX Runtime has made a MatMul and an Add of each."""
    return [f"{name}_MatMul" for name in names]


def in_blocks(path: Path) -> list[str]:
    """Names of the products whose weights are in blocks."""
    graph = onnx.load(str(path), load_external_data=False).graph
    return [node.name for node in graph.node if node.op_type == "MatMulNBits"]
