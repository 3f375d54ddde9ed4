"""From what was seen of an activation to the range that its integers span.

Shapes: N bins of a histogram, T of them in a candidate range, L levels of the integers.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from potstill.export.histogram import Histogram
from potstill.export.ranges import Seen
from potstill.targets.target import Calibration
from potstill.validate.fake_quant import Activation, Formats

BINNED: tuple[Calibration, ...] = ("percentile", "entropy", "mse")  # methods that need a histogram
PERCENTILE = 99.99
ENTROPY_BINS = 2048  # as in Migacz 2017
AT_ONCE = 256  # candidates compared at once
FRACTIONS = 0.9 ** np.arange(40)  # of the whole range, down to 1/61
HOPELESS = 4.0  # times the least error so far: the search ends there


def minmax(seen: Seen, activation: Activation) -> tuple[float, float]:
    """The least and the greatest value: nothing is cut off."""
    return seen.low, seen.high


def moving_average(seen: Seen, activation: Activation) -> tuple[float, float]:
    """Averages of each batch's least and greatest value (Krishnamoorthi 2018, arXiv:1806.08342, section 3)."""
    return seen.mean_low, seen.mean_high


def percentile(seen: Seen, activation: Activation) -> tuple[float, float]:
    """The range of the middle 99.99 % of the values (Wu 2020, arXiv:2004.09602, section 4.1), half cut on each side.

    Exact to the width of a bin, in which values are taken to be spread evenly.
    """
    histogram = _histogram(seen)
    total = np.cumsum(histogram.counts)
    edges, ends = histogram.edges, []
    for share in ((100 - PERCENTILE) / 200, (100 + PERCENTILE) / 200):
        rank = share * total[-1]
        at = int(np.searchsorted(total, rank))
        inside = (rank - (total[at] - histogram.counts[at])) / histogram.counts[at]
        ends.append(float(np.clip(edges[at] + inside * (edges[at + 1] - edges[at]), seen.low, seen.high)))
    return ends[0], ends[1]


def entropy(seen: Seen, activation: Activation) -> tuple[float, float]:
    """The magnitude at which cutting off loses least information (Migacz 2017, "8-bit inference with TensorRT").

    Of each candidate, T bins of 2,048, the divergence KL(P || Q): P the counts with all that is beyond added to the
    last bin, Q the counts spread evenly over the bins of each of L levels that hold anything. L is half of the
    integers, and all of them where all values are positive and they are unsigned. The lowest bin is made equal to its
    neighbour: zero is held without error (both as in NVIDIA's pytorch-quantization, calib/histogram.py).
    """
    histogram = _histogram(seen)
    formats = Formats(activation)
    levels = formats.limits[1] + 1
    levels //= 2 if seen.low < 0 and not formats.symmetric else 1
    counts, width = _magnitudes(histogram)
    if len(counts) <= levels:
        return seen.low, seen.high
    counts[0] = counts[1]
    candidates = np.arange(levels, len(counts) + 1)
    parts = [_divergences(counts, candidates[i : i + AT_ONCE], levels) for i in range(0, len(candidates), AT_ONCE)]
    divergences = np.concatenate(parts)
    if not np.isfinite(divergences).any():
        return seen.low, seen.high
    most = float(candidates[divergences.argmin()] * width)
    return max(seen.low, -most), min(seen.high, most)


