"""The student: cut from the teacher by depth and width, or a checkpoint of its own."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from potstill.validate.checkpoint import Checkpoint, open_folder, reading_weights
from potstill.validate.errors import InputError
from potstill.validate.task import Model, Task, quiet_transformers


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Student:
    """Where training starts.

    A cut keeps the teacher's weights: layers spread evenly from its first to its last (as DistilBERT, Sanh 2019,
    and PKD, Sun 2019, start theirs), and of each weight the leading rows and columns that fit the narrower width,
    the head size kept. A factory or another checkpoint brings its own weights.

    Attributes:
        layers: transformer layers to keep.
        hidden: hidden size to keep; a multiple of the teacher's head size.
        checkpoint: a transformers checkpoint, or `package.module:factory`.
        weights: weights file for a factory; without one it starts as the factory made it.
    """

    layers: int | None = None
    hidden: int | None = None
    checkpoint: str | None = None
    weights: Path | None = None

    def __post_init__(self) -> None:
        """Refuse a cut of nothing, and a cut beside a checkpoint."""
        if self.checkpoint and (self.layers or self.hidden):
            raise ValueError("a student is either a cut (layers, hidden) or a checkpoint, not both")
        if not (self.checkpoint or self.layers or self.hidden):
            raise ValueError("a student needs layers, hidden or checkpoint")

    def in_words(self, teacher: Model) -> str:
        """What it is, e.g. `3 of 6 layers`."""
        if self.checkpoint:
            return self.checkpoint
        config = teacher.core.config
        parts = [
            f"{kept} of {getattr(config, _named(config, field))} {word}"
            for kept, field, word in ((self.layers, "num_layers", "layers"), (self.hidden, "hidden_size", "wide"))
            if kept
        ]
        return ", ".join(parts)

    def __call__(self, teacher: Model, task: Task, options: dict[str, Any], seed: int) -> Model:
        """The student, untrained.

        Args:
            teacher: whose classes, and for a cut whose weights, it takes.
            task: how a checkpoint is loaded.
            options: the task's own loading options.
            seed: for weights that no checkpoint gives.

        Raises:
            InputError: the teacher cannot be cut so, or the checkpoint does not fit the teacher's classes.
        """
        torch.manual_seed(seed)
        if self.checkpoint is None:
            return _cut(teacher, self.layers, self.hidden)
        student = task.load(Checkpoint(self.checkpoint, self.weights), teacher.labels, like=teacher, **options)
        if student.labels != teacher.labels:
            raise InputError(f"the student's classes {student.labels} are not the teacher's {teacher.labels}")
        return student


def _cut(teacher: Model, layers: int | None, hidden: int | None) -> Model:
    """A student of the teacher's own architecture with fewer layers, a smaller hidden size, or both."""
    if teacher.checkpoint.is_factory:
        raise InputError(
            f"a factory's module cannot be cut by layers or hidden; give --student package.module:factory "
            f"for a smaller one than {teacher.checkpoint}"
        )
    config: Any = copy.deepcopy(teacher.core.config)
    depth = _named(config, "num_layers")
    before = int(getattr(config, depth))
    kept = _spread(before, layers or before)
    setattr(config, depth, len(kept))
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = [config.layer_types[i] for i in kept]
    if hidden:
        _narrow(config, hidden)
    try:
        with quiet_transformers():
            core = type(teacher.core)(config)
        _take_weights(core, teacher.core, before, kept)
    except (RuntimeError, IndexError, KeyError, ValueError) as error:
        raise InputError(f"a {config.model_type} cannot be cut so ({error}); give --student CHECKPOINT") from error
    module = type(teacher.module)(core, teacher.input_names).eval()  # the teacher's, as its task wraps it
    return replace(teacher, module=module, core=core.eval(), fresh=())


def _named(config: Any, field: str) -> str:
    """What an architecture calls a field (`num_layers`, `hidden_size`, …), by optimum's normalised configs.

    Raises:
        InputError: the architecture has no single such number.
    """
    from optimum.utils import NormalizedConfigManager

    names = {
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_attention_heads",
    }
    try:
        normalized = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
        name = str(getattr(normalized, field.upper(), names[field]))
    except KeyError:
        name = names[field]
    name = str(getattr(config, "attribute_map", {}).get(name, name))
    if not isinstance(getattr(config, name, None), int):
        raise InputError(
            f"a {config.model_type} has no single {name}, so it cannot be cut by layers= or hidden=; "
            "give --student CHECKPOINT of a smaller one"
        )
    return name


def layers_of(checkpoint: Checkpoint) -> int:
    """Transformer layers of a checkpoint that `transformers` opens.

    Raises:
        InputError: its architecture has no single such number.
    """
    from transformers import AutoConfig

    with reading_weights(checkpoint):
        config = AutoConfig.from_pretrained(open_folder(checkpoint), trust_remote_code=False)
    return int(getattr(config, _named(config, "num_layers")))


def _spread(depth: int, layers: int) -> list[int]:
    """Indices of `layers` layers spread evenly over `depth`, first and last among them."""
    if not 1 <= layers <= depth:
        raise InputError(f"layers={layers}: the teacher has {depth} layers, so a cut keeps 1 to {depth}")
    return [round(i) for i in np.linspace(0, depth - 1, layers)] if layers > 1 else [0]


def _narrow(config: Any, hidden: int) -> None:
    """Set a smaller hidden size, with the head size and the ratio of the feed-forward kept."""
    width, heads = _named(config, "hidden_size"), _named(config, "num_attention_heads")
    old, head_size = int(getattr(config, width)), int(getattr(config, width)) // int(getattr(config, heads))
    if not 0 < hidden <= old or hidden % head_size:
        raise InputError(
            f"hidden={hidden}: a multiple of the teacher's head size {head_size}, at most {old}, is needed"
        )
    for inner in ("intermediate_size", "hidden_dim", "ffn_dim"):  # the feed-forward, by architecture
        if isinstance(getattr(config, inner, None), int):
            setattr(config, inner, int(getattr(config, inner)) * hidden // old)
    setattr(config, width, hidden)
    setattr(config, heads, hidden // head_size)


def _take_weights(student: nn.Module, teacher: nn.Module, depth: int, kept: list[int]) -> None:
    """Copy into each of the student's tensors the leading part of the teacher's tensor that fits.

    Layers are found as the `ModuleList`s of the teacher's depth: layer i of the student takes layer kept[i].
    """
    stacks = [name for name, m in teacher.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not stacks:
        raise InputError(f"no stack of {depth} layers was found in {type(teacher).__name__}, so it cannot be cut")
    theirs = teacher.state_dict()
    taken: dict[str, Tensor] = {}
    for key, tensor in student.state_dict().items():
        source = key
        for stack in stacks:
            if key.startswith(f"{stack}."):
                index, _, rest = key.removeprefix(f"{stack}.").partition(".")
                source = f"{stack}.{kept[int(index)]}.{rest}"
        taken[key] = theirs[source][tuple(slice(0, size) for size in tensor.shape)].clone()
    student.load_state_dict(taken)
