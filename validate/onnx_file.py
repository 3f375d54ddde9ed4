"""An ONNX file that a user brings: looked through before it is used, and run by ONNX Runtime as a module would be.

Shapes: B examples in a batch.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn

from potstill.validate.errors import InputError, told
from potstill.validate.external_data import check_external_data, nodes_of, read_graph, tensors
from potstill.validate.finite import check_finite
from potstill.validate.session import open_session

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
QUANTISED = re.compile(r"Quant|Integer|NBits|Bnb4|FpQ4|^Q(Linear|Attention|Gemm|Ordered|MoE)")
STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class Port:
    """An input or output of a graph: its numpy type and its dimensions, a number where one is fixed, else a name."""

    dtype: str
    dims: tuple[int | str, ...]


class OnnxModule(nn.Module):
    """An ONNX file as a module: `forward(*inputs) -> output`, computed by ONNX Runtime on the CPU.

    It has no parameters that could be trained. Where the file takes one example at a time, a batch is run one by one.

    Attributes:
        path: the file.
        inputs: by name, in the graph's order.
        output: the name of the output that is read.
        opset: of the standard operators.
        weights: how many it holds.
        config: the transformers config beside it; only set where there is one.
    """

    def __init__(self, path: Path, wanted: str) -> None:
        """Open a file.

        Args:
            path: the file.
            wanted: the output to read where there are several.

        Raises:
            InputError: whatever `looked_through` refuses, ONNX Runtime cannot open it, or the output cannot be told.
        """
        super().__init__()
        self.path, model = path, looked_through(path)
        self.opset = opset_of(model)
        self.weights: int = sum(math.prod(t.dims) for t in tensors(model) if t.data_type in FLOATS)
        self._session = _session(path)
        held = {tensor.name for tensor in model.graph.initializer}
        self.inputs = {value.name: _port(value) for value in model.graph.input if value.name not in held}
        outputs = {value.name: _port(value) for value in model.graph.output}
        if wanted not in outputs and len(outputs) != 1:
            raise InputError(
                f"{path.name} gives {', '.join(outputs)}; expected one output, or one of the name {wanted!r}"
            )
        self.output = wanted if wanted in outputs else next(iter(outputs))
        self._output = outputs[self.output]

    @property
    def one_by_one(self) -> bool:
        """Whether the file takes one example at a time."""
        return any(port.dims[:1] == (1,) for port in self.inputs.values())

    def forward(self, *inputs: Tensor) -> Tensor:
        """The output for inputs in the graph's order.

        Raises:
            InputError: ONNX Runtime cannot run these; the message names their shapes.
        """
        arrays = {name: tensor.cpu().numpy() for name, tensor in zip(self.inputs, inputs, strict=True)}
        count = len(inputs[0])
        parts = [slice(i, i + 1) for i in range(count)] if self.one_by_one else [slice(None)]
        found = [self._run({name: array[part] for name, array in arrays.items()}) for part in parts]
        return torch.from_numpy(np.concatenate(found)).to(inputs[0].device)

    def _run(self, arrays: dict[str, NDArray[Any]]) -> NDArray[Any]:
        try:
            output: NDArray[Any] = self._session.run([self.output], arrays)[0]
        except Exception as error:  # ONNX Runtime's errors have no base of their own
            shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            raise InputError(f"{self.path.name} does not run on {shapes}: {told(error)}") from error
        return output

    def check_fed(self, arrays: Mapping[str, NDArray[Any]], free: Mapping[int, str], by: str) -> None:
        """Compare what the file takes with the arrays that it will get.

        Args:
            arrays: one batch of encoded examples, by name.
            free: the dimensions that may change from batch to batch.
            by: what encodes, for the message.

        Raises:
            InputError: an input that nothing feeds, or of another type or shape.
        """
        foreign = [name for name in self.inputs if name not in arrays]
        if foreign:
            raise InputError(
                f"{self.path.name} takes {', '.join(self.inputs)}, and {by} gives {', '.join(arrays)}: nothing feeds "
                f"{', '.join(foreign)}; export the model with inputs of these names alone"
            )
        for name, port in self.inputs.items():
            array = arrays[name]
            fits = len(port.dims) == array.ndim and all(
                isinstance(dim, str) or axis in free or dim == array.shape[axis] for axis, dim in enumerate(port.dims)
            )
            if port.dtype != array.dtype.name or not fits:
                shape = _in_words([free.get(axis, size) for axis, size in enumerate(array.shape)])
                raise InputError(
                    f"{self.path.name} takes {name} as {port.dtype} {_in_words(port.dims)}, and {by} gives "
                    f"{array.dtype.name} {shape}"
                )
            if port.dims and isinstance(port.dims[0], int) and port.dims[0] != 1:
                raise InputError(
                    f"{self.path.name} takes {name} in batches of {port.dims[0]} only; export it with a dynamic batch, "
                    "or a batch of 1"
                )

    def in_words(self) -> str:
        """What goes in and comes out."""
        taken = ", ".join(f"{name} {_in_words(port.dims)}" for name, port in self.inputs.items())
        return f"ONNX of opset {self.opset}, {taken} → {self.output} {_in_words(self._output.dims)}"


def looked_through(path: Path) -> onnx.ModelProto:
    """An ONNX file without its external data, once all that can be told without running it was checked.

    Raises:
        InputError: it is no ONNX file, its external data are not beside it, it is quantised or in half precision,
            has operators that ONNX Runtime does not know, or weights that are not finite.
    """
    model = read_graph(path)
    check_external_data(path, model)
    _check_operators(path, model)
    held = (t for t in tensors(model) if t.data_type in FLOATS)
    check_finite(path.name, ((t.name, numpy_helper.to_array(t, str(path.parent))) for t in held))
    return model


def _check_operators(path: Path, model: onnx.ModelProto) -> None:
    """Refuse a graph that is no float32 one, or that ONNX Runtime has no operators for."""
    from onnxruntime.capi import _pybind_state

    nodes = list(nodes_of(model))
    quantised = Counter(node.op_type for node in nodes if QUANTISED.search(node.op_type))
    if quantised:
        raise InputError(
            f"{path.name} is quantised already ({_counted(quantised)}); give the float32 file it was made of"
        )
    halves = sum(tensor.data_type in HALVES and math.prod(tensor.dims) > 1 for tensor in tensors(model))
    if halves:
        raise InputError(f"{path.name} holds {halves} weights in half precision; give the float32 file it was made of")
    known = {(_domain(schema.domain), schema.name) for schema in _pybind_state.get_all_operator_schema()}
    known |= {(_domain(function.domain), function.name) for function in model.functions}
    foreign = Counter(
        f"{node.domain}::{node.op_type}" if _domain(node.domain) else node.op_type
        for node in nodes
        if (_domain(node.domain), node.op_type) not in known
    )
    if foreign:
        raise InputError(
            f"{path.name} has operators that ONNX Runtime does not know ({_counted(foreign)}); a package runs without "
            "libraries of one's own: export the model without them"
        )


def _domain(domain: str) -> str:
    return "" if domain in STANDARD else domain


def _counted(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(found.items()))


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard operators; 1 where none is said."""
    return next((one.version for one in model.opset_import if one.domain in STANDARD), 1)


def _session(path: Path) -> Any:
    try:
        return open_session(path, log_severity_level=4)
    except Exception as error:  # ONNX Runtime's errors have no base of their own
        raise InputError(f"ONNX Runtime cannot open {path}: {told(error)}") from error


def _port(value: onnx.ValueInfoProto) -> Port:
    of = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(of.elem_type).name if of.elem_type else "no tensor"
    dims = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in of.shape.dim)
    return Port(dtype, dims)


def _in_words(dims: Any) -> str:
    return f"({', '.join(map(str, dims))})"
