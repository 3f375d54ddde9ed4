"""The figures of a scorecard, by the field's own libraries.

Shapes: N examples, C classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 2000
MANY, LARGEST = 2000, 100  # values above which a mean is not resampled one by one, and how many still are
AT_ONCE = 2**21  # values that are looked at at a time
Z = 1.959963984540054  # the normal quantile of a two-sided 95 % interval
Z_POWER = 0.8416212335729143  # that of a power of 80 %


@dataclass(frozen=True)
class Interval:
    """A two-sided 95 % confidence interval, in the unit of what it is of."""

    low: float
    high: float

    @property
    def half(self) -> float:
        """Half its width."""
        return (self.high - self.low) / 2


def proportion(successes: int, n: int) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927), by scipy."""
    from scipy.stats import binomtest

    low, high = binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(low), float(high))


def paired_difference(lost: int, gained: int, n: int, level: float = CONFIDENCE) -> Interval:
    """Interval of a difference of two proportions measured on the same n examples.

    At each end the outer one of two: Tango's score interval (1998, "Equivalence test and confidence interval for the
    difference in proportions for the paired-sample design"), and Wald's after half an observation is added to each of
    the four cells (Agresti and Min 2005, "Simple improved confidence intervals for comparing matched proportions").
    Where few examples flip, either alone is too narrow on one side.

    Args:
        lost: examples that only the first got right.
        gained: examples that only the second got right.
        n: examples in all.
        level: of the interval.
    """
    from scipy.special import ndtri

    z = float(ndtri((1 + level) / 2))
    middle, variance = _adjusted(lost, gained, n)
    half = z * math.sqrt(variance)
    low, high = _score_low(lost, gained, n, z), -_score_low(gained, lost, n, z)
    return Interval(max(-1.0, min(low, middle - half)), min(1.0, max(high, middle + half)))


def _score_low(lost: int, gained: int, n: int, z: float) -> float:
    """Lower end of Tango's interval: the difference whose score statistic is z."""
    from scipy.optimize import brentq

    found = (gained - lost) / n

    def above(at: float) -> float:
        """The difference found less `at`, beyond z of its errors; `chance` is that of a loss were `at` the truth."""
        b, c = (2 * n + lost - gained) * at - lost - gained, -lost * at * (1 - at)
        chance = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        return n * (found - at) - z * math.sqrt(max(0.0, n * (2 * chance + at * (1 - at))))

    return -1.0 if lost == n else float(brentq(above, -1.0, found - 1e-9, xtol=1e-12))


