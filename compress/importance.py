"""How much each part of a trained transformer matters, measured on examples.

Shapes: B examples in a batch, T tokens or patches, D hidden dimensions, L layers.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from potstill.compress.anatomy import Spaces, along, number, sizes_of, stacks
from potstill.compress.layers import hooked
from potstill.compress.losses import hard
from potstill.validate.data import Examples
from potstill.validate.errors import InputError
from potstill.validate.examples import IGNORED
from potstill.validate.predictor import best_device
from potstill.validate.task import Model

MEASURED_ON = 256  # examples, drawn by the seed
BATCH = 16


def taylor_importance(model: Model, examples: Examples, spaces: Spaces, seed: int) -> dict[str, Tensor]:
    """First-order Taylor importance of each dimension of each space: Σ |w · ∂L/∂w| over its weights and the batches.

    L is the hard-label loss. To the first order it changes by w · ∂L/∂w when a weight goes (Molchanov 2019, "Importance
    estimation for neural network pruning"; for heads Michel 2019, "Are sixteen heads really better than one?").

    Args:
        model: a trained model.
        examples: with class labels; `MEASURED_ON` of them are used.
        spaces: of which dimensions; see `anatomy`.
        seed: of the draw.

    Returns:
        For each space, one number ≥ 0 for each of its dimensions, float64.

    Raises:
        InputError: the labels are no classes.
    """
    if examples.labels.dtype.kind not in "iu":
        raise InputError(f"importance is measured with class labels, and those of {examples.name} are none")
    weights = {name: w for name, w in model.core.named_parameters() if any(spaces.get(name, ()))}
    scores: dict[str, Tensor] = {}
    labelled, sizes = 0, sizes_of(model.core)
    for tensors, labels in _batches(model, examples, seed):
        labelled += int((labels != IGNORED).sum())
        loss = hard(model.answers(tensors), labels)
        slopes = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
        for (name, w), slope in zip(weights.items(), slopes, strict=True):
            change = (w.detach() * slope).abs()
            for dim, dimension in enumerate(spaces[name]):
                part = change.transpose(0, dim).flatten(1).sum(dim=1) if change.ndim > 1 else change
                for space, place in along(dimension, len(part), sizes):
                    scores[space] = scores.get(space, 0) + part[place].double().cpu()
    if not labelled:
        raise InputError(
            f"importance is measured with labels, and {examples.name} has none; cut layers, vocabulary or rank instead"
        )
    return scores


def block_influence(model: Model, examples: Examples, seed: int) -> Tensor:
    """How far each layer turns its input: 1 − mean over tokens of cos(input, output), shape (L,).

    The block influence of Men 2024, "ShortGPT: layers in large language models are more redundant than you expect".

    Args:
        model: a trained transformer.
        examples: `MEASURED_ON` of them are used; labels are not.
        seed: of the draw.
    """
    depth = number(model.core.config, "num_layers")
    stack = stacks(model.core, depth)[0]
    layers = {f"{stack}.{i}": model.core.get_submodule(f"{stack}.{i}") for i in range(depth)}
    turned, tokens = torch.zeros(depth, dtype=torch.float64), 0.0
    seen: dict[str, Tensor] = {}

    def note(name: str, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        after = output if isinstance(output, Tensor) else output[0]
        seen[name] = F.cosine_similarity(inputs[0].double(), after.double(), dim=-1)  # (B, T)

    with torch.no_grad(), hooked(layers, note):
        for tensors, _labels in _batches(model, examples, seed):
            model.answers(tensors)
            cosines = torch.stack([seen[name] for name in layers])
            real = _real(tensors, cosines[0])
            tokens += real.sum().item()
            turned += ((1 - cosines) * real).sum(dim=(1, 2)).cpu()
    return turned / tokens


def _real(tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """1 for each token (B, T) that is no padding; of a language model, that has a next one."""
    if "places" in tensors:
        return torch.zeros_like(like).flatten().index_fill(0, tensors["places"], 1.0).view_as(like)
    return tensors["attention_mask"].double() if "attention_mask" in tensors else torch.ones_like(like)


def most_important(scores: Tensor, keep: int) -> Tensor:
    """Indices, rising, of the `keep` largest scores."""
    return scores.topk(keep).indices.sort().values


def _batches(model: Model, examples: Examples, seed: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Encoded examples and their labels on the best device, to which the model is moved."""
    device, truncated = best_device(), model.encode.truncated
    order = np.random.default_rng(seed).permutation(len(examples))[:MEASURED_ON].tolist()
    model.module.to(device).eval()
    for start in range(0, len(order), BATCH):
        index = order[start : start + BATCH]
        tensors = model.tensors(examples.rows(index), device)
        labels = torch.from_numpy(np.asarray(examples.labels_of(index))).to(device)
        yield tensors, tensors.get("targets", labels)
    model.encode.truncated = truncated
