"""Whether a model is as sure as it is right, beside its teacher.

Shapes: N examples, C classes.
"""

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass
from scipy.special import softmax

from potstill.validate.examples import IGNORED
from potstill.validate.metrics import Interval, bootstrap, in_parts, most_likely

BINS = 15


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
    excess = np.zeros((n, 2 * BINS))  # right less sure, in the column of its side and bin
    for side, (sure, right) in enumerate(sides):
        excess[np.arange(n), side * BINS + _bins(sure)] = right - sure

    def errors(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        mine, theirs = np.abs(sums).reshape(-1, 2, BINS).sum(axis=2).T / n
        return np.stack([mine, theirs, mine - theirs], axis=1)

    def of(index: NDArray[np.int64]) -> NDArray[np.float64]:
        first = np.arange(len(index))[:, None] * n  # of each resample, where its n counts begin
        times = np.bincount((index + first).ravel(), minlength=index.size).reshape(index.shape)
        return errors(times.astype(np.float64) @ excess)

    found = [float(one) for one in errors(excess.sum(axis=0))[0]]
    *of_sides, apart = (_reflected(one, at) for one, at in zip(bootstrap(of, n, seed), found, strict=True))
    mine, theirs = (
        Reliability(ece, Interval(max(0.0, interval.low), max(0.0, interval.high)), _filled(*side))
        for ece, interval, side in zip(found[:2], of_sides, sides, strict=True)
    )
    return Calibration(mine, theirs, found[2], apart)


def confidence(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """The probability (N,) that a model gave to what it said, by its logits (N, C), in float64 in parts."""
    return in_parts(lambda part: softmax(part.astype(np.float64), axis=1).max(axis=1), logits)


def _reflected(percentiles: Interval, at: float) -> Interval:
    return Interval(2 * at - percentiles.high, 2 * at - percentiles.low)


def _sure_and_right(
    logits: NDArray[np.floating], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
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
