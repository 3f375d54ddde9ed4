"""GPTQ: what rounding one weight costs is put on the weights that are not rounded yet (Frantar 2022, arXiv 2210.17323).

ONNX Runtime's own puts it nowhere: it multiplies by a column of an upper triangular matrix, which is zero below the
diagonal (onnxruntime 1.31.1, quantization/neural_compressor/weight_only.py, `gptq`), so its integers are the nearest.

Shapes: K × N a matrix, S blocks of a column, T tokens.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from potstill.export.graph import save_model
from potstill.export.net import Net, attribute, open_model
from potstill.validate.decoder import runs_of
from potstill.validate.encoder import Inputs

DAMPING = 0.01  # of the Hessian's mean diagonal, added to it; as in the paper
LEAST, MOST = -8, 7  # in 4 bits
MEMORY = 2**30  # bytes of Hessians at a time


def fit_integers(path: Path, float_: Net, samples: Sequence[Sequence[int]]) -> None:
    """Replace the nearest integers of 4-bit products, symmetric around 0, by those of GPTQ, in place.

    Args:
        path: the graph with MatMulNBits nodes, named after the products as ONNX Runtime names them.
        float_: the float graph.
        samples: texts as token ids; they are run once for each `MEMORY` bytes of Hessians.
    """
    net, readers = Net.read(path), dict[str, list[str]]()
    stored = {node.name.removesuffix("_Q4"): node for node in net.model.graph.node if node.name.endswith("_Q4")}
    for name in stored:
        readers.setdefault(float_.nodes[name].input[0], []).append(name)
    session = open_model(_with_outputs(float_, list(readers)))
    fed = [run for sample in samples for run in runs_of(session, sample)]
    widths = {tensor: float_.tensors[float_.nodes[names[0]].input[1]].dims[0] for tensor, names in readers.items()}
    for some in _within_memory(widths):
        for tensor, hessian in zip(some, _hessians(session, some, fed), strict=True):
            for name in readers[tensor]:
                size = int(attribute(stored[name], "block_size", 0))
                whole, scales = rounded(float_.array(float_.nodes[name].input[1]), hessian, size)
                net.put(stored[name].input[1], packed(whole, size))
                net.put(stored[name].input[2], scales.T)
    save_model(net.model, path)


def rounded(
    weight: NDArray[np.floating], hessian: NDArray[np.float64], block_size: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Integers (K, N) from −8 to 7 and scales (S, N): of a block's value m of greatest magnitude, −m / 8.

    Args:
        weight: (K, N).
        hessian: (K, K), of the squared error of the product: the sum of x xᵀ over its inputs x.
        block_size: values of a column that share a scale, which is taken when the first of them is rounded.
    """
    left, high = weight.astype(np.float64), len(weight)
    whole = np.zeros(weight.shape, dtype=np.int8)
    scales = np.zeros((-(-high // block_size), weight.shape[1]), dtype=np.float32)
    damped = hessian + np.eye(high) * (DAMPING * np.trace(hessian) / high or 1)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    for start in range(0, high, block_size):
        block = left[start : start + block_size]
        errors, within = np.zeros_like(block), upper[start : start + block_size, start : start + block_size]
        greatest = np.take_along_axis(block, np.abs(block).argmax(axis=0)[None], axis=0)[0]
        scale = scales[start // block_size] = (greatest / LEAST).astype(np.float32)
        step = np.where(scale == 0, 1, scale).astype(np.float64)
        for i in range(len(block)):
            found = np.clip(np.rint(block[i] / step), LEAST, MOST)
            whole[start + i] = found
            errors[i] = (block[i] - found * scale) / within[i, i]
            block[i:] -= np.outer(within[i, i:], errors[i])
        left[start + block_size :] -= upper[start : start + block_size, start + block_size :].T @ errors
    return whole, scales


def packed(whole: NDArray[np.int8], block_size: int) -> NDArray[np.uint8]:
    """Integers (K, N) as MatMulNBits stores them: (N, S, block_size / 2), 8 added, the first in the lower half."""
    columns = np.pad(whole.T, ((0, 0), (0, -len(whole) % block_size))) + 8
    pairs = columns.astype(np.uint8).reshape(len(columns), -1, block_size // 2, 2)
    found: NDArray[np.uint8] = pairs[..., 0] | pairs[..., 1] << np.uint8(4)
    return found


def _with_outputs(net: Net, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of a graph that gives out some tensors too."""
    model = onnx.ModelProto()
    model.CopyFrom(net.model)
    model.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    return model


def _within_memory(widths: Mapping[str, int]) -> list[list[str]]:
    """Tensors by their widths K, in groups whose Hessians fit into memory; one alone may not."""
    groups, held = list[list[str]](), MEMORY + 1
    for name, wide in widths.items():
        if held + 8 * wide**2 > MEMORY:
            groups, held = [*groups, []], 0
        groups[-1].append(name)
        held += 8 * wide**2
    return groups


def _hessians(session: Any, names: Sequence[str], fed: Sequence[Inputs]) -> list[NDArray[np.float64]]:
    """Of each tensor (…, K) the sum of x xᵀ over all its rows x: (K, K)."""
    found: list[Any] = [0] * len(names)
    for one in fed:
        for i, array in enumerate(session.run(names, one)):
            rows = array.reshape(-1, array.shape[-1]).astype(np.float64)
            found[i] = found[i] + rows.T @ rows
    return found
