"""An evaluation set under perturbations that keep its labels true: is a student more fragile than its teacher?

One strength for each perturbation, in the constants below with their sources. Only the input changes: labels, the
number of words of a text to tag, and the context of a question stay.

Shapes: N examples, H × W pixels, S samples of a sound.
"""

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import hypot
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from potstill.validate.audio import decoded
from potstill.validate.errors import InputError, did_you_mean
from potstill.validate.examples import Examples, Table
from potstill.validate.files import sha256_json
from potstill.validate.near_pictures import colour_axis

Change = Callable[[Any, np.random.Generator], Any]
VERSION = 1  # of the algorithms: another one gives other digests

COLUMNS: Mapping[str, str] = {  # which column of a task is perturbed
    "text-classification": "text",
    "token-classification": "tokens",
    "question-answering": "question",  # the answers are spans of the context
    "feature-extraction": "text",  # both texts of a pair
    "image-classification": "image",
    "audio-classification": "audio",
    "module": "x",
}


@dataclass(frozen=True)
class Severity:
    """Severity 3 of 5 of a benchmark: its pictures' side in pixels, and how strong it perturbs them.

    Attributes:
        side: in pixels.
        noise: standard deviation, as a share of the range from black to white.
        blur: standard deviation of the Gaussian, in pixels.
        jpeg: quality, 1 to 95.
    """

    side: int
    noise: float
    blur: float
    jpeg: int


# Hendrycks and Dietterich 2019, "Benchmarking neural network robustness to common corruptions and perturbations", and
# its published code: CIFAR-10-C, Tiny ImageNet-C, ImageNet-C. What 224 pixels bear leaves nothing of 32.
SEVERITIES = (Severity(32, 0.08, 0.7, 58), Severity(64, 0.12, 1.0, 50), Severity(224, 0.18, 3.0, 15))
SHORTER_SIDE = 256  # pixels: larger pictures are brought to it first, as ImageNet-C's are

TYPOS = 0.1  # of the words: TextFlint's default (Gui 2021, "TextFlint: unified multilingual robustness evaluation")
TYPED = 4  # letters that a word to be mistyped has at least (Pruthi 2019, "Combating adversarial misspellings")

SNR_DB = 10.0  # ours: the middle of the usual 20, 10 and 0 dB; CIFAR-10-C's severity 3 is 9 dB below its pictures
LEVEL_DB = 12.0  # quieter or louder: the ends of `Gain` of the audiomentations package


@dataclass(frozen=True)
class _Way:
    """A perturbation at its strength: in words, and what it does to one value of a column."""

    words: str
    change: Change


@dataclass(frozen=True)
class Perturbed:
    """A table whose rows are perturbed when they are read.

    The draw of a row is seeded by its index in `table` as it was given at first, so that a row is the same whenever,
    in whatever batch and after whatever `select` it is read.

    Attributes:
        table: the rows as they were.
        column: which of its columns is perturbed; with several values for a row, all of them.
        change: one value and a generator to the perturbed value.
        index: which rows of the first table these are, in order; None for all.
    """

    table: Table
    column: str
    change: Change
    index: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, indices: Any) -> dict[str, Any]:
        rows, numbers = dict(self.table[indices]), self._numbers(indices)
        values, found = rows[self.column], []
        each = len(values) // max(len(numbers), 1)  # 2 for pairs of texts
        for place, number in enumerate(numbers):
            rng = np.random.default_rng(int(number))
            found += [self.change(value, rng) for value in values[place * each : (place + 1) * each]]
        rows[self.column] = np.stack(found) if found and isinstance(values, np.ndarray) else found
        return rows

    def select(self, indices: Any) -> "Perturbed":
        """Some of the rows, in that order."""
        return replace(self, table=self.table.select(indices), index=self._numbers(indices))

    def _numbers(self, indices: Any) -> NDArray[np.int64]:
        """Indices in the first table."""
        numbers = np.asarray(indices, dtype=np.int64)
        return numbers if self.index is None else self.index[numbers]


def perturbations_of(task_word: str, examples: Examples) -> tuple[str, ...]:
    """The names of the perturbations that fit a task and its examples, told by the first of them; none is possible."""
    return tuple(_ways(examples, task_word))


def in_words(examples: Examples, name: str, task_word: str) -> str:
    """What a perturbation does, with its strength; see `perturbed`."""
    return _way(examples, name, task_word).words


