"""Augmented views of image arrays: a function of seed, view and example, so that a view can be seen again.

Shapes: B examples, H × W pixels.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from potstill.validate.data import Rows
from potstill.validate.errors import InputError

Way = Literal["flip", "shift"]


class Views:
    """Flips and shifts of N images; teacher and student see the same view (Beyer 2022, "Knowledge distillation: a
    good teacher is patient and consistent")."""

    def __init__(self, ways: Sequence[Way], examples: int, seed: int) -> None:
        self._ways, self._examples, self._seed = tuple(ways), examples, seed
        self._drawn = lru_cache(maxsize=2)(self._draw)

    def __call__(self, rows: Rows, indices: Sequence[int], view: int) -> Rows:
        """One view of some examples.

        Args:
            rows: with image arrays `x` (B, H, W, 1 or 3).
            indices: their numbers (B,).
            view: its number.

        Raises:
            InputError: the arrays are no such images.
        """
        x: NDArray[Any] = np.array(rows["x"])
        if x.ndim != 4 or x.shape[3] not in (1, 3):
            raise InputError(f"augment needs images of shape (height, width, 1 or 3), and x is {x.shape[1:]}")
        flips, shifts = self._drawn(view)
        if "flip" in self._ways:
            flip = flips[indices]
            x[flip] = x[flip, :, ::-1]
        if "shift" in self._ways:
            x = _shifted(x, shifts[indices])
        return {**rows, "x": x}

    def _draw(self, view: int) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Whether each example is flipped, and how far it is shifted down and right, from 0 to 1."""
        rng = np.random.default_rng([self._seed, view])
        return rng.random(self._examples) < 0.5, rng.random((self._examples, 2))


def _shifted(x: NDArray[Any], shares: NDArray[np.float64]) -> NDArray[Any]:
    """Images moved by up to an eighth of their side each way; what comes in is black."""
    reach = max(1, x.shape[1] // 8)
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    moves = (shares * (2 * reach + 1)).astype(np.int64)
    rows = moves[:, 0, None] + np.arange(x.shape[1])
    columns = moves[:, 1, None] + np.arange(x.shape[2])
    picked: NDArray[Any] = padded[np.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked
