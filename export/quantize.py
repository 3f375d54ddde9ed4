"""The number formats that a target wants."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from pydantic import Field
from pydantic.dataclasses import dataclass

from potstill.export.calibrate import calibration_indices
from potstill.export.embeddings import embeddings, embeddings_in_rows
from potstill.export.graph import data_file, save_model, too_large
from potstill.export.half import EXAMPLES, Half, to_float16
from potstill.export.static import TYPES, tables_of, write_static
from potstill.export.weight_only import BLOCK, MORE_BITS, as_products, in_blocks, weights_in_blocks
from potstill.targets.target import Scheme, Target
from potstill.validate.data import Examples
from potstill.validate.encoder import Encoder, Inputs
from potstill.validate.errors import InputError
from potstill.validate.fake_quant import Formats

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
LEAST = "potstill.least"  # the name of a constant


@dataclass(frozen=True)
class Quantized:
    """What became of a graph.

    Attributes:
        scheme: in words, e.g. `static uint8 × int8, per channel`.
        why: the target's reason for it.
        weighted: nodes with weights (convolutions and matrix products) in the float graph.
        left_float: how many of them still compute in floating point.
        calibration_examples: that gave the activation ranges; 0 where none are needed.
        float32_nodes: of a float16 graph, names of the nodes that stay in float32; see `Half`.
        more_bits: how many of the weighted nodes a search gave 8-bit weights in blocks.
        repaired: what each repair of the scheme did, one clause for each.
    """

    scheme: str
    why: str
    weighted: int
    left_float: int
    calibration_examples: int
    float32_nodes: list[str] = Field(default_factory=list)
    more_bits: int = 0
    repaired: list[str] = Field(default_factory=list)


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
    if scheme.method == "weights":
        words = [f"{scheme.weight} weights in blocks of {scheme.block_size}"]
    else:
        types = f"{scheme.activation} × {scheme.weight}" if scheme.method == "static" else f"{scheme.weight} weights"
        words = [f"{scheme.method} {types}", f"per {'channel' if scheme.per_channel else 'tensor'}"]
    words += ["reduced range"] if scheme.reduce_range else []
    words += [f"ranges by {scheme.calibration.replace('_', ' ')}"] if scheme.calibration not in (None, "minmax") else []
    words += [f"embeddings in {scheme.embedding} rows"] if scheme.embedding else []
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

    Static: QDQ, ranges over calibration examples by the scheme's method; with 16 bits the file has opset 21. Dynamic:
    weights as integers, ranges of activations at run time. Weights: those of matrix products in blocks. Embedding
    tables in all three as the scheme says. float16: see `to_float16`. By `onnxruntime.quantization`.

    Args:
        path: the float graph.
        out: the file to write.
        scheme: the number formats.
        calibrate: examples for the ranges of a static scheme, or to find what float16 cannot hold.
        encode: of the model.
        seed: of the choice among the examples.
        keep_float: names of nodes, as `prepare` leaves them, that stay in floating point, or have the
            scheme's `more_bits`.
        ranges: where the activation ranges are kept, as `onnxruntime.quantization` writes them: read if they are
            there, else measured and written. They do not change with `keep_float`. Repairs are kept beside them, in a
            folder by `repairs_beside`.

    Raises:
        InputError: a static scheme without calibration examples, ones that `observe` refuses, or nothing to quantise.
    """
    weighted = len(float_nodes(path))
    if scheme.method not in ("float32", "float16") and not weighted and not _has_embeddings(path):
        raise InputError(
            f"the graph has no convolution, matrix product or embedding with constant weights, and the target wants "
            f"{in_words(scheme)}; give it a scheme with method: float16 or float32"
        )
    used, repaired = 0, list[str]()
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".quantize.") as folder:
        prepared = Path(folder) / "prepared.onnx"
        if scheme.method == "float32":
            save_model(onnx.load(str(path)), out)
        elif scheme.method == "float16":
            return _half(path, scheme, to_float16(path, out, _some(path, calibrate, encode, seed)))
        else:
            prepare(path, prepared)
            used, repaired = _in_integers(prepared, out, scheme, calibrate, encode, seed, keep_float, ranges)
            if data_file(out).is_file():  # what was too large for one file may fit now
                save_model(onnx.load(str(out)), out)
            tables = [node for node in tables_of(prepared, scheme) if node not in keep_float]
            if scheme.embedding and tables:
                embeddings_in_rows(out, scheme.embedding, tables)
            else:
                scheme = scheme.model_copy(update={"embedding": None})
            if keep_float:
                _hold_float(out, keep_float)
            if scheme.more_bits and keep_float:
                weights_in_blocks(out, MORE_BITS, BLOCK)
    left = len(float_nodes(out))
    if scheme.method not in ("float32", "float16") and weighted and left == weighted and not keep_float:
        raise InputError(f"none of the {weighted} weighted nodes could be quantised as {in_words(scheme)}")
    more = len(in_blocks(out)) if scheme.more_bits else 0
    return Quantized(in_words(scheme), scheme.why, weighted, left, used, more_bits=more, repaired=repaired)


def prepare(path: Path, out: Path) -> None:
    """Write the graph as it is quantised: batch norms folded, shapes inferred, every node with a name."""
    quant_pre_process(
        str(path),
        str(out),
        skip_symbolic_shape=True,
        save_as_external_data=too_large(path),
        external_data_location=data_file(out).name,
    )
    _mend(out)


def _has_embeddings(path: Path) -> bool:
    return bool(embeddings(onnx.load(str(path), load_external_data=False).graph))


def _some(path: Path, examples: Examples | None, encode: Encoder, seed: int) -> list[Inputs]:
    """The graph's inputs of a few examples, one by one."""
    names = [one.name for one in onnx.load(str(path), load_external_data=False).graph.input]
    chosen = calibration_indices(examples, seed)[:EXAMPLES].tolist() if examples is not None else []
    encoded = [encode(examples.rows([i])) for i in chosen] if examples is not None else []
    return [{name: one[name] for name in names} for one in encoded]


def _half(path: Path, scheme: Scheme, made: Half) -> Quantized:
    kept = made.float32_nodes
    words = f"float16, {len(kept)} of {made.nodes} nodes in float32" if kept else "float16"
    return Quantized(words, scheme.why, len(float_nodes(path)), 0, 0, kept)


def _in_integers(
    path: Path,
    out: Path,
    scheme: Scheme,
    calibrate: Examples | None,
    encode: Encoder,
    seed: int,
    keep_float: Sequence[str],
    ranges: Path | None,
) -> tuple[int, list[str]]:
    """Write a prepared graph by the scheme's method; how many examples gave ranges, and what the repairs did."""
    if scheme.method == "static":
        return write_static(path, out, scheme, calibrate, encode, seed, keep_float, ranges)
    if scheme.method == "dynamic":
        _dynamic(path, out, scheme, keep_float)
    else:
        save_model(onnx.load(str(path)), out)
        weights_in_blocks(out, int(str(scheme.weight).removeprefix("int")), int(scheme.block_size or BLOCK), keep_float)
    return 0, []


def _dynamic(path: Path, out: Path, scheme: Scheme, keep_float: Sequence[str]) -> None:
    quantize_dynamic(
        str(path),
        str(out),
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        nodes_to_exclude=[*tables_of(path, scheme), *keep_float, *as_products(keep_float)],
        per_channel=scheme.per_channel,
        reduce_range=scheme.reduce_range,
        weight_type=TYPES[str(scheme.weight)],
        use_external_data_format=too_large(path),
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
