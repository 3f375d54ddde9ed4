"""Raw examples as a reader sees them: the text, or a small picture as a data URI.

Shapes: N examples, H × W pixels, C channels (1, 3 or none).
"""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from potstill.pipeline.ledger import Entry
from potstill.validate.data import Examples

MOST_LETTERS = 600
MOST_PIXELS = 128  # of a side; a larger picture is made smaller
PNG_UP_TO = 64  # pixels of a side; a larger picture is a JPEG


@dataclass(frozen=True)
class Exhibit:
    """What can be shown of an example: its texts, cut where they are long; pictures as data URIs; or neither."""

    texts: tuple[str, ...]
    pictures: tuple[str, ...]


def exhibits(examples: Examples, entries: Iterable[Entry]) -> dict[int, Exhibit]:
    """The examples that the entries' flips name, by their row from 1."""
    rows = sorted({flip.row for entry in entries if entry.flips for flip in entry.flips.worst})
    if not rows:
        return {}
    columns = examples.rows([row - 1 for row in rows]).values()
    shown = [_column(list(column)) for column in columns]
    return {
        row: Exhibit(
            texts=tuple(column[i] for is_text, column in shown if is_text),
            pictures=tuple(column[i] for is_text, column in shown if not is_text and column[i]),
        )
        for i, row in enumerate(rows)
    }


def _column(values: list[Any]) -> tuple[bool, list[str]]:
    """Whether these are texts, and each as a text or as a data URI; empty for what is neither."""
    if all(isinstance(value, str) for value in values):
        return True, [value if len(value) <= MOST_LETTERS else f"{value[:MOST_LETTERS]}…" for value in values]
    if all(isinstance(value, Image.Image) for value in values):
        return False, [_data_uri(value.convert("RGB")) for value in values]
    arrays = [np.asarray(value) for value in values]
    if all(_is_picture(array) for array in arrays):
        return False, [_data_uri(Image.fromarray(pixels)) for pixels in _as_bytes(arrays)]
    return False, [""] * len(values)


def _is_picture(array: NDArray[Any]) -> bool:
    """Whether an array is (H, W), (H, W, 1) or (H, W, 3) of numbers, not one cell high or wide."""
    return (
        array.dtype.kind in "uif"
        and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3)))
        and min(array.shape[:2]) > 1
    )


def _as_bytes(arrays: list[NDArray[Any]]) -> list[NDArray[np.uint8]]:
    """Pictures as bytes: as they are, or from the smallest to the largest value of all of them."""
    flat = [array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array for array in arrays]
    if all(array.dtype == np.uint8 for array in flat):
        return flat
    low, high = float(min(array.min() for array in flat)), float(max(array.max() for array in flat))
    scale = 255 / ((high - low) or 1.0)
    return [np.rint((array.astype(np.float64) - low) * scale).astype(np.uint8) for array in flat]


def _data_uri(picture: Image.Image) -> str:
    kind = "png" if max(picture.size) <= PNG_UP_TO else "jpeg"
    picture.thumbnail((MOST_PIXELS, MOST_PIXELS))
    file = io.BytesIO()
    picture.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
