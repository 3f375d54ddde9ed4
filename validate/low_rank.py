"""Linear layers as two thinner ones: a structure that a checkpoint's config.json cannot say.

`potstill.json` beside the weights says it instead: `{"low_rank": {"bert.encoder.layer.0.output.dense": 96, …}}`, the
rank by the module's path; numbers only, no code. Such a checkpoint opens with Potstill, and its ONNX package opens
anywhere; `from_pretrained` alone does not know the structure and reports the weights as missing.

Shapes: B examples, I inputs and O outputs of a Linear, R its rank.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from potstill.validate.checkpoint import RECORD, WEIGHTS
from potstill.validate.errors import InputError
from potstill.validate.files import read_json

KEY = "low_rank"


class LowRank(nn.Sequential):
    """x (B, …, I) to x (V Uᵀ) + b (B, …, O), as a Linear of I × R without a bias and one of R × O."""

    def __init__(self, inputs: int, rank: int, outputs: int, *, bias: bool) -> None:
        super().__init__(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias))
        self.rank = rank


def ranks_of(core: nn.Module) -> dict[str, int]:
    """The rank of each `LowRank` in a model, by its path."""
    return {name: module.rank for name, module in core.named_modules() if isinstance(module, LowRank)}


def recorded_ranks(where: str) -> dict[str, int]:
    """The ranks that a checkpoint's folder records; none for a hub name.

    Raises:
        InputError: the record holds something else.
    """
    path = Path(where) / RECORD
    ranks = read_json(path).get(KEY, {}) if path.is_file() else {}
    if not isinstance(ranks, dict) or not all(type(rank) is int and rank > 0 for rank in ranks.values()):
        raise InputError(
            f"{path}: {KEY!r} holds {str(ranks)[:60]}; expected a rank above 0 for the path of each module"
        )
    return ranks


def load_low_rank(auto_class: Any, config: Any, folder: Path, ranks: Mapping[str, int]) -> tuple[nn.Module, list[str]]:
    """A transformers model of that structure with its weights, float32, and the names of those that were not there.

    Args:
        auto_class: whose `from_config` builds the model.
        config: of the model.
        folder: with `model.safetensors`.
        ranks: by the path of the module that each is of.

    Raises:
        InputError: a path leads to no Linear, or the file holds weights that the model has not.
        RuntimeError: the shape of a weight is another one.
    """
    from safetensors.torch import load_model

    core: nn.Module = auto_class.from_config(config, dtype=torch.float32)
    linears = {name: module for name, module in core.named_modules() if isinstance(module, nn.Linear)}
    for name, rank in ranks.items():
        old = linears.get(name)
        if old is None or rank > min(old.weight.shape):
            raise InputError(f"{folder / RECORD}: {type(core).__name__} has no Linear {name!r} of a rank from {rank}")
        core.set_submodule(name, LowRank(old.in_features, rank, old.out_features, bias=old.bias is not None))
    missing, unexpected = load_model(core, folder / WEIGHTS, strict=False)
    if unexpected:
        raise InputError(f"{folder / WEIGHTS} does not fit {folder / RECORD}: {sorted(unexpected)[0]!r} is foreign")
    return core, sorted(missing)
