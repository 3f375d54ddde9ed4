"""The number formats that a target wants."""

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data
from onnxruntime.quantization.shape_inference import quant_pre_process
from pydantic.dataclasses import dataclass

from potstill.export.calibrate import Reader
from potstill.export.graph import save_model
from potstill.export.ranges import float_tensors, observe
from potstill.export.thresholds import BINNED, METHODS, minmax
from potstill.targets.target import Scheme, Target
from potstill.validate.data import Examples
from potstill.validate.encoder import Encoder
from potstill.validate.errors import InputError
from potstill.validate.fake_quant import Formats

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
TYPES = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}


@dataclass(frozen=True)
class Quantized:
    """What became of a graph.

    Attributes:
        scheme: in words, e.g. `static uint8 × int8, per channel`.
        why: the target's reason for it.
        weighted: nodes with weights (convolutions and matrix products) in the float graph.
        left_float: how many of them still compute in floating point.
        calibration_examples: that gave the activation ranges; 0 where none are needed.
    """

    scheme: str
    why: str
    weighted: int
    left_float: int
    calibration_examples: int


def scheme_for(path: Path, target: Target) -> Scheme:
    """The target's scheme for a graph: by where most of its weights are, in convolutions or in matrix products."""
    graph = onnx.load(str(path), load_external_data=False).graph
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    held = dict.fromkeys(WEIGHTED, 0)
    for node in graph.node:
        if node.op_type in held:
            held[node.op_type] += sum(sizes.get(name, 0) for name in node.input)
    convolutional = held["Conv"] + held["ConvTranspose"] > held["Gemm"] + held["MatMul"]
    return target.quantize.convolution if convolutional else target.quantize.matmul


def in_words(scheme: Scheme) -> str:
    """A scheme as a person would say it."""
    if scheme.method in ("float32", "float16"):
        return scheme.method
    types = f"{scheme.activation} × {scheme.weight}" if scheme.method == "static" else f"{scheme.weight} weights"
    words = [f"{scheme.method} {types}", f"per {'channel' if scheme.per_channel else 'tensor'}"]
    words += ["reduced range"] if scheme.reduce_range else []
    words += [f"ranges by {scheme.calibration.replace('_', ' ')}"] if scheme.calibration not in (None, "minmax") else []
    return ", ".join(words)


def fits(formats: Formats, scheme: Scheme) -> bool:
    """Whether a model that was trained in these integers has the ones that a scheme asks for."""
    wanted = (scheme.method, scheme.weight, scheme.per_channel, scheme.activation, scheme.reduce_range)
    return wanted == ("static", "int8", True, formats.activation, formats.reduce_range)


def as_trained(path: Path, out: Path, scheme: Scheme, float_graph: Path) -> Quantized:
    """Write the graph at `path`, which holds its integers from training, to `out` as it is."""
    save_model(onnx.load(str(path)), out)
    left, weighted = len(_float_nodes(out)), len(_float_nodes(float_graph))
    words = in_words(scheme.model_copy(update={"calibration": None}))  # the ranges are trained
    return Quantized(f"{words}, from training", scheme.why, weighted, left, 0)


def quantize(
    path: Path, out: Path, scheme: Scheme, calibrate: Examples | None, encode: Encoder, seed: int
) -> Quantized:
    """Write the graph at `path` in a scheme's number formats to `out`.

    Static: QDQ, ranges over calibration examples by the scheme's method. Dynamic: weights (embeddings too) as integers,
    ranges of activations at run time. float16: inputs and outputs stay float32. By `onnxruntime.quantization`.

    Raises:
        InputError: a static scheme without calibration examples, ones that `observe` refuses, or nothing to quantise.
    """
    used = 0
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".quantize.") as folder:
        prepared = Path(folder) / "prepared.onnx"
        if scheme.method == "float32":
            save_model(onnx.load(str(path)), out)
        elif scheme.method == "float16":
            _to_float16(path, out)
        else:
            quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
            _drop_stale_shapes(prepared)
            used = (
                _static(prepared, out, scheme, calibrate, encode, seed)
                if scheme.method == "static"
                else _dynamic(prepared, out, scheme)
            )
    weighted, left = len(_float_nodes(path)), len(_float_nodes(out))
    if scheme.method in ("static", "dynamic") and weighted and left == weighted:
        raise InputError(f"none of the {weighted} weighted nodes could be quantised as {in_words(scheme)}")
    return Quantized(in_words(scheme), scheme.why, weighted, 0 if scheme.method == "float16" else left, used)