def perturbed(examples: Examples, name: str, task_word: str) -> Examples:
    """The same examples with their rows perturbed when they are read.

    Args:
        examples: N examples of the task.
        name: one of `perturbations_of`.
        task_word: the task's word in a recipe.

    Raises:
        InputError: the perturbation does not fit.
    """
    way = _way(examples, name, task_word)
    return replace(
        examples,
        name=f"{examples.name}, {way.words}",
        table=Perturbed(examples.table, COLUMNS[task_word], way.change),
        digest=sha256_json([examples.digest, name, way.words, VERSION]),
    )


def _way(examples: Examples, name: str, task_word: str) -> _Way:
    ways = _ways(examples, task_word)
    if not ways:
        raise InputError(
            f"no perturbation is known for what {examples.name} holds, so leave out {name!r}; there are some for "
            "texts, pictures, sounds and arrays of floats"
        )
    if name not in ways:
        raise InputError(f"{name!r} does not perturb what {examples.name} holds{did_you_mean(name, list(ways))}")
    return ways[name]


def _ways(examples: Examples, task_word: str) -> dict[str, _Way]:
    """The perturbations that fit, by name."""
    if task_word not in COLUMNS or not len(examples):
        return {}
    value = examples.rows([0])[COLUMNS[task_word]][0]
    if isinstance(value, Image.Image):
        return _of_pictures(min(value.size))
    if isinstance(value, str | list):
        return {
            "typos": _Way(f"typos in {TYPOS * 100:.0f} % of the words", mistyped),
            "case": _Way("all in lower case, or in upper case what was so", in_other_case),
        }
    if isinstance(value, Mapping):
        noise = f"white noise at {SNR_DB:.0f} dB"
        level = f"{LEVEL_DB:.0f} dB quieter or louder"
        return {
            "level": _Way(level, partial(_on_sound, at_other_level)),
            "noise": _Way(noise, partial(_on_sound, with_noise)),
        }
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        words = f"Gaussian noise {SNR_DB:.0f} dB below each example's own standard deviation"
        return {"noise": _Way(words, with_noise)}
    axis = colour_axis(value)
    if axis is None:
        return {}
    return _of_pictures(min(side for i, side in enumerate(value.shape) if axis < 0 or i != axis))


# Pictures.


def _of_pictures(side: int) -> dict[str, _Way]:
    """The perturbations of pictures, as strong as in the benchmark whose side is nearest, by ratio.

    `side`: the shorter one of the first picture, in pixels; all others are perturbed as strongly.
    """
    severity = min(SEVERITIES, key=lambda one: abs(np.log(side / one.side)))
    noise = f"Gaussian noise with a standard deviation of {severity.noise * 100:.0f} % of the range"
    blur = f"Gaussian blur with a standard deviation of {severity.blur:g} pixels"
    return {
        "noise": _Way(noise, partial(_on_picture, partial(_noisy, share=severity.noise))),
        "blur": _Way(blur, partial(_on_picture, partial(_blurred, sigma=severity.blur))),
        "jpeg": _Way(f"JPEG quality {severity.jpeg}", partial(_on_picture, partial(_as_jpeg, quality=severity.jpeg))),
    }


def _on_picture(change: Change, value: Any, rng: np.random.Generator) -> Any:
    """Perturb the pixels of a picture of PIL, grey or made RGB, or of an array of bytes in its own layout."""
    if isinstance(value, Image.Image):
        image = _reduced(value if value.mode in ("L", "RGB") else value.convert("RGB"))
        return Image.fromarray(change(np.asarray(image), rng))
    axis = colour_axis(value)
    last = value if value.ndim == 2 else np.moveaxis(value, axis or 0, 2)
    pixels = last[..., 0] if last.shape[2:] == (1,) else last
    found = change(np.ascontiguousarray(pixels), rng).reshape(last.shape)
    return found if value.ndim == 2 else np.moveaxis(found, 2, axis or 0)


