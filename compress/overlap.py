"""Rows to learn from that hold a piece of an evaluation set: n-grams of words in common.

Brown et al. 2020, "Language models are few-shot learners", appendix C: 13-grams of words, whatever their case and
punctuation.

Shapes: W words of a row, E examples of the evaluation set.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potstill.compress.data_rows import Row, words

SHORTEST = 8  # words of a piece that is looked for inside a row; appendix C has none shorter
COMMON, COMMON_SHARE = 10, 0.05  # examples that share a piece: in more than both it is a form's wording
FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
INVERSE = pow(FACTOR, -1, 2**64)


@dataclass(frozen=True)
class Piece:
    """Pieces of one length: hashes (K,) in order, and the example (K,), from 0, that each is of."""

    hashes: NDArray[np.uint64]
    examples: NDArray[np.int64]


class Overlap:
    """What of an evaluation set is looked for in rows.

    Of an example of n words or more each n-gram; of a shorter one the whole of it, anywhere in a row if it has 8 words,
    else as the whole of a row, of its prompt or of its text. The same of an example's prompt; never of an answer alone.
    What more than 10 examples and 5 % of them share is a form's wording (`common` counts such pieces), and is left out.

    Args:
        examples: prompt (empty for none) and text of each.
        n: words of an n-gram.
    """

    def __init__(self, examples: Iterable[tuple[str, str]], n: int) -> None:
        found: dict[int, list[tuple[NDArray[np.uint64], int]]] = {}
        self._whole: dict[tuple[str, ...], set[int]] = {}
        self.examples = 0
        for index, (prompt, text) in enumerate(examples):
            self.examples += 1
            for part in (words(f"{prompt}\n{text}"), words(prompt)):
                if len(part) >= min(n, SHORTEST):
                    length = min(n, len(part))
                    found.setdefault(length, []).append((np.unique(_ngrams(_hashes(part), length)), index))
                elif part:
                    self._whole.setdefault(tuple(part), set()).add(index)
        self._form = max(COMMON, COMMON_SHARE * self.examples)
        rare = {part: of for part, of in self._whole.items() if len(of) <= self._form}
        self.common = len(self._whole) - len(rare)
        self._whole = rare
        self._pieces = {length: self._piece(grams) for length, grams in sorted(found.items())}

    def _piece(self, grams: list[tuple[NDArray[np.uint64], int]]) -> Piece:
        hashes = np.concatenate([one for one, _ in grams])
        examples = np.repeat([index for _, index in grams], [len(one) for one, _ in grams])
        pairs = np.unique(np.stack([hashes, examples.astype(np.uint64)], axis=1), axis=0)
        _, place, counts = np.unique(pairs[:, 0], return_inverse=True, return_counts=True)
        common = counts > self._form
        self.common += int(common.sum())
        rare = ~common[place]
        return Piece(pairs[rare, 0], pairs[rare, 1].astype(np.int64))

    def hits(self, row: Row) -> dict[int, str]:
        """The examples, from 0, of which a row holds a piece, and the first such piece of each."""
        prompt, text = words(row.prompt), words(row.text)
        both = [*prompt, *words(row.reasoning), *text]
        found: dict[int, str] = {}
        for part in (both, prompt, text):
            if len(part) < SHORTEST:
                found |= dict.fromkeys(self._whole.get(tuple(part), ()), " ".join(part))
        hashes = _hashes(both)
        for length, piece in self._pieces.items():
            grams = _ngrams(hashes, length)
            low, high = (np.searchsorted(piece.hashes, grams, side) for side in ("left", "right"))
            for place in np.flatnonzero(high > low).tolist():
                shown = " ".join(both[place : place + length])
                found = dict.fromkeys(piece.examples[low[place] : high[place]].tolist(), shown) | found
        return found


def _hashes(part: Sequence[str]) -> NDArray[np.uint64]:
    """A hash (W,) of each word, times a factor by its place."""
    values = np.fromiter(map(hash, part), np.int64, len(part)).view(np.uint64)
    return values * _powers(FACTOR, len(part))


def _ngrams(hashes: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """A hash (W − n + 1,) of each n words in a row: a polynomial modulo 2⁶⁴, whatever their place."""
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashes, dtype=np.uint64)])
    grams: NDArray[np.uint64] = (sums[n:] - sums[:-n]) * _powers(INVERSE, max(0, len(hashes) - n + 1))
    return grams


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """base⁰, base¹, … (count,), modulo 2⁶⁴."""
    powers = np.full(count, base, np.uint64)
    powers[:1] = 1
    result: NDArray[np.uint64] = np.cumprod(powers, dtype=np.uint64)
    return result
