"""The figures of a scorecard, by the field's own libraries.

Shapes: N examples, C classes.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
Z = 1.959963984540054  # the normal quantile of a two-sided 95 % interval


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


def paired_difference(lost: int, gained: int, n: int) -> Interval:
    """Interval of a difference of two proportions measured on the same n examples.

    Agresti and Min 2005, "Simple improved confidence intervals for comparing matched proportions": Wald's
    interval after half an observation is added to each of the four cells.

    Args:
        lost: examples that only the first got right.
        gained: examples that only the second got right.
        n: examples in all.
    """
    total, b, c = n + 2, lost + 0.5, gained + 0.5
    middle = (c - b) / total
    half = Z * math.sqrt((b + c) - (c - b) ** 2 / total) / total
    return Interval(max(-1.0, middle - half), min(1.0, middle + half))


def mcnemar_p(lost: int, gained: int) -> float:
    """Exact two-sided McNemar test of equal accuracy (McNemar 1947; the binomial form), by scipy."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def mean_kl(teacher: NDArray[np.floating], student: NDArray[np.floating]) -> float:
    """Mean KL(teacher ‖ student) over examples, in nats, from logits (N, C), computed in float64."""
    from scipy.special import log_softmax

    p, q = (log_softmax(np.asarray(logits, dtype=np.float64), axis=1) for logits in (teacher, student))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())
