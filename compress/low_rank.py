"""Weights as products of two thinner ones.

Shapes: I inputs and O outputs of a Linear, R the rank kept.
"""

import torch
from torch import Tensor, nn

from potstill.compress.anatomy import number, stacks
from potstill.validate.errors import InputError
from potstill.validate.low_rank import LowRank


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a weight (O, I) by a product of rank R: (O, R) and (R, I), float32.

    The singular value decomposition cut after R values, no other product is nearer in the Frobenius norm (Eckart and
    Young 1936, "The approximation of one matrix by another of lower rank"). Each factor takes the root of the values.
    """
    u, values, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    roots = values[:rank].sqrt()
    return (u[:, :rank] * roots).float(), (roots[:, None] * v[:rank]).float()


def factorise(core: nn.Module, rank: float) -> dict[str, int]:
    """Put `LowRank`s in the place of the Linear modules of a transformer's layers where that saves weights.

    Args:
        core: a transformers model, changed in place.
        rank: below 1 a share of the full rank min(I, O), else the rank itself.

    Returns:
        The rank of each module that was replaced, by its path.

    Raises:
        InputError: no module would be smaller.
    """
    depth = number(core.config, "num_layers")
    inside = tuple(f"{stack}." for stack in stacks(core, depth))
    found = {n: m for n, m in core.named_modules() if n.startswith(inside) and isinstance(m, nn.Linear)}
    ranks = {}
    for name, old in found.items():
        rows, columns = old.weight.shape
        kept = max(1, round(rank * min(rows, columns))) if rank < 1 else int(rank)
        if kept * (rows + columns) >= rows * columns:
            continue
        new, ranks[name] = LowRank(columns, kept, rows, bias=old.bias is not None), kept
        with torch.no_grad():
            for linear, factor in zip(new, reversed(factors(old.weight, kept)), strict=True):
                linear.weight.copy_(factor)  # type: ignore[operator]
            if old.bias is not None:
                new[1].bias.copy_(old.bias)  # type: ignore[operator]
        core.set_submodule(name, new)
    if not ranks:
        shapes = ", ".join(sorted({" × ".join(map(str, m.weight.shape)) for m in found.values()}))
        raise InputError(f"rank={rank:g} makes none of the layers' weights ({shapes}) smaller; give a lower one")
    return ranks
