"""Which dimension of which weight belongs to which part of a transformer.

A *space* is a set of dimensions that are kept or cut together, over all the weights that they run through:

    vocabulary   the tokens
    hidden       the residual stream, one for all layers
    heads.I      the heads' dimensions of layer I: query, key and value to the attention's output
    neurons.I    the neurons of layer I's feed-forward
    pooled       what stands between the last layer and the classifier, where there is such a layer

Shapes: D hidden dimensions, A heads × head size, F neurons, V tokens.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from potstill.validate.errors import InputError

Spaces = dict[str, tuple[str | None, ...]]

# Ends of the names of a layer's Linear modules (BERT, RoBERTa; DistilBERT; ViT): the spaces of rows and columns.
_ROLES: Mapping[tuple[str, ...], tuple[str, str]] = {
    (".query", ".key", ".value"): ("heads", "hidden"),
    (".q_lin", ".k_lin", ".v_lin"): ("heads", "hidden"),
    (".q_proj", ".k_proj", ".v_proj"): ("heads", "hidden"),
    ("attention.output.dense", "attention.out_lin", "attention.o_proj"): ("hidden", "heads"),
    ("intermediate.dense", "ffn.lin1", "mlp.fc1"): ("neurons", "hidden"),
    ("output.dense", "ffn.lin2", "mlp.fc2"): ("hidden", "neurons"),
}
# A Linear between the layers and the classifier, and what reads it.
_POOLERS = {"pooler.dense": "classifier", "pre_classifier": "classifier", "classifier.dense": "classifier.out_proj"}
_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
}
FEED_FORWARDS = ("intermediate_size", "hidden_dim", "ffn_dim")  # what configs call the width of the feed-forward


def named(config: Any, field: str) -> str:
    """What an architecture calls a field (`num_layers`, `hidden_size`, …), by optimum's normalised configs.

    Raises:
        InputError: the architecture has no single such number.
    """
    from optimum.utils import NormalizedConfigManager

    try:
        normalized = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
        name = str(getattr(normalized, field.upper(), _FIELDS[field]))
    except KeyError:
        name = _FIELDS[field]
    name = str(getattr(config, "attribute_map", {}).get(name, name))
    if not isinstance(getattr(config, name, None), int):
        raise InputError(
            f"a {config.model_type} has no single {name}, so it cannot be cut by layers= or hidden=; "
            "give --student CHECKPOINT of a smaller one"
        )
    return name


def number(config: Any, field: str) -> int:
    """A field's value; see `named`."""
    return int(getattr(config, named(config, field)))


def feed_forward(config: Any) -> str:
    """What an architecture calls the width of its feed-forward.

    Raises:
        InputError: it has no single such number.
    """
    found = [name for name in FEED_FORWARDS if isinstance(getattr(config, name, None), int)]
    if not found:
        raise InputError(f"a {config.model_type} has no single width of its feed-forward, so its neurons cannot be cut")
    return found[0]


def stacks(core: nn.Module, depth: int) -> list[str]:
    """Names of the `ModuleList`s that hold the layers.

    Raises:
        InputError: there is none of that depth.
    """
    found = [name for name, m in core.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not found:
        raise InputError(f"no stack of {depth} layers was found in {type(core).__name__}, so it cannot be cut")
    return found


def embedding(core: nn.Module) -> str:
    """The name of the weight (V, D) that holds a vector for each token.

    Raises:
        InputError: the model has none, or one that other weights are tied to.
    """
    model: Any = core
    tokens, kind = model.get_input_embeddings(), model.config.model_type
    if not isinstance(tokens, nn.Embedding):
        raise InputError(f"a {kind} reads no tokens, so vocabulary= has nothing to cut")
    if model.get_output_embeddings() is not None:
        raise InputError(f"this {kind} writes tokens too (an output embedding), and vocabulary= cuts only those read")
    return next(name for name, weight in core.named_parameters() if weight is tokens.weight)


def spaces_of(core: nn.Module) -> Spaces:
    """The space of each dimension of each weight, by the weight's name; None where it belongs to no part.

    Raises:
        InputError: the architecture is not laid out like BERT, RoBERTa, DistilBERT or ViT.
    """
    model: Any = core
    config, depth = model.config, number(model.config, "num_layers")
    if len(stack := stacks(core, depth)) != 1:
        raise InputError(f"a {config.model_type} has {len(stack)} stacks of layers; its width cannot be cut")
    modules = dict(core.named_modules())
    spaces: Spaces = {}
    for name, module in modules.items():
        for kind, weight in module.named_parameters(prefix=name, recurse=False):
            found: tuple[str | None, ...]
            if isinstance(module, nn.Linear):
                found = _of_linear(name, stack[0], modules)
            elif isinstance(module, nn.Embedding):
                found = ("vocabulary" if module is model.get_input_embeddings() else None, "hidden")
            elif isinstance(module, nn.Conv2d):
                found = ("hidden", None, None, None)
            else:  # a norm, or a token or positions of the model's own
                found = (*(None,) * (weight.ndim - 1), "hidden")
            spaces[kind] = found[: weight.ndim]  # a bias runs along the rows
    _check(core, spaces, depth)
    return spaces


def _of_linear(name: str, stack: str, modules: Mapping[str, nn.Module]) -> tuple[str | None, str]:
    """The spaces of a Linear's rows and columns."""
    if name.startswith(f"{stack}."):
        index = name.removeprefix(f"{stack}.").partition(".")[0]
        for ends, (rows, columns) in _ROLES.items():
            if name.endswith(ends):
                return (rows, f"{columns}.{index}") if rows == "hidden" else (f"{rows}.{index}", columns)
    for pooler, reader in _POOLERS.items():
        if name.endswith(pooler):
            return "pooled", "hidden"
        if name == reader and any(other.endswith(pooler) for other in modules):
            return None, "pooled"
    return None, "hidden"


def _check(core: nn.Module, spaces: Spaces, depth: int) -> None:
    """Refuse an architecture whose parts were not all found, or found with other sizes than its config says."""
    config: Any = core.config
    hidden, neurons = number(config, "hidden_size"), int(getattr(config, feed_forward(config)))
    sizes, expected = {"hidden": hidden, "pooled": hidden}, Counter[tuple[str | None, ...]]()
    for i in range(depth):
        heads, inner = f"heads.{i}", f"neurons.{i}"
        sizes |= {heads: hidden, inner: neurons}
        expected |= {(heads, "hidden"): 3, ("hidden", heads): 1, (inner, "hidden"): 1, ("hidden", inner): 1}
    found = Counter(pair for pair in spaces.values() if pair in expected)
    weights = dict(core.named_parameters())
    fits = all(
        sizes.get(space or "", size) == size
        for name, pair in spaces.items()
        for space, size in zip(pair, weights[name].shape, strict=True)
    )
    if found != expected or not fits:
        raise InputError(
            f"a {config.model_type} is not laid out like BERT, RoBERTa, DistilBERT or ViT, so its width cannot be cut; "
            "give --student CHECKPOINT of a smaller one, or layers= alone"
        )