def _reduced(image: Image.Image) -> Image.Image:
    """A picture whose shorter side is at most `SHORTER_SIDE` pixels.

    What is done to single pixels of a photograph is gone as soon as a model's processor makes it small.
    """
    scale = SHORTER_SIDE / min(image.size)
    if scale >= 1:
        return image
    width, height = (round(side * scale) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _bytes(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _noisy(pixels: NDArray[np.uint8], rng: np.random.Generator, share: float) -> NDArray[np.uint8]:
    """Pixels (H, W) or (H, W, 3) with Gaussian noise, each colour its own."""
    return _bytes(pixels + np.float32(share * 255) * rng.standard_normal(pixels.shape, dtype=np.float32))


def _blurred(pixels: NDArray[np.uint8], rng: np.random.Generator, sigma: float) -> NDArray[np.uint8]:
    """Pixels (H, W) or (H, W, 3) through a Gaussian filter; beyond the edge lie its own pixels."""
    from scipy.ndimage import gaussian_filter

    return _bytes(gaussian_filter(pixels.astype(np.float32), sigma, mode="nearest", axes=(0, 1)))


def _as_jpeg(pixels: NDArray[np.uint8], rng: np.random.Generator, quality: int) -> NDArray[np.uint8]:
    """Pixels (H, W) or (H, W, 3) written as a JPEG and read again."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(file))


# Sounds, and arrays of floats.


def _on_sound(change: Change, value: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Perturb the samples of a sound at its own rate."""
    samples, rate = decoded(value)
    return {"array": change(samples, rng), "sampling_rate": rate}


def with_noise(values: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Values of any shape with white Gaussian noise `SNR_DB` below their own standard deviation; none in silence."""
    scale = values.std(dtype=np.float64) * 10 ** (-SNR_DB / 20)
    noisy: NDArray[Any] = (values + scale * rng.standard_normal(values.shape)).astype(values.dtype)
    return noisy


def at_other_level(samples: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Samples (S,) `LEVEL_DB` quieter or louder, at even odds; cut off at full scale (±1), as a converter does."""
    factor = 10 ** (rng.choice([-LEVEL_DB, LEVEL_DB]) / 20)
    louder: NDArray[np.float32] = np.clip(samples * factor, -1, 1).astype(np.float32)
    return louder


# Texts.


def _neighbours() -> dict[str, str]:
    """The letters beside each letter on a QWERTY keyboard: 2 to 6 keys less than 1.3 keys away."""
    rows = (("qwertyuiop", 0.0), ("asdfghjkl", 0.25), ("zxcvbnm", 0.75))  # where each row begins, in keys
    keys = {letter: (start + i, y) for y, (row, start) in enumerate(rows) for i, letter in enumerate(row)}
    return {
        one: "".join(other for other, (u, v) in keys.items() if 0 < hypot(x - u, y - v) < 1.3)
        for one, (x, y) in keys.items()
    }


NEIGHBOURS: Mapping[str, str] = _neighbours()


def mistyped(text: str | list[str], rng: np.random.Generator) -> str | list[str]:
    """A text, or its words, with one typo in `TYPOS` of the words, rounded up or down by chance.

    Words are drawn among those of `TYPED` letters or more. Two letters are swapped, or one is left out, doubled or
    replaced by its neighbour on the keyboard, all alike probable; the first and the last letter stay (Pruthi 2019).
    Spaces and the number of words stay.
    """
    pieces = re.split(r"(\s+)", text) if isinstance(text, str) else list(text)
    step = 2 if isinstance(text, str) else 1  # of a text, every second piece is space
    words = pieces[::step]
    long = [i for i, word in enumerate(words) if sum(map(str.isalpha, word)) >= TYPED]
    count = int(TYPOS * sum(map(bool, words)) + rng.random())
    for i in rng.permutation(long)[:count]:
        words[int(i)] = _with_typo(words[int(i)], rng)
    pieces[::step] = words
    return "".join(pieces) if isinstance(text, str) else pieces


def _with_typo(word: str, rng: np.random.Generator) -> str:
    """A word with one typo among its letters but the first and the last."""
    inner = [i for i, letter in enumerate(word) if letter.isalpha()][1:-1]
    places = {
        "swap": [i for i in inner if i + 1 in inner and word[i] != word[i + 1]],
        "drop": inner,
        "double": inner,
        "replace": [i for i in inner if word[i].lower() in NEIGHBOURS],
    }
    possible = [kind for kind, where in places.items() if where]
    kind = possible[rng.integers(len(possible))]
    at = places[kind][rng.integers(len(places[kind]))]
    letter = word[at]
    if kind == "swap":
        return word[:at] + word[at + 1] + letter + word[at + 2 :]
    if kind == "replace":
        near = NEIGHBOURS[letter.lower()]
        new = near[rng.integers(len(near))]
        return word[:at] + (new.upper() if letter.isupper() else new) + word[at + 1 :]
    return word[:at] + ("" if kind == "drop" else letter * 2) + word[at + 1 :]


def in_other_case(text: str | list[str], rng: np.random.Generator) -> str | list[str]:
    """A text, or its words, in lower case; one that is so already, in upper case.

    As people write who leave capitals out (Mayhew 2019, "ner and pos when nothing is capitalized"), or leave caps lock
    on. A model that does not look at case gives the same answer.
    """
    words = [text] if isinstance(text, str) else text
    found = [word.lower() for word in words]
    if found == words:
        found = [word.upper() for word in words]
    return found[0] if isinstance(text, str) else found
