"""A model on a device as one to judge: raw inputs over the wire, raw outputs back; words and classes stay here.

Shapes: B examples in a batch, R rows of all of them, C classes.
"""

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, NonNegativeInt, ValidationError

from potstill.targets.device import Device, Made
from potstill.targets.local import Local
from potstill.targets.qemu import Crashed, emulator_of
from potstill.targets.qnn import QnnSim
from potstill.targets.target import Target
from potstill.validate.encoder import Encoder, Inputs
from potstill.validate.errors import InputError, PotstillError, Unreachable
from potstill.validate.examples import Rows
from potstill.validate.model import Read, as_they_are
from potstill.validate.predictor import one_below_another
from potstill.validate.session import CPU
from potstill.validate.units import counted

NUMBERS = {np.dtype(code).name for code in np.typecodes["AllInteger"] + "efd?"}

HERE = Local()


class _Output(BaseModel):
    dtype: str
    shape: list[NonNegativeInt]


class _Answer(BaseModel):
    providers: list[str]
    missing_providers: list[str]
    outputs: list[_Output]


class DevicePredictor:
    """An ONNX file that the agent runs, one example at a time, in a process of its own for each batch.

    Examples are encoded and outputs are read here, as `OnnxPredictor` does, so that the judge is the same.
    """

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
        batch_size: int = 256,
        device: Device = HERE,
        timeout_s: float = 900,
    ) -> None:
        """`timeout_s` is for one batch."""
        self.name, self.batch_size, self.encode, self._read = name, batch_size, encode, read
        self._model = {
            "path": path.resolve(),
            "providers": list(providers),
            "session_options": dict(session_options or {}),
        }
        self._threads = threads
        self._device, self._timeout_s = device, timeout_s

    def __call__(self, rows: Rows) -> NDArray[np.float32]:
        """Logits (R, C) of some rows, each run alone.

        Raises:
            InputError: the interpreter cannot be started, or lacks a provider.
            Unreachable: no answer in time.
            PotstillError: the agent failed, or its outputs are missing or malformed.
        """
        return one_below_another(self._answers(rows))

    def first(self, rows: Rows, seconds: float) -> list[NDArray[np.float32]]:
        """Logits (R, C) of each of the first rows, as many as are run in some seconds, one at least.

        Raises: as above.
        """
        return self._answers(rows, seconds)

    def _answers(self, rows: Rows, seconds: float | None = None) -> list[NDArray[np.float32]]:
        count = len(next(iter(rows.values())))
        inputs = [self.encode({name: rows[name][i : i + 1] for name in rows}) for i in range(count)]
        found = []
        for encoded, output in zip(inputs, self._outputs(inputs, seconds), strict=seconds is None):
            tensors = {name: torch.from_numpy(array) for name, array in encoded.items()}
            found.append(self._read(torch.from_numpy(output.astype(np.float32)), tensors).numpy())
        return found

    def _outputs(self, inputs: Sequence[Inputs], seconds: float | None) -> list[NDArray[Any]]:
        """The model's first output of each example, as the agent gave it; of the first ones where time is limited."""
        with tempfile.TemporaryDirectory(prefix="potstill-") as folder:
            given, made = Path(folder, "inputs.bin"), Path(folder, "outputs.bin")
            files = {"inputs": given, "outputs": Made(made)}
            limit = {} if seconds is None else {"seconds": seconds}
            request = {
                "threads": self._threads,
                "answer": {**self._model, **files, **limit, "examples": _write(given, inputs)},
            }
            reply = self._device.ask(request, timeout_s=self._timeout_s)
            try:
                answer = _Answer.model_validate(reply.get("answer"))
            except ValidationError as error:
                raise PotstillError(f"the agent gave no answer: {error.errors()[0]['msg']}") from None
            if answer.missing_providers:
                raise InputError(
                    f"{self.name} wants {', '.join(answer.missing_providers)}, and its device has only "
                    f"{', '.join(answer.providers)}; give a provider that is there"
                )
            done = len(answer.outputs)
            return _read_outputs(
                made, answer.outputs, len(inputs) if seconds is None else min(max(done, 1), len(inputs))
            )


class EmulatedPredictor(DevicePredictor):
    """An ONNX file as a target's CPU or NPU computes it, one example at a time; see `DevicePredictor`.

    Attributes:
        chip: what is emulated.
        emulator: by which program.
    """

    def __init__(
        self,
        target: Target,
        path: Path,
        encode: Encoder,
        name: str,
        *,
        read: Read = as_they_are,
        batch_size: int = 256,
        timeout_s: float = 900,
    ) -> None:
        """Examples of one batch share the emulator's start of about 2 s; `timeout_s` is for one batch.

        Raises:
            InputError: nothing emulates the target's CPU or NPU here: why, and what to do.
        """
        device: Device
        if target.model.compiler:
            device = npu = QnnSim(target)
            self.chip, self.emulator, self._crashes = npu.chip, "onnxruntime-qnn", False
        else:
            emulator = emulator_of(target)
            device = Local(emulator.python, emulator.environment, where="emulate", kind="emulated")
            self.chip, self.emulator, self._crashes = emulator.cpu, Path(emulator.python[0]).name, True
        super().__init__(
            path,
            encode,
            name,
            read=read,
            session_options=target.runtime.session_options,
            threads=1,
            batch_size=batch_size,
            device=device,
            timeout_s=timeout_s,
        )

    def _outputs(self, inputs: Sequence[Inputs], seconds: float | None) -> list[NDArray[Any]]:
        """As of `DevicePredictor`.

        Raises:
            Crashed: the file did, as that CPU.
            InputError, Unreachable: as of `DevicePredictor`.
        """
        try:
            return super()._outputs(inputs, seconds)
        except (InputError, Unreachable):
            raise
        except PotstillError as error:
            if not self._crashes:
                raise
            ended, _, said = str(error).partition(": ")
            last = said.splitlines()[-1:]  # no traceback, and no place of this machine
            words = ": ".join([ended, *last]).replace(str(Path(str(self._model["path"])).parent) + os.sep, "")
            raise Crashed(f"{self.name} crashed as {self.chip}: {words}") from error


def _write(file: Path, inputs: Sequence[Inputs]) -> list[dict[str, Any]]:
    """Write arrays raw and little-endian, one after the other; what they are, for the request."""
    with file.open("wb") as into:
        for one in inputs:
            for array in one.values():
                into.write(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return [{name: {"dtype": array.dtype.name, "shape": array.shape} for name, array in one.items()} for one in inputs]


def _read_outputs(file: Path, outputs: Sequence[_Output], examples: int) -> list[NDArray[Any]]:
    """Arrays out of a raw little-endian file that must hold exactly them.

    Raises:
        PotstillError: they are too few, no numbers, or the file is of another size.
    """
    if len(outputs) != examples:
        raise PotstillError(f"the agent gave {counted(len(outputs), 'output')} for {counted(examples, 'example')}")
    raw = file.read_bytes() if file.is_file() else b""
    found, start = [], 0
    for output in outputs:
        if output.dtype not in NUMBERS:
            raise PotstillError(f"the agent gave outputs of dtype {output.dtype!r}, expected numbers")
        dtype, size = np.dtype(output.dtype).newbyteorder("<"), math.prod(output.shape)
        if start + size * dtype.itemsize <= len(raw):
            found.append(np.frombuffer(raw, dtype, size, start).reshape(output.shape))
        start += size * dtype.itemsize
    if start != len(raw):
        raise PotstillError(
            f"the agent's outputs hold {len(raw)} bytes, expected {start} for {counted(examples, 'example')}"
        )
    return found
