"""Weights of an ONNX model that lie in files of their own: there, whole, and beside the model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potstill.validate.errors import InputError


def check_external_data(path: Path) -> None:
    """Refuse a model whose weights lie outside its folder or are not all there.

    Only the graph is read. A location is a relative path below the model's folder, links followed.
    Source: ONNX, docs/ExternalData.md.

    Args:
        path: the `.onnx` file.

    Raises:
        InputError: the file is no ONNX model; or weights in a file of their own have no location, or one that is
            absolute or leaves the folder, or that file is missing or too short.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError:
        raise InputError(f"{path} is not an ONNX model; give a file that an ONNX exporter wrote") from None
    folder = path.parent.resolve()
    for tensor in _tensors(model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        said = {entry.key: entry.value for entry in tensor.external_data}
        location = said.get("location", "")
        file = (folder / location).resolve()
        if not location or Path(location).is_absolute() or not file.is_relative_to(folder):
            raise InputError(
                f"{path}: the weights {tensor.name!r} are said to be in {location!r}, expected a file in the folder "
                "of the model; this is not a model to trust"
            )
        if not file.is_file():
            raise InputError(
                f"{path}: the weights {tensor.name!r} are in {location!r}, which is not there; "
                "put that file beside the model"
            )
        end = int(said.get("offset", 0)) + int(said.get("length", 0))
        size = file.stat().st_size
        if end > size:
            raise InputError(
                f"{path}: the weights {tensor.name!r} end at byte {end} of {location!r}, which has {size}; "
                "copy that file again"
            )


def _tensors(graph: Any) -> Iterator[Any]:
    """The tensors of a graph, of its nodes' attributes and of the graphs inside them."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from [attribute.t, *attribute.tensors]
            for inner in [attribute.g, *attribute.graphs]:
                yield from _tensors(inner)
