"""How much the loss hangs on each part of a model: first-order Taylor importance, by gates.

A gate ξ = 1 multiplies what a part gives to the rest: the input features that a Linear or Conv module takes from it, or
all that a layer adds to its residual stream. To first order the loss changes by |∂L/∂ξ| when the part is
removed; the importance of a part is the mean of that over examples (Molchanov et al. 2019, "Importance estimation for
neural network pruning", section 3, with gates; for heads Michel et al. 2019, "Are sixteen heads really better than
one?", equation 2). Molchanov squares it; the absolute value lets few examples of large loss rule less.

Shapes: B examples in a batch, U units of a part (heads of a layer, neurons of a layer, channels), F features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from potstill.compress.losses import hard
from potstill.validate.aligned import read_by
from potstill.validate.data import Examples
from potstill.validate.errors import InputError
from potstill.validate.examples import IGNORED
from potstill.validate.progress import track
from potstill.validate.task import Model
from potstill.validate.tokens import TokensEncoder

BATCH = 32


@dataclass(frozen=True)
class Site:
    """Where the units of a part are gated.

    Attributes:
        module: a Linear or Conv that takes what the units give; or a transformer layer.
        unit: (F,) for each input feature of `module` its unit, −1 for a feature of something else. None for a
            layer, which has one gate, on what it adds to its input.
    """

    module: nn.Module
    unit: Tensor | None


@dataclass(frozen=True)
class Part:
    """Units that can be removed one by one.

    Attributes:
        name: dotted name of the module that computes them.
        units: U, how many there are.
        sites: all the places that they reach.
    """

    name: str
    units: int
    sites: tuple[Site, ...]


@contextmanager
def gated(parts: Sequence[Part], gates: Sequence[Tensor]) -> Iterator[None]:
    """Multiply the units of some parts by gates, (B, U) or (1, U) each, in every forward pass inside the block."""
    with ExitStack() as hooks:
        for part, gate in zip(parts, gates, strict=True):
            for site in part.sites:
                handle = (
                    site.module.register_forward_hook(_scale_branch(gate), with_kwargs=True)
                    if site.unit is None
                    else site.module.register_forward_pre_hook(_scale_inputs(gate, site.unit, part.name))
                )
                hooks.callback(handle.remove)
        yield


def _scale_inputs(gate: Tensor, unit: Tensor, name: str) -> Callable[..., Any]:
    """A hook that multiplies input features: the last axis of a Linear's input, axis 1 of a Conv's."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = args
        if len(gate) not in (1, len(x)):
            raise InputError(f"{name} cannot be judged example by example: a batch of {len(gate)} arrives as {len(x)}")
        ones = gate.new_ones(len(gate), 1)  # what −1 picks
        factors = torch.cat([gate, ones], dim=1)[:, unit.to(gate.device)]
        middle = [1] * (x.ndim - 2)
        linear = isinstance(module, nn.Linear)
        shape = (len(gate), *middle, factors.shape[1]) if linear else (len(gate), factors.shape[1], *middle)
        return (x * factors.view(shape), *rest)

    return hook


def _scale_branch(gate: Tensor) -> Callable[..., Any]:
    """A hook that turns a layer's output h, given x, into x + ξ (h − x)."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        h: Tensor = output[0] if isinstance(output, tuple) else output
        mixed = x + gate.view(-1, *[1] * (x.ndim - 1)) * (h - x)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    return hook


def importance(
    model: Model, parts: Sequence[Part], examples: Examples, device: torch.device
) -> list[NDArray[np.float64]]:
    """The importance of each unit of each part, (U,) for each: mean over the examples of |∂L/∂ξ|, in nats.

    L is the hard-label loss of one example, summed over its labels where it has several. The model is in
    eval mode: no dropout, batch norm by its running statistics.

    Raises:
        InputError: a part mixes the examples of a batch, so that none can be judged alone; or there are no labels.
    """
    if not parts:
        return []
    model, examples = one_by_one(model), read_by(examples, model.encode)
    module = model.module.to(device).eval()
    totals, labelled = [np.zeros(part.units) for part in parts], 0
    with track("weighing what can be pruned", len(examples)) as advance:
        for start in range(0, len(examples), BATCH):
            indices = list(range(start, min(start + BATCH, len(examples))))
            labels = torch.from_numpy(examples.labels_of(indices)).to(device)
            gates = [torch.ones(len(indices), part.units, device=device, requires_grad=True) for part in parts]
            with gated(parts, gates):
                tensors = model.tensors(examples.rows(indices), device)
                rows, labels = model.answers(tensors), tensors.get("targets", labels)
                known = (labels != IGNORED).sum()
                loss, labelled = hard(rows, labels) * known, labelled + int(known)
            for total, slope in zip(totals, torch.autograd.grad(loss, gates), strict=True):
                total += slope.abs().double().sum(dim=0).cpu().numpy()
            advance(len(indices))
    if not labelled:
        raise InputError(f"importance is measured with labels, and {examples.name} has none")
    module.to("cpu")
    return [total / len(examples) for total in totals]


def one_by_one(model: Model) -> Model:
    """The model with each example in a row of its own, where its encoder would pack several into one."""
    return (
        replace(model, encode=replace(model.encode, packs=False)) if isinstance(model.encode, TokensEncoder) else model
    )


def outputs(
    module: nn.Module, inputs: Sequence[Tensor], parts: Sequence[Part], gone: Sequence[Sequence[int]]
) -> Tensor:
    """What a module gives when some units of some parts are gated to zero."""
    gates = [torch.ones(1, part.units) for part in parts]
    for gate, units in zip(gates, gone, strict=True):
        gate[:, list(units)] = 0.0
    with torch.inference_mode(), gated(parts, gates):
        result: Tensor = module(*inputs)
    return result


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two outputs are the same to float32's rounding: 1e-4 of the largest value."""
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))