def _magnitudes(histogram: Histogram) -> tuple[NDArray[np.float64], float]:
    """Counts of magnitudes in at most `ENTROPY_BINS` bins, up to the last that holds any, and their width."""
    zero, width = -histogram.start, 2.0**histogram.exponent
    above, below = histogram.counts[zero:], histogram.counts[:zero][::-1]
    counts = np.zeros(len(histogram.counts), dtype=np.float64)
    counts[: len(above)] += above
    counts[: len(below)] += below
    held = np.flatnonzero(counts)
    if held[-1] >= ENTROPY_BINS:
        return counts.reshape(-1, 2).sum(axis=1)[: held[-1] // 2 + 1], 2 * width
    return counts[: held[-1] + 1], width


def _divergences(counts: NDArray[np.float64], candidates: NDArray[np.int64], levels: int) -> NDArray[np.float64]:
    """KL(P || Q) in nats of each candidate T, infinite where P has what Q has not.

    With q the height of a level in Q: Σ p log p − Σ p log q, both by sums over whole levels.
    """
    sums, filled = (np.concatenate([[0], np.cumsum(values)]) for values in (counts, counts > 0))
    logs = np.concatenate([[0], np.cumsum(_xlogx(counts))])
    bounds = -(-np.arange(levels + 1) * candidates[:, None] // levels)  # bins of a level, by the floor of bin · L / T
    mass, number = np.diff(sums[bounds], axis=1), np.diff(filled[bounds], axis=1)
    beyond, last = sums[-1] - sums[candidates], counts[candidates - 1]
    height = mass / np.maximum(number, 1)
    theirs = mass.copy()
    theirs[:, -1] += beyond
    with np.errstate(divide="ignore", invalid="ignore"):
        cross = np.where(theirs > 0, theirs * np.log(height), 0).sum(axis=1)
        ours = logs[candidates - 1] + _xlogx(last + beyond)
        divergence = (ours - cross) / sums[-1] - np.log(sums[-1] / sums[candidates])
    return np.where((last == 0) & (beyond > 0), np.inf, divergence)


def _xlogx(values: NDArray[np.float64]) -> NDArray[np.float64]:
    product: NDArray[np.float64] = values * np.log(np.where(values > 0, values, 1))
    return product


def mse(seen: Seen, activation: Activation) -> tuple[float, float]:
    """The range whose integers have the least mean squared error, rounding and cutting off together.

    The criterion of Sung 2015 (arXiv:1511.06488) and Banner 2019 (arXiv:1810.05723), here integrated over the
    histogram, values taken to be spread evenly in a bin. One end after the other is sought, twice, over fractions of
    the whole range and then between the neighbours of the best.
    """
    histogram, formats = _histogram(seen), Formats(activation)
    held = np.flatnonzero(histogram.counts)
    edges = histogram.edges[held[0] : held[-1] + 2]
    counts = histogram.counts[held[0] : held[-1] + 1]

    def error(low: float, high: float) -> float:
        return float(counts @ np.diff(_integral(edges, *formats.parameters(low, high), *formats.limits)))

    if formats.symmetric:
        most = max(-seen.low, seen.high)
        most *= _best(lambda fraction: error(-fraction * most, fraction * most))
        return max(seen.low, -most), min(seen.high, most)
    low, high = seen.low, seen.high
    for _ in range(2 if low < 0 < high else 1):
        if high > 0:
            high = seen.high * _best(lambda fraction, low=low: error(low, fraction * seen.high))  # type: ignore[misc]
        if low < 0:
            low = seen.low * _best(lambda fraction, high=high: error(fraction * seen.low, high))  # type: ignore[misc]
    return low, high


def _integral(at: NDArray[np.float64], scale: float, zero_point: int, least: int, greatest: int) -> NDArray[np.float64]:
    """The integral from 0 to each place of the squared quantisation error: n s³/12 + r³/3, r what n steps leave."""
    steps = np.clip(np.rint(at / scale), least - zero_point, greatest - zero_point)
    rest = at - steps * scale
    whole: NDArray[np.float64] = steps * scale**3 / 12 + rest**3 / 3
    return whole


def _best(error: Callable[[float], float]) -> float:
    """The fraction of a range, at most 1, with the least error. What is cut off only grows as the range shrinks."""
    errors = [error(1.0)]
    for fraction in FRACTIONS[1:]:
        errors.append(error(float(fraction)))
        if errors[-1] > HOPELESS * min(errors):
            break
    at = int(np.argmin(errors))
    bounds = (FRACTIONS[min(at + 1, len(FRACTIONS) - 1)], FRACTIONS[max(at - 1, 0)])
    found = minimize_scalar(error, bounds=bounds, method="bounded", options={"xatol": 2e-3})
    return float(found.x if found.fun < errors[at] else FRACTIONS[at])


def _histogram(seen: Seen) -> Histogram:
    assert seen.histogram is not None, "this method needs a histogram"
    return seen.histogram


METHODS: Mapping[Calibration, Callable[[Seen, Activation], tuple[float, float]]] = {
    "minmax": minmax,
    "moving_average": moving_average,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}
