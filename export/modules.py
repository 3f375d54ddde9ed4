"""Which module of a model each node and tensor of its graph is of: a map beside the graph, and none of it in the file.

Source: torch.onnx writes `pkg.torch.onnx.name_scopes` into the metadata of each node (torch 2.13,
torch/onnx/_internal/exporter/_core.py); by TorchScript the scopes are the node's name, `/encoder/layer.0/Add_1`.
"""

import ast
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path

import onnx
from onnx import NodeProto
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from potstill.targets.modules import FORMAT
from potstill.validate.files import write_json
from potstill.validate.task import Model

ACTIVATIONS = ("Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid")
SCOPES = "pkg.torch.onnx.name_scopes"


def modules_beside(graph: Path) -> Path:
    """Where the map of a graph lies."""
    return graph.with_name(f"{graph.stem}.modules.json")


def write_modules(graph: onnx.ModelProto, model: Model, path: Path) -> None:
    """Write the modules of a graph that still has the metadata of its export, each with its nodes and tensors.

    Constants are of the module that reads them, so that what a quantiser makes of them is, too; those that several
    read are of none. An activation function is of the module that holds it and what it reads, with which ONNX Runtime
    may fuse it. Paths are those in `model.core`.
    """
    parts = dict(model.module.named_modules())
    known: dict[str, str] = {}
    readers: dict[str, set[str]] = {}
    for node in graph.graph.node:
        module = _module(node, parts)
        if module is None:
            continue
        if node.op_type in ACTIVATIONS and node.input[0] in known:
            module = ".".join(_shared(module.split("."), known[node.input[0]].split(".")))
        known |= dict.fromkeys([node.name, *node.output], module)
        for name in node.input:
            readers.setdefault(name, set()).add(module)
    for tensor in graph.graph.initializer:
        if len(of := readers.get(tensor.name, set())) == 1:
            known[tensor.name] = next(iter(of))
    outer = next((name for name, part in parts.items() if part is model.core), "")
    modules: dict[str, list[str]] = {}
    for name, module in known.items():
        inner = f"{module}.".removeprefix(f"{outer}.") if outer else f"{module}."
        modules.setdefault(inner.removesuffix("."), []).append(name)
    write_json(path, {"format": FORMAT, "modules": modules})


def _module(node: NodeProto, parts: Mapping[str, nn.Module]) -> str | None:
    """The dotted path of a node's innermost module; None where the export does not say.

    The exporter folds a batch norm into the convolution before it, and gives the result the batch norm's scope: it is
    the convolution's, by the name of its weight.
    """
    told = next((one.value for one in node.metadata_props if one.key == SCOPES), None)
    if told is None:
        return ".".join(node.name.split("/")[1:-1]) if node.name.startswith("/") else None
    scopes = [str(scope) for scope in ast.literal_eval(told)[:-1]]
    module = next((scope for scope in reversed(scopes) if scope in parts), "")
    weight = node.input[1] if node.op_type in ("Conv", "ConvTranspose") else ""
    if weight.endswith(".weight") and isinstance(parts[module], _BatchNorm):
        return weight.removesuffix(".weight")
    return module


def _shared(one: list[str], other: list[str]) -> Iterator[str]:
    """The parts with which both paths start."""
    return (left for left, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
