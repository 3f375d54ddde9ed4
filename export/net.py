"""A float graph whose weights are changed: its ties, its weights as arrays, and sessions of a part of it."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from potstill.export.graph import save_model


class Net:
    """Names, ties and constants of a graph.

    Attributes:
        model: the graph; what `put` changes is changed there.
        tensors: its constants by name.
        nodes: its nodes by name.
        made_by: the node that makes a tensor.
        read_by: the nodes that read a tensor, once for each time.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        graph = model.graph
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.nodes = {node.name: node for node in graph.node}
        self.made_by = {name: node for node in graph.node for name in node.output}
        self.read_by: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.read_by.setdefault(name, []).append(node)
        self._ends = {value.name for value in graph.output}

    def array(self, name: str) -> NDArray[Any]:
        """A constant."""
        found: NDArray[Any] = numpy_helper.to_array(self.tensors[name])
        return found

    def put(self, name: str, array: NDArray[Any]) -> None:
        """Give a constant other values, of its own type."""
        kind = helper.tensor_dtype_to_np_dtype(self.tensors[name].data_type)
        self.tensors[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array, dtype=kind), name))

    def own(self, node: NodeProto, place: int) -> str | None:
        """The name of a float constant that a node reads at a place and nothing else does; None if it is not so."""
        name = node.input[place] if place < len(node.input) else ""
        held = name in self.tensors and self.tensors[name].data_type == TensorProto.FLOAT
        return name if held and len(self.read_by[name]) == 1 else None

    def reader(self, node: NodeProto) -> NodeProto | None:
        """The only node that reads what a node makes; None where several do, or the graph gives it out."""
        name = node.output[0]
        readers = self.read_by.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self._ends else None

    def bias(self, node: NodeProto) -> str | None:
        """The name of the constant that is added to each channel of a node with weights, if it has one of its own.

        Of a MatMul it is what the next Add adds.
        """
        if node.op_type != "MatMul":
            return self.own(node, 2)
        after = self.reader(node)
        if after is None or after.op_type != "Add":
            return None
        name = self.own(after, 1 if after.input[0] == node.output[0] else 0)
        wide = self.tensors[node.input[1]].dims[-1:] if node.input[1] in self.tensors else None
        return name if name and list(self.tensors[name].dims) == list(wide or ()) else None


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """An attribute of a node, or what holds where it is not said."""
    return next((helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


def session(model: onnx.ModelProto, outputs: Sequence[str]) -> Any:
    """A session of what some float tensors of a graph are computed by; these are its outputs, in order."""
    import onnxruntime

    part = onnx.ModelProto()
    part.CopyFrom(model)
    needed = _needed(model.graph.node, outputs)
    read = {name for node in needed for name in node.input}
    del part.graph.node[:], part.graph.output[:], part.graph.initializer[:], part.graph.value_info[:]
    part.graph.node.extend(needed)
    part.graph.initializer.extend(one for one in model.graph.initializer if one.name in read)
    part.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # nothing is fused away
    with tempfile.TemporaryDirectory() as folder:
        save_model(part, Path(folder) / "part.onnx")
        return onnxruntime.InferenceSession(
            str(Path(folder) / "part.onnx"), options, providers=["CPUExecutionProvider"]
        )


def _needed(nodes: Iterable[NodeProto], outputs: Sequence[str]) -> list[NodeProto]:
    """Those of the nodes, which are in order, that the outputs come from."""
    wanted, found = set(outputs), list[NodeProto]()
    for node in reversed(list(nodes)):
        if wanted & set(node.output):
            wanted |= {*node.input, *_captured(node)}
            found.append(node)
    return found[::-1]


def _captured(node: NodeProto) -> set[str]:
    """What the bodies of an If or a Loop read from around them; names of their own may be among it."""
    bodies = [one.g for one in node.attribute if one.type == onnx.AttributeProto.GRAPH]
    return {name for body in bodies for inner in body.node for name in [*inner.input, *_captured(inner)]}
