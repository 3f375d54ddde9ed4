"""A recipe's `losses` as weighted terms: `{kl: 0.9, hard: {weight: 0.1, smoothing: 0.1}}`."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from potstill.compress.layer_losses import LAYERS
from potstill.compress.losses import HARD, SOFT
from potstill.validate.errors import did_you_mean

Given = Mapping[str, float | Mapping[str, Any]]


@dataclass(frozen=True)
class Term:
    """One loss with its weight and settings.

    Attributes:
        name: in `SOFT`, `HARD` or `LAYERS`.
        weight: above 0.
        settings: of the loss's function.
        layers: for a layer loss, the student's to the teacher's layers; None for the default.
    """

    name: str
    weight: float
    settings: Mapping[str, Any]
    layers: Mapping[Any, Any] | None = None

    @functools.cached_property
    def function(self) -> Callable[..., Tensor]:
        """The loss with its settings filled in."""
        function = LAYERS[self.name].function if self.name in LAYERS else (SOFT | HARD)[self.name]  # type: ignore[operator]
        return functools.partial(function, **self.settings)

    @functools.cached_property
    def needs_labels(self) -> bool:
        """Whether the loss reads labels beside the teacher's outputs."""
        return self.name in SOFT and "labels" in inspect.signature(SOFT[self.name]).parameters


def terms(losses: Given, temperature: float | None = None) -> list[Term]:
    """The terms of a recipe's `losses`; those of weight 0 are left out.

    Args:
        losses: weights, or mappings with `weight`, the loss's own settings and, for a layer loss, `layers`.
        temperature: for the losses that take one and were given none.

    Raises:
        ValueError: an unknown loss or setting, a weight that is no positive number, or nothing to learn from.
    """
    found = [_term(name, given, temperature) for name, given in losses.items()]
    found = [term for term in found if term.weight > 0]
    if not found:
        raise ValueError("losses: nothing to learn from; give at least one a weight above 0, e.g. {kl: 0.9, hard: 0.1}")
    return found


def _term(name: str, given: float | Mapping[str, Any], temperature: float | None) -> Term:
    known = {**SOFT, **HARD, **{layer: loss.function for layer, loss in LAYERS.items()}}
    if name not in known:
        raise ValueError(f"losses: unknown loss {name!r}{did_you_mean(name, [*known])}")
    settings = dict(given) if isinstance(given, Mapping) else {"weight": given}
    weight, layers = settings.pop("weight", 1.0), settings.pop("layers", None)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ValueError(f"losses: the weight of {name} must be a number from 0 up, and is {weight!r}")
    if layers is not None and (name not in LAYERS or not isinstance(layers, Mapping) or not layers):
        raise ValueError(
            f"losses: {name}.layers: expected the student's to the teacher's layers, e.g. {{0: 2, 1: 5}}"
            if name in LAYERS
            else f"losses: {name} has no layers to match"
        )
    takes = [p.name for p in inspect.signature(known[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for key, value in settings.items():
        if key not in takes:
            raise ValueError(f"losses: {name} has no setting {key!r}{did_you_mean(key, [*takes, 'weight'])}")
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"losses: {name}.{key} must be a number, and is {value!r}")
    if settings.get("temperature", 1) <= 0:
        raise ValueError(f"losses: {name}.temperature must be above 0, and is {settings['temperature']:g}")
    if "temperature" in takes and temperature is not None:
        settings = {"temperature": temperature} | settings
    return Term(name, float(weight), settings, layers)
