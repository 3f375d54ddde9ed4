"""How much more a model loses by a perturbation than its teacher: against simulation and by hand."""

import numpy as np
import pytest

from potstill.validate.metrics import Interval, detectable, paired_difference
from potstill.validate.shift import fragility

Answers = tuple[np.ndarray, np.ndarray]


def drawn(rng: np.random.Generator, n: int, model: tuple[float, float], teacher: tuple[float, float]) -> list[Answers]:
    """Right or wrong (n,) of a model and its teacher, as is and perturbed; both find the same examples hard."""
    hard = rng.random(n)
    return [(hard < model[i], hard * 0.8 + 0.2 * rng.random(n) < teacher[i]) for i in (0, 1)]


def test_by_hand() -> None:
    yes, no = True, False
    as_is = np.array([yes, yes, yes, no]), np.array([yes, yes, yes, yes])
    perturbed = np.array([no, no, yes, no]), np.array([yes, no, yes, yes])
    change, interval, _ = fragility(as_is, perturbed)
    assert change == (-2 / 4) - (-1 / 4)
    assert interval.low < change < interval.high


def test_without_a_change_the_interval_has_a_width() -> None:
    right = np.ones(100, dtype=bool)
    change, interval, _ = fragility((right, right), (right, right))
    assert change == 0
    assert interval.low < 0 < interval.high


def test_beside_a_perfect_teacher_it_is_agresti_and_mins_interval_of_the_model() -> None:
    """As published: Wald's interval of the paired difference after half an observation is added to each cell."""
    rng, n = np.random.default_rng(0), 300
    as_is, perturbed, always = rng.random(n) < 0.9, rng.random(n) < 0.8, np.ones(n, dtype=bool)
    lost, gained = (as_is & ~perturbed).sum() + 0.5, (perturbed & ~as_is).sum() + 0.5
    change, interval, _ = fragility((as_is, always), (perturbed, always))
    middle = (gained - lost) / (n + 2)
    half = 1.959964 * np.sqrt(lost + gained - (gained - lost) ** 2 / (n + 2)) / (n + 2)
    assert change == pytest.approx((gained - lost) / n)
    assert (interval.low, interval.high) == pytest.approx((middle - half, middle + half))


@pytest.mark.parametrize("n", [50, 400])
def test_the_interval_holds_the_truth(n: int) -> None:
    rng, held = np.random.default_rng(1), 0
    truth = np.mean([fragility(*drawn(rng, 200_000, (0.9, 0.8), (0.9, 0.85)))[0] for _ in range(5)])
    for _ in range(1000):
        _, interval, _ = fragility(*drawn(rng, n, (0.9, 0.8), (0.9, 0.85)))
        held += interval.low <= truth <= interval.high
    assert 0.93 <= held / 1000 <= 0.975


def test_p_is_below_five_percent_as_often_as_it_says() -> None:
    rng, p = np.random.default_rng(3), []
    for _ in range(2000):
        hard = 0.8 * rng.random(500)
        alike = [tuple(hard + 0.2 * rng.random((2, 500)) < share) for share in (0.9, 0.8)]
        p.append(fragility(*alike)[2])  # type: ignore[arg-type]
    assert 0.035 <= np.mean(np.array(p) < 0.05) <= 0.065


def test_a_loss_that_is_called_detectable_shows_four_times_in_five() -> None:
    rng, n, lost, gained = np.random.default_rng(2), 2000, 0.03, 0.02
    at_rest = paired_difference(round(n * (lost + gained) / 2), round(n * (lost + gained) / 2), n)
    loss = detectable(at_rest)
    counts = rng.multinomial(n, [0.025 + loss / 2, 0.025 - loss / 2, 0.95], size=2000)
    seen = [paired_difference(int(a), int(b), n).high < 0 for a, b, _ in counts]
    assert 0.77 <= np.mean(seen) <= 0.83


def test_detectable_is_the_power_calculation_of_statsmodels() -> None:
    power = pytest.importorskip("statsmodels.stats.power")
    n, sd = 400, 0.3
    half = 1.959964 * sd / n**0.5
    by_power = power.NormalIndPower(ddof=0).solve_power(nobs1=n, alpha=0.05, power=0.8, ratio=0) * sd
    assert detectable(Interval(-half, half)) == pytest.approx(by_power, rel=1e-4)
