"""The student: cut from the teacher, or a checkpoint of its own."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from potstill.compress.anatomy import Spaces, embedding, feed_forward, named, number, spaces_of, stacks
from potstill.compress.importance import block_influence, most_important, taylor_importance
from potstill.compress.low_rank import factorise
from potstill.compress.settings import StudentSettings
from potstill.compress.vocabulary import cut_vocabulary
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
    in the whole teacher; the hidden dimensions are the same for all layers, heads and neurons each layer's own. Tokens
    that no example uses go from the embedding and from the tokenizer. Weights of the layers become products of two by
    their singular values. A factory or another checkpoint brings its own weights.
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
            parts.append(f"{self.neurons} of {getattr(config, feed_forward(config))} neurons")
        if self.vocabulary:
            parts.append("tokens in use" if self.vocabulary == "used" else f"at most {self.vocabulary} tokens")
        if self.rank:
            parts.append(f"rank {self.rank:.0%}" if self.rank < 1 else f"rank {self.rank}")
        return ", ".join(parts)

    def __call__(
        self, teacher: Model, task: Task, options: dict[str, Any], seed: int, examples: Examples | None = None
    ) -> Model:
        """The student, untrained.

        Args:
            teacher: whose classes, and for a cut whose weights, it takes.
            task: how a checkpoint is loaded.
            options: the task's own loading options.
            seed: for weights that no checkpoint gives, and for the examples that importance is measured on.
            examples: training examples with labels, for a cut that `reads_examples`.

        Raises:
            InputError: the teacher cannot be cut so, or the checkpoint does not fit the teacher's classes.
        """
        torch.manual_seed(seed)
        if self.checkpoint is None:
            return self._cut(teacher, examples, seed)
        student = task.load(Checkpoint(self.checkpoint, self.weights), teacher.labels, like=teacher, **options)
        if student.labels != teacher.labels:
            raise InputError(f"the student's classes {student.labels} are not the teacher's {teacher.labels}")
        return student

    def _cut(self, teacher: Model, examples: Examples | None, seed: int) -> Model:
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
        if isinstance(getattr(config, "layer_types", None), list):
            config.layer_types = [config.layer_types[i] for i in layers]
        spaces, kept = self._widths(teacher, config, examples, seed)
        if self.vocabulary:
            assert examples is not None  # it reads examples
            encode, tokens = cut_vocabulary(teacher, examples, self.vocabulary, config)
            spaces.setdefault(embedding(teacher.core), ("vocabulary", None))
            kept["vocabulary"] = torch.tensor(tokens)
        core = _build(teacher.core, config, layers, spaces, kept)
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
        head_size = _narrow(config, self.hidden, self.neurons)
        spaces = spaces_of(teacher.core)
        scores = taylor_importance(teacher, examples, spaces, seed)
        hidden, neurons = number(config, "hidden_size"), int(getattr(config, feed_forward(config)))
        kept = {}
        for space, score in scores.items():
            match space.partition(".")[0]:
                case "heads":
                    kept[space] = most_important(score, hidden // head_size, head_size)
                case "neurons":
                    kept[space] = most_important(score, neurons)
                case "hidden" | "pooled":
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


def _narrow(config: Any, hidden: int | None, neurons: int | None) -> int:
    """Set smaller widths, the head size kept; gives the head size."""
    width, heads, inner = named(config, "hidden_size"), named(config, "num_attention_heads"), feed_forward(config)
    old, most = int(getattr(config, width)), int(getattr(config, inner))
    head_size = old // int(getattr(config, heads))
    hidden = hidden or old
    if hidden > old or hidden % head_size:
        raise InputError(
            f"hidden={hidden}: a multiple of the teacher's head size {head_size}, at most {old}, is needed"
        )
    if neurons and neurons > most:
        raise InputError(f"neurons={neurons}: the teacher's feed-forward is {most} wide, so a cut keeps 1 to {most}")
    setattr(config, inner, neurons or most * hidden // old)
    setattr(config, width, hidden)
    setattr(config, heads, hidden // head_size)
    return head_size


def _build(teacher: nn.Module, config: Any, layers: list[int], spaces: Spaces, kept: Kept) -> nn.Module:
    """A model of the smaller config with the teacher's weights: of each space the dimensions kept.

    Raises:
        InputError: the teacher's weights do not fit the config.
    """
    depth = number(teacher.config, "num_layers")
    inside = tuple(f"{stack}." for stack in stacks(teacher, depth))
    theirs = teacher.state_dict()
    try:
        with quiet_transformers():
            student: nn.Module = type(teacher)(config)
        taken: dict[str, Tensor] = {}
        for name in student.state_dict():
            source = _source(name, inside, layers)
            weight = theirs[source]
            for dim, space in enumerate(spaces.get(source, ())):
                if space in kept:
                    weight = weight.index_select(dim, kept[space].to(weight.device))
            taken[name] = weight.clone()
        student.load_state_dict(taken)
    except (RuntimeError, IndexError, KeyError, ValueError) as error:
        raise InputError(f"a {config.model_type} cannot be cut so ({error}); give --student CHECKPOINT") from error
    return student


def _source(name: str, inside: tuple[str, ...], layers: list[int]) -> str:
    """The teacher's name of a student's weight: layer i of the student takes layer `layers[i]`."""
    for stack in inside:
        if name.startswith(stack):
            index, _, rest = name.removeprefix(stack).partition(".")
            return f"{stack}{layers[int(index)]}.{rest}"
    return name
