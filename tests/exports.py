"""Graphs that were exported before, for tests whose subject is what comes after.

torch's exporter takes seconds even for a small transformer, and most tests begin with the same few teachers.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch

from potstill.validate.model import LogitsOf

Export = Callable[[Any, tuple[torch.Tensor, ...], Path, int], None]


def key_of(model: Any, inputs: tuple[torch.Tensor, ...], opset: int) -> str:
    """A hash of all that an exported transformer depends on: its classes, settings, weights, inputs and names."""
    module = model.module
    settings = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    config = module.model.config
    words = [type(module).__qualname__, repr(module), repr(sorted(settings.items())), config.to_json_string(False)]
    words += [
        str(config._attn_implementation),
        str(model.input_names),
        model.output,
        str(model.encode.axes),
        str(opset),
    ]
    found = hashlib.sha256(json.dumps(words).encode())
    for name, value in [*module.state_dict().items(), *(("", one) for one in inputs)]:
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def once(export: Export, folder: Path) -> Export:
    """`export`, which exports a transformer anew only if it has not the bits of one in `folder`."""

    def exported(model: Any, inputs: tuple[torch.Tensor, ...], path: Path, opset: int) -> None:
        if not isinstance(model.module, LogitsOf):
            return export(model, inputs, path, opset)
        kept = folder / f"{key_of(model, inputs, opset)}.onnx"
        if not kept.exists():
            export(model, inputs, path, opset)
            aside = kept.with_suffix(f".{os.getpid()}")
            onnx.save(onnx.load(path), aside)
            aside.rename(kept)
        onnx.save(onnx.load(kept), path)
        return None

    return exported
