"""Static number formats: activation ranges that are calibrated and written into the graph (QDQ)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data

from potstill.export.calibrate import Reader
from potstill.export.embeddings import embeddings
from potstill.export.graph import save_model, too_large
from potstill.export.net import Net, refill
from potstill.export.ranges import float_tensors, observe
from potstill.export.repairs import Repairs, repairs_beside
from potstill.export.thresholds import BINNED, METHODS, minmax
from potstill.targets.target import Scheme
from potstill.validate.data import Examples
from potstill.validate.encoder import Encoder
from potstill.validate.errors import InputError
from potstill.validate.fake_quant import Formats

TYPES = {
    "uint8": QuantType.QUInt8,
    "int8": QuantType.QInt8,
    "uint16": QuantType.QUInt16,
    "int16": QuantType.QInt16,
}


def write_static(
    path: Path,
    out: Path,
    scheme: Scheme,
    calibrate: Examples | None,
    encode: Encoder,
    seed: int,
    keep_float: Sequence[str],
    ranges: Path | None,
) -> tuple[int, list[str]]:
    """Write a prepared graph in a static scheme; how many examples calibrated, and what the repairs did.

    Args and errors as of `quantize`.
    """
    if calibrate is None or len(calibrate) < 2:
        raise InputError(
            "a static number format needs at least 2 real examples: give --calibrate DATA, "
            "or data.calibrate in the recipe"
        )
    inputs = onnx.load(str(path), load_external_data=False).graph.input
    first = inputs[0].type.tensor_type.shape.dim[0]
    one_by_one = first.HasField("dim_value") or len(encode.axes) > 1
    reader = Reader(calibrate, encode, seed, 1 if one_by_one else 16, [one.name for one in inputs])
    kept = ranges or path.with_name("ranges.json")

    def write(graph: Path, to: Path, left: Sequence[str] = ()) -> None:
        if not kept.is_file():
            _save_ranges(_measured(graph, scheme, reader), kept)
        _quantized(graph, to, scheme, kept, left)

    repaired = list[str]()
    if scheme.repairs:
        repaired = Repairs(scheme.repairs, repairs_beside(kept), reader, seed)(path, keep_float, write)
    write(path, out, keep_float)
    _drop_zeros(out)
    return reader.used, repaired


def _measured(path: Path, scheme: Scheme, reader: Reader) -> dict[str, tuple[float, float]]:
    """The range of each activation over the calibration examples, by the scheme's method."""
    method, activation = scheme.calibration or "minmax", scheme.activation or "uint8"
    binned = _read_ranges(path, scheme) if method in BINNED else ()
    ranges = {}
    for name, seen in observe(path, reader, binned).items():
        kept = METHODS[method] if seen.histogram or method not in BINNED else minmax
        ranges[name] = kept(seen, activation)
    return ranges


def _formats(scheme: Scheme) -> Formats:
    return Formats(scheme.activation or "uint8", scheme.reduce_range)


def _save_ranges(ranges: Mapping[str, tuple[float, float]], path: Path) -> None:
    """Write ranges as ONNX Runtime keeps those that it calibrated."""
    data = {name: tuple(np.array(end, dtype=np.float32) for end in ends) for name, ends in ranges.items()}
    save_tensors_data(TensorsData(CalibrationMethod.MinMax, data), path)


def _quantized(path: Path, out: Path, scheme: Scheme, ranges: Path, keep_float: Sequence[str] = ()) -> None:
    """Quantise a graph with given ranges, which ONNX Runtime takes as if it had calibrated and kept them."""
    quantize_static(
        str(path),
        str(out),
        None,
        quant_format=QuantFormat.QDQ,
        per_channel=scheme.per_channel,
        reduce_range=scheme.reduce_range,
        activation_type=TYPES[str(scheme.activation)],
        weight_type=TYPES[str(scheme.weight)],
        calibrate_method=CalibrationMethod.MinMax,
        nodes_to_exclude=[*_activation_products(path), *tables_of(path, scheme), *keep_float],
        extra_options={"ActivationSymmetric": _formats(scheme).symmetric},
        calibration_cache_path=ranges,
        use_external_data_format=too_large(path),
    )


def _drop_zeros(path: Path) -> None:
    """Leave out the zero points of constants that are all zero, as is meant where there are none (ONNX's definition).

    A Gemm runs in integers only where its constants have theirs (`qdq_selectors.cc`).
    """
    net = Net.read(path)
    graph = net.model.graph
    of_gemm = {name for node in graph.node if node.op_type == "Gemm" for name in node.input}
    dropped = set[str]()
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 3 and not of_gemm & set(node.output):
            zero = net.constant(node.input[2])
            if node.input[0] in net.tensors and zero is not None and not zero.any():
                dropped.add(node.input.pop())
    dropped -= {name for node in graph.node for name in node.input}
    refill(graph.initializer, [tensor for tensor in graph.initializer if tensor.name not in dropped])
    save_model(net.model, path)


def _read_ranges(path: Path, scheme: Scheme) -> list[str]:
    """Names of the activations whose own range decides a scale of the quantised graph.

    Not those whose range is another's or fixed, as that of what a ReLU reads or a softmax gives. ONNX Runtime is asked:
    each activation gets a range that makes its scale a number of its own.
    """
    names, steps = float_tensors(path), _formats(scheme).limits[1]
    tried, ranges = path.with_name("tried.onnx"), path.with_name("tried.json")
    _save_ranges({name: (0.0, float(steps * i)) for i, name in enumerate(names, start=1)}, ranges)
    _quantized(path, tried, scheme, ranges)
    net = Net.read(tried)
    scales = [net.array(node.input[1]) for node in net.model.graph.node if node.op_type == "QuantizeLinear"]
    own = {float(scale) for scale in scales if not scale.ndim}
    return [name for i, name in enumerate(names, start=1) if i in own]


def tables_of(path: Path, scheme: Scheme) -> list[str]:
    """Names of the embeddings that a scheme wants in integers by row."""
    graph = onnx.load(str(path), load_external_data=False).graph
    return [node.name for node in embeddings(graph)] if scheme.embedding else []


def _activation_products(path: Path) -> list[str]:
    """Names of the products of two activations (as in attention): they lose more than they gain in integers."""
    net = Net.read(path, weights=False)
    products = [node for node in net.model.graph.node if node.op_type == "MatMul"]
    return [node.name for node in products if not set(node.input) & set(net.tensors)]
