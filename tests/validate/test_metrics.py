"""Figures against independent references."""

import time
from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from potstill.validate.metrics import bootstrap, bootstrap_mean, divergences, mcnemar_p, paired_difference, proportion


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


def test_paired_difference_is_tangos_or_agresti_and_mins_where_that_is_wider() -> None:
    def score(lost: int, gained: int, n: int, at: float) -> float:
        """Tango's statistic, with the likelihood under a true difference `at` maximised by scipy."""

        def unlikely(lose: float) -> float:
            cells = np.maximum([lose, lose + at, 1 - 2 * lose - at], 1e-300)
            return -float(np.log(cells) @ [lost, gained, n - lost - gained])

        bounds = (max(0.0, -at), (1 - at) / 2)
        lose = optimize.minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-13}).x
        return float(((gained - lost) / n - at) / np.sqrt((2 * lose + at - at * at) / n))

    for lost, gained, n, level in ((5, 3, 50, 0.95), (0, 0, 65, 0.95), (3, 9, 40, 0.9), (12, 0, 600, 0.999)):
        z, at = stats.norm.ppf((1 + level) / 2), (gained - lost) / n
        tango = [
            optimize.brentq(lambda x, of=(lost, gained, n), end=sign * z: score(*of, x) - end, *ends)
            for sign, ends in ((1, (-0.99, at - 1e-6)), (-1, (at + 1e-6, 0.99)))
        ]
        b, c, total = lost + 0.5, gained + 0.5, n + 2
        half = z * np.sqrt(b + c - (c - b) ** 2 / total) / total
        found = paired_difference(lost, gained, n, level)
        assert found.low == pytest.approx(min(tango[0], (c - b) / total - half), abs=1e-6)
        assert found.high == pytest.approx(max(tango[1], (c - b) / total + half), abs=1e-6)
    assert paired_difference(10, 0, 10).low == -1


@pytest.mark.parametrize(
    ("n", "drop", "gain"),
    [(10, 0.165, 0), (65, 0.03, 0), (100, 0.02, 0), (100, 0.13, 0.01), (200, 0.05, 0.002), (50, 0.05, 0.05)],
)
def test_each_end_of_paired_difference_errs_seldom_even_where_few_examples_flip(
    n: int, drop: float, gain: float
) -> None:
    """Exactly, over all counts; Agresti and Min's low end alone errs in up to 16 %."""
    most = [int(stats.binom.ppf(1 - 1e-7, n, p)) + 1 for p in (gain + drop, gain)]
    for level in (0.95, 1 - 0.05 / 14):
        below = above = 0.0
        for lost, gained in product(range(min(n, most[0]) + 1), range(most[1] + 1)):
            if lost + gained <= n:
                p = stats.multinomial.pmf(
                    [lost, gained, n - lost - gained], n, [gain + drop, gain, 1 - 2 * gain - drop]
                )
                found = paired_difference(lost, gained, n, level)
                below, above = below + p * (found.low > -drop), above + p * (found.high < -drop)
        assert below <= 1.5 * (1 - level) / 2
        assert above <= 1.01 * (1 - level) / 2


def test_no_flips_still_has_width() -> None:
    found = paired_difference(0, 0, 100)
    assert found.low < 0 < found.high


def test_mcnemar_is_the_binomial_test() -> None:
    assert mcnemar_p(14, 2) == pytest.approx(2 * stats.binom.cdf(2, 16, 0.5))
    assert mcnemar_p(0, 0) == 1.0


def test_wilson_and_mcnemar_are_those_of_statsmodels() -> None:
    for successes, n in ((0, 12), (580, 599), (30, 30)):
        found = proportion(successes, n)
        assert (found.low, found.high) == pytest.approx(proportion_confint(successes, n, method="wilson"), abs=1e-12)
    for lost, gained in ((14, 2), (3, 3), (0, 6), (120, 90)):
        assert mcnemar_p(lost, gained) == pytest.approx(mcnemar([[500, lost], [gained, 40]], exact=True).pvalue)


