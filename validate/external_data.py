"""The file of an ONNX model and those that hold its weights: there, whole, and beside it. Nothing is run."""

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import external_data_helper, helper

from potstill.validate.errors import InputError, told


def read_graph(path: Path) -> onnx.ModelProto:
    """An ONNX model without its external data.

    Raises:
        InputError: it is none.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as ONNX ({told(error)}); expected a whole .onnx file: copy or export it again"
        ) from error
    if not model.graph.node or not model.graph.output:
        raise InputError(f"{path} holds no ONNX graph; expected a whole .onnx file: copy or export it again")
    return model


def files_of(path: Path) -> list[Path]:
    """An ONNX file and those that hold its weights.

    Raises:
        InputError: it is none, or see `check_external_data`.
    """
    return [path, *check_external_data(path, read_graph(path))]


def check_external_data(path: Path, model: onnx.ModelProto) -> list[Path]:
    """The files that hold weights of an ONNX file; each has to lie in its folder, and to be long enough.

    Source: the ONNX specification, "External Data": locations are relative to the file, without `..`.

    Raises:
        InputError: one is missing, too short, or outside the folder by its path or by a link.
    """
    ends: dict[str, int] = {}
    for tensor in tensors(model):
        if external_data_helper.uses_external_data(tensor):
            info = external_data_helper.ExternalDataInfo(tensor)
            if not info.length:  # not said: by the tensor's type and shape
                info.length = math.ceil(math.prod(tensor.dims) * _bits(tensor.data_type) / 8)
            ends[info.location] = max(ends.get(info.location, 0), (info.offset or 0) + info.length)
    for location, end in ends.items():
        whole = (PurePosixPath(location), PureWindowsPath(location))
        file, folder = path.parent / location, path.parent.resolve()
        if not location or any(one.is_absolute() or ".." in one.parts for one in whole):
            raise InputError(f"{path.name} keeps weights in {location!r}; expected a file in the folder of {path.name}")
        if not file.resolve().is_relative_to(folder):
            raise InputError(
                f"{path.name} keeps weights in {location!r}, a link that leads out of its folder; put the file there"
            )
        if not file.is_file():
            raise InputError(f"{path.name} keeps weights in {location!r}, which is not in {path.parent}; put it there")
        if file.stat().st_size < end:
            raise InputError(
                f"{path.name} keeps weights in {location!r}, which has {file.stat().st_size} of at least {end} bytes; "
                "copy it again"
            )
    return [path.parent / location for location in ends]


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all constants, in the file and outside of it."""
    return sum(map(_bytes, tensors(model)))


def streamed_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the constants that a run reads whole: all but those that are only looked up by row."""
    looked_up, read = set[str](), set[str]()
    for node in nodes_of(model):
        by_row = node.op_type in ("Gather", "GatherBlockQuantized")
        looked_up.update(node.input[:1] if by_row else ())
        read.update(node.input[1:] if by_row else node.input)
    return sum(_bytes(tensor) for tensor in tensors(model) if tensor.name in read or tensor.name not in looked_up)


def _bytes(tensor: onnx.TensorProto) -> int:
    if external_data_helper.uses_external_data(tensor):
        return int(external_data_helper.ExternalDataInfo(tensor).length or 0)
    return int(tensor.ByteSize())


def _bits(data_type: int) -> int:
    return int(helper.tensor_dtype_to_np_dtype(data_type).itemsize * 8)


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from graphs_of(inner)


def nodes_of(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """All nodes, of graphs inside nodes and of the file's own functions too."""
    for graph in graphs_of(model.graph):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All constants: initializers, and those that are attributes of nodes."""
    for graph in graphs_of(model.graph):
        yield from graph.initializer
    for node in nodes_of(model):
        for attribute in node.attribute:
            yield from [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
