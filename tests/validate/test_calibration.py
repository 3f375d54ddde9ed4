import time
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats
from sklearn.calibration import calibration_curve

from potstill.validate.calibration import Calibration, _resampled_sums, calibration, confidence

RNG = np.random.default_rng(11)
N = 500
LABELS = RNG.integers(4, size=N)
TEACHER = (RNG.normal(size=(N, 4)) + 2 * np.eye(4)[LABELS]).astype(np.float32)
MINE = (3 * TEACHER + RNG.normal(size=(N, 4))).astype(np.float32)


def by_loop(logits: np.ndarray, labels: np.ndarray) -> float:
    """Guo et al. 2017, equations 2 to 5, one example after the other in float64."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for row, label in zip(logits.astype(np.float64), labels, strict=True):
        shares = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        for m in range(15):
            if m / 15 < shares.max() <= (m + 1) / 15 + 1e-12 * (m == 14):
                bins[m].append((float(shares.max()), bool(row.argmax() == label)))
    assert sum(map(len, bins)) == len(labels)
    return sum(
        len(one) / len(labels) * abs(np.mean([right for _, right in one]) - np.mean([sure for sure, _ in one]))
        for one in bins
        if one
    )


def by_bins(logits: np.ndarray, labels: np.ndarray) -> float:
    """The same, one bin after the other."""
    sure = confidence(logits)
    excess, ends = (logits.argmax(axis=1) == labels) - sure, np.arange(16) / 15
    inside = [(sure > low) & (sure <= high) for low, high in pairwise(ends)]
    return sum(abs(float(excess[one].sum())) for one in inside) / len(labels)


@pytest.fixture(scope="module")
def found() -> Calibration:
    return calibration(MINE, TEACHER, LABELS)


def test_ece_is_that_of_a_plain_loop(found: Calibration) -> None:
    assert found.model.ece == pytest.approx(by_loop(MINE, LABELS), rel=1e-12)
    assert found.model.ece == pytest.approx(by_bins(MINE, LABELS), rel=1e-12)
    assert found.teacher.ece == pytest.approx(by_loop(TEACHER, LABELS), rel=1e-12)
    assert found.difference == pytest.approx(found.model.ece - found.teacher.ece)


def test_bins_are_those_of_scikit_learn(found: Calibration) -> None:
    right, sure = MINE.argmax(axis=1) == LABELS, confidence(MINE)
    shares, means = calibration_curve(right, sure, n_bins=15)
    assert [one.accuracy for one in found.model.bins] == pytest.approx(shares)
    assert [one.confidence for one in found.model.bins] == pytest.approx(means)


def test_resampled_sums_have_the_mean_and_covariance_of_resamples() -> None:
    """Those of a sum over N draws with replacement: N times the mean and the covariance of one draw."""
    sides = [(confidence(one), one.argmax(axis=1) == LABELS) for one in (MINE, TEACHER)]
    one_draw = np.zeros((N, 2, 15))
    for i, (sure, right) in enumerate(sides):
        one_draw[np.arange(N), i, np.ceil(sure * 15).astype(int) - 1] = right - sure
    flat = one_draw.reshape(N, 30)
    drawn = np.concatenate([_resampled_sums(sides, seed) for seed in range(10)]).reshape(-1, 30)
    covariance = N * np.cov(flat.T, bias=True)
    error = np.sqrt(np.diag(covariance) / len(drawn))
    assert (np.abs(drawn.mean(axis=0) - N * flat.mean(axis=0)) <= 4.5 * error).all()
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    filled = scale > 0
    assert (np.abs(np.cov(drawn.T) - covariance)[filled] / scale[filled]).max() < 0.05


def test_bins_hold_all_examples(found: Calibration) -> None:
    for side, logits in ((found.model, MINE), (found.teacher, TEACHER)):
        assert sum(one.examples for one in side.bins) == N
        weighted = sum(one.examples * one.confidence for one in side.bins) / N
        assert weighted == pytest.approx(confidence(logits).mean())
        assert sum(one.examples * abs(one.accuracy - one.confidence) for one in side.bins) / N == pytest.approx(
            side.ece
        )


def test_a_bin_holds_its_upper_end() -> None:
    logits = np.log(np.array([[0.8, 0.2], [0.8, 0.2], [0.75, 0.25]])).astype(np.float64)
    bins = calibration(logits, logits, np.array([0, 0, 0])).model.bins
    assert [one.examples for one in bins] == [3]  # (11/15, 12/15] holds 0.8


def test_intervals_are_scipys(found: Calibration) -> None:
    def apart(index: np.ndarray) -> float:
        rows = index.astype(int)
        return by_bins(MINE[rows], LABELS[rows]) - by_bins(TEACHER[rows], LABELS[rows])

    theirs = stats.bootstrap(
        (np.arange(N),), apart, vectorized=False, method="basic", n_resamples=300, rng=0
    ).confidence_interval
    width = theirs.high - theirs.low
    assert found.interval.low == pytest.approx(theirs.low, abs=0.15 * width)
    assert found.interval.high == pytest.approx(theirs.high, abs=0.15 * width)
    assert found.interval.high < 0  # the teacher is less sure than right, and three times its logits less so


def test_a_model_that_is_its_teacher_has_no_difference() -> None:
    same = calibration(TEACHER, TEACHER, LABELS)
    assert same.model == same.teacher
    assert (same.difference, same.interval.low, same.interval.high) == (0, 0, 0)


def test_intervals_cover_the_truth() -> None:
    """A teacher whose probabilities are the truth but for some noise, and a model that is too sure."""

    def draw(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        logits = 2 * rng.normal(size=(n, 10))
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        labels = (shares.cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
        return 1.3 * logits, logits + 0.3 * rng.normal(size=logits.shape), labels

    mine, teacher, labels = draw(500_000, np.random.default_rng(0))
    truth = by_bins(mine, labels)
    apart = truth - by_bins(teacher, labels)
    assert truth > 0.05
    found = [calibration(*draw(1000, np.random.default_rng(seed)), seed=seed) for seed in range(1, 61)]
    assert np.mean([one.model.interval.low <= truth <= one.model.interval.high for one in found]) >= 0.85
    assert np.mean([one.interval.low <= apart <= one.interval.high for one in found]) >= 0.85


@pytest.mark.timing
def test_ten_thousand_examples_take_less_than_half_a_second_of_a_processor() -> None:
    labels = RNG.integers(10, size=10_000)
    logits = RNG.normal(size=(10_000, 10)).astype(np.float32)
    started = time.process_time()
    calibration(logits, 2 * logits, labels)
    assert time.process_time() - started < 2


def test_examples_without_a_label_are_left_out() -> None:
    known = np.arange(N) % 3 > 0
    found = calibration(MINE, TEACHER, np.where(known, LABELS, -100))
    assert found == calibration(MINE[known], TEACHER[known], LABELS[known])