def test_divergences_are_their_formula_in_float64() -> None:
    rng = np.random.default_rng(2)
    teacher, student = rng.normal(size=(2, 50, 7)).astype(np.float32) * 5
    p = np.exp(teacher.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    q = np.exp(student.astype(np.float64))
    q /= q.sum(axis=1, keepdims=True)
    assert divergences(teacher, student) == pytest.approx((p * np.log(p / q)).sum(axis=1), rel=1e-9)
    assert divergences(teacher, student) == pytest.approx(stats.entropy(p, q, axis=1), rel=1e-9)
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


def documents(rng: np.random.Generator, n: int) -> np.ndarray:
    """Tokens and the summed losses of a student and its teacher on each document; long ones are easier: (n, 3)."""
    tokens = rng.lognormal(5, 0.7, size=n)
    teacher = 3 - 0.2 * (np.log(tokens) - 5) + rng.normal(0, 0.3, size=n)
    student = teacher + 0.1 + 0.05 * (np.log(tokens) - 5) + rng.normal(0, 0.1, size=n)
    return np.stack([tokens, tokens * student, tokens * teacher], axis=1)


def queries(rng: np.random.Generator, n: int) -> np.ndarray:
    """Texts that belong to each query, and those of them that were found: (n, 2)."""
    many = 1 + rng.poisson(3, size=n)
    return np.stack([many, rng.binomial(many, rng.beta(4, 1, size=n))], axis=1)


@pytest.mark.parametrize(
    ("draw", "figure", "truth"),
    [
        # of a lognormal with μ = 5 and σ = 0.7, E[L log L] / E[L] = μ + σ²
        (documents, lambda sums: (sums[:, 1] - sums[:, 2]) / sums[:, 0], 0.1 + 0.05 * 0.49),  # log of perplexities
        (queries, lambda sums: sums[:, 1] / sums[:, 0], 0.8),
    ],
)
def test_the_bootstrap_covers_ratios_of_sums(draw: Any, figure: Any, truth: float) -> None:
    rng, covered = np.random.default_rng(7), 0
    for _ in range(400):
        rows = draw(rng, 120)
        (found,) = bootstrap(lambda index, r=rows: figure(r[index].sum(axis=1))[:, None], 120, resamples=400)
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / 400 <= 0.975


@pytest.mark.parametrize("n", [2001, 20_000])
def test_a_mean_of_many_values_has_the_interval_of_the_bootstrap(n: int) -> None:
    """Ends as means over seeds, because 2,000 resamples leave each unsure by 0.06 standard errors."""
    values = np.random.default_rng(0).gamma(0.3, 0.3, size=n)
    plain = [bootstrap(lambda index: values[index].mean(axis=1, keepdims=True), n, seed)[0] for seed in range(10)]
    ours = [bootstrap_mean(values, seed) for seed in range(10, 20)]
    error = values.std() / n**0.5
    for end in ("low", "high"):
        apart = np.mean([getattr(one, end) for one in ours]) - np.mean([getattr(one, end) for one in plain])
        assert abs(apart) < 0.1 * error


def test_a_mean_of_few_values_is_the_bootstraps_own() -> None:
    values = np.random.default_rng(0).gamma(0.3, 0.3, size=2000)
    (plain,) = bootstrap(lambda index: values[index].mean(axis=1, keepdims=True), 2000)
    assert bootstrap_mean(values) == plain


def test_the_interval_of_a_mean_of_many_values_holds_the_truth() -> None:
    rng = np.random.default_rng(4)
    held = [
        one.low <= 0.09 and one.high >= 0.09
        for one in (bootstrap_mean(rng.gamma(0.3, 0.3, size=3000)) for _ in range(600))
    ]
    assert 0.93 <= np.mean(held) <= 0.97


def test_a_mean_of_many_values_costs_little() -> None:
    values = np.random.default_rng(0).gamma(0.3, 0.3, size=100_000)
    started = time.process_time()
    bootstrap_mean(values)
    assert time.process_time() - started < 0.5  # drawn one by one, 200 million values
