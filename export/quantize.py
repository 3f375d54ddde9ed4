"""The number formats that a target wants."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data
from onnxruntime.quantization.shape_inference import quant_pre_process
from pydantic.dataclasses import dataclass

from potstill.export.calibrate import Reader
from potstill.export.graph import save_model
from potstill.export.ranges import float_tensors, observe
from potstill.export.repairs import Repairs, repairs_beside
from potstill.export.thresholds import BINNED, METHODS, minmax
from potstill.targets.target import Scheme, Target
from potstill.validate.data import Examples
from potstill.validate.encoder import Encoder
from potstill.validate.errors import InputError
from potstill.validate.fake_quant import Formats

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
LEAST = "potstill.least"  # the name of a constant
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
        repaired: what each repair of the scheme did, one clause for each.
    """

    scheme: str
    why: str
    weighted: int
    left_float: int
    calibration_examples: int
    repaired: list[str] = field(default_factory=list)


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
    words += [f"repaired by {' and '.join(scheme.repairs)}"] if scheme.repairs else []
    return ", ".join(words)


def fits(formats: Formats, scheme: Scheme) -> bool:
    """Whether a model that was trained in these integers has the ones that a scheme asks for."""
    wanted = (scheme.method, scheme.weight, scheme.per_channel, scheme.activation, scheme.reduce_range)
    return wanted == ("static", "int8", True, formats.activation, formats.reduce_range)


def as_trained(path: Path, out: Path, scheme: Scheme, float_graph: Path) -> Quantized:
    """Write the graph at `path`, which holds its integers from training, to `out` as it is."""
    save_model(onnx.load(str(path)), out)
    left, weighted = len(float_nodes(out)), len(float_nodes(float_graph))
    words = in_words(scheme.model_copy(update={"calibration": None, "repairs": []}))  # trained instead
    return Quantized(f"{words}, from training", scheme.why, weighted, left, 0)


def quantize(
    path: Path,
    out: Path,
    scheme: Scheme,
    calibrate: Examples | None,
    encode: Encoder,
    seed: int,
    *,
    keep_float: Sequence[str] = (),
    ranges: Path | None = None,
) -> Quantized:
    """Write the graph at `path` in a scheme's number formats to `out`.

    Static: QDQ, ranges over calibration examples by the scheme's method. Dynamic: weights (embeddings too) as integers,
    ranges of activations at run time. float16: inputs and outputs stay float32. By `onnxruntime.quantization`.

    Args:
        path: the float graph.
        out: the file to write.
        scheme: the number formats.
        calibrate: examples for the ranges of a static scheme.
        encode: of the model.
        seed: of the choice among the examples.
        keep_float: names of nodes, as `prepare` leaves them, that stay in floating point.
        ranges: where the activation ranges are kept, as `onnxruntime.quantization` writes them: read if they are
            there, else measured and written. They do not change with `keep_float`. Repairs are kept beside them, in a
            folder by `repairs_beside`.

    Raises:
        InputError: a static scheme without calibration examples, ones that `observe` refuses, or nothing to quantise.
    """
    used, repaired = 0, list[str]()
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".quantize.") as folder:
        prepared = Path(folder) / "prepared.onnx"
        if scheme.method == "float32":
            save_model(onnx.load(str(path)), out)
        elif scheme.method == "float16":
            _to_float16(path, out)
        else:
            prepare(path, prepared)
            if scheme.method == "static":
                used, repaired = _static(prepared, out, scheme, calibrate, encode, seed, keep_float, ranges)
            else:
                _dynamic(prepared, out, scheme, keep_float)
            if keep_float:
                _hold_float(out, keep_float)
    weighted, left = len(float_nodes(path)), len(float_nodes(out))
    if scheme.method in ("static", "dynamic") and weighted and left == weighted and not keep_float:
        raise InputError(f"none of the {weighted} weighted nodes could be quantised as {in_words(scheme)}")
    left = 0 if scheme.method == "float16" else left
    return Quantized(in_words(scheme), scheme.why, weighted, left, used, repaired)


def prepare(path: Path, out: Path) -> None:
    """Write the graph as it is quantised: batch norms folded, shapes inferred, every node with a name."""
    quant_pre_process(str(path), str(out), skip_symbolic_shape=True)
    _mend(out)


