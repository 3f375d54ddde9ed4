"""Which dimension of which weight belongs to which part of a transformer.

A *space* is a set of dimensions that are kept or cut together, over all the weights that they run through:

    vocabulary   the tokens
    hidden       the residual stream, one for all layers
    heads.I      the heads' dimensions of layer I: query, key and value to the attention's output
    keys.I       those of key and value alone, where the config counts their heads by itself (grouped queries)
    neurons.I    the neurons of layer I's feed-forward
    pooled       what stands between the last layer and the classifier, where there is such a layer

A dimension of a weight holds one space, several one after the other (fused weights), or none.

Shapes: D hidden dimensions, A heads × head size, G key heads × head size, F neurons, V tokens.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from potstill.validate.errors import InputError

Dimension = tuple[str, ...]  # the spaces along it, one after the other
Spaces = dict[str, tuple[Dimension, ...]]

# Ends of the names of a layer's Linear modules (BERT, RoBERTa; DistilBERT; ViT; Llama and its like; Phi-3; GPT-2): the
# kinds of their outputs and inputs.
_ROLES: Mapping[tuple[str, ...], tuple[Dimension, Dimension]] = {
    (".query", ".key", ".value"): (("heads",), ("hidden",)),
    (".q_lin", ".k_lin", ".v_lin", ".q_proj"): (("heads",), ("hidden",)),
    (".k_proj", ".v_proj"): (("keys",), ("hidden",)),
    (".qkv_proj",): (("heads", "keys", "keys"), ("hidden",)),
    (".c_attn",): (("heads", "heads", "heads"), ("hidden",)),
    ("attention.output.dense", "attention.out_lin", ".o_proj", "attn.c_proj"): (("hidden",), ("heads",)),
    ("intermediate.dense", "ffn.lin1", "mlp.fc1", "mlp.c_fc"): (("neurons",), ("hidden",)),
    ("mlp.gate_proj", "mlp.up_proj"): (("neurons",), ("hidden",)),
    ("mlp.gate_up_proj",): (("neurons", "neurons"), ("hidden",)),
    ("output.dense", "ffn.lin2", "mlp.fc2", "mlp.down_proj", "mlp.c_proj"): (("hidden",), ("neurons",)),
}
_OF_HEADS = ("q_norm", "k_norm")  # norms inside each head
# A Linear between the layers and the classifier, and what reads it.
_POOLERS = {"pooler.dense": "classifier", "pre_classifier": "classifier", "classifier.dense": "classifier.out_proj"}
_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
}
# What configs call the width of the feed-forward.
FEED_FORWARDS = ("intermediate_size", "hidden_dim", "ffn_dim", "n_inner")


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
    found += ["n_inner"] if hasattr(config, "n_inner") else []  # GPT-2's is None: 4 D
    if not found:
        raise InputError(f"a {config.model_type} has no single width of its feed-forward, so its neurons cannot be cut")
    return found[0]


def neurons_of(config: Any) -> int:
    """The width of the feed-forward."""
    return int(getattr(config, feed_forward(config)) or 4 * number(config, "hidden_size"))


def head_size(config: Any) -> int:
    """Dimensions of a head: `head_dim`, else D shared out over the heads."""
    return int(
        getattr(config, "head_dim", None) or number(config, "hidden_size") // number(config, "num_attention_heads")
    )


def groups_of(config: Any) -> int:
    """Heads of keys and values; each serves as many query heads as any other."""
    return int(getattr(config, "num_key_value_heads", None) or number(config, "num_attention_heads"))


def sizes_of(core: nn.Module) -> dict[str, int]:
    """How many dimensions each space has, by the config."""
    config: Any = core.config
    hidden, size = number(config, "hidden_size"), head_size(config)
    sizes = {"hidden": hidden, "pooled": hidden, "vocabulary": int(getattr(config, "vocab_size", 0))}
    for i in range(number(config, "num_layers")):
        sizes |= {
            f"heads.{i}": number(config, "num_attention_heads") * size,
            f"keys.{i}": groups_of(config) * size,
            f"neurons.{i}": neurons_of(config),
        }
    return sizes


def along(dimension: Dimension, length: int, sizes: Mapping[str, int]) -> Iterator[tuple[str, slice]]:
    """Each space along a dimension of a weight, and where it lies there."""
    start = 0
    for space in dimension:
        end = start + (sizes[space] if len(dimension) > 1 else length)
        yield space, slice(start, end)
        start = end


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
        InputError: the model has none.
    """
    model: Any = core
    tokens, kind = model.get_input_embeddings(), model.config.model_type
    if not isinstance(tokens, nn.Embedding):
        raise InputError(f"a {kind} reads no tokens, so vocabulary= has nothing to cut")
    return next(name for name, weight in core.named_parameters() if weight is tokens.weight)


