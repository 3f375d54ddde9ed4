"""Anything that turns a batch of raw examples into logits: a torch module, an ONNX session.

Shapes: N examples, B of them in a batch, C classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from potstill.validate.data import Examples, Rows
from potstill.validate.encoder import Encoder
from potstill.validate.errors import InputError
from potstill.validate.progress import track
from potstill.validate.task import Model


class Predictor(Protocol):
    """Raw rows to logits (B, C), float32."""

    name: str
    batch_size: int
    encode: Encoder

    def __call__(self, rows: Rows) -> NDArray[np.float32]:
        """Logits of some rows."""
        ...


def best_device() -> torch.device:
    """The CUDA device when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class TorchPredictor:
    """A loaded model, in float32, on a device."""

    def __init__(self, model: Model, name: str, device: torch.device, batch_size: int = 64) -> None:
        self.name, self.batch_size, self.encode = name, batch_size, model.encode
        self._model, self._device = model, device
        model.module.to(device).eval()

    def __call__(self, rows: Rows) -> NDArray[np.float32]:
        """Logits of some rows."""
        with torch.inference_mode():
            logits: NDArray[np.float32] = (
                self._model.module(*self._model.batch(rows, self._device)).float().cpu().numpy()
            )
        return logits


class OnnxPredictor:
    """An ONNX file in ONNX Runtime, one example at a time, as a device runs it.

    One at a time is also the only true way to judge dynamic quantisation, whose ranges depend on the batch.
    """

    batch_size = 1

    def __init__(
        self,
        path: Path,
        encode: Encoder,
        name: str,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        session_options: Mapping[str, str] | None = None,
        threads: int = 0,
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        for key, value in (session_options or {}).items():
            options.add_session_config_entry(key, value)
        self.name, self.encode = name, encode
        self._session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        self.input_types = {i.name: i.type for i in self._session.get_inputs()}

    def __call__(self, rows: Rows) -> NDArray[np.float32]:
        """Logits of some rows."""
        return self.run(self.encode(rows))

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Logits of inputs that are encoded already."""
        logits = self._session.run(None, {name: inputs[name] for name in self.input_types})[0]
        return np.asarray(logits, dtype=np.float32)


def predict(predictor: Predictor, examples: Examples, length_of: str | None = None) -> NDArray[np.float32]:
    """Logits (N, C) of all examples, in their order.

    Args:
        predictor: what to ask.
        examples: N examples.
        length_of: a text column; batches are then made of texts of like length, which pads less.

    Raises:
        InputError: a logit is not finite.
    """
    order = np.arange(len(examples))
    if length_of and predictor.batch_size > 1:
        order = np.argsort([len(text) for text in examples.rows(range(len(examples)))[length_of]], kind="stable")
    logits: NDArray[np.float32] | None = None
    with track(f"predicting with {predictor.name}", len(order)) as advance:
        for start in range(0, len(order), predictor.batch_size):
            index = order[start : start + predictor.batch_size]
            batch = predictor(examples.rows(index.tolist()))
            if logits is None:
                logits = np.empty((len(order), batch.shape[1]), dtype=np.float32)
            logits[index] = batch
            advance(len(index))
    assert logits is not None
    broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(broken):
        raise InputError(
            f"{predictor.name} gave logits that are not finite on {len(broken)} of {len(logits)} examples of "
            f"{examples.name}, first on row {broken[0] + 1}; its weights or that example are broken"
        )
    return logits
