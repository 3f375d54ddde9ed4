"""A graph at hand: who makes and reads what, its constants as arrays; and sessions of a graph or of a part of it."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from potstill.export.graph import save_model
from potstill.validate.session import open_session

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class Net:
    """Names, ties and constants of a graph.

    Attributes:
        model: the graph; what `put` and `hold` change is changed there.
        tensors: its constants by name, those that nodes hold too.
        nodes: its nodes by name.
        made_by: the node that makes a tensor.
        read_by: the nodes that read a tensor, once for each time.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        graph = model.graph
        held = [(node.output[0], attribute(node, "value", None)) for node in graph.node if node.op_type == "Constant"]
        self.tensors = {tensor.name: tensor for tensor in graph.initializer} | {name: one for name, one in held if one}
        self.nodes = {node.name: node for node in graph.node}
        self.made_by = {name: node for node in graph.node for name in node.output}
        self.read_by: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.read_by.setdefault(name, []).append(node)
        self._inputs = {value.name for value in graph.input}
        self._ends = {value.name for value in graph.output}

    @classmethod
    def read(cls, path: Path, *, weights: bool = True) -> "Net":
        """The graph of a file; without `weights` those that lie beside it are left there."""
        return cls(onnx.load(str(path), load_external_data=weights))

    @cached_property
    def types(self) -> dict[str, onnx.TypeProto.Tensor]:
        """Element type and shape of the tensors that the graph tells them of."""
        values = [*self.model.graph.input, *self.model.graph.output, *self.model.graph.value_info]
        return {value.name: value.type.tensor_type for value in values}

    @cached_property
    def float_nodes(self) -> list[str]:
        """Names of the nodes with weights that compute in floating point: not fed by DequantizeLinear on both sides."""
        return [node.name for node in self.model.graph.node if node.op_type in WEIGHTED and self._in_float(node)]

    def _in_float(self, node: NodeProto) -> bool:
        kinds = [self.tensors[name].data_type for name in node.input[:2] if name in self.tensors]
        sources = [one.op_type for place in (0, 1) if (one := self.source(node, place))]
        return bool({TensorProto.FLOAT, TensorProto.FLOAT16} & set(kinds)) or sources.count("DequantizeLinear") == 1

    def array(self, name: str) -> NDArray[Any]:
        """A constant."""
        found: NDArray[Any] = numpy_helper.to_array(self.tensors[name])
        return found

    def constant(self, name: str) -> NDArray[Any] | None:
        """A constant; None of what is computed."""
        return self.array(name) if name in self.tensors else None

    def put(self, name: str, array: NDArray[Any]) -> None:
        """Give a constant other values, of its own type."""
        kind = helper.tensor_dtype_to_np_dtype(self.tensors[name].data_type)
        self.tensors[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array, dtype=kind), name))

    def computed(self, name: str) -> bool:
        """Whether a tensor is an activation or an input of the graph, and no constant."""
        return name not in self.tensors and (name in self.made_by or name in self._inputs)

    def hold(self, name: str, array: NDArray[Any]) -> str:
        """Add a constant and give its name."""
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        self.tensors[name] = self.model.graph.initializer[-1]
        return name

    def source(self, node: NodeProto, place: int) -> NodeProto | None:
        """The node that makes an input; None where it is a constant, the graph's, or not there."""
        return self.made_by.get(node.input[place]) if place < len(node.input) else None

    def sources(self, node: NodeProto) -> list[NodeProto]:
        """The nodes that make the inputs."""
        return [self.made_by[name] for name in node.input if name in self.made_by]

    def readers(self, node: NodeProto) -> list[NodeProto]:
        """The nodes that read what a node makes, once for each time."""
        return [one for name in node.output for one in self.read_by.get(name, [])]

    def replace(self, node: NodeProto, others: Sequence[NodeProto]) -> None:
        """Put others in the place of a node; `made_by` and `read_by` stay those of before."""
        nodes = list(self.model.graph.node)
        at = nodes.index(node)
        refill(self.model.graph.node, [*nodes[:at], *others, *nodes[at + 1 :]])

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
    nodes = needed(model.graph.node, outputs)
    read = {name for node in nodes for name in node.input}
    del part.graph.value_info[:]
    refill(part.graph.node, nodes)
    refill(part.graph.initializer, [one for one in model.graph.initializer if one.name in read])
    refill(part.graph.output, [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs])
    basic = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # nothing is fused away
    return open_model(part, graph_optimization_level=basic)


def open_model(model: onnx.ModelProto, entries: Mapping[str, str] | None = None, **settings: Any) -> Any:
    """A session of a graph in memory; `entries` and `settings` as of `open_session`."""
    with tempfile.TemporaryDirectory(prefix="potstill-") as folder:
        save_model(model, Path(folder, "graph.onnx"))
        return open_session(Path(folder, "graph.onnx"), entries, **settings)


def refill(held: Any, now: Sequence[Any]) -> None:
    """Put other nodes, constants or values in the place of those that a graph has."""
    del held[:]
    held.extend(now)


def mend(model: onnx.ModelProto) -> onnx.ModelProto:
    """Name the nodes without a name; drop shape entries that name a weight, which the dynamic quantiser trips over."""
    for i, node in enumerate(model.graph.node):
        node.name = node.name or f"unnamed_{i}"
    weights = {tensor.name for tensor in model.graph.initializer}
    refill(model.graph.value_info, [value for value in model.graph.value_info if value.name not in weights])
    return model


def floats(model: onnx.ModelProto) -> list[str]:
    """Names of the activations in float32, the graph's inputs too, in the order in which they are computed."""
    types, constant = Net(model).types, {tensor.name for tensor in model.graph.initializer}
    made = [value.name for value in model.graph.input] + [name for node in model.graph.node for name in node.output]
    return [one for one in made if one in types and types[one].elem_type == TensorProto.FLOAT and one not in constant]


def needed(nodes: Iterable[NodeProto], outputs: Sequence[str]) -> list[NodeProto]:
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
