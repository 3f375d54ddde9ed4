"""Whether a model is as sure as it is right, beside its teacher.

Shapes: N examples, C classes.
"""

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass
from scipy.special import softmax

from potstill.validate.examples import IGNORED
from potstill.validate.metrics import RESAMPLES, Interval, expanded_percentiles, in_parts, most_likely

BINS = 15
_Side = tuple[NDArray[np.float64], NDArray[np.bool_]]  # how sure of each example, and whether right


@dataclass(frozen=True)
class Bin:
    """Examples of which a model was about equally sure.

    Attributes:
        examples: how many.
        confidence: mean probability that the model gave to what it said.
        accuracy: share that it had right.
    """

    examples: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Reliability:
    """How sure a model is and how often it is right.

    Attributes:
        ece: expected calibration error: the mean distance of confidence and accuracy over the bins, by examples.
        interval: its 95 % interval, which may lie below `ece`: that of a sample lies above the truth.
        bins: those of 15 of equal width that have examples, the least sure first.
    """

    ece: float
    interval: Interval
    bins: list[Bin]


@dataclass(frozen=True)
class Calibration:
    """A model's reliability and its teacher's.

    Attributes:
        model, teacher: of each.
        difference, interval: the model's error less the teacher's, with the paired 95 % interval.
    """

    model: Reliability
    teacher: Reliability
    difference: float
    interval: Interval


def calibration(
    logits: NDArray[np.floating], teacher: NDArray[np.floating], labels: NDArray[np.int64], seed: int = 0
) -> Calibration:
    """Expected calibration errors over 15 bins of equal width, with paired bootstrap intervals.

    Guo et al. 2017, "On calibration of modern neural networks": a bin holds its upper end, not its lower one. Noise in
    a bin adds to the error, in a resample once more than in the sample, so the percentiles are reflected at the
    estimate (the basic bootstrap; Davison and Hinkley 1997, section 5.2).

    Args:
        logits, teacher: of both (N, C).
        labels: (N,); examples labelled `IGNORED` are left out.
        seed: of the resamples.
    """
    sides = [_sure_and_right(one, labels) for one in (logits, teacher)]
    n = len(sides[0][0])
    resampled = _errors(_resampled_sums(sides, seed), n)
    found = [float(one) for one in _errors(_sums(sides), n)[0]]
    percentiles = expanded_percentiles(resampled, n)
    *of_sides, apart = (_reflected(one, at) for one, at in zip(percentiles, found, strict=True))
    mine, theirs = (
        Reliability(ece, Interval(max(0.0, interval.low), max(0.0, interval.high)), _filled(*side))
        for ece, interval, side in zip(found[:2], of_sides, sides, strict=True)
    )
    return Calibration(mine, theirs, found[2], apart)


def confidence(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """The probability (N,) that a model gave to what it said, by its logits (N, C), in float64 in parts."""
    return in_parts(lambda part: softmax(part.astype(np.float64), axis=1).max(axis=1), logits)


def _errors(sums: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Both errors and their difference (S, 3), from sums of right less sure (S, 2, BINS) over n examples."""
    mine, theirs = np.abs(sums).sum(axis=2).T / n
    return np.stack([mine, theirs, mine - theirs], axis=1)


def _sums(sides: list[_Side]) -> NDArray[np.float64]:
    """Right less sure, added over the examples of each side's bins: (1, 2, BINS)."""
    return np.array([[np.bincount(_bins(sure), right - sure, BINS) for sure, right in sides]], dtype=np.float64)


def _resampled_sums(sides: list[_Side], seed: int) -> NDArray[np.float64]:
    """The sums of 2,000 resamples of the examples (S, 2, BINS), without drawing each of N examples.

    Examples in the same bin and right alike, on both sides, are one of G groups. How many of a resample come from each
    is multinomial, as in any resample. Within a group only the confidences differ, by less than a bin's width: their
    sum is drawn as normal, with the mean and the covariance that as many draws from the group have.
    """
    n, bins = len(sides[0][0]), [_bins(sure) for sure, _ in sides]
    code = np.ravel_multi_index((bins[0], sides[0][1], bins[1], sides[1][1]), (BINS, 2, BINS, 2))
    _, first, group, size = np.unique(code, return_index=True, return_inverse=True, return_counts=True)
    excess = np.stack([right - sure for sure, right in sides])  # (2, N)
    mean = np.stack([np.bincount(group, one) for one in excess]) / size  # (2, G)
    a, b = excess - mean[:, group]
    spread, shared, other_spread = (np.bincount(group, one) / size for one in (a * a, a * b, b * b))
    slope = np.divide(shared, spread, out=np.zeros_like(shared), where=spread > 0)
    rest = np.sqrt(np.maximum(other_spread - slope * shared, 0))  # of the second side, what the first does not tell
    rng = np.random.default_rng(seed)
    times = rng.multinomial(n, size / n, size=RESAMPLES)
    x, y = rng.standard_normal((2, *times.shape)) * np.sqrt(times)
    x *= np.sqrt(spread)
    within = [x, slope * x + rest * y]
    sums = [(times * mean[i] + within[i]) @ np.eye(BINS)[bins[i][first]] for i in range(2)]
    return np.stack(sums, axis=1)


def _reflected(percentiles: Interval, at: float) -> Interval:
    return Interval(2 * at - percentiles.high, 2 * at - percentiles.low)


def _sure_and_right(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> _Side:
    known = labels != IGNORED
    return confidence(logits)[known], (most_likely(logits) == labels)[known]


def _bins(sure: NDArray[np.float64]) -> NDArray[np.int64]:
    """The bin (N,) of each confidence, from 0."""
    found: NDArray[np.int64] = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], sure, side="left")
    return found


def _filled(sure: NDArray[np.float64], right: NDArray[np.bool_]) -> list[Bin]:
    of = _bins(sure)
    counts, sums, hits = (np.bincount(of, weights, BINS) for weights in (None, sure, right))
    return [
        Bin(int(n), float(total / n), float(hit / n)) for n, total, hit in zip(counts, sums, hits, strict=True) if n
    ]