def of_tokens(core: nn.Module) -> Spaces:
    """The weights with a row for each token: the embedding, and what writes tokens, tied to it or not.

    Raises:
        InputError: the model has no embedding of tokens, or writes tokens without being one that generates texts.
    """
    model: Any = core
    head, reads, kind = model.get_output_embeddings(), embedding(core), model.config.model_type
    if head is not None and not model.can_generate():
        raise InputError(f"this {kind} writes tokens too (an output embedding), and vocabulary= cuts only those read")
    own = [] if head is None else [id(weight) for weight in head.parameters()]
    every = core.named_parameters(remove_duplicate=False)
    found = {name: weight.ndim for name, weight in every if name == reads or id(weight) in own}
    return {name: (("vocabulary",), *((),) * (ndim - 1)) for name, ndim in found.items()}


def spaces_of(core: nn.Module) -> Spaces:
    """The spaces along each dimension of each weight, by the weight's name; none where it belongs to no part.

    Raises:
        InputError: the architecture is not laid out like one of those whose names are known.
    """
    model: Any = core
    config, depth = model.config, number(model.config, "num_layers")
    if len(stack := stacks(core, depth)) != 1:
        raise InputError(f"a {config.model_type} has {len(stack)} stacks of layers; its width cannot be cut")
    modules = dict(core.named_modules())
    spaces: Spaces = {}
    for name, module in modules.items():
        for kind, weight in module.named_parameters(prefix=name, recurse=False):
            spaces[kind] = _of_weight(weight, name, module, stack[0], modules, model)
    _check(core, spaces, depth)
    return spaces


def _of_weight(
    weight: Tensor, name: str, module: nn.Module, stack: str, modules: Mapping[str, nn.Module], model: Any
) -> tuple[Dimension, ...]:
    """The spaces along each dimension of one weight of a module."""
    found: tuple[Dimension, ...]
    if isinstance(module, nn.Linear | Conv1D):
        outputs, inputs = _of_linear(name, stack, modules, model)
        if module is model.get_output_embeddings():
            outputs = ("vocabulary",)
        transposed = isinstance(module, Conv1D) and weight.ndim == 2
        found = (inputs, outputs) if transposed else (outputs, inputs)
    elif isinstance(module, nn.Embedding):
        found = ("vocabulary",) if module is model.get_input_embeddings() else (), ("hidden",)
    elif isinstance(module, nn.Conv2d):
        found = ("hidden",), (), (), ()
    elif name.endswith(_OF_HEADS):
        found = ((),)
    else:  # a norm, or a token or positions of the model's own
        found = (*((),) * (weight.ndim - 1), ("hidden",))
    return found[: weight.ndim]  # a bias runs along the outputs


def _of_linear(name: str, stack: str, modules: Mapping[str, nn.Module], model: Any) -> tuple[Dimension, Dimension]:
    """The spaces of a Linear's outputs and inputs; none for one of the layers that is not known."""
    if name.startswith(f"{stack}."):
        index = name.removeprefix(f"{stack}.").partition(".")[0]
        grouped = hasattr(model.config, "num_key_value_heads")

        def here(kinds: Dimension) -> Dimension:
            own = [kind if grouped or kind != "keys" else "heads" for kind in kinds]
            return tuple(kind if kind == "hidden" else f"{kind}.{index}" for kind in own)

        return next(
            ((here(rows), here(columns)) for ends, (rows, columns) in _ROLES.items() if name.endswith(ends)), ((), ())
        )
    for pooler, reader in _POOLERS.items():
        if name.endswith(pooler):
            return ("pooled",), ("hidden",)
        if name == reader and any(other.endswith(pooler) for other in modules):
            return (), ("pooled",)
    return (), ("hidden",)


def _check(core: nn.Module, spaces: Spaces, depth: int) -> None:
    """Refuse an architecture whose parts were not all found, or found with other sizes than its config says."""
    config: Any = core.config
    sizes, weights = sizes_of(core), dict(core.named_parameters(remove_duplicate=False))
    matrices = {name: found for name, found in spaces.items() if weights[name].ndim == 2}
    met = Counter(space for found in matrices.values() for dimension in found for space in dimension)
    whole = all(
        met[f"heads.{i}"] + met[f"keys.{i}"] == 4 and met[f"neurons.{i}"] in (2, 3) for i in range(depth)
    )  # query, key, value, output; (gate,) up, down
    fits = all(
        not dimension or sum(sizes[space] for space in dimension) == size
        for name, found in spaces.items()
        for dimension, size in zip(found, weights[name].shape, strict=True)
    )
    if not (whole and fits and all(any(found) for found in matrices.values())):
        raise InputError(
            f"a {config.model_type} is not laid out like BERT, DistilBERT, ViT, Llama, Phi-3 or GPT-2, so its width "
            "cannot be cut; give --student CHECKPOINT of a smaller one, or layers= alone"
        )