def bootstrap(
    of: Callable[[NDArray[np.int64]], NDArray[np.float64]], n: int, seed: int = 0, resamples: int = RESAMPLES
) -> list[Interval]:
    """Expanded percentile intervals of statistics, by resampling n examples with replacement (Efron 1979).

    Several statistics of the same resamples make a paired interval: a difference is one of them. Percentiles of
    resamples are too narrow, as normal quantiles without n − 1 and without Student's t are; the levels are taken that
    much further out (Hesterberg 2015, "What teachers should know about the bootstrap").

    Args:
        of: indices of examples (S, n), one row for each resample, to K statistics (S, K).
        n: examples.
        seed: of what is drawn.
        resamples: how often.

    Returns:
        K intervals.
    """
    rng, found = np.random.default_rng(seed), []
    at_once = max(1, 2**21 // max(n, 1))
    for start in range(0, resamples, at_once):
        found.append(of(rng.integers(n, size=(min(at_once, resamples - start), n))))
    return expanded_percentiles(np.concatenate(found), n)


def bootstrap_mean(values: NDArray[np.float64], seed: int = 0) -> Interval:
    """The interval of `bootstrap` of the mean of n values, at a cost that does not grow with n.

    Of more than 2,000 values the 100 largest are drawn one by one. The sum of what else a resample holds is drawn as
    normal, with the mean and the variance that a sum of so many of the others has: none of them is large beside it.
    """
    n = len(values)
    if n <= MANY:
        (interval,) = bootstrap(lambda index: values[index].mean(axis=1, keepdims=True), n, seed)
        return interval
    inorder, rng = np.sort(values), np.random.default_rng(seed)
    body, tail = inorder[:-LARGEST], inorder[-LARGEST:]
    drawn = rng.binomial(n, LARGEST / n, size=RESAMPLES)  # of the tail, in each resample
    picked = tail[rng.integers(LARGEST, size=drawn.sum())]
    of_tail = np.bincount(np.repeat(np.arange(RESAMPLES), drawn), picked, RESAMPLES)
    left = n - drawn
    of_body = left * body.mean() + rng.standard_normal(RESAMPLES) * np.sqrt(left * body.var())
    (interval,) = expanded_percentiles((of_tail + of_body)[:, None] / n, n)
    return interval


def expanded_percentiles(found: NDArray[np.float64], n: int) -> list[Interval]:
    """The K intervals of `bootstrap`, from K statistics (S, K) of S resamples of n examples."""
    from scipy.stats import norm
    from scipy.stats import t as student_t

    share = (1 - CONFIDENCE) / 2
    if n > 1:
        share = float(norm.cdf(student_t.ppf(share, n - 1) * math.sqrt(n / (n - 1))))
    low, high = np.quantile(found, [share, 1 - share], axis=0)
    return [Interval(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def detectable(interval: Interval) -> float:
    """The smallest true difference that an interval of this width would show, by leaving out 0, four times in five.

    Half its width times (z₀.₉₇₅ + z₀.₈) / z₀.₉₇₅, the usual power calculation (Chow et al. 2008, "Sample size
    calculations in clinical research", chapter 4).
    """
    return interval.half * (Z + Z_POWER) / Z


def mcnemar_p(lost: int, gained: int) -> float:
    """Exact two-sided McNemar test of equal accuracy (McNemar 1947; the binomial form), by scipy."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def in_parts(of: Callable[..., NDArray[Any]], *arrays: NDArray[Any]) -> NDArray[Any]:
    """What `of` gives (N,) of arrays (N, C), a part of the rows at a time.

    So what it makes on its way takes memory that grows neither with N nor with C; the arrays may lie on the disk.
    """
    plain = [np.asarray(array) for array in arrays]  # slices of a memory map cost more
    n, step = len(plain[0]), max(1, AT_ONCE // max(1, plain[0].shape[1]))
    return np.concatenate([of(*(one[i : i + step] for one in plain)) for i in range(0, max(n, 1), step)])


def most_likely(logits: NDArray[np.floating]) -> NDArray[np.int64]:
    """The class (N,) of the largest logit of each row (N, C), the first of equal ones."""
    dtype = np.float32 if logits.dtype == np.float16 else logits.dtype  # four times as fast, the change included
    return in_parts(lambda part: part.astype(dtype, copy=False).argmax(axis=1), logits)


def divergences(teacher: NDArray[np.floating], student: NDArray[np.floating]) -> NDArray[np.float64]:
    """KL(teacher ‖ student) of each example (N,), in nats, from logits (N, C), computed in float64 in parts."""
    from scipy.special import log_softmax

    def of(*both: NDArray[np.floating]) -> NDArray[np.float64]:
        p, q = (log_softmax(logits.astype(np.float64), axis=1) for logits in both)
        found: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=1)
        return found

    return in_parts(of, teacher, student)


def share_outside(logits: NDArray[np.floating], columns: NDArray[np.int64]) -> float:
    """The mean over rows (N, C) of the probability that is of other classes than some (K,), in float64 in parts."""
    from scipy.special import softmax

    return float(
        in_parts(lambda rows: 1 - softmax(rows.astype(np.float64), axis=1)[:, columns].sum(axis=1), logits).mean()
    )


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for being several, so that at most 5 % of such sets have any below 0.05 by chance.

    Holm 1979, "A simple sequentially rejective multiple test procedure": the smallest of m times m, the next times
    m − 1, and so on, none below the one before it.
    """
    given = np.asarray(p, dtype=np.float64)
    order = np.argsort(given, kind="stable")
    found = np.empty_like(given)
    found[order] = np.minimum(np.maximum.accumulate(given[order] * np.arange(len(given), 0, -1)), 1)
    return [float(one) for one in found]


def change_of_gap(one: tuple[int, int, int], other: tuple[int, int, int]) -> tuple[Interval, float]:
    """Interval and two-sided p-value of the difference of two paired differences of proportions.

    The two are over different examples, so that their variances add; each has the middle and the variance of
    `paired_difference` (Agresti and Min 2005), half an observation in each cell.

    Args:
        one, other: examples that only the first got right, that only the second got right, and in all; of both sets.

    Returns:
        The interval of `one`'s difference less `other`'s, and the p-value of the hypothesis that they are equal.
    """
    from scipy.special import ndtr

    (middle, variance), (other_middle, other_variance) = _adjusted(*one), _adjusted(*other)
    apart, error = middle - other_middle, math.sqrt(variance + other_variance)
    interval = Interval(max(-2.0, apart - Z * error), min(2.0, apart + Z * error))
    return interval, float(2 * ndtr(-abs(apart) / error))


def _adjusted(lost: int, gained: int, n: int) -> tuple[float, float]:
    """A paired difference and its variance after half an observation is added to each of the four cells."""
    total, b, c = n + 2, lost + 0.5, gained + 0.5
    middle = (c - b) / total
    return middle, (b + c - (c - b) ** 2 / total) / total**2
