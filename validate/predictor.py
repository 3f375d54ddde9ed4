"""Anything that turns raw examples into the rows that are judged: a torch module, an ONNX session.

Shapes: N examples, B of them in a batch, R rows of all of them, C classes. R is N where each example has one class.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from potstill.validate.decoder import with_past
from potstill.validate.encoder import Encoder, Inputs
from potstill.validate.errors import InputError
from potstill.validate.examples import Examples, Rows
from potstill.validate.files import take_space
from potstill.validate.model import MASKED, Model, Read, as_they_are
from potstill.validate.progress import track
from potstill.validate.session import CPU, open_session
from potstill.validate.units import counted

LEAST = float(np.finfo(np.float16).min)


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
        providers: Sequence[str] = (CPU,),
        session_options: Mapping[str, str] | None = None,
        threads: int = 0,
    ) -> None:
        self.name, self.encode, self._read = name, encode, read
        self._session = open_session(path, session_options, providers=providers, intra_op_num_threads=threads)
        self.input_types = {i.name: i.type for i in self._session.get_inputs()}
        self._output = [self._session.get_outputs()[0].name]

    def __call__(self, rows: Rows) -> NDArray[np.float32]:
        """Logits of some rows, each run alone."""
        count = len(next(iter(rows.values())))
        return one_below_another([self._one({name: rows[name][i : i + 1] for name in rows}) for i in range(count)])

    def _one(self, row: Rows) -> NDArray[np.float32]:
        inputs = self.encode(row)
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        return self._read(torch.from_numpy(self.run(inputs)), tensors).numpy()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Outputs of inputs that are encoded already, as the graph gives them."""
        logits = self._session.run(self._output, self.feeds(inputs))[0]
        return np.asarray(logits, dtype=np.float32)

    def feeds(self, inputs: Mapping[str, NDArray[Any]]) -> Inputs:
        """What the graph takes of encoded inputs; a decoder's with an empty past, see `with_past`."""
        return with_past(self._session, inputs)


def predict(predictor: Predictor, examples: Examples, length_of: str | None, into: Path) -> NDArray[np.float16]:
    """Logits (R, C) of all examples, in their order, kept in a file and rounded as `rounded` does.

    Memory does not grow with N: each batch is written to its place on the disk.

    Args:
        predictor: what to ask.
        examples: N examples.
        length_of: a column; batches are then made of examples of like length, which pads less, the longest first.
        into: the `.npy` to make.

    Returns:
        The file, memory-mapped, read-only.

    Raises:
        InputError: a logit is not finite, or larger than float16 holds.
        OSError: the disk is full.
    """
    order = np.arange(len(examples))
    if length_of:
        order = np.argsort(-examples.lengths(length_of), kind="stable")
    starts, kept = examples.offsets, np.empty((0, 0), dtype=np.float16)
    fault = np.zeros(len(examples), dtype=np.int8)  # of each example: 1 too large, 2 not finite
    with track(f"predicting with {predictor.name}", len(order)) as advance:
        for first in range(0, len(order), predictor.batch_size):
            index = order[first : first + predictor.batch_size]
            batch = predictor(examples.rows(index.tolist()))
            if starts is None:
                starts = np.arange(len(examples) + 1) * (len(batch) // len(index))
            kept = _wide_enough(kept, into, int(starts[-1]), batch.shape[1])
            stored = rounded(batch)
            kept[np.concatenate([np.arange(starts[i], starts[i + 1]) for i in index]), : batch.shape[1]] = stored
            fits, finite = (np.isfinite(one).all(axis=1) for one in (stored, batch))
            of_rows = np.where(finite, np.where(fits, 0, 1), 2).astype(np.int8)
            np.maximum.at(fault, np.repeat(index, np.diff(starts)[index]), of_rows)
            advance(len(index))
    _refuse(fault, predictor, examples)
    del kept
    read_only: NDArray[np.float16] = np.load(into, mmap_mode="r")
    return read_only


def rounded(rows: NDArray[np.float32]) -> NDArray[np.float16]:
    """Rows (R, C) in float16, each with its largest value where it was.

    To the nearest, ties to even (IEEE 754). Where that makes the largest value of a row equal to one before it, it is
    raised by one step, so that the row says the same class. What is below −65,504 becomes −65,504, as a class that is
    masked by −1e9 does: its probability is 0 beside any other. What is above 65,504 becomes infinite.
    """
    with np.errstate(over="ignore"):
        found = np.maximum(rows, LEAST).astype(np.float16)
    top = rows.argmax(axis=1)
    moved = np.flatnonzero(found.astype(np.float32).argmax(axis=1) != top)
    at = moved, top[moved]
    found[at] = np.nextafter(found[at], np.float16(np.inf))
    return found


def one_below_another(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Rows (R, C) of several examples; narrower ones are filled with `MASKED`, as where columns are tokens."""
    width = max(part.shape[1] for part in parts)
    return np.concatenate(
        [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=MASKED) for part in parts]
    )


def _wide_enough(kept: NDArray[np.float16], into: Path, rows: int, width: int) -> NDArray[np.float16]:
    """The file with at least `width` columns: where these are tokens, a longer batch has more; `MASKED` before it."""
    if kept.shape[1] >= width:
        return kept
    aside = into.with_name(f"{into.name}.wider")
    wider = np.lib.format.open_memmap(aside, mode="w+", dtype=np.float16, shape=(rows, width))
    take_space(aside, aside.stat().st_size)
    wider[:] = MASKED
    wider[: len(kept), : kept.shape[1]] = kept
    aside.replace(into)
    return wider


def _refuse(fault: NDArray[np.int8], predictor: Predictor, examples: Examples) -> None:
    """Tell of logits that cannot be kept; `fault` (N,) is 2 for an example with one that is not finite, 1 too large."""
    worst = fault.max()
    if not worst:
        return
    rows = np.flatnonzero(fault == worst)
    what, why = (
        ("that are not finite", "its weights or that example are broken")
        if worst == 2
        else (f"above {-LEAST:,.0f}, the most that float16 holds,", "scale its outputs or that example down")
    )
    raise InputError(
        f"{predictor.name} gave logits {what} on {len(rows)} of {counted(len(examples), 'example')} of {examples.name}"
        f", first on row {rows[0] + 1}; {why}"
    )
