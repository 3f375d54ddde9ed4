"""The distillation losses.

Shapes: B examples in a batch, C classes.
"""

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch, in nats.

    The factor T² keeps the size of its gradient when T changes (Hinton, Vinyals and Dean 2015, section 2.1).

    Args:
        student: logits (B, C).
        teacher: logits (B, C).
        temperature: T > 0.
    """
    p = F.log_softmax(teacher.float() / temperature, dim=1)
    q = F.log_softmax(student.float() / temperature, dim=1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2


def hard_loss(student: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, C) with class indices (B,), mean over the batch, in nats."""
    return F.cross_entropy(student.float(), labels)


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosines of all pairs in a batch (Tung and Mori 2019, equation 4, on unit vectors).

    Args:
        student: vectors (B, D).
        teacher: vectors (B, D'), of another width if need be.
    """
    ours, theirs = (F.normalize(vectors.float(), dim=1) for vectors in (student, teacher))
    return F.mse_loss(ours @ ours.T, theirs @ theirs.T)