def _static(
    path: Path,
    out: Path,
    scheme: Scheme,
    calibrate: Examples | None,
    encode: Encoder,
    seed: int,
    keep_float: Sequence[str],
    ranges: Path | None,
) -> tuple[int, list[str]]:
    """Write a static graph; how many examples calibrated, and what the repairs did."""
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
        _write_static(graph, to, scheme, kept, left)

    repaired = list[str]()
    if scheme.repairs:
        repaired = Repairs(scheme.repairs, repairs_beside(kept), reader, seed)(path, keep_float, write)
    write(path, out, keep_float)
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


def _save_ranges(ranges: Mapping[str, tuple[float, float]], path: Path) -> None:
    """Write ranges as ONNX Runtime keeps those that it calibrated."""
    data = {name: tuple(np.array(end, dtype=np.float32) for end in ends) for name, ends in ranges.items()}
    save_tensors_data(TensorsData(CalibrationMethod.MinMax, data), path)


def _write_static(path: Path, out: Path, scheme: Scheme, ranges: Path, keep_float: Sequence[str] = ()) -> None:
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
        nodes_to_exclude=[*_activation_products(path), *keep_float],
        extra_options={"ActivationSymmetric": scheme.activation == "int8"},
        calibration_cache_path=ranges,
    )


def _read_ranges(path: Path, scheme: Scheme) -> list[str]:
    """Names of the activations whose own range decides a scale of the quantised graph.

    Not those whose range is another's or fixed, as that of what a ReLU reads or a softmax gives. ONNX Runtime is asked:
    each activation gets a range that makes its scale a number of its own.
    """
    names, steps = float_tensors(path), 255 if scheme.activation == "uint8" else 127
    tried, ranges = path.with_name("tried.onnx"), path.with_name("tried.json")
    _save_ranges({name: (0.0, float(steps * i)) for i, name in enumerate(names, start=1)}, ranges)
    _write_static(path, tried, scheme, ranges)
    graph = onnx.load(str(tried)).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    scales = [tensors[node.input[1]] for node in graph.node if node.op_type == "QuantizeLinear"]
    own = {float(numpy_helper.to_array(scale)) for scale in scales if not scale.dims}
    return [name for i, name in enumerate(names, start=1) if i in own]


def _dynamic(path: Path, out: Path, scheme: Scheme, keep_float: Sequence[str]) -> None:
    quantize_dynamic(
        str(path),
        str(out),
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        nodes_to_exclude=[*keep_float, *(f"{name}_MatMul" for name in keep_float)],  # a Gemm is renamed so before
        per_channel=scheme.per_channel,
        reduce_range=scheme.reduce_range,
        weight_type=TYPES[str(scheme.weight)],
    )


def _hold_float(path: Path, names: Sequence[str]) -> None:
    """Make ONNX Runtime compute some nodes in float where their neighbours are in integers.

    When it opens a file, it puts the float weights of a Conv or Gemm between a DequantizeLinear and a QuantizeLinear,
    with at most a Relu or Clip on the way, into int8 by itself, per tensor (`weight_bias_quantization.cc`). A Max with
    the least float there changes no value and stops it.
    """
    model = onnx.load(str(path))
    made_by = {name: node for node in model.graph.node for name in node.output}
    kept: list[onnx.NodeProto] = []
    for node in model.graph.node:
        source = made_by.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        while source and source.op_type in ("Relu", "Clip"):
            source = made_by.get(source.input[0])
        if source and source.op_type in ("Conv", "ConvTranspose", "Gemm") and source.name in names:
            held = f"{node.input[0]}_held"
            kept.append(helper.make_node("Max", [node.input[0], LEAST], [held], name=f"{held}_in_float"))
            node.input[0] = held
        kept.append(node)
    if len(kept) > len(model.graph.node):
        del model.graph.node[:]
        model.graph.node.extend(kept)
        model.graph.initializer.append(numpy_helper.from_array(np.finfo(np.float32).min, LEAST))
        save_model(model, path)


def _to_float16(path: Path, out: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load(str(path)), keep_io_types=True)
    save_model(model, out)


def _mend(path: Path) -> None:
    """Name the nodes without a name; drop shape entries that name a weight, which the dynamic quantiser trips over."""
    model = onnx.load(str(path))
    for i, node in enumerate(model.graph.node):
        node.name = node.name or f"unnamed_{i}"
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


def float_nodes(path: Path) -> list[str]:
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
