"""The distillation losses on what lies between input and output. A new one is one function and one line in `LAYERS`.

Shapes: B examples, T tokens (or patches), D width, A heads, C channels, H × W pixels of a map. A mask (B, T) is 1
where there is a token and 0 where there is padding; padding is left out exactly.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


@dataclass(frozen=True)
class LayerLoss:
    """A loss between a layer of the student and one of the teacher.

    Attributes:
        function: `(student, teacher, mask, **settings) -> scalar`.
        reads: what it reads of a layer: its `hidden` state, its `heads` (query, key, value) or its feature `map`.
        projected: whether a student of another width gets a learned projection to the teacher's.
        last: whether only the last layers are matched when the recipe says nothing; else layers spread evenly.
    """

    function: Callable[..., Tensor]
    reads: Literal["hidden", "heads", "map"]
    projected: bool = False
    last: bool = False


@dataclass(frozen=True)
class Heads:
    """Query, key and value of one attention layer, each (B, T, D), and how many heads D holds."""

    query: Tensor
    key: Tensor
    value: Tensor
    heads: int


def hidden(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of hidden states (B, T, D) over real tokens (Jiao 2020, "TinyBERT", equation 8)."""
    difference = (student.float() - teacher.float()).square().mean(dim=2)
    return (difference * mask).sum() / mask.sum()


def pkd(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Squared distance of the normalised first token's states, (B, T, D), mean over the batch.

    Sun 2019, "Patient knowledge distillation", equation 7; `mask` is not read: the first token is never padding.
    """
    ours, theirs = (F.normalize(states[:, 0].float(), dim=1) for states in (student, teacher))
    return (ours - theirs).square().sum(dim=1).mean()


def attention(student: Heads, teacher: Heads, mask: Tensor) -> Tensor:
    """KL(teacher ‖ student) of the attention distributions, mean over heads and real query tokens.

    Wang 2020, "MiniLM", equation 7. Computed from queries and keys, so for positions that are added to the
    embeddings, as in BERT and ViT, and not for rotary ones. The numbers of heads must be the same.
    """
    return _relation(student.query, student.key, teacher.query, teacher.key, mask, student.heads, teacher.heads)


def relations(student: Heads, teacher: Heads, mask: Tensor, *, heads: int | None = None) -> Tensor:
    """Mean of the KLs of query-query, key-key and value-value relations.

    Wang 2021, "MiniLMv2", equations 4 to 6: vectors are cut anew into `heads` relation heads, so that student and
    teacher may have different widths and numbers of heads.

    Args:
        student: of one layer.
        teacher: of one layer.
        mask: (B, T).
        heads: relation heads; by default the teacher's attention heads. Must divide both widths.
    """
    count = heads or teacher.heads
    pairs = ((student.query, teacher.query), (student.key, teacher.key), (student.value, teacher.value))
    return torch.stack([_relation(ours, ours, theirs, theirs, mask, count, count) for ours, theirs in pairs]).mean()


def values(student: Heads, teacher: Heads, mask: Tensor, *, heads: int | None = None) -> Tensor:
    """KL(teacher ‖ student) of the value-value relations alone (Wang 2020, "MiniLM", equations 8 to 10).

    Arguments as for `relations`.
    """
    count = heads or teacher.heads
    return _relation(student.value, student.value, teacher.value, teacher.value, mask, count, count)


def features(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """½ · mean squared difference of feature maps (B, C, H, W) (Romero 2015, "FitNets", equation 3, per element)."""
    return (_same_grid(student, teacher) - teacher.float()).square().mean() / 2


def attention_transfer(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """½ · distance of the normalised maps of channel energy, mean over the batch.

    Zagoruyko and Komodakis 2017, "Paying more attention to attention", equation 2 with p = 2; channels may differ.
    """
    ours, theirs = (
        F.normalize(x.float().square().sum(dim=1).flatten(1), dim=1) for x in (_same_grid(student, teacher), teacher)
    )
    distance: Tensor = torch.linalg.vector_norm(ours - theirs, dim=1)
    return distance.mean() / 2


LAYERS: Mapping[str, LayerLoss] = {
    "hidden": LayerLoss(hidden, "hidden", projected=True),
    "pkd": LayerLoss(pkd, "hidden", projected=True),
    "attention": LayerLoss(attention, "heads", last=True),
    "relations": LayerLoss(relations, "heads", last=True),
    "values": LayerLoss(values, "heads", last=True),
    "features": LayerLoss(features, "map", projected=True),
    "attention_transfer": LayerLoss(attention_transfer, "map"),
}


def _relation(
    ours_a: Tensor, ours_b: Tensor, theirs_a: Tensor, theirs_b: Tensor, mask: Tensor, ours: int, theirs: int
) -> Tensor:
    """KL between softmax(a·bᵀ/√d) of teacher and student, mean over heads and real tokens."""
    q, p = _scores(ours_a, ours_b, mask, ours), _scores(theirs_a, theirs_b, mask, theirs)
    each = (p.exp() * (p - q)).masked_fill(mask[:, None, None, :] == 0, 0.0).sum(dim=3).mean(dim=1)
    return (each * mask).sum() / mask.sum()


def _scores(a: Tensor, b: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Log-softmax of scaled products (B, A, T, T); padding gets no share."""
    a, b = (x.float().unflatten(2, (heads, -1)).transpose(1, 2) for x in (a, b))
    scores = a @ b.transpose(2, 3) / a.shape[3] ** 0.5
    return F.log_softmax(scores.masked_fill(mask[:, None, None, :] == 0, torch.finfo(scores.dtype).min), dim=3)


def _same_grid(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's map on the teacher's grid, by average pooling or interpolation."""
    student, size = student.float(), teacher.shape[2:]
    if student.shape[2:] == size:
        return student
    if student.shape[2] >= size[0] and student.shape[3] >= size[1]:
        return F.adaptive_avg_pool2d(student, (size[0], size[1]))
    return F.interpolate(student, size, mode="bilinear", align_corners=False)
