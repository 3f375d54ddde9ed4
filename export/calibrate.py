"""Activation ranges from real examples, in memory that does not grow with their number."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader

from potstill.validate.data import Examples
from potstill.validate.encoder import Encoder
from potstill.validate.progress import track

CALIBRATION_EXAMPLES = 256


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Calibration examples one batch at a time, encoded when asked for.

    With the min-max calibrator only each tensor's range is kept, so memory is that of one batch.

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
        self._order = calibration_indices(len(examples), seed)
        self._order = self._order[: len(self._order) // batch_size * batch_size or None]
        self.used = len(self._order)
        self._start = 0
        self._track = track("calibrating", self.used)
        self._advance: Any = None

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """The inputs of the next batch, None after the last."""
        if self._advance is None:
            self._advance = self._track.__enter__()
        index = self._order[self._start : self._start + self._batch_size]
        self._start += len(index)
        if not len(index):
            self._track.__exit__(None, None, None)
            return None
        self._advance(len(index), "")
        inputs = self._encode(self._examples.rows(index.tolist()))
        return {name: inputs[name] for name in self._names or inputs}


def calibration_indices(n: int, seed: int) -> NDArray[np.int64]:
    """Which of n examples calibrate: `CALIBRATION_EXAMPLES` of them drawn without replacement."""
    return np.random.default_rng(seed).permutation(n)[:CALIBRATION_EXAMPLES]
