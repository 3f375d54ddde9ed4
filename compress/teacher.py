"""The teacher while a student learns: frozen, on the training device."""

import torch
from torch import Tensor

from potstill.validate.task import Model


class Teacher:
    """Logits of a frozen model."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self._module = model.module.to(device).eval()

    def __call__(self, inputs: list[Tensor]) -> Tensor:
        """Logits (B, C) for inputs in the order of the model's `forward`."""
        with torch.no_grad():
            logits: Tensor = self._module(*inputs)
        return logits
