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
    """The sets of shingles of texts that `_plain` gave: a sparse matrix (U, 2³¹ − 1) of ones, columns by hash."""
    from sklearn.feature_extraction.text import HashingVectorizer

    hashed = HashingVectorizer(
        analyzer="char", ngram_range=(SHINGLE, SHINGLE), lowercase=False, binary=True, norm=None,
        alternate_sign=False, n_features=2**31 - 1, dtype=np.int32,
    )  # fmt: skip
    return hashed.transform(texts)


def _plain(text: str) -> str:
    """A text's words in one case, as long as a shingle at least; of a text without words its signs."""
    folded = text.casefold()
    return (" ".join(re.findall(r"\w+", folded)) or "".join(folded.split())).ljust(SHINGLE, "_")


def _bands(sets: Any) -> NDArray[np.uint64]:
    """A key (U, bands) for each band of the MinHash signature of sets of shingles (U, …).

    Each function is multiply, add, and the upper half of the 64 bits (Dietzfelbinger 1996: universal).
    """
    rng = np.random.default_rng(0)
    factors, offsets = rng.integers(2**63, size=(2, BANDS, ROWS), dtype=np.uint64)
    hashes, starts = sets.indices.astype(np.uint64), sets.indptr[:-1]
    keys = np.zeros((sets.shape[0], BANDS), dtype=np.uint64)
    for band in range(BANDS):
        for factor, offset in zip(factors[band] | np.uint64(1), offsets[band], strict=True):
            least = np.minimum.reduceat((hashes * factor + offset) >> np.uint64(32), starts)
            keys[:, band] = (keys[:, band] ^ least) * np.uint64(0x9E3779B97F4A7C15)  # the golden ratio: spreads bits
    return keys


def search(judging: Examples, others: Examples) -> Best:
    """For each text of `judging` one of `others` whose shingles are alike by 0.8 or more, if there is one.

    The Jaccard similarity of sets of shingles; candidates by MinHash (Broder 1997, "On the resemblance and containment
    of documents") and banding (Leskovec et al. 2014, "Mining of massive datasets", section 3.4). Case, punctuation
    and space do not count; the texts of a row are one text.
    """
    known, place = np.unique(
        [_plain(text) for rows in parts(judging, AT_ONCE) for text in _texts(rows)], return_inverse=True
    )
    mine = shingles(known)
    keys = _bands(mine)
    order = np.argsort(keys, axis=0)
    best, before = Best(len(known)), 0
    with track("near duplicates", len(others)) as advance:
        for rows in parts(others, AT_ONCE):
            texts = [_plain(text) for text in _texts(rows)]
            distinct, first = np.unique(texts, return_index=True)
            theirs = shingles(distinct)
            for i, j in _candidates(keys, order, _bands(theirs), best):
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
