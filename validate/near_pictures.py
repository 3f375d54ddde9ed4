"""Near duplicates among pictures, by the colours of their parts.

Shapes: U pictures, H × W pixels.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from potstill.validate.examples import Examples
from potstill.validate.nearest import Best, parts
from potstill.validate.progress import track

AT_ONCE = 256
COARSE, FINE = 8, 16  # cells on a side
COARSE_ALIKE, FINE_ALIKE = 0.99, 0.95  # correlations
RULE = f"correlations above {COARSE_ALIKE} of {COARSE} × {COARSE} cells and above {FINE_ALIKE} of {FINE} × {FINE}"


def can_read(examples: Examples) -> bool:
    """Whether they are pictures, alone in their rows: of PIL, or arrays of bytes or of three colours."""
    columns = list(examples.rows([0]).values())
    return len(columns) == 1 and colour_axis(columns[0][0]) is not None


def search(judging: Examples, others: Examples) -> Best:
    """For each picture of `judging` the one of `others` that is most alike, if one is alike enough.

    8 × 8 cells correlate by more than 0.99, and so that it is no two smooth pictures, 16 × 16 by more than 0.95. The
    kin of perceptual hashes, without rounding to bits (Zauner 2010, "Implementation and benchmarking of perceptual
    image hash functions"). Mirrored, turned or cropped pictures are not found. Time grows with the product of both
    numbers, 192 products a pair.
    """
    each = [cells(next(iter(rows.values()))) for rows in parts(judging, AT_ONCE)]
    coarse, fine = np.concatenate([one for one, _ in each]), np.concatenate([one.astype(np.float16) for _, one in each])
    best, before = Best(len(coarse)), 0
    with track("near duplicates", len(others)) as advance:
        for rows in parts(others, AT_ONCE):
            their_coarse, their_fine = cells(next(iter(rows.values())))
            alike = coarse @ their_coarse.T
            nearest = alike.argmax(axis=1)
            i = np.flatnonzero(alike.max(axis=1) > COARSE_ALIKE)
            i = i[(fine[i] * their_fine[nearest[i]]).sum(axis=1) > FINE_ALIKE]
            best.note(i, nearest[i] + before, alike[i, nearest[i]])
            before += len(their_coarse)
            advance(len(their_coarse))
    return best


def cells(pictures: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Pictures as 8 × 8 cells (U, 192) and 16 × 16 cells (U, 768) of mean colours, each less its mean, of length 1."""
    fine = _fine(pictures)
    k = FINE // COARSE
    coarse = fine.reshape(len(fine), COARSE, k, COARSE, k, 3).mean(axis=(2, 4))
    return _centred(coarse), _centred(fine)


def _fine(pictures: Any) -> NDArray[np.float32]:
    """The mean colours of 16 × 16 cells: (U, 16, 16, 3)."""
    if isinstance(pictures[0], Image.Image):
        small = [one.convert("RGB").resize((FINE, FINE), Image.Resampling.BOX) for one in pictures]
        return np.array([np.asarray(one) for one in small], dtype=np.float32)
    axis, array = colour_axis(pictures[0]), np.asarray(pictures, dtype=np.float32)
    planes = array[:, None] if axis == -1 else array if axis == 0 else np.moveaxis(array, 3, 1)
    rows, columns = (_areas(side) for side in planes.shape[2:])
    mean = np.moveaxis(rows @ planes @ columns.T, 1, 3)
    return np.broadcast_to(mean, (*mean.shape[:3], 3))


def colour_axis(value: Any) -> int | None:
    """Which axis of a picture is its colours: 2 or 0, or −1 where it has none; None for what is no picture.

    Arrays of numbers that are neither bytes nor have three colours may be anything, such as spectrograms.
    """
    if isinstance(value, Image.Image):
        return 2
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "uf":
        return None
    bytes_ = value.dtype == np.uint8
    if value.ndim == 2:
        axis, sides = -1 if bytes_ else None, value.shape
    elif value.ndim == 3 and value.shape[2] in ((1, 3) if bytes_ else (3,)):
        axis, sides = 2, value.shape[:2]
    elif value.ndim == 3 and value.shape[0] in ((1, 3) if bytes_ else (3,)):
        axis, sides = 0, value.shape[1:]
    else:
        return None
    return axis if min(sides) >= COARSE else None


def _areas(side: int) -> NDArray[np.float32]:
    """How much of each of 16 cells each of `side` pixels fills: (16, side), rows sum to 1."""
    edges, pixels = np.linspace(0, side, FINE + 1), np.arange(side)
    filled = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    share: NDArray[np.float32] = (np.maximum(filled, 0) * FINE / side).astype(np.float32)
    return share


def _centred(parts: NDArray[np.float32]) -> NDArray[np.float32]:
    """Less the mean of each, and of length 1; zero for what is of one colour."""
    flat = parts.reshape(len(parts), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.where(lengths > 1e-3, flat / np.maximum(lengths, 1e-3), 0).astype(np.float32)
    return unit
