"""Predictions in memory, for tests that keep none."""

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from potstill.validate.examples import Examples
from potstill.validate.predictor import Predictor, predict


def predicted(predictor: Predictor, examples: Examples, length_of: str | None = None) -> NDArray[np.float32]:
    """What `predict` keeps (R, C), as float32 for torch and scipy."""
    with tempfile.TemporaryDirectory() as folder:
        return predict(predictor, examples, length_of, Path(folder, "logits.npy")).astype(np.float32)
