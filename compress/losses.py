"""The distillation losses on a model's outputs. A new one is one function and one line in `SOFT` or `HARD`.

Shapes: R rows (examples; words for tagging), C classes, D width of an embedding. Every loss is a mean over the rows,
computed in float32, in nats where it is a divergence.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from potstill.validate.examples import IGNORED

Loss = Callable[..., Tensor]


def kl(student: Tensor, teacher: Tensor, *, temperature: float = 2.0, standardize: bool = False) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)).

    The factor T² keeps the size of its gradient when T changes (Hinton, Vinyals and Dean 2015, "Distilling the
    knowledge in a neural network", section 2.1).

    Args:
        student: logits (R, C).
        teacher: logits (R, C).
        temperature: T > 0.
        standardize: bring each row of logits to mean 0 and deviation 1 first (Sun 2024, "Logit standardization in
            knowledge distillation"). It says nothing with two classes, whose standardised logits are always ±0.7.
    """
    q, p = _softened(student, temperature, standardize), _softened(teacher, temperature, standardize)
    return F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2


def reverse_kl(student: Tensor, teacher: Tensor, *, temperature: float = 2.0, standardize: bool = False) -> Tensor:
    """T² · KL(student ‖ teacher), both softened: the student drops what it cannot hold (Gu 2023, "MiniLLM").

    Arguments as for `kl`.
    """
    return kl(teacher, student, temperature=temperature, standardize=standardize)


def jensen_shannon(
    student: Tensor, teacher: Tensor, *, temperature: float = 2.0, beta: float = 0.5, standardize: bool = False
) -> Tensor:
    """T² · (β · KL(teacher ‖ m) + (1 − β) · KL(student ‖ m)) with m = β · teacher + (1 − β) · student, softened.

    The generalised Jensen-Shannon divergence (Agarwal 2023, "On-policy distillation of language models", section 3).
    Other arguments as for `kl`.

    Args:
        student: logits (R, C).
        teacher: logits (R, C).
        temperature: T > 0.
        beta: from 0 to 1, both left out.
        standardize: as for `kl`.
    """
    q, p = _softened(student, temperature, standardize), _softened(teacher, temperature, standardize)
    weights = torch.tensor([beta, 1 - beta], device=p.device).log()
    middle = torch.logsumexp(torch.stack([p, q]) + weights[:, None, None], dim=0)
    of_teacher = F.kl_div(middle, p, reduction="batchmean", log_target=True)
    of_student = F.kl_div(middle, q, reduction="batchmean", log_target=True)
    return (beta * of_teacher + (1 - beta) * of_student) * temperature**2


def decoupled(
    student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 4.0, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    """T² · (α · KL of target against the rest + β · KL among the other classes).

    Zhao 2022, "Decoupled knowledge distillation", equation 7. For a row without a label the teacher's class stands
    for the target. With two classes the second part is nothing.

    Args:
        student: logits (R, C).
        teacher: logits (R, C).
        labels: classes (R,), `IGNORED` where there is none.
        temperature: T > 0.
        alpha: weight of the target's part.
        beta: weight of the other classes' part.
    """
    target = torch.where(labels == IGNORED, teacher.argmax(dim=1), labels)[:, None]
    q, p = _softened(student, temperature), _softened(teacher, temperature)
    is_target = torch.zeros_like(q, dtype=torch.bool).scatter_(1, target, True)

    def split(log: Tensor) -> tuple[Tensor, Tensor]:
        others = log.masked_fill(is_target, -torch.inf)
        rest = torch.logsumexp(others, dim=1, keepdim=True)
        among = (others - rest).masked_fill(is_target, 0.0)  # not a class here: its share of the sum is masked below
        return torch.cat([log.gather(1, target), rest], dim=1), among

    (q_two, q_among), (p_two, p_among) = split(q), split(p)
    of_target = F.kl_div(q_two, p_two, reduction="batchmean", log_target=True)
    among = (p_among.exp() * (p_among - q_among)).masked_fill(is_target, 0.0).sum(dim=1).mean()
    return (alpha * of_target + beta * among) * temperature**2


def dist(
    student: Tensor, teacher: Tensor, *, temperature: float = 2.0, beta: float = 1.0, gamma: float = 1.0
) -> Tensor:
    """β · T² · (1 − Pearson correlation over classes) + γ · T² · (1 − Pearson correlation over the batch).

    Huang 2022, "Knowledge distillation from a stronger teacher", equations 6 to 9. With two classes the first part
    has no gradient.

    Args:
        student: logits (R, C).
        teacher: logits (R, C).
        temperature: T > 0.
        beta: weight of the relation between classes.
        gamma: weight of the relation between examples.
    """
    q, p = (torch.softmax(logits.float() / temperature, dim=1) for logits in (student, teacher))
    between = 1 - _pearson(q, p).mean()
    within = 1 - _pearson(q.T, p.T).mean()
    return (beta * between + gamma * within) * temperature**2


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − cosine similarity of embeddings (R, D) (as Sanh 2019, "DistilBERT", aligns hidden states)."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=1)).mean()


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """‖G_teacher − G_student‖² / R² of the row-normalised Gram matrices of a batch of outputs (R, D).

    Widths may differ (Tung and Mori 2019, "Similarity-preserving knowledge distillation", equations 1 to 4).
    """
    ours, theirs = (F.normalize(z.float() @ z.float().T, dim=1) for z in (student, teacher))
    return (ours - theirs).square().sum() / len(student) ** 2


def uld(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ |p₍ᵢ₎ − q₍ᵢ₎| of the sorted probabilities of both, the fewer ones filled up with zeros.

    The Wasserstein-1 distance of two vocabularies any of whose tokens are one apart: it needs no tokenizer in common
    (Boizard 2024, "Towards cross-tokenizer distillation: the universal logit distillation loss for LLMs").

    Args:
        student: logits (R, C).
        teacher: logits (R, D), of the same places in the text.
    """
    q, p = (torch.softmax(logits.float(), dim=1).sort(dim=1, descending=True).values for logits in (student, teacher))
    width = max(q.shape[1], p.shape[1])
    q, p = (F.pad(one, (0, width - one.shape[1])) for one in (q, p))
    return (q - p).abs().sum(dim=1).mean()


def hard(student: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of logits (R, C) with classes (R,), mean over the rows that have a label.

    Args:
        student: logits (R, C).
        labels: classes (R,), `IGNORED` where there is none.
        smoothing: share of the target spread over all classes (Szegedy 2016, "Rethinking the Inception
            architecture", section 7).
    """
    total = F.cross_entropy(student.float(), labels, ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


SOFT: Mapping[str, Loss] = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "decoupled": decoupled,
    "dist": dist,
    "cosine": cosine,
    "similarity": similarity,
    "uld": uld,
}
HARD: Mapping[str, Loss] = {"hard": hard}
AS_VECTORS = frozenset({"cosine", "similarity"})  # read outputs as they are; to the others logits + c are the same


def _softened(logits: Tensor, temperature: float, standardize: bool = False) -> Tensor:
    """Log-probabilities (R, C) at a temperature."""
    logits = logits.float()
    if standardize:
        logits = (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + 1e-7)
    return F.log_softmax(logits / temperature, dim=1)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of each row of a with the same row of b."""
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    return F.cosine_similarity(a, b, dim=1, eps=1e-8)
