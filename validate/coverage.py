"""Whether the examples that calibrate cover the range of those that judge.

Shapes: n calibration and N evaluation examples, C channels.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.validate.examples import Examples, Pairs
from potstill.validate.units import counted

AT_ONCE = 256
BY_CHANCE = 0.001  # what is more probable than this where both sets are drawn alike is not told


def outside(calibrate: Examples, judging: Examples, length_of: str | None) -> str | None:
    """One sentence where more of the evaluation set is out of the calibration's range than chance explains.

    Of arrays (one column of bytes or floats) the values of each channel, below the least or above the greatest; of
    texts those longer than the longest. Of examples drawn alike the count outside n others is distributed as a negative
    hypergeometric, by ranks alone (Wilks 1942, "Statistical prediction with special reference to the problem of
    tolerance limits"); ties make it rarer. Memory is that of a part of the examples.
    """
    first = judging.rows([0])
    if length_of is not None and length_of in first:
        return _of_lengths(calibrate, judging, length_of)
    columns = list(first.values())
    is_array = len(columns) == 1 and isinstance(columns[0], np.ndarray)
    return _of_values(calibrate, judging) if is_array and _is_measured(columns[0]) else None


def _is_measured(array: NDArray[Any]) -> bool:
    """Whether an array's numbers have a range; wider integers are indices."""
    return array.dtype == np.uint8 or array.dtype.kind == "f"


def _improbable(count: int, n: int, judged: int, sides: int, channels: int = 1) -> bool:
    """Whether so many of `judged` examples outside the range of n others are too many for chance in any channel."""
    from scipy.stats import hypergeom

    # so many outside: of the first count + sides − 1 of all in order, fewer than `sides` are among the n
    chance = hypergeom.cdf(sides - 1, n + judged, n, count + sides - 1) if count else 1.0
    return bool(chance < BY_CHANCE / channels)


def _of_lengths(calibrate: Examples, judging: Examples, column: str) -> str | None:
    longest, lengths = int(calibrate.lengths(column).max()), judging.lengths(column)
    longer = int((lengths > longest).sum())
    judged = len(judging) * (2 if isinstance(judging.table, Pairs) else 1)
    if not _improbable(longer, len(calibrate), judged, sides=1):
        return None
    unit = "letters" if isinstance(judging.rows([0])[column][0], str) else "words"
    are = "is" if longer == 1 else "are"
    return (
        f"{longer:,} of the {counted(len(judging), 'evaluation example')} {are} longer than the longest of the "
        f"{counted(len(calibrate), 'calibration example')} ({longest:,} {unit}; the longest evaluation example has "
        f"{int(lengths.max()):,}). Give calibration examples as long as those to come."
    )


def _channels(examples: Examples) -> Iterator[NDArray[Any]]:
    """Values (B, V, C) of some examples after the others: V values of each of C channels.

    Rows of numbers: each is a channel. Rows of three axes: the first is the channels where it has 1 or 3 and the last
    has not, else the last. Rows of two axes are one channel.
    """
    for start in range(0, len(examples), AT_ONCE):
        (array,) = examples.rows(range(start, min(start + AT_ONCE, len(examples)))).values()
        if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] not in (1, 3):
            array = np.moveaxis(array, 1, 3)
        channels = 1 if array.ndim in (1, 3) else array.shape[-1]
        yield array.reshape(len(array), -1, channels)


def _of_values(calibrate: Examples, judging: Examples) -> str | None:
    ends = [(part.min(axis=(0, 1)), part.max(axis=(0, 1))) for part in _channels(calibrate)]
    low, high = np.min([one for one, _ in ends], axis=0), np.max([one for _, one in ends], axis=0)
    count, values = np.zeros(len(low), dtype=np.int64), 0
    for part in _channels(judging):
        count += ((part < low) | (part > high)).sum(axis=(0, 1))
        values += part.shape[0] * part.shape[1]
    share = count / values
    worst = int(share.argmax())
    examples = int(np.floor(share[worst] * len(judging)))  # values of one example hang together: counted as examples
    if not _improbable(examples, len(calibrate), len(judging), sides=2, channels=len(low)):
        return None
    return (
        f"{count.sum() / (values * len(low)):.1%} of the evaluation values are outside the range of the "
        f"{counted(len(calibrate), 'calibration example')}; of channel {worst + 1} of {len(low)} {share[worst]:.1%} "
        f"are outside {low[worst]:.4g} to {high[worst]:.4g}. What is outside is cut off in integers: give calibration "
        "examples like those to come."
    )
