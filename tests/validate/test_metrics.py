"""Figures against independent references."""

import numpy as np
import pytest
from scipy import stats

from potstill.validate.metrics import bootstrap, divergences, mcnemar_p, paired_difference, proportion


def test_wilson_interval_is_its_formula() -> None:
    n, k, z = 599, 580, stats.norm.ppf(0.975)
    p = k / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    found = proportion(k, n)
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-12)


def test_paired_difference_is_near_the_paired_bootstrap() -> None:
    rng = np.random.default_rng(0)
    difference = rng.choice([-1, 0, 1], p=[0.06, 0.91, 0.03], size=2000)
    lost, gained = int((difference == -1).sum()), int((difference == 1).sum())
    bootstrap = stats.bootstrap((difference,), np.mean, method="percentile", rng=rng).confidence_interval
    found = paired_difference(lost, gained, 2000)
    assert found.low == pytest.approx(bootstrap.low, abs=0.002)
    assert found.high == pytest.approx(bootstrap.high, abs=0.002)


def test_paired_difference_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    n, lose, gain = 400, 0.05, 0.03
    covered = 0
    for lost, gained, _ in rng.multinomial(n, [lose, gain, 1 - lose - gain], size=3000):
        found = paired_difference(int(lost), int(gained), n)
        covered += found.low <= gain - lose <= found.high
    assert 0.94 <= covered / 3000 <= 0.965


def test_bootstrap_is_that_of_scipy() -> None:
    rng = np.random.default_rng(3)
    counts = rng.integers(1, 20, size=(80, 2)).astype(float)

    def ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return a.sum(axis=axis) / b.sum(axis=axis)

    theirs = stats.bootstrap(
        counts.T, ratio, paired=True, vectorized=True, method="percentile", n_resamples=5000, rng=0
    )
    (found,) = bootstrap(lambda index: ratio(*np.moveaxis(counts[index], 2, 0))[:, None], 80)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.08 * width)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.08 * width)


def test_no_flips_still_has_width() -> None:
    found = paired_difference(0, 0, 100)
    assert found.low < 0 < found.high


def test_mcnemar_is_the_binomial_test() -> None:
    assert mcnemar_p(14, 2) == pytest.approx(2 * stats.binom.cdf(2, 16, 0.5))
    assert mcnemar_p(0, 0) == 1.0


def test_divergences_are_their_formula_in_float64() -> None:
    rng = np.random.default_rng(2)
    teacher, student = rng.normal(size=(2, 50, 7)).astype(np.float32) * 5
    p = np.exp(teacher.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    q = np.exp(student.astype(np.float64))
    q /= q.sum(axis=1, keepdims=True)
    assert divergences(teacher, student) == pytest.approx((p * np.log(p / q)).sum(axis=1), rel=1e-9)
    assert not divergences(teacher, teacher).any()


def test_the_bootstrap_covers_the_truth() -> None:
    rng, covered = np.random.default_rng(4), 0
    for values in rng.gamma(0.5, 0.2, size=(2000, 150)):  # skewed, as divergences are; mean 0.1
        (found,) = bootstrap(lambda index, v=values: v[index].mean(axis=1, keepdims=True), 150, resamples=500)
        covered += found.low <= 0.1 <= found.high
    assert 0.93 <= covered / 2000 <= 0.96


def test_the_bootstraps_levels_are_hesterbergs() -> None:
    values, n = np.random.default_rng(5).normal(size=20), 20
    (found,) = bootstrap(lambda index: values[index].mean(axis=1, keepdims=True), n, resamples=200_000)
    drawn = values[np.random.default_rng(6).integers(n, size=(200_000, n))].mean(axis=1)
    share = stats.norm.cdf(-np.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [share, 1 - share])), abs=0.01)
