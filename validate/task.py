"""The tasks: a new one is one class and one line in `TASKS`.

Shapes: B examples in a batch, C classes.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from potstill.validate.audio import AudioClassification
from potstill.validate.checkpoint import LABELS, Checkpoint, build_module, open_folder
from potstill.validate.embedding import FeatureExtraction
from potstill.validate.encoder import ArrayEncoder, ImageEncoder
from potstill.validate.errors import InputError
from potstill.validate.examples import Rows
from potstill.validate.files import read_json
from potstill.validate.language import TextGeneration
from potstill.validate.model import LogitsOf, Model, OneClass, OnnxModel, Task, quiet_transformers
from potstill.validate.pretrained import Pretrained, class_names, open_onnx
from potstill.validate.quantized import restored
from potstill.validate.spans import QuestionAnswering
from potstill.validate.tagging import TokenClassification
from potstill.validate.text import OfText

__all__ = [
    "TASKS", "ImageClassification", "LogitsOf", "Model", "ModuleClassification", "Task", "TextClassification",
    "class_names", "quiet_transformers",
]  # fmt: skip


class TextClassification(OfText, OneClass):
    """One text, one class."""

    word = "text-classification"
    features: tuple[str, ...] = ("text",)
    length_of: str | None = "text"
    probe: ClassVar[Rows] = {"text": ["a"]}


class ImageClassification(Pretrained, OneClass):
    """One image, one class."""

    word = "image-classification"
    features: tuple[str, ...] = ("image",)
    length_of: str | None = None
    tool = "processor"
    probe: ClassVar[Rows] = {"image": [np.zeros((8, 8, 3), dtype=np.uint8)]}

    def open_tool(self, folder: str) -> Any:
        """The image processor."""
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)

    def encoder(  # type: ignore[override]  # it has no options
        self, tool: Any, core: nn.Module, checkpoint: Checkpoint
    ) -> ImageEncoder:
        """See `Pretrained.encoder`."""
        return ImageEncoder(tool)


class ModuleClassification(OneClass):
    """Any `nn.Module` from one array to logits; classes are numbered."""

    word = "module"
    features: tuple[str, ...] = ("x",)
    length_of: str | None = None

    def load(
        self,
        checkpoint: Checkpoint,
        labels: tuple[str, ...] | None = None,
        like: Model | None = None,
        example: Rows | None = None,
    ) -> Model:
        """Build by the factory; `example` is fed once to learn the number of classes. See `Task.load`."""
        if not checkpoint.is_factory and not checkpoint.onnx:
            open_folder(checkpoint)  # says how to name a factory, when the folder knows it
            raise InputError(
                f"the task 'module' takes package.module:factory or an ONNX file, and was given {checkpoint}"
            )
        if example is None:
            raise InputError("the task 'module' needs an example to learn the number of classes")
        if checkpoint.onnx:
            return self._of_onnx(checkpoint, example)
        core, encode = build_module(checkpoint), ArrayEncoder()
        found = tuple(map(str, range(_logits_width(core, encode(example)["x"], checkpoint))))
        labels = labels or found
        if len(found) != len(labels):
            raise InputError(
                f"{checkpoint} gives {len(found)} classes, the teacher has {len(labels)}; they must be the same"
            )
        return Model(restored(core, checkpoint), encode, ("x",), labels, checkpoint, core)

    def _of_onnx(self, checkpoint: Checkpoint, example: Rows) -> Model:
        """An ONNX file from one array to logits, the input under its own name; classes by `labels.json` beside it."""
        core = open_onnx(checkpoint, "logits")
        name = next(iter(core.inputs))
        encode = ArrayEncoder(name=name)
        core.check_fed(encode(example), encode.axes, "the data")
        found = tuple(map(str, range(_logits_width(core, encode(example)[name], checkpoint))))
        said = checkpoint.beside_onnx / LABELS
        labels = tuple(map(str, read_json(said))) if said.is_file() else found
        if len(found) != len(labels):
            raise InputError(f"{checkpoint} gives {len(found)} classes, and {said} names {len(labels)}")
        return OnnxModel(core, encode, (name,), labels, checkpoint, core, output=core.output)


def _logits_width(core: nn.Module, x: NDArray[Any], checkpoint: Checkpoint) -> int:
    """C of the logits (B, C) that a module gives for `x`."""
    try:
        with torch.inference_mode():
            logits = core(torch.from_numpy(x))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{checkpoint} does not take x of shape {x.shape} and type {x.dtype}: {error}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(
            f"{checkpoint} gave {got} for x of shape {x.shape}; expected logits of shape ({len(x)}, classes)"
        )
    return logits.shape[1]


TASKS: Mapping[str, Task] = {
    task.word: task
    for task in (
        TextClassification(),
        ImageClassification(),
        ModuleClassification(),
        TokenClassification(),
        AudioClassification(),
        FeatureExtraction(),
        QuestionAnswering(),
        TextGeneration(),
    )
}
