"""Near duplicates among texts, in time that grows with their number and that of pairs which are nearly alike enough.

Shapes: U texts (of a pair two), K pairs.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.validate.examples import Examples
from potstill.validate.nearest import Best, parts
from potstill.validate.progress import track

AT_ONCE = 5000
SHINGLE = 5  # letters
JACCARD = 0.8
BANDS, ROWS = 20, 5  # finds a pair of Jaccard similarity 0.8 with probability 1 − (1 − 0.8⁵)²⁰ = 0.9996
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # of the golden ratio, odd: spreads bits
PAIRS_AT_ONCE = 20_000  # candidates compared at a time
KEYS_AT_ONCE = 500  # of other texts, whose candidates are listed at a time
RULE = f"{SHINGLE}-letter shingles with a Jaccard similarity of {JACCARD} or more"


def can_read(examples: Examples) -> bool:
    """Whether they are texts, or words."""
    first = examples.rows([0]).values()
    return any(isinstance(column[0], str) or _is_words(column[0]) for column in first)


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _texts(rows: Any) -> list[str]:
    """One text (U) for each row: of several columns joined, of words joined."""
    columns = [column for column in rows.values() if isinstance(column[0], str) or _is_words(column[0])]
    return [
        " ".join(one if isinstance(one, str) else " ".join(one) for one in row) for row in zip(*columns, strict=True)
    ]


def shingles(texts: Sequence[str] | NDArray[np.str_]) -> Any:
    """The sets of shingles of texts that `plain` gave: a sparse matrix (U, 2³¹ − 1) of ones, columns by hash."""
    from scipy.sparse import csr_matrix

    hashes, starts = hashed(texts)
    columns = (hashes % np.uint64(2**31 - 1)).astype(np.int32)
    ones = np.ones(len(columns), np.int32)
    sets = csr_matrix((ones, columns, np.append(starts, len(columns))), shape=(len(texts), 2**31 - 1))
    sets.sum_duplicates()
    sets.data[:] = 1
    return sets


def hashed(texts: Sequence[str] | NDArray[np.str_]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The shingles of texts that `plain` gave, each as a number of 32 bits, and where each text's (U,) start.

    A polynomial of the code points modulo 2⁶⁴, its upper half mixed: numpy is 20 times as quick at it as
    scikit-learn's `HashingVectorizer`.
    """
    lengths = np.array([len(text) for text in texts])
    points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    hashes = points[: len(points) - SHINGLE + 1].copy()
    for k in range(1, SHINGLE):
        hashes = hashes * GOLDEN + points[k : k + len(hashes)]
    hashes = (hashes ^ (hashes >> np.uint64(29))) * GOLDEN >> np.uint64(32)
    whole, ends = np.ones(len(points), bool), np.cumsum(lengths)
    for k in range(1, SHINGLE):
        whole[ends - k] = False  # would reach into the next text
    counts = lengths - SHINGLE + 1
    return hashes[whole[: len(hashes)]], np.cumsum(counts) - counts


def plain(text: str) -> str:
    """A text's words in one case, as long as a shingle at least; of a text without words its signs."""
    folded = text.casefold()
    return (" ".join(re.findall(r"\w+", folded)) or "".join(folded.split())).ljust(SHINGLE, "_")


def signatures(hashes: NDArray[np.uint64], starts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """MinHash signatures (U, bands, rows), each value of 32 bits, of shingles that `hashed` gave.

    Each function is multiply, add, and the upper half of the 64 bits (Dietzfelbinger 1996: universal).
    """
    rng = np.random.default_rng(0)
    factors, offsets = rng.integers(2**63, size=(2, BANDS, ROWS), dtype=np.uint64)
    least = np.empty((len(starts), BANDS, ROWS), dtype=np.uint64)
    for band, row in np.ndindex(BANDS, ROWS):
        values = hashes * (factors[band, row] | np.uint64(1)) + offsets[band, row]
        least[:, band, row] = np.minimum.reduceat(values, starts) >> np.uint64(32)
    return least


def band_keys(least: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A key (U, bands) for each band of signatures (U, bands, rows of a band)."""
    keys = np.zeros(least.shape[:2], dtype=np.uint64)
    for row in range(least.shape[2]):
        keys = (keys ^ least[:, :, row]) * GOLDEN
    return keys


def search(judging: Examples, others: Examples) -> Best:
    """For each text of `judging` one of `others` whose shingles are alike by 0.8 or more, if there is one.

    The Jaccard similarity of sets of shingles; candidates by MinHash (Broder 1997, "On the resemblance and containment
    of documents") and banding (Leskovec et al. 2014, "Mining of massive datasets", section 3.4). Case, punctuation
    and space do not count; the texts of a row are one text.
    """
    known, place = np.unique(
        [plain(text) for rows in parts(judging, AT_ONCE) for text in _texts(rows)], return_inverse=True
    )
    mine = shingles(known)
    keys = band_keys(signatures(*_ragged(mine)))
    order = np.argsort(keys, axis=0)
    best, before = Best(len(known)), 0
    with track("near duplicates", len(others)) as advance:
        for rows in parts(others, AT_ONCE):
            texts = [plain(text) for text in _texts(rows)]
            distinct, first = np.unique(texts, return_index=True)
            theirs = shingles(distinct)
            for i, j in _candidates(keys, order, band_keys(signatures(*_ragged(theirs))), best):
                new = best.partner[i] < 0
                i, j = i[new], j[new]
                alike = _jaccard(mine[i], theirs[j])
                near = alike >= JACCARD
                best.note(i[near], first[j[near]] + before, alike[near])
            before += len(texts)
            advance(len(texts))
    of_all = Best(len(place))
    of_all.note(np.arange(len(place)), best.partner[place], best.alike[place])
    return of_all


def _ragged(sets: Any) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    return sets.indices.astype(np.uint64), sets.indptr[:-1]


def _candidates(
    mine: NDArray[np.uint64], order: NDArray[np.int64], keys: NDArray[np.uint64], best: Best
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs (i, j) with a key in common, some at a time: of `mine`, which `order` sorts, and of `keys`.

    Those of `mine` that were found meanwhile are left out, so that many texts of one kind are not all compared.
    """
    for band in range(BANDS):
        for begin in range(0, len(keys), KEYS_AT_ONCE):
            left = order[:, band][best.partner[order[:, band]] < 0]
            inorder, some = mine[left, band], keys[begin : begin + KEYS_AT_ONCE, band]
            low, high = (np.searchsorted(inorder, some, side) for side in ("left", "right"))
            j = np.repeat(np.arange(len(some)), high - low)
            starts = np.cumsum(high - low) - (high - low)
            i = left[np.arange(len(j)) + (low - starts)[j]]
            for start in range(0, len(j), PAIRS_AT_ONCE):
                a, b = i[start : start + PAIRS_AT_ONCE], j[start : start + PAIRS_AT_ONCE] + begin
                fresh = ~(mine[a, :band] == keys[b, :band]).any(axis=1)  # else an earlier band gave the pair
                yield a[fresh], b[fresh]


def _jaccard(a: Any, b: Any) -> NDArray[np.float64]:
    """Jaccard similarity (K,) of the sets of two matrices of K rows, row by row."""
    both = np.asarray(a.multiply(b).sum(axis=1)).ravel()
    sizes = np.diff(a.indptr) + np.diff(b.indptr)
    share: NDArray[np.float64] = both / (sizes - both)
    return share
