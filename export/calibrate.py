"""Which examples calibrate, one batch at a time."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from potstill.validate.data import Examples
from potstill.validate.encoder import Encoder, Inputs
from potstill.validate.progress import track

CALIBRATION_EXAMPLES = 256
POOL = 16 * CALIBRATION_EXAMPLES  # examples that are looked at to choose those


class Reader:
    """Calibration examples one batch at a time, encoded when asked for, so that memory is that of one batch.

    Args:
        examples: to choose from.
        encode: of the model that is calibrated.
        seed: of the choice of `CALIBRATION_EXAMPLES` among them.
        batch_size: 1 when shapes differ from example to example.
        names: the graph's inputs, where the encoder gives more.
    """

    def __init__(
        self, examples: Examples, encode: Encoder, seed: int, batch_size: int, names: Sequence[str] | None = None
    ) -> None:
        self._examples, self._encode, self._batch_size, self._names = examples, encode, batch_size, names
        self._order = calibration_indices(examples, seed)
        self.used = len(self._order)

    def __len__(self) -> int:
        """How many batches there are."""
        return math.ceil(self.used / self._batch_size)

    def __iter__(self) -> Iterator[Inputs]:
        """The inputs of each batch; the last may be smaller."""
        with track("calibrating", self.used) as advance:
            for start in range(0, self.used, self._batch_size):
                index = self._order[start : start + self._batch_size].tolist()
                inputs = self._encode(self._examples.rows(index))
                yield {name: inputs[name] for name in self._names or inputs}
                advance(len(index), "")


def calibration_indices(examples: Examples, seed: int) -> NDArray[np.int64]:
    """Which examples calibrate: up to `CALIBRATION_EXAMPLES`, spread evenly over classes and lengths, in random order.

    Of `POOL` examples drawn by chance, in order of class and then of length, one in so many is taken, the first and the
    last too (systematic sampling, Madow 1944): so each class and each length has the share that it has in the pool.
    """
    rng = np.random.default_rng(seed)
    pool = rng.permutation(len(examples))[:POOL]
    some = examples.take(pool.tolist(), "pool")
    lengths = _lengths(some)
    labels = some.labels if some.offsets is None else np.zeros(len(pool))
    order = np.lexsort((lengths, labels))
    count = min(len(pool), CALIBRATION_EXAMPLES)
    chosen = pool[order[np.linspace(0, len(pool) - 1, count).round().astype(np.int64)]] if count else pool
    return rng.permutation(chosen)


def _lengths(examples: Examples) -> NDArray[np.int64]:
    """Length (N,) of each example over its columns of texts or words; 0 where there are none."""
    lengths = np.zeros(len(examples), dtype=np.int64)
    first = examples.rows([0]) if len(examples) else {}
    for column, values in first.items():
        if isinstance(values[0], str | list):
            lengths += examples.lengths(column)
    return lengths
