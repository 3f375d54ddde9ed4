"""The student: cut from the teacher, or a checkpoint of its own."""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from potstill.compress.anatomy import (
    Dimension,
    Spaces,
    along,
    feed_forward,
    groups_of,
    head_size,
    named,
    neurons_of,
    number,
    of_tokens,
    sizes_of,
    spaces_of,
    stacks,
)
from potstill.compress.importance import block_influence, most_important, taylor_importance
from potstill.compress.low_rank import factorise
from potstill.compress.settings import StudentSettings
from potstill.compress.vocabulary import Vocabulary, cut_vocabulary
from potstill.validate.checkpoint import Checkpoint, open_folder, reading_weights
from potstill.validate.data import Examples
from potstill.validate.errors import InputError
from potstill.validate.task import Model, Task, quiet_transformers

Kept = dict[str, Tensor]  # space -> indices of the dimensions that stay, rising


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Student(StudentSettings):
    """Where training starts; the settings are those of `StudentSettings`.

    A cut keeps the teacher's weights. Layers are spread evenly from its first to its last (as DistilBERT, Sanh 2019,
    and PKD, Sun 2019, start theirs), or are its first, or those of the largest block influence (Men 2024). Hidden
    dimensions, heads and neurons are those of the largest first-order Taylor importance (Molchanov 2019, Michel 2019)
    in the whole teacher; the hidden dimensions are the same for all layers, heads and neurons each layer's own. Query
    heads that share a key and value head (Ainslie 2023) stay or go with it. Tokens that no example uses go from the
    embedding and from the tokenizer. Weights of the layers become products of two by their singular values. A factory
    or another checkpoint brings its own weights.
    """

    def in_words(self, teacher: Model) -> str:
        """What it is, e.g. `3 of 6 layers, 192 of 384 wide, tokens in use`."""
        if self.checkpoint:
            return self.checkpoint
        parts, config = [], teacher.core.config
        if self.layers:
            which = "" if self.pick == "evenly" else f" ({self.pick})"
            if not isinstance(self.layers, int):
                which = f" ({', '.join(map(str, self.layers))})"
            count = self.layers if isinstance(self.layers, int) else len(self.layers)
            parts.append(f"{count} of {number(config, 'num_layers')} layers{which}")
        if self.hidden:
            parts.append(f"{self.hidden} of {number(config, 'hidden_size')} wide")
        if self.neurons:
            parts.append(f"{self.neurons} of {neurons_of(config)} neurons")
        if self.vocabulary:
            parts.append("tokens in use" if self.vocabulary == "used" else f"at most {self.vocabulary} tokens")
        if self.rank:
            parts.append(f"rank {self.rank:.0%}" if self.rank < 1 else f"rank {self.rank}")
        return ", ".join(parts)

    def __call__(
        self,
        teacher: Model,
        task: Task,
        options: dict[str, Any],
        seed: int,
        examples: Examples | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> Model:
        """The student, untrained.

        Args:
            teacher: whose classes, and for a cut whose weights, it takes.
            task: how a checkpoint is loaded.
            options: the task's own loading options.
            seed: for weights that no checkpoint gives, and for the examples that importance is measured on.
            examples: training examples with labels, for a cut that `reads_examples`.
            vocabulary: that is left where it is cut; by default what the examples leave.

        Raises:
            InputError: the teacher cannot be cut so, or the checkpoint does not fit the teacher's classes.
        """
        torch.manual_seed(seed)
        if self.checkpoint is None:
            return self._cut(teacher, examples, seed, vocabulary)
        student = task.load(Checkpoint(self.checkpoint, self.weights), teacher.labels, like=teacher, **options)
        if student.labels != teacher.labels:
            raise InputError(f"the student's classes {student.labels} are not the teacher's {teacher.labels}")
        return student

    def _cut(self, teacher: Model, examples: Examples | None, seed: int, vocabulary: Vocabulary | None) -> Model:
        """A student of the teacher's own architecture."""
        if teacher.checkpoint.is_factory:
            raise InputError(
                f"a factory's module cannot be cut; give --student package.module:factory "
                f"for a smaller one than {teacher.checkpoint}"
            )
        if self.reads_examples and examples is None:
            raise InputError(
                "hidden, neurons, vocabulary and pick: importance cut by the training examples, and there are none: "
                "give data.train"
            )
        config: Any = copy.deepcopy(teacher.core.config)
        encode = teacher.encode
        layers = self._layers(teacher, examples, seed)
        setattr(config, named(config, "num_layers"), len(layers))
        if isinstance(vars(config).get("layer_types"), list):
            config.layer_types = [config.layer_types[i] for i in layers]
        spaces, kept = self._widths(teacher, config, examples, seed)
        if self.vocabulary:
            assert examples is not None  # it reads examples
            vocabulary = vocabulary or cut_vocabulary(teacher, examples, self.vocabulary)
            encode = vocabulary.encode
            vocabulary.renumber(config)
            spaces = of_tokens(teacher.core) | spaces
            kept["vocabulary"] = torch.tensor(vocabulary.kept)
        core: Any = _build(teacher.core, config, layers, spaces, kept)
        if getattr(teacher.core, "generation_config", None) is not None:
            core.generation_config = copy.deepcopy(teacher.core.generation_config)
            if vocabulary:
                vocabulary.renumber(core.generation_config)
        if self.rank:
            factorise(core, self.rank)
        module = copy.deepcopy(teacher.module, {id(teacher.core): core})
        return replace(teacher, module=module.eval(), core=core.eval(), encode=encode, fresh=())

    def _layers(self, teacher: Model, examples: Examples | None, seed: int) -> list[int]:
        """Indices of the layers that stay, rising."""
        depth = number(teacher.core.config, "num_layers")
        if isinstance(self.layers, tuple):
            if self.layers[-1] >= depth:
                raise InputError(
                    f"layers={[*self.layers]}: the teacher's {depth} layers are numbered from 0 to {depth - 1}"
                )
            return [*self.layers]
        count = self.layers or depth
        if count > depth:
            raise InputError(f"layers={count}: the teacher has {depth} layers, so a cut keeps 1 to {depth}")
        if self.pick == "importance":
            assert examples is not None  # it reads examples
            return [int(i) for i in most_important(block_influence(teacher, examples, seed), count)]
        if self.pick == "first":
            return [*range(count)]
        return [round(i) for i in np.linspace(0, depth - 1, count)] if count > 1 else [0]

    def _widths(self, teacher: Model, config: Any, examples: Examples | None, seed: int) -> tuple[Spaces, Kept]:
        """The spaces of the teacher's weights and what stays of each; the config is given the new widths."""
        if not (self.hidden or self.neurons):
            return {}, {}
        assert examples is not None  # it reads examples
        _narrow(config, self.hidden, self.neurons)
        spaces = spaces_of(teacher.core)
        scores = taylor_importance(teacher, examples, spaces, seed)
        hidden, neurons = number(config, "hidden_size"), neurons_of(config)
        groups = groups_of(teacher.core.config)
        kept: Kept = {}
        for space, score in scores.items():
            match space.partition("."):
                case "heads", _, layer:
                    both = {name: scores[name] for name in (space, f"keys.{layer}") if name in scores}
                    together = torch.stack([one.view(groups, -1).sum(dim=1) for one in both.values()]).sum(dim=0)
                    stay = most_important(together, groups_of(config))
                    kept |= {name: _inside(stay, len(one) // groups) for name, one in both.items()}
                case "neurons", _, _:
                    kept[space] = most_important(score, neurons)
                case (("hidden" | "pooled"), _, _):
                    kept[space] = most_important(score, hidden)
        return spaces, kept


def layers_of(checkpoint: Checkpoint) -> int:
    """Transformer layers of a checkpoint that `transformers` opens.

    Raises:
        InputError: its architecture has no single such number.
    """
    from transformers import AutoConfig

    with reading_weights(checkpoint):
        config = AutoConfig.from_pretrained(open_folder(checkpoint), trust_remote_code=False)
    return number(config, "num_layers")


def _narrow(config: Any, hidden: int | None, neurons: int | None) -> None:
    """Set smaller widths; heads shrink by whole groups and keep their size."""
    width, heads, inner = named(config, "hidden_size"), named(config, "num_attention_heads"), feed_forward(config)
    old, most, size, groups = int(getattr(config, width)), neurons_of(config), head_size(config), groups_of(config)
    hidden, step = hidden or old, math.gcd(size, old)
    if hidden > old or hidden % step:
        raise InputError(
            f"hidden={hidden}: a multiple of {step} is needed, for the teacher's head size {size}, and at most {old}"
        )
    if neurons and neurons > most:
        raise InputError(f"neurons={neurons}: the teacher's feed-forward is {most} wide, so a cut keeps 1 to {most}")
    each, least = getattr(config, heads) // groups, -(-groups * hidden // old)  # in proportion, rounded up
    stay = next((n for n in range(least, groups) if hidden % (n * each) == 0), groups)
    setattr(config, inner, neurons or most * hidden // old)
    setattr(config, width, hidden)
    setattr(config, heads, stay * each)
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = stay
    if size * stay * each != hidden:
        config.head_dim = size


def _inside(groups: Tensor, size: int) -> Tensor:
    """The dimensions of groups of `size` neighbours."""
    return (groups[:, None] * size + torch.arange(size)).flatten()


def _build(teacher: nn.Module, config: Any, layers: list[int], spaces: Spaces, kept: Kept) -> nn.Module:
    """A model of the smaller config with the teacher's weights: of each space the dimensions kept.

    Raises:
        InputError: the teacher's weights do not fit the config.
    """
    depth = number(teacher.config, "num_layers")
    inside = tuple(f"{stack}." for stack in stacks(teacher, depth))
    theirs, sizes = teacher.state_dict(), sizes_of(teacher) if _fused(spaces) else {}
    try:
        config.validate()
        with quiet_transformers():
            student: nn.Module = type(teacher)(config)
        taken: dict[str, Tensor] = {}
        for name in student.state_dict():
            source = _source(name, inside, layers)
            weight = theirs[source]
            for dim, dimension in enumerate(spaces.get(source, ())):
                if stay := _stay(dimension, weight.shape[dim], sizes, kept):
                    weight = weight.index_select(dim, torch.cat(stay).to(weight.device))
            taken[name] = weight.clone()
        student.load_state_dict(taken)
    except (RuntimeError, IndexError, KeyError, ValueError, StrictDataclassError) as error:
        raise InputError(f"a {config.model_type} cannot be cut so ({error}); give --student CHECKPOINT") from error
    return student


def _fused(spaces: Spaces) -> bool:
    return any(len(dimension) > 1 for dimensions in spaces.values() for dimension in dimensions)


def _stay(dimension: Dimension, length: int, sizes: Mapping[str, int], kept: Kept) -> list[Tensor]:
    """Indices along a dimension that stay, of one space after the other; empty where all do."""
    if not any(space in kept for space in dimension):
        return []
    return [
        place.start + kept.get(space, torch.arange(place.stop - place.start))
        for space, place in along(dimension, length, sizes)
    ]


def _source(name: str, inside: tuple[str, ...], layers: list[int]) -> str:
    """The teacher's name of a student's weight: layer i of the student takes layer `layers[i]`."""
    for stack in inside:
        if name.startswith(stack):
            index, _, rest = name.removeprefix(stack).partition(".")
            return f"{stack}{layers[int(index)]}.{rest}"
    return name
