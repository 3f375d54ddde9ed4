"""What ONNX Runtime fuses in a model file, counted against what the graph lets expect.

A fusion that does not happen is told by nobody: the numbers are right, and the model is slow.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import yaml
from onnx import NodeProto
from pydantic.dataclasses import dataclass

from potstill.export.modules import ACTIVATIONS
from potstill.export.net import Net
from potstill.targets.target import Target
from potstill.validate.session import open_session
from potstill.validate.units import counted

COSTLY = 1.05  # a fusion whose absence costs less than that is counted and not warned of
INTEGER = ("integer convolution", "integer matrix product")
ALREADY = {  # operators that a model file may hold fused, by kind
    "integer convolution": ("QLinearConv", "ConvInteger"),
    "integer matrix product": ("QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"),
    "GELU": ("Gelu", "BiasGelu", "FastGelu", "QuickGelu"),
    "attention": ("Attention", "MultiHeadAttention", "QAttention", "GroupQueryAttention"),
}


@dataclass(frozen=True)
class Fusions:
    """What was fused in one file.

    Attributes:
        provider: the execution provider that was asked.
        runtime: the version of ONNX Runtime.
        expected: by kind, how many the float graph (for integers, the file) lets expect.
        found: by kind, how many the optimised graph has.
        warnings: a sentence for each kind that lacks some and is slower for it, or has integers that the file has not.
    """

    provider: str
    runtime: str
    expected: dict[str, int]
    found: dict[str, int]
    warnings: list[str]


def count_fusions(path: Path, float_graph: Path, target: Target) -> Fusions | None:
    """Optimise a file as the target's execution provider does when it opens it, and count.

    Only graphs are read and written here, at any size of the weights. Where the target is an ARM one, ONNX Runtime is
    told to let int8 activations be, as it does there.

    Args:
        path: the file that ships.
        float_graph: that it was made of.
        target: whose first provider is asked.

    Returns:
        the counts; None where nothing is known of the provider (fusions.yaml) or it is not here.
    """
    provider = target.runtime.providers[0]
    known = _known().get(provider)
    if known is None or provider not in onnxruntime.get_available_providers():
        return None
    file, source = (Net.read(one, weights=False) for one in (path, float_graph))
    optimised = Net(_optimised(path, provider, target))
    expected = {kind: PATTERNS[kind](file if kind in FROM_FILE else source) for kind in known}
    found = {kind: _found(optimised, kind, known[kind]["operators"]) for kind in known}
    warnings = [
        sentence for kind in known if (sentence := _told(kind, expected[kind], found[kind], known[kind]["costs"]))
    ]
    return Fusions(provider, onnxruntime.__version__, expected, found, warnings)


def _told(kind: str, expected: int, found: int, costs: float) -> str:
    """The warning on one kind; empty where there is nothing to say."""
    if kind in INTEGER and found > expected:
        return (
            f"ONNX Runtime computes {counted(found, 'node')} of the kind {kind!r} where the file has {expected}; "
            f"it quantised {found - expected} by itself."
        )
    if found >= expected or costs < COSTLY:
        return ""
    return (
        f"{expected - found} of {counted(expected, 'expected fusion')} of the kind {kind!r} did not happen in ONNX "
        f"Runtime; without any of them a model took {costs:g} times as long."
    )


@cache
def _known() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Kinds by provider, each with its operators and what its absence costs."""
    text = resources.files("potstill.export").joinpath("fusions.yaml").read_text(encoding="utf-8")
    known: Mapping[str, Mapping[str, Mapping[str, Any]]] = yaml.safe_load(text)
    return known


def _optimised(path: Path, provider: str, target: Target) -> onnx.ModelProto:
    """The graph that ONNX Runtime runs of a file, its larger weights left out."""
    entries = {**target.runtime.session_options, "session.optimized_model_external_initializers_file_name": "weights"}
    if target.hardware.arch == "arm64":
        entries["session.qdqisint8allowed"] = "1"
    with tempfile.TemporaryDirectory(prefix="potstill-") as folder:
        out = Path(folder, "optimised.onnx")
        open_session(path, entries, providers=[provider], optimized_model_filepath=str(out))
        return onnx.load(str(out), load_external_data=False)


def _number(graph: Net, name: str) -> float | None:
    """A constant of one number."""
    tensor = graph.tensors.get(name)
    return float(graph.array(name).reshape(-1)[0]) if tensor and math.prod(tensor.dims) == 1 else None


