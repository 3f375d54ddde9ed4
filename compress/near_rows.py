"""Rows of a file that are nearly another row, in memory of 700 bytes a row whatever its length.

The rule is that of `validate/near_texts.py`: sets of 5-letter shingles with a Jaccard similarity of 0.8 or more.

Shapes: N rows, P parts of each (its text; or what it answers, and its text).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from potstill.validate import near_texts
from potstill.validate.near_texts import BANDS, JACCARD
from potstill.validate.progress import track

LETTERS_AT_ONCE = 200_000  # of the texts whose shingles are in memory together
ROWS = {1: 5, 2: 3}  # values of each part in a band's key: 20 bands find 0.9996, and 0.998 where both parts are at 0.8
CERTAINLY_LESS = 0.65  # share of 100 equal values; at a similarity of 0.8 it is missed by chance once in 7,000
SETS = 2000  # kept of rows that others are compared to


class Sketches:
    """MinHash signatures of rows of P parts, from which the near duplicates are found.

    Candidates are rows with a band in common, a key over values of all parts, so that a prompt that many rows share
    makes no candidates of them (banding: Leskovec et al. 2014, "Mining of massive datasets", section 3.4). Those with
    too few equal values are left out by the lowest 8 bits of each (Li and König 2010, "b-bit minwise hashing"); the
    rest are compared by their shingles.
    """

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self._keys: list[NDArray[np.uint32]] = []
        self._marks: list[NDArray[np.uint8]] = []
        self._waiting: list[Sequence[str]] = []
        self._letters = 0

    def add(self, row: Sequence[str]) -> None:
        """Add a row of P texts."""
        self._waiting.append(row)
        self._letters += sum(map(len, row))
        if self._letters >= LETTERS_AT_ONCE:
            self._sketch()

    def _sketch(self) -> None:
        if not self._waiting:
            return
        columns = zip(*self._waiting, strict=True)
        least = [near_texts.signatures(*near_texts.hashed([near_texts.plain(x) for x in one])) for one in columns]
        width = ROWS[self.parts]
        keys = near_texts.band_keys(np.concatenate([one[:, :, :width] for one in least], axis=2))
        self._keys.append((keys >> np.uint64(32)).astype(np.uint32))
        self._marks.append(np.stack([one.reshape(len(one), -1) for one in least], axis=1).astype(np.uint8))
        self._waiting, self._letters = [], 0

    def search(self, lengths: NDArray[np.int64], row: Callable[[int], Sequence[str]]) -> NDArray[np.int64]:
        """For each row (N,) the longer row that it nearly is and that stays, or −1 where the row itself stays.

        Rows are taken from the longest to the shortest, of equals the first; each stays unless it nearly is one that
        did. So no two that stay are near duplicates, but for those that MinHash misses.

        Args:
            lengths: of the rows (N,).
            row: gives the P texts of the row of that index again.
        """
        self._sketch()
        partner = np.full(len(lengths), -1)
        if not self._keys:
            return partner
        keys, marks = np.concatenate(self._keys), np.concatenate(self._marks)
        self._keys, self._marks = [], []
        order = np.argsort(-lengths, kind="stable")
        keys, marks = keys[order], marks[order]

        @lru_cache(SETS)
        def shingles(rank: int) -> list[NDArray[np.uint64]]:
            return [_set(text) for text in row(int(order[rank]))]

        for rank, found in _candidates(keys, partner, order):
            alike = (marks[found] == marks[rank]).mean(axis=2).min(axis=1)
            likely = found[alike >= CERTAINLY_LESS]
            for other in likely[np.argsort(-alike[alike >= CERTAINLY_LESS], kind="stable")]:
                if all(jaccard(*pair) >= JACCARD for pair in zip(shingles(rank), shingles(int(other)), strict=True)):
                    partner[order[rank]] = order[other]
                    break
        return partner


def _candidates(
    keys: NDArray[np.uint32], partner: NDArray[np.int64], order: NDArray[np.int64]
) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """Each row's rank, and the ranks of those before it that stay and share a key with it.

    Rows of one key lie side by side in `members`, in their order; those of them that stay are moved to the front, so
    that a row which many others nearly are costs each of them one comparison.
    """
    count = len(keys)
    members = np.empty((BANDS, count), np.int32)
    begins = np.empty((count, BANDS), np.int32)  # where a row's key begins in `members`
    stay = np.zeros((BANDS, count), np.int32)  # how many of that key stay, at that place
    alone = np.ones(count, bool)
    for band in range(BANDS):
        places = np.argsort(keys[:, band], kind="stable")
        new = np.diff(keys[places, band], prepend=keys[places[0], band]) != 0
        new[0] = True
        first = np.flatnonzero(new)
        sizes = np.diff(first, append=count)
        members[band], begins[places, band] = places, np.repeat(first, sizes)
        alone[places] &= np.repeat(sizes == 1, sizes)
    bands = np.arange(BANDS)
    with track("near duplicates", count) as advance:
        advance(int(alone.sum()))
        for rank in np.flatnonzero(~alone):
            begin = begins[rank]
            kept = stay[bands, begin]
            parts = [members[band, begin[band] : begin[band] + kept[band]] for band in np.flatnonzero(kept)]
            if parts:
                yield int(rank), np.unique(np.concatenate(parts))
            if partner[order[rank]] < 0:
                members[bands, begin + kept] = rank
                stay[bands, begin] += 1
            advance(1)


def _set(text: str) -> NDArray[np.uint64]:
    return np.unique(near_texts.hashed([near_texts.plain(text)])[0])


def jaccard(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    """Jaccard similarity of two sets, each an array of distinct values."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)
