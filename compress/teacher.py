"""The teacher while a student learns: frozen, on the training device."""

from collections.abc import Mapping

import torch
from torch import Tensor

from potstill.validate.task import Model


class Teacher:
    """What a frozen model says."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self._model = model
        model.module.to(device).eval()

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Logits (R, C) of encoded rows."""
        with torch.no_grad():
            return self._model.answers(tensors)
