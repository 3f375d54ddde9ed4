"""A histogram whose range widens as values come, in memory that does not grow with their number."""

import math

import numpy as np
from numpy.typing import NDArray

BINS = 4096  # of a whole histogram; at least half of them lie between the least and the greatest value, or zero
PART = 2**15  # values counted at once: they stay in the processor's cache
LEAST_EXPONENT = -126  # exponent of the narrowest bin: its inverse is still a float32


class Histogram:
    """Counts of float32 values in `BINS` bins of one width, a power of two, with an edge at zero.

    A value outside of them widens the bins: the width doubles until all fit, and bins whose sum is a new one are added.
    So every count is exact at every width: a value's bin is the floor of it over the width, which no rounding touches.

    Attributes:
        counts: int64 (BINS,).
        exponent: the width of a bin is 2 to this power.
        start: the first bin begins at this many widths; at most 0.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(BINS, dtype=np.int64)
        self.exponent, self.start = LEAST_EXPONENT, 0

    @property
    def edges(self) -> NDArray[np.float64]:
        """The bins' ends, ascending (BINS + 1,)."""
        ends: NDArray[np.float64] = np.ldexp(
            np.arange(self.start, self.start + BINS + 1, dtype=np.float64), self.exponent
        )
        return ends

    def add(self, values: NDArray[np.float32], low: float, high: float) -> None:
        """Count values of any shape, finite, of which `low` is the least and `high` the greatest."""
        self._widen(low, high)
        flat = values.ravel()
        scaled, index = np.empty(PART, dtype=np.float32), np.empty(PART, dtype=np.int32)
        inverse, start = np.float32(2.0**-self.exponent), np.float32(self.start)
        for begin in range(0, flat.size, PART):
            part = flat[begin : begin + PART]
            here, whole = scaled[: part.size], index[: part.size]
            np.multiply(part, inverse, out=here)
            np.floor(here, out=here)
            np.subtract(here, start, out=here)
            np.copyto(whole, here, casting="unsafe")  # whole numbers from 0 to BINS - 1
            self.counts += np.bincount(whole, minlength=BINS)

    def _widen(self, low: float, high: float) -> None:
        """Make the bins hold zero, what they held, and values from `low` to `high`."""
        held = np.flatnonzero(self.counts)
        width = 2.0**self.exponent
        first, last = min(math.floor(low / width), 0), max(math.floor(high / width), 0)
        if len(held):
            first, last = min(first, self.start + int(held[0])), max(last, self.start + int(held[-1]))
        if first >= self.start and last < self.start + BINS:
            return
        by = 0
        while (last >> by) - (first >> by) >= BINS:
            by += 1
        start = first >> by
        counts = np.zeros_like(self.counts)
        if len(held):  # a bin of index i goes into i >> by, the floor of i / 2 ** by
            np.add.at(counts, ((self.start + held) >> min(by, 62)) - start, self.counts[held])
        self.counts, self.exponent, self.start = counts, self.exponent + by, start
