"""Raw examples to a model's inputs; each model has its own.

Shapes: B examples in a batch, T tokens, H × W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from potstill.validate.errors import InputError
from potstill.validate.examples import Rows

Inputs = dict[str, NDArray[Any]]
BATCH: Mapping[int, str] = {0: "batch"}


class Encoder(Protocol):
    """What every encoder does."""

    truncated: int  # examples cut to the longest length so far

    @property
    def axes(self) -> Mapping[int, str]:
        """The dimensions of every input that may change, by name."""
        ...

    def __call__(self, rows: Rows, /) -> Inputs:
        """Encode rows; every array has the shape (B, …)."""
        ...

    def save(self, folder: Path, /) -> None:
        """Write what `transformers` opens to encode the same way."""
        ...

    def same_as(self, other: "Encoder", /) -> bool:
        """Whether both give the same inputs for the same rows."""
        ...


@dataclass
class TextEncoder:
    """Texts through the checkpoint's own tokenizer: int64 arrays (B, T), T at most `max_length`.

    Attributes:
        tokenizer: a fast tokenizer of transformers.
        max_length: tokens kept of an example.
        pad_to: a fixed T, for targets that take no dynamic shapes.
        truncated: examples that were cut so far.
    """

    tokenizer: Any
    max_length: int
    pad_to: int | None = None
    truncated: int = 0
    axes: ClassVar[Mapping[int, str]] = {0: "batch", 1: "sequence"}

    def __call__(self, rows: Rows) -> Inputs:
        """Token ids and masks."""
        return self.arrays(self.tokenize(list(rows["text"])))

    def tokenize(self, *texts: Any, truncation: str | bool = True, **how: Any) -> Any:
        """The tokenizer's own result, cut and padded; what was cut is counted."""
        encoded = self.tokenizer(
            *texts,
            truncation=truncation,
            max_length=self.pad_to or self.max_length,
            padding="max_length" if self.pad_to else "longest",
            **how,
        )
        self.truncated += sum(bool(one.overflowing) for one in encoded.encodings)
        return encoded

    def arrays(self, encoded: Any) -> Inputs:
        """The inputs in a tokenizer's result, int64 (B, T)."""
        return {
            name: np.asarray(values, dtype=np.int64)
            for name, values in encoded.items()
            if name in self.tokenizer.model_input_names
        }

    def save(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save_pretrained(folder)

    def same_as(self, other: Encoder) -> bool:
        """Whether the other one has the same tokenizer and lengths."""
        return isinstance(other, TextEncoder) and self._plan() == other._plan()

    def _plan(self) -> tuple[int, int | None, str]:
        """All that decides the inputs; padding and truncation as of the last call are no part of it."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return self.max_length, self.pad_to, backend.to_str()


@dataclass
class ImageEncoder:
    """Images through the checkpoint's own image processor: `pixel_values` float32 (B, 3, H, W)."""

    processor: Any
    truncated: int = 0
    axes: ClassVar[Mapping[int, str]] = BATCH

    def __call__(self, rows: Rows) -> Inputs:
        """Pixels, resized and normalised."""
        from PIL import Image

        images = [
            (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).convert("RGB")
            for image in rows["image"]
        ]
        return {"pixel_values": self.processor(images=images, return_tensors="np")["pixel_values"].astype(np.float32)}

    def save(self, folder: Path) -> None:
        """Write the image processor."""
        self.processor.save_pretrained(folder)

    def same_as(self, other: Encoder) -> bool:
        """Whether the other one prepares images the same way."""
        return isinstance(other, ImageEncoder) and bool(self.processor.to_dict() == other.processor.to_dict())


@dataclass
class ArrayEncoder:
    """Arrays as they are: integers wider than a byte as int64, all else as float32. Scaling is the module's.

    Attributes:
        truncated: of no meaning here.
        name: of the input.
    """

    truncated: int = 0
    name: str = "x"
    axes: ClassVar[Mapping[int, str]] = BATCH

    def __call__(self, rows: Rows) -> Inputs:
        """The array.

        Raises:
            InputError: it holds no numbers.
        """
        x = np.asarray(rows["x"])
        if x.dtype.kind not in "iufb":
            raise InputError(f"x is {x.dtype}; expected numbers")
        return {self.name: x.astype(np.int64 if x.dtype.kind in "iu" and x.dtype.itemsize > 1 else np.float32)}

    def save(self, folder: Path) -> None:
        """Nothing to write: the module holds its own scaling."""

    def same_as(self, other: Encoder) -> bool:
        """Whether the other one takes arrays too."""
        return isinstance(other, ArrayEncoder)
