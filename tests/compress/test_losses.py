"""Each loss against its paper's formula, written out in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

from potstill.compress import losses
from potstill.compress.terms import terms

RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(0, 3, (16, 7)), RNG.normal(0, 3, (16, 7))
LABELS = RNG.integers(0, 7, 16)
Array = NDArray[Any]


def found(name: str, student: Array = STUDENT, teacher: Array = TEACHER, **settings: Any) -> float:
    """A loss in float32, labels included where it takes them."""
    a, b, y = torch.from_numpy(student).float(), torch.from_numpy(teacher).float(), torch.from_numpy(LABELS)
    if name == "hard":
        return losses.hard(a, y, **settings).item()
    extra = (y,) if name == "decoupled" else ()
    return losses.SOFT[name](a, b, *extra, **settings).item()


def divergence(p: Array, q: Array) -> float:
    """Mean over rows of the sum of p · log(p / q)."""
    return float((p * np.log(p / q)).sum(axis=1).mean())


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.5])
def test_kl_is_hintons(temperature: float) -> None:
    p, q = softmax(TEACHER / temperature, axis=1), softmax(STUDENT / temperature, axis=1)
    assert found("kl", temperature=temperature) == pytest.approx(temperature**2 * divergence(p, q), rel=1e-5)
    assert found("reverse_kl", temperature=temperature) == pytest.approx(temperature**2 * divergence(q, p), rel=1e-5)


def test_kls_gradient_is_hintons() -> None:
    student = torch.from_numpy(STUDENT).requires_grad_()
    losses.kl(student, torch.from_numpy(TEACHER), temperature=3.0).backward()
    wanted = 3.0 * (softmax(STUDENT / 3, axis=1) - softmax(TEACHER / 3, axis=1)) / len(STUDENT)
    assert student.grad is not None
    assert np.allclose(student.grad.numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_is_agarwals(beta: float) -> None:
    p, q = softmax(TEACHER / 2, axis=1), softmax(STUDENT / 2, axis=1)
    m = beta * p + (1 - beta) * q
    wanted = 4 * (beta * divergence(p, m) + (1 - beta) * divergence(q, m))
    assert found("jensen_shannon", temperature=2.0, beta=beta) == pytest.approx(wanted, rel=1e-5)


def test_standardised_logits_are_suns() -> None:
    a, b = ((z - z.mean(axis=1, keepdims=True)) / z.std(axis=1, ddof=1, keepdims=True) for z in (STUDENT, TEACHER))
    wanted = 4 * divergence(softmax(b / 2, axis=1), softmax(a / 2, axis=1))
    assert found("kl", temperature=2.0, standardize=True) == pytest.approx(wanted, rel=1e-4)
    assert found("kl", student=5 * TEACHER + 3, standardize=True) == pytest.approx(0.0, abs=1e-6)


def test_decoupled_is_zhaos() -> None:
    t, rows = 4.0, np.arange(16)
    p, q = softmax(TEACHER / t, axis=1), softmax(STUDENT / t, axis=1)
    two_p, two_q = (np.stack([x[rows, LABELS], 1 - x[rows, LABELS]], axis=1) for x in (p, q))
    others = np.ones_like(p, dtype=bool)
    others[rows, LABELS] = False
    hat_p, hat_q = ((x[others] / (1 - x[rows, LABELS]).repeat(6)).reshape(16, 6) for x in (p, q))
    wanted = t**2 * (1.5 * divergence(two_p, two_q) + 8 * divergence(hat_p, hat_q))
    assert found("decoupled", alpha=1.5, beta=8.0, temperature=t) == pytest.approx(wanted, rel=1e-4)


def test_decoupled_adds_up_to_kl_when_weighted_so() -> None:
    """KL = TCKD + (1 − p_target) · NCKD (Zhao 2022, equation 5), on one row."""
    for row in range(3):
        a, b, y = torch.from_numpy(STUDENT[[row]]), torch.from_numpy(TEACHER[[row]]), torch.tensor(LABELS[[row]])
        rest = 1 - softmax(TEACHER[row] / 4)[LABELS[row]]
        parts = losses.decoupled(a, b, y, alpha=1.0, beta=float(rest)).item()
        assert parts == pytest.approx(losses.kl(a, b, temperature=4.0).item(), rel=1e-5)


def test_decoupled_takes_the_teachers_class_where_there_is_no_label() -> None:
    a, b = torch.from_numpy(STUDENT), torch.from_numpy(TEACHER)
    none = torch.full((16,), losses.IGNORED)
    assert losses.decoupled(a, b, none) == losses.decoupled(a, b, b.argmax(dim=1))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_huangs(temperature: float) -> None:
    p, q = softmax(TEACHER / temperature, axis=1), softmax(STUDENT / temperature, axis=1)
    between = np.mean([1 - np.corrcoef(p[i], q[i])[0, 1] for i in range(16)])
    within = np.mean([1 - np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(7)])
    wanted = temperature**2 * (2 * between + 3 * within)
    assert found("dist", temperature=temperature, beta=2.0, gamma=3.0) == pytest.approx(wanted, rel=1e-4)


def test_cosine_is_one_less_the_cosine() -> None:
    norms = np.linalg.norm(STUDENT, axis=1) * np.linalg.norm(TEACHER, axis=1)
    assert found("cosine") == pytest.approx(1 - np.mean((STUDENT * TEACHER).sum(axis=1) / norms), rel=1e-5)


def test_similarity_is_tungs_and_takes_other_widths() -> None:
    wide = RNG.normal(size=(16, 11))
    ours, theirs = (z @ z.T for z in (STUDENT, wide))
    ours, theirs = (g / np.linalg.norm(g, axis=1, keepdims=True) for g in (ours, theirs))
    wanted = np.linalg.norm(ours - theirs, "fro") ** 2 / 16**2
    assert found("similarity", teacher=wide) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hard_is_cross_entropy_with_smoothing(smoothing: float) -> None:
    target = np.full((16, 7), smoothing / 7)
    target[np.arange(16), LABELS] += 1 - smoothing
    wanted = -(target * log_softmax(STUDENT, axis=1)).sum(axis=1).mean()
    assert found("hard", smoothing=smoothing) == pytest.approx(wanted, rel=1e-5)


def test_hard_leaves_out_rows_without_a_label_exactly() -> None:
    logits, labels = torch.from_numpy(STUDENT), torch.from_numpy(LABELS).clone()
    labels[::2] = losses.IGNORED
    assert losses.hard(logits, labels).item() == pytest.approx(losses.hard(logits[1::2], labels[1::2]).item(), rel=1e-6)
    broken = torch.where((labels == losses.IGNORED)[:, None], torch.inf, logits)
    assert losses.hard(broken, labels).item() == losses.hard(logits, labels).item()
    assert losses.hard(logits, torch.full((16,), losses.IGNORED)).item() == 0.0


@pytest.mark.parametrize("name", [name for name in losses.SOFT if name != "decoupled"])
def test_a_student_that_says_the_same_has_nothing_to_learn(name: str) -> None:
    assert found(name, student=TEACHER) == pytest.approx(0.0, abs=2e-6)


@pytest.mark.parametrize("name", [*losses.SOFT, *losses.HARD])
def test_losses_are_computed_in_float32_whatever_comes_in(name: str) -> None:
    a, b, y = torch.from_numpy(STUDENT).bfloat16(), torch.from_numpy(TEACHER).bfloat16(), torch.from_numpy(LABELS)
    args = {"hard": (a, y), "decoupled": (a, b, y)}.get(name, (a, b))
    loss = (losses.SOFT | losses.HARD)[name](*args)  # type: ignore[operator]
    assert loss.dtype == torch.float32
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"kll": 1.0}, "unknown loss 'kll'; did you mean 'kl'"),
        ({"kl": {"weight": 1.0, "temprature": 2.0}}, "kl has no setting 'temprature'; did you mean 'temperature'"),
        ({"kl": {"temperature": 0}}, "kl.temperature must be above 0"),
        ({"kl": -1.0}, "weight of kl must be a number from 0 up, and is -1.0"),
        ({"kl": {"weight": float("nan")}}, "weight of kl must be a number"),
        ({"kl": {"beta": "much"}}, "kl has no setting 'beta'"),
        ({"dist": {"beta": "much"}}, "dist.beta must be a number, and is 'much'"),
        ({"kl": {"layers": {0: 1}}}, "kl has no layers to match"),
        ({"hidden": {"layers": [1]}}, "hidden.layers: expected the student's to the teacher's layers"),
        ({"kl": 0.0}, "nothing to learn from"),
        ({}, "nothing to learn from"),
    ],
)
def test_losses_that_mean_nothing_are_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        terms(given)


def test_terms_take_the_stages_temperature_unless_they_have_their_own() -> None:
    kl, dist, hard = terms({"kl": 0.5, "dist": {"weight": 2, "temperature": 1.0}, "hard": 1, "cosine": 0}, 4.0)
    assert (kl.weight, kl.settings) == (0.5, {"temperature": 4.0})
    assert (dist.weight, dist.settings) == (2.0, {"temperature": 1.0})
    assert hard.settings == {}
