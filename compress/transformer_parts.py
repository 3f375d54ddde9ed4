"""What can be cut out of a transformer: layers, neurons of the feed-forward, and heads of an encoder.

The Linear modules are cut directly (with torch-pruning's functions): in a transformer each part is one feature range of
a few named modules, and its config has to say the same, which a traced graph does not know.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import nn

from potstill.compress.anatomy import FEED_FORWARDS
from potstill.compress.gates import Part, Site
from potstill.validate.errors import InputError
from potstill.validate.reshape import mark

HEADS = ("num_attention_heads", "n_heads", "num_heads")  # what attention modules call their number of heads


@dataclass(frozen=True)
class Names:
    """Where a layer of an architecture has its modules."""

    attention: str
    inputs: tuple[str, str, str]  # query, key, value: below `attention`
    output: str
    up: str
    down: str
    gate: str | None = None  # of a gated feed-forward, beside `up`


KNOWN = (
    Names("attention.self", ("query", "key", "value"), "attention.output.dense", "intermediate.dense", "output.dense"),
    Names("attention", ("q_lin", "k_lin", "v_lin"), "attention.out_lin", "ffn.lin1", "ffn.lin2"),
    Names("attention", ("q_proj", "k_proj", "v_proj"), "attention.o_proj", "mlp.fc1", "mlp.fc2"),
    Names(
        "self_attn", ("q_proj", "k_proj", "v_proj"), "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj"
    ),
)  # BERT, RoBERTa, ELECTRA, …; DistilBERT; ViT, DeiT; Llama, Mistral, Qwen, Gemma


class Encoder:
    """The one stack of layers of a transformer, and what can be removed from it."""

    def __init__(self, core: Any, path: str, names: Names) -> None:
        self._core, self._path, self._names = core, path, names

    @property
    def layers(self) -> nn.ModuleList:
        """The stack."""
        stack: nn.ModuleList = self._core.get_submodule(self._path)
        return stack

    @property
    def gated(self) -> bool:
        """Whether it is of Llama's form: a gated feed-forward, and heads that may share keys: none goes alone."""
        return self._names.gate is not None

    def layer_parts(self) -> list[Part]:
        """One part for each layer, of one unit."""
        return [Part(f"{self._path}.{i}", 1, (Site(layer, None),)) for i, layer in enumerate(self.layers)]

    def head_parts(self) -> list[Part]:
        """One part for each layer, its heads the units."""
        parts = []
        for i, layer in enumerate(self.layers):
            attention = layer.get_submodule(self._names.attention)
            output = _linear(layer, self._names.output)
            heads = int(getattr(attention, _heads(attention)))
            unit = torch.arange(heads).repeat_interleave(output.in_features // heads)
            parts.append(Part(f"{self._path}.{i}.{self._names.attention}", heads, (Site(output, unit),)))
        return parts

    def neuron_parts(self) -> list[Part]:
        """One part for each layer, the neurons of its feed-forward the units."""
        parts = []
        for i, layer in enumerate(self.layers):
            down = _linear(layer, self._names.down)
            unit = torch.arange(down.in_features)
            parts.append(Part(f"{self._path}.{i}.{self._names.up}", down.in_features, (Site(down, unit),)))
        return parts

    def remove_layers(self, gone: Sequence[int]) -> None:
        """Take layers out, by index, and say so in the config."""
        config = self._core.config
        kept = [i for i in range(len(self.layers)) if i not in set(gone)]
        parent, _, name = self._path.rpartition(".")
        setattr(self._core.get_submodule(parent), name, nn.ModuleList([self.layers[i] for i in kept]))
        config.num_hidden_layers = len(kept)
        if isinstance(getattr(config, "layer_types", None), list):
            config.layer_types = [config.layer_types[i] for i in kept]
        for i, layer in enumerate(self.layers):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    vars(module)["layer_idx"] = i

    def remove_heads(self, gone: Mapping[str, Sequence[int]]) -> None:
        """Take heads out, by the name of their part and their indices; no config can say so: the model is marked."""
        for part, layer in zip(self.head_parts(), self.layers, strict=True):
            attention: Any = layer.get_submodule(self._names.attention)
            output = _linear(layer, self._names.output)
            size = output.in_features // part.units
            features = [head * size + i for head in gone[part.name] for i in range(size)]
            for name in self._names.inputs:
                torch_pruning.prune_linear_out_channels(_linear(attention, name), features)
            torch_pruning.prune_linear_in_channels(output, features)
            setattr(attention, _heads(attention), part.units - len(gone[part.name]))
            if hasattr(attention, "all_head_size"):
                attention.all_head_size = output.in_features
        mark(self._core)

    def remove_neurons(self, gone: Mapping[str, Sequence[int]]) -> None:
        """Take neurons out, by the name of their part and their indices, as many in each; the config says so."""
        parts = self.neuron_parts()
        for part, layer in zip(parts, self.layers, strict=True):
            for name in filter(None, (self._names.up, self._names.gate)):
                torch_pruning.prune_linear_out_channels(_linear(layer, name), list(gone[part.name]))
            torch_pruning.prune_linear_in_channels(_linear(layer, self._names.down), list(gone[part.name]))
        config, width = self._core.config, parts[0].units
        setattr(config, _inner(config, width), width - len(gone[parts[0].name]))


def encoder_of(core: nn.Module) -> Encoder | None:
    """The stack of transformer layers of a model; None where there is none that is known.

    Raises:
        InputError: there are several.
    """
    found = [
        (path, names)
        for path, module in core.named_modules()
        for names in KNOWN
        if isinstance(module, nn.ModuleList) and len(module) and all(_fits(layer, names) for layer in module)
    ]
    if len(found) > 1:
        stacks = ", ".join(path for path, _ in found)
        raise InputError(f"{type(core).__name__} has {len(found)} stacks of layers ({stacks}); one can be pruned")
    if not found or not hasattr(core, "config"):
        return None
    encoder = Encoder(core, *found[0])
    return encoder if _inner(core.config, encoder.neuron_parts()[0].units) else None


def _inner(config: Any, width: int) -> str:
    """What a config calls the width of its feed-forward; empty where nothing has that width."""
    return next((name for name in FEED_FORWARDS if getattr(config, name, None) == width), "")


def _fits(layer: nn.Module, names: Names) -> bool:
    inside = dict(layer.named_modules())
    wanted = [*(f"{names.attention}.{name}" for name in names.inputs), names.output, names.up, names.down]
    wanted += [names.gate] if names.gate else []
    return all(isinstance(inside.get(name), nn.Linear) for name in wanted)


def _linear(module: nn.Module, path: str) -> nn.Linear:
    found = module.get_submodule(path)
    assert isinstance(found, nn.Linear)
    return found


def _heads(attention: nn.Module) -> str:
    return next(name for name in HEADS if isinstance(getattr(attention, name, None), int))