def _product(graph: Net, node: NodeProto) -> bool:
    """Whether a node multiplies two activations."""
    return node.op_type == "MatMul" and not set(node.input) & set(graph.tensors)


def _found(graph: Net, kind: str, operators: list[str]) -> int:
    """How many of a kind an optimised graph has; an activation in a convolution is an attribute of it.

    A convolution that adds a third input before its activation is another fusion, which is not counted.
    """
    nodes = [node for node in graph.model.graph.node if node.op_type in operators]
    if kind == "convolution with activation":
        nodes = [node for node in nodes if any(one.name == "activation" for one in node.attribute)]
        nodes = [node for node in nodes if len([name for name in node.input if name]) < 4]
    return len(nodes)


def _operators(graph: Net, kind: str) -> int:
    return sum(node.op_type in ALREADY[kind] for node in graph.model.graph.node)


def _integers(graph: Net, kind: str, operators: tuple[str, ...]) -> int:
    """Nodes between DequantizeLinears, or that are integer operators in the file."""
    both = 0
    for node in graph.model.graph.node:
        if node.op_type in operators:
            sources = [graph.source(node, place) for place in (0, 1)]
            both += all(source is not None and source.op_type == "DequantizeLinear" for source in sources)
    return both + _operators(graph, kind)


def _activated(graph: Net) -> int:
    """Convolutions in float whose only reader is an activation."""
    count = 0
    for node in graph.model.graph.node:
        reader, weight = graph.reader(node), graph.source(node, 1)
        if node.op_type == "Conv" and (weight is None or weight.op_type != "DequantizeLinear"):
            count += reader is not None and reader.op_type in ACTIVATIONS
    return count


def _gelus(graph: Net) -> int:
    """Gelu operators, and x/2 · (1 + erf(x/√2)) (Hendrycks and Gimpel 2016) in pieces."""
    pieces = 0
    for node in graph.model.graph.node:
        reader = graph.reader(node) if node.op_type == "Erf" else None
        added = [_number(graph, name) for name in reader.input] if reader and reader.op_type == "Add" else []
        pieces += 1.0 in added
    return pieces + _operators(graph, "GELU")


def _norms(graph: Net) -> Iterator[str]:
    """What each layer norm reads: of the operator, and of (x − mean) / √(variance + ε) (Ba et al. 2016) in pieces."""
    for node in graph.model.graph.node:
        if node.op_type == "LayerNormalization":
            yield node.input[0]
        if node.op_type == "Div":
            found, root = graph.source(node, 0), graph.source(node, 1)
            total = graph.source(root, 0) if root and root.op_type == "Sqrt" else None
            if found and found.op_type == "Sub" and total and total.op_type == "Add":
                variance = [graph.source(total, place) for place in (0, 1)]
                if any(one and one.op_type == "ReduceMean" for one in variance):
                    yield found.input[0]


def _skips(graph: Net) -> int:
    """Layer norms of a sum of two activations."""
    sums = [graph.made_by.get(name) for name in _norms(graph)]
    return sum(one is not None and one.op_type == "Add" and not set(one.input) & set(graph.tensors) for one in sums)


def _attentions(graph: Net) -> int:
    """Attention operators, and softmaxes between two products of activations."""
    count = 0
    for node in graph.model.graph.node:
        if node.op_type == "Softmax":
            count += _near_product(graph, node, graph.sources) and _near_product(graph, node, graph.readers)
    return count + _operators(graph, "attention")


def _near_product(graph: Net, node: NodeProto, step: Callable[[NodeProto], list[NodeProto]], hops: int = 4) -> bool:
    """Whether a product of two activations is a few nodes away: masks, scales and checks for NaN lie between."""
    found = [node]
    for _ in range(hops):
        found = [one for past in found for one in step(past)]
        if any(_product(graph, one) for one in found):
            return True
    return False


FROM_FILE = (*INTEGER, "convolution with activation")  # the others are counted in the float graph
PATTERNS: Mapping[str, Callable[[Net], int]] = {
    "integer convolution": lambda graph: _integers(graph, "integer convolution", ("Conv", "ConvTranspose")),
    "integer matrix product": lambda graph: _integers(graph, "integer matrix product", ("MatMul", "Gemm")),
    "convolution with activation": _activated,
    "GELU": _gelus,
    "layer norm": lambda graph: len(list(_norms(graph))),
    "skip layer norm": _skips,
    "attention": _attentions,
}
