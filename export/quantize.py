"""The number formats that a target wants."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import helper
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from pydantic import Field
from pydantic.dataclasses import dataclass

from potstill.export.block_weights import Blocks, decoder_in_blocks, untie
from potstill.export.calibrate import calibration_indices
from potstill.export.decoder_graph import is_decoder
from potstill.export.embeddings import embeddings, embeddings_in_rows
from potstill.export.graph import data_file, save_model, too_large
from potstill.export.half import EXAMPLES, Half, to_float16
from potstill.export.net import WEIGHTED, Net, attribute, mend, refill
from potstill.export.static import TYPES, tables_of, write_static
from potstill.export.weight_only import BLOCK, MORE_BITS, as_products, in_blocks, weights_in_blocks
from potstill.targets.target import DECODER, Scheme, Target
from potstill.validate.data import Examples
from potstill.validate.decoder import IDS, runs_of, takes_past
from potstill.validate.encoder import Encoder, Inputs
from potstill.validate.errors import InputError
from potstill.validate.fake_quant import Formats
from potstill.validate.session import open_session

LEAST = "potstill.least"  # the name of a constant
SHAPES = ("gemm_input_shape", "gemm_output_shape")  # so start names that ONNX Runtime gives


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
    """The target's scheme for a graph: a decoder's; else by where its weights are, in convolutions or in products."""
    graph = onnx.load(str(path), load_external_data=False).graph
    if takes_past(graph.input):
        return target.quantize.decoder or DECODER
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
        words += [f"by {scheme.algorithm}"] if scheme.algorithm != "rtn" else []
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
    if scheme.method == "float16":
        return _half(path, scheme, to_float16(path, out, _some(path, calibrate, encode, seed)))
    if scheme.method == "float32":
        save_model(onnx.load(str(path)), out)
        return Quantized(in_words(scheme), scheme.why, weighted, weighted, 0)
    _check_weights(path, scheme, weighted)
    if is_decoder(path):
        return _decoder(path, out, scheme, calibrate, encode, seed, keep_float)
    if scheme.algorithm != "rtn":
        raise InputError(f"algorithm: {scheme.algorithm} is for language models; leave it out of the target's scheme")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".quantize.") as folder:
        prepared = Path(folder) / "prepared.onnx"
        prepare(path, prepared)
        used, repaired = _in_integers(prepared, out, scheme, calibrate, encode, seed, keep_float, ranges)
        tables = [node for node in tables_of(prepared, scheme) if node not in keep_float]
        scheme = _finish(out, scheme, tables, keep_float)
    left = len(float_nodes(out))
    if weighted and left == weighted and not keep_float:
        raise InputError(f"none of the {weighted} weighted nodes could be quantised as {in_words(scheme)}")
    more = len(in_blocks(out)) if scheme.more_bits else 0
    return Quantized(in_words(scheme), scheme.why, weighted, left, used, more_bits=more, repaired=repaired)


def _finish(path: Path, scheme: Scheme, tables: Sequence[str], keep_float: Sequence[str]) -> Scheme:
    """Put embeddings into rows and hold back or give more bits to some nodes, in place; the scheme as it came out."""
    if data_file(path).is_file():  # what was too large for one file may fit now
        save_model(onnx.load(str(path)), path)
    if scheme.embedding and tables:
        embeddings_in_rows(path, scheme.embedding, tables)
    if keep_float:
        _hold_float(path, keep_float)
    if scheme.more_bits and keep_float:
        weights_in_blocks(path, MORE_BITS, BLOCK)
    return scheme if tables else scheme.model_copy(update={"embedding": None})


def prepare(path: Path, out: Path) -> None:
    """Write the graph as it is quantised: batch norms folded, shapes inferred, every node with a name.

    A decoder's is only untied.
    """
    if is_decoder(path):
        net = Net.read(path)
        untie(net)
        save_model(net.model, out)
        return
    quant_pre_process(
        str(path),
        str(out),
        skip_symbolic_shape=True,
        save_as_external_data=too_large(path),
        external_data_location=data_file(out).name,
    )
    save_model(_own_shapes(mend(onnx.load(str(out)))), out)


def _own_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rename the shapes that ONNX Runtime made for a Gemm, where sizes are fixed.

    When it opens a file, it makes new ones by names that no node has, and ends where a weight has them
    (`matmul_add_fusion.cc`).
    """
    renamed = {one.name: f"prepared_{one.name}" for one in model.graph.initializer if one.name.startswith(SHAPES)}
    for tensor in model.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    return model


