"""Models whose shapes are no longer those that their config or factory gives.

Heads that were pruned cannot be said in a transformers config (there the head size is hidden size / heads), nor
channels in a user's factory. `potstill.json` beside the weights then holds

    {"reshaped": {"attributes": {"bert.encoder.layer.0.attention.self.num_attention_heads": 3, …}}}

and on loading, before the weights are read, each module takes the shapes of the tensors in the weights file, and
the attributes their values. This is data only: shapes can but shrink, and an attribute is one of `ATTRIBUTES`, a whole
number that the module has already. Such a checkpoint opens with Potstill, not with `from_pretrained` alone; its ONNX
package opens anywhere. Without the record, shapes that differ are the error that they always were.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from potstill.validate.checkpoint import RESHAPED
from potstill.validate.errors import InputError

ATTRIBUTES = frozenset({"num_attention_heads", "num_heads", "n_heads", "all_head_size", "groups"})
RESHAPABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, _BatchNorm, nn.LayerNorm, nn.Embedding)
_MARK = "_potstill_reshaped"


def mark(module: nn.Module) -> None:
    """Say that a model's shapes are its own, so that they are recorded when it is saved; copies keep the mark."""
    setattr(module, _MARK, True)


def record_of(module: nn.Module) -> dict[str, Any]:
    """What `potstill.json` is to hold of a model's shapes; nothing unless it is marked."""
    return {RESHAPED: {"attributes": dict(attributes_of(module))}} if getattr(module, _MARK, False) else {}


def attributes_of(module: nn.Module) -> Iterator[tuple[str, int]]:
    """The dotted names and values of all `ATTRIBUTES` in a model."""
    for path, part in module.named_modules():
        for name in sorted(ATTRIBUTES & vars(part).keys()):
            if type(value := getattr(part, name)) is int:
                yield f"{path}.{name}".lstrip("."), value


def recorded(record: Mapping[str, Any]) -> dict[str, int] | None:
    """The attributes in the content of a `potstill.json`; None if the model is not reshaped.

    Raises:
        InputError: it is not of the form above.
    """
    if RESHAPED not in record:
        return None
    attributes = record[RESHAPED].get("attributes") if isinstance(record[RESHAPED], dict) else None
    if not isinstance(attributes, dict) or not all(type(value) is int for value in attributes.values()):
        raise InputError(
            f"potstill.json: {RESHAPED!r} holds {str(record[RESHAPED])[:60]!r}; "
            "expected 'attributes', names with whole numbers"
        )
    return attributes


def shapes_in(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in some safetensors files, from their headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
    return shapes


def reshape(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], attributes: Mapping[str, int]) -> None:
    """Give a model's tensors new shapes, their values undefined, and set attributes; it is marked then.

    Tensors that several modules share stay shared.

    Args:
        module: freshly built, on any device (`meta` too).
        shapes: by the names of the state dict; a tensor that is not named keeps its shape.
        attributes: by dotted name; see `ATTRIBUTES`.

    Raises:
        InputError: an attribute is not allowed, or not there; something would grow; a module is of a kind that
            cannot be reshaped.
    """
    for path, value in attributes.items():
        _set_attribute(module, path, value)
    fresh: dict[int, Tensor] = {}
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        shape = shapes.get(name, tuple(tensor.shape))
        if shape == tuple(tensor.shape):
            continue
        if len(shape) != tensor.ndim or any(not 0 < new <= old for new, old in zip(shape, tensor.shape, strict=True)):
            raise InputError(
                f"the weights hold {name} of shape {shape}, the model has {tuple(tensor.shape)}; "
                "a reshaped model is smaller in some dimensions and larger in none"
            )
        empty = tensor.new_empty(shape)
        fresh[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    for path, part in module.named_modules():
        own = {**part._parameters, **part._buffers}
        changed = {name: fresh[id(tensor)] for name, tensor in own.items() if id(tensor) in fresh}
        if changed and not isinstance(part, RESHAPABLE):
            raise InputError(f"{path} is a {type(part).__name__}, whose shapes cannot be recorded")
        for name, tensor in changed.items():
            setattr(part, name, tensor)
        if changed:
            _set_sizes(part)
    mark(module)


def reshaped_class(kind: type[Any], shapes: Mapping[str, tuple[int, ...]], attributes: Mapping[str, int]) -> type[Any]:
    """A transformers class whose models are reshaped as soon as they are built, for its `from_pretrained`."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it becomes the method
        kind.__init__(self, *args, **kwargs)
        reshape(self, shapes, attributes)

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})


def _set_attribute(module: nn.Module, path: str, value: int) -> None:
    """Set one attribute that is allowed, and there already, to a value that is no larger."""
    place, _, name = path.rpartition(".")
    if name not in ATTRIBUTES:
        raise InputError(f"potstill.json would set {path}; only {', '.join(sorted(ATTRIBUTES))} can be set")
    part = dict(module.named_modules()).get(place)
    now = getattr(part, name, None)
    if type(now) is not int or not 0 < value <= now:
        raise InputError(f"potstill.json would set {path} to {value}; the model has {now}, and it can but shrink")
    setattr(part, name, value)


def _set_sizes(part: nn.Module) -> None:
    """Make a module's own account of its sizes fit its tensors."""
    if isinstance(part, nn.Linear):
        part.out_features, part.in_features = part.weight.shape
    elif isinstance(part, _ConvNd):
        part.out_channels, part.in_channels = part.weight.shape[0], part.weight.shape[1] * part.groups
    elif isinstance(part, _BatchNorm):
        part.num_features = len(part.weight if part.affine else part.running_mean)  # type: ignore[arg-type]
    elif isinstance(part, nn.LayerNorm):
        part.normalized_shape = tuple(part.weight.shape)
    elif isinstance(part, nn.Embedding):
        part.num_embeddings, part.embedding_dim = part.weight.shape