def _static(path: Path, out: Path, scheme: Scheme, calibrate: Examples | None, encode: Encoder, seed: int) -> int:
    if calibrate is None or len(calibrate) < 2:
        raise InputError(
            "a static number format needs at least 2 real examples: give --calibrate DATA, "
            "or data.calibrate in the recipe"
        )
    inputs = onnx.load(str(path), load_external_data=False).graph.input
    first = inputs[0].type.tensor_type.shape.dim[0]
    one_by_one = first.HasField("dim_value") or len(encode.axes) > 1
    reader = Reader(calibrate, encode, seed, 1 if one_by_one else 16, [one.name for one in inputs])
    method, activation = scheme.calibration or "minmax", scheme.activation or "uint8"
    binned = _read_ranges(path, scheme) if method in BINNED else ()
    ranges = {}
    for name, seen in observe(path, reader, binned).items():
        kept = METHODS[method] if seen.histogram or method not in BINNED else minmax
        ranges[name] = kept(seen, activation)
    _write_static(path, out, scheme, ranges)
    return reader.used


def _write_static(path: Path, out: Path, scheme: Scheme, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Quantise a graph with given ranges, which ONNX Runtime takes as if it had calibrated and kept them."""
    data = {name: tuple(np.array(end, dtype=np.float32) for end in ends) for name, ends in ranges.items()}
    kept = out.with_name(f".ranges.{out.name}.json")
    try:
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, data), kept)
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
            nodes_to_exclude=_activation_products(path),
            extra_options={"ActivationSymmetric": scheme.activation == "int8"},
            calibration_cache_path=kept,
        )
    finally:
        kept.unlink(missing_ok=True)


def _read_ranges(path: Path, scheme: Scheme) -> list[str]:
    """Names of the activations whose own range decides a scale of the quantised graph.

    Not those whose range is another's or fixed, as that of what a ReLU reads or a softmax gives. ONNX Runtime is asked:
    each activation gets a range that makes its scale a number of its own.
    """
    names, steps = float_tensors(path), 255 if scheme.activation == "uint8" else 127
    tried = path.with_name("tried.onnx")
    _write_static(path, tried, scheme, {name: (0.0, float(steps * i)) for i, name in enumerate(names, start=1)})
    graph = onnx.load(str(tried)).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    scales = [tensors[node.input[1]] for node in graph.node if node.op_type == "QuantizeLinear"]
    own = {float(numpy_helper.to_array(scale)) for scale in scales if not scale.dims}
    return [name for i, name in enumerate(names, start=1) if i in own]


def _dynamic(path: Path, out: Path, scheme: Scheme) -> int:
    quantize_dynamic(
        str(path),
        str(out),
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        per_channel=scheme.per_channel,
        reduce_range=scheme.reduce_range,
        weight_type=TYPES[str(scheme.weight)],
    )
    return 0


def _to_float16(path: Path, out: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load(str(path)), keep_io_types=True)
    save_model(model, out)


def _drop_stale_shapes(path: Path) -> None:
    """Drop shape entries that name a weight: the dynamic quantiser trips over them after a dynamo export."""
    model = onnx.load(str(path))
    weights = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    save_model(model, path)


def _activation_products(path: Path) -> list[str]:
    """Names of the products of two activations (as in attention): they lose more than they gain in integers."""
    graph = onnx.load(str(path), load_external_data=False).graph
    constant = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and not constant & set(node.input)]


def _float_nodes(path: Path) -> list[str]:
    """Names of the nodes with weights that compute in floating point: not fed by DequantizeLinear on both sides."""
    graph = onnx.load(str(path), load_external_data=False).graph
    floats = {t.name for t in graph.initializer if t.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)}
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    found = []
    for node in graph.node:
        if node.op_type not in WEIGHTED:
            continue
        sources = [made_by.get(name) for name in node.input[:2]]
        held = floats & set(node.input[:2])
        if held or (sources.count("DequantizeLinear") == 1):
            found.append(node.name)
    return found