def _check_weights(path: Path, scheme: Scheme, weighted: int) -> None:
    if not weighted and not embeddings(onnx.load(str(path), load_external_data=False).graph):
        raise InputError(
            f"the graph has no convolution, matrix product or embedding with constant weights, and the target wants "
            f"{in_words(scheme)}; give it a scheme with method: float16 or float32"
        )


def _some(path: Path, examples: Examples | None, encode: Encoder, seed: int) -> list[Inputs]:
    """The graph's inputs of a few examples, one by one."""
    if examples is None:
        return []
    encoded = [encode(examples.rows([i])) for i in calibration_indices(examples, seed)[:EXAMPLES].tolist()]
    if is_decoder(path):
        session = open_session(path)
        return [run for one in encoded for run in runs_of(session, one[IDS][0])]
    names = [one.name for one in onnx.load(str(path), load_external_data=False).graph.input]
    return [{name: one[name] for name in names} for one in encoded]


def _decoder(
    path: Path,
    out: Path,
    scheme: Scheme,
    calibrate: Examples | None,
    encode: Encoder,
    seed: int,
    keep_float: Sequence[str],
) -> Quantized:
    """Write a decoder with its matrices in blocks; `keep_float` have 8 bits where the scheme has `more_bits`."""
    if scheme.method != "weights":
        raise InputError(
            f"a language model's weights are stored in blocks, float16 or float32, and the target wants "
            f"{in_words(scheme)}; set quantize.decoder.method in the target to one of these"
        )
    chosen = calibration_indices(calibrate, seed)[:EXAMPLES].tolist() if calibrate is not None else []
    texts = [encode(calibrate.rows([i]))[IDS][0].tolist() for i in chosen] if calibrate is not None else []
    eight, in_float = (tuple(keep_float), ()) if scheme.more_bits else ((), tuple(keep_float))
    bits: Literal[4, 8] = 4 if scheme.weight == "int4" else 8
    blocks = Blocks(bits, scheme.algorithm, int(scheme.block_size or BLOCK), eight, in_float)
    decoder_in_blocks(path, out, blocks, texts)
    graph = onnx.load(str(out), load_external_data=False).graph
    stored = [node for node in graph.node if node.op_type == "MatMulNBits"]
    more = sum(attribute(node, "bits", 4) == 8 for node in stored) if bits == 4 else 0
    left, used = len(float_nodes(out)), len(texts) if scheme.algorithm == "gptq" else 0
    return Quantized(in_words(scheme), scheme.why, len(stored) + left, left, used, more_bits=more)


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
    net, kept = Net.read(path), list[onnx.NodeProto]()
    for node in net.model.graph.node:
        source = net.source(node, 0) if node.op_type == "QuantizeLinear" else None
        while source and source.op_type in ("Relu", "Clip"):
            source = net.source(source, 0)
        if source and source.op_type in ("Conv", "ConvTranspose", "Gemm") and source.name in names:
            held = f"{node.input[0]}_held"
            kept.append(helper.make_node("Max", [node.input[0], LEAST], [held], name=f"{held}_in_float"))
            node.input[0] = held
        kept.append(node)
    if len(kept) > len(net.model.graph.node):
        refill(net.model.graph.node, kept)
        net.hold(LEAST, np.array(np.finfo(np.float32).min))
        save_model(net.model, path)


def float_nodes(path: Path) -> list[str]:
    """`Net.float_nodes` of a file."""
    return Net.read(path, weights=False).float_nodes
