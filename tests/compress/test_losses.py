"""Losses against the paper's formula in float64."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from potstill.compress.losses import hard_loss, soft_loss

rng = np.random.default_rng(0)
STUDENT, TEACHER = rng.normal(size=(2, 16, 5)) * 4
LABELS = rng.integers(5, size=16)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 0.5])
def test_soft_loss_is_hintons(temperature: float) -> None:
    p, q = log_softmax(TEACHER / temperature, axis=1), log_softmax(STUDENT / temperature, axis=1)
    expected = temperature**2 * (np.exp(p) * (p - q)).sum(axis=1).mean()
    found = soft_loss(torch.from_numpy(STUDENT), torch.from_numpy(TEACHER), temperature)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_soft_loss_is_nothing_for_equal_logits_up_to_a_constant() -> None:
    logits = torch.from_numpy(TEACHER)
    assert soft_loss(logits + 3.0, logits, 2.0).item() == pytest.approx(0.0, abs=1e-6)


def test_its_gradient_is_t_times_the_difference_of_the_soft_labels() -> None:
    """d/dz of T² KL at temperature T is T (q − p) / B (Hinton 2015, equation 2)."""
    student = torch.tensor(STUDENT, requires_grad=True)
    soft_loss(student, torch.from_numpy(TEACHER), 3.0).backward()  # type: ignore[no-untyped-call]
    q, p = (np.exp(log_softmax(logits / 3.0, axis=1)) for logits in (STUDENT, TEACHER))
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), 3.0 * (q - p) / 16, atol=1e-6)


def test_hard_loss_is_cross_entropy() -> None:
    expected = -log_softmax(STUDENT, axis=1)[np.arange(16), LABELS].mean()
    assert hard_loss(torch.from_numpy(STUDENT), torch.from_numpy(LABELS)).item() == pytest.approx(expected, rel=1e-6)


def test_half_precision_logits_are_taken_in_float32() -> None:
    student, teacher = torch.from_numpy(STUDENT).bfloat16(), torch.from_numpy(TEACHER).bfloat16()
    assert soft_loss(student, teacher, 2.0).dtype == torch.float32
    assert soft_loss(student, teacher, 2.0).item() == pytest.approx(
        soft_loss(student.float(), teacher.float(), 2.0).item()
    )
