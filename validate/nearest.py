"""What the searches for near duplicates share.

Shapes: U texts or pictures of the evaluation set, K pairs.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.validate.examples import Examples


def parts(examples: Examples, at_once: int) -> Iterator[Any]:
    """The rows of examples, some at a time."""
    for start in range(0, len(examples), at_once):
        yield examples.rows(range(start, min(start + at_once, len(examples))))


class Best:
    """For each of U, how alike the most alike other is, (U,), and which one that is, (U,); −1 for none."""

    def __init__(self, count: int) -> None:
        self.alike, self.partner = np.zeros(count), np.full(count, -1)

    def note(self, i: NDArray[np.int64], j: NDArray[np.int64], alike: NDArray[np.floating]) -> None:
        """Take for each i the j (K,) that is most alike, where more so than what was known; of equals the first."""
        order = np.lexsort((-j, alike))  # of several writes to one place the last one stays
        i, j, alike = i[order], j[order], alike[order]
        better = alike > self.alike[i]
        self.alike[i[better]], self.partner[i[better]] = alike[better], j[better]
