"""Whose child a writer is: which words and phrases it prefers, against strangers.

A model that learned from another's texts takes over its turns of phrase. The feature of a word, or of two or three in
a row, is the logarithm of how often a writer uses it, drawn towards all writers' rate as far as it is rare (the
informative Dirichlet prior of Monroe 2008, "Fightin' Words"), times the square root of how often it is expected, so
that each weighs by what is known of it. Writers are then compared as models are by their outputs: see `kinship`.

Shapes: M writers, suspects first, then references, the one in question last; W words and phrases.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from potstill.validate.errors import InputError
from potstill.validate.kinship import Kinship, against_strangers, check_strangers, named_by

MEASURE = "phrases"
LONGEST = 3  # words in a row
MOST = 20_000  # words and phrases, the most frequent
LEAST_WORDS = 1000  # of a writer
PRIOR = 1000.0  # words that the prior counts for
GROUPS = 20  # of texts, for the jackknife
TOKEN = r"(?u)\w+|[^\w\s]"


def phrasing(
    texts: Sequence[str],
    suspects: Mapping[str, Sequence[str]],
    references: Sequence[Sequence[str]],
    alpha: float = 0.05,
) -> Kinship:
    """Test each suspect as the one from whom a writer learned to write.

    Args:
        texts: of the writer, best to the same prompts as the others'.
        suspects: texts of each, by name.
        references: texts of writers that are kin to nobody here.
        alpha: of the test.

    Returns:
        With the writer's texts as `examples`, and nothing `wrong`.

    Raises:
        InputError: too few to compare with, or a writer of fewer than a thousand words.
    """
    check_strangers(len(suspects), len(references))
    for number, one in enumerate(writers := [*suspects.values(), *references, texts], 1):
        if (words := sum(len(text.split()) for text in one)) < LEAST_WORDS:
            raise InputError(
                f"writer {number} of {len(writers)} (suspects, references, the one in question) wrote {words} words, "
                f"expected {LEAST_WORDS} or more; let it write more"
            )
    counts = _counts(writers)
    whole = _gram(counts.sum(axis=1))
    without = np.stack([_gram(np.delete(counts, group, axis=1).sum(axis=1)) for group in range(counts.shape[1])])
    found = against_strangers(MEASURE, whole, without, list(suspects), alpha)
    strangers = len(suspects) + len(references)
    return Kinship(*named_by(found, MEASURE, alpha), tuple(found), len(texts), 0, strangers, alpha)


def _counts(writers: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """How often each writer uses each phrase in each group of texts (M, G, W)."""
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(token_pattern=TOKEN, ngram_range=(1, LONGEST), max_features=MOST)
    vectorizer.fit(text for one in writers for text in one)
    found = [vectorizer.transform([" ".join(one[group::GROUPS]) for group in range(GROUPS)]) for one in writers]
    return np.stack([one.toarray() for one in found]).astype(np.float64)


def _gram(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Products of the writers' features (M, M), of counts (M, W)."""
    sizes = counts.sum(axis=1, keepdims=True)
    counts = counts[:, counts.any(axis=0)]
    rate = (counts / sizes).mean(axis=0)
    features = np.log((counts + PRIOR * rate) / (sizes + PRIOR)) * np.sqrt(rate * sizes.mean())
    features -= features.mean(axis=1, keepdims=True)
    gram: NDArray[np.float64] = features @ features.T
    return gram
