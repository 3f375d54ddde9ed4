"""Anything that turns raw examples into the rows that are judged: a torch module, an ONNX session.

Shapes: N examples, B of them in a batch, R rows of all of them, C classes. R is N where each example has one class.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from potstill.validate.encoder import Encoder
from potstill.validate.errors import InputError
from potstill.validate.examples import Examples, Rows
from potstill.validate.model import MASKED, Model, Read, as_they_are
from potstill.validate.progress import track


class Predictor(Protocol):
    """Raw rows to logits (R, C), float32."""

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
            tensors = self._model.tensors(rows, self._device)
            logits: NDArray[np.float32] = self._model.answers(tensors).float().cpu().numpy()
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
        read: Read = as_they_are,
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
        self.name, self.encode, self._read = name, encode, read
        self._session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        self.input_types = {i.name: i.type for i in self._session.get_inputs()}

    def __call__(self, rows: Rows) -> NDArray[np.float32]:
        """Logits of some rows, each run alone."""
        count = len(next(iter(rows.values())))
        return np.concatenate([self._one({name: rows[name][i : i + 1] for name in rows}) for i in range(count)])

    def _one(self, row: Rows) -> NDArray[np.float32]:
        inputs = self.encode(row)
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        return self._read(torch.from_numpy(self.run(inputs)), tensors).numpy()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Outputs of inputs that are encoded already, as the graph gives them."""
        logits = self._session.run(None, {name: inputs[name] for name in self.input_types})[0]
        return np.asarray(logits, dtype=np.float32)


def predict(predictor: Predictor, examples: Examples, length_of: str | None = None) -> NDArray[np.float32]:
    """Logits (R, C) of all examples, in their order.

    Args:
        predictor: what to ask.
        examples: N examples.
        length_of: a column; batches are then made of examples of like length, which pads less.

    Raises:
        InputError: a logit is not finite.
    """
    order = np.arange(len(examples))
    if length_of and predictor.batch_size > 1:
        order = np.argsort(examples.lengths(length_of), kind="stable")
    starts, logits = examples.offsets, np.empty((0, 0), dtype=np.float32)
    with track(f"predicting with {predictor.name}", len(order)) as advance:
        for first in range(0, len(order), predictor.batch_size):
            index = order[first : first + predictor.batch_size]
            batch = predictor(examples.rows(index.tolist()))
            if starts is None:
                starts = np.arange(len(examples) + 1) * (len(batch) // len(index))
            logits = _wide_enough(logits, int(starts[-1]), batch.shape[1])
            places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in index])
            logits[places, : batch.shape[1]] = batch
            advance(len(index))
    assert starts is not None
    broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(broken):
        rows = np.unique(np.searchsorted(starts, broken, side="right"))
        raise InputError(
            f"{predictor.name} gave logits that are not finite on {len(rows)} of {len(examples)} examples of "
            f"{examples.name}, first on row {rows[0]}; its weights or that example are broken"
        )
    return logits


def _wide_enough(logits: NDArray[np.float32], rows: int, width: int) -> NDArray[np.float32]:
    """Logits with at least `width` columns: where these are tokens, a longer batch has more; `MASKED` before it."""
    if logits.shape[1] >= width:
        return logits
    wider = np.full((rows, width), MASKED, dtype=np.float32)
    wider[: len(logits), : logits.shape[1]] = logits
    return wider
