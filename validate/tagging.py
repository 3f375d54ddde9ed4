"""Tagging: a class for each word of a text, judged by the entities that the classes spell.

Shapes: B examples in a batch, T tokens, W words of the longest of them, R words of all of them, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from potstill.validate.data import load_examples
from potstill.validate.encoder import Encoder, Inputs, TextEncoder
from potstill.validate.errors import InputError
from potstill.validate.examples import IGNORED, Examples, Rows
from potstill.validate.metrics import bootstrap, divergences, in_parts, most_likely
from potstill.validate.model import Gives, OneClass
from potstill.validate.scorecard import RESAMPLED, Scorecard, check_alike
from potstill.validate.text import OfText

PADDING, CUT = -1, -2  # of `word_starts`: no such word; a word cut off, or without any token


@dataclass
class WordsEncoder(TextEncoder):
    """Words through the checkpoint's own tokenizer, with the place of each word's first token.

    Beside the tokenizer's arrays (B, T): `word_starts` (B, W) int64, `PADDING` where an example has no such word,
    `CUT` where a word was cut off by the longest length.
    """

    def __call__(self, rows: Rows) -> Inputs:
        """Token ids, masks and word starts."""
        texts = [list(words) for words in rows["tokens"]]
        encoded = self.tokenize(texts, is_split_into_words=True)
        starts = np.full((len(texts), max(map(len, texts))), PADDING, dtype=np.int64)
        for i, words in enumerate(texts):
            starts[i, : len(words)] = CUT
            of_token = np.array([-1 if word is None else word for word in encoded.word_ids(i)])
            found, first = np.unique(of_token, return_index=True)
            starts[i, found[found >= 0]] = first[found >= 0]
        return self.arrays(encoded) | {"word_starts": starts}


class TokenClassification(OfText, OneClass):
    """A class for each word, by the logits of its first token. Words are given, not found.

    Outputs (B, T, C) become rows (R, C), one for each word, the first example's before the second's; a word that was
    cut off has logits of zero, and is judged as outside of any entity. Source of the metric: CoNLL-2003
    (Tjong Kim Sang and De Meulder 2003) as the `seqeval` package counts it.
    """

    word = "token-classification"
    features: tuple[str, ...] = ("tokens",)
    length_of: str | None = "tokens"
    gives: Gives = "classes"
    probe: ClassVar[Rows] = {"tokens": [["a"]]}
    ndim = 3
    encode_by = WordsEncoder

    def read(self, outputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Outputs (B, T, C) at each word's first token: (R, C)."""
        starts = tensors["word_starts"]
        index = starts.clamp(min=0)[..., None].expand(-1, -1, outputs.shape[-1])
        rows = outputs.gather(1, index).masked_fill((starts < 0)[..., None], 0.0)
        return rows[starts != PADDING]

    def examples(
        self, source: str, columns: Mapping[str, str], *, judging: bool = False, labelled: bool = True
    ) -> Examples:
        """Read `tokens`, a list of words, and `tags`, a class for each; see `Task.examples`.

        Raises:
            InputError: a row has no words, or not one tag for each.
        """
        examples = load_examples(source, self.features, columns, label="tags", labelled=labelled)
        words = examples.lengths("tokens")
        if not words.all():
            raise InputError(f"{examples.name} has no words in row {int(np.argmin(words)) + 1}")
        if examples.offsets is None:
            if (examples.labels != IGNORED).any():
                raise InputError(f"{examples.name} has one tag for a row; expected a list with one for each word")
            return as_unlabelled(examples, words)
        tags = np.diff(examples.offsets)
        for i in np.flatnonzero(tags != words)[:1]:
            raise InputError(f"{examples.name} has {words[i]} words and {tags[i]} tags in row {i + 1}")
        return examples

    def judge(
        self,
        mine: NDArray[np.floating],
        teacher: NDArray[np.floating],
        examples: Examples,
        encode: Encoder | None = None,
        truncated: int = 0,
    ) -> Scorecard:
        """Micro-averaged F1 of entities, intervals by a bootstrap over texts; words labelled `IGNORED` are left out.

        Where no class is spelled as part of an entity (`B-…`, `I-…`), each word is one, and F1 is accuracy.
        """
        labels, names, offsets = examples.labels, examples.label_names or (), examples.offsets
        check_alike(mine, teacher, len(labels))
        assert offsets is not None
        known = labels != IGNORED
        text = np.repeat(np.arange(len(examples)), np.diff(offsets))[known]
        outside = next((i for i, name in enumerate(names) if name.upper() == "O"), 0)
        ours, theirs = (_classes(rows, outside)[known] for rows in (mine, teacher))
        truth = labels[known]
        right, teacher_right, same = ours == truth, theirs == truth, ours == theirs
        of_entities = any(name[:2].upper() in ("B-", "I-") for name in names)
        entities = entity_counts if of_entities else word_counts
        said = (_said(mine) & _said(teacher))[known]
        apart = np.where(said, divergences(teacher, mine)[known], 0.0)
        of_words = (same, np.ones(len(text)), teacher_right & ~right, apart, said)
        counts = np.concatenate(
            [
                entities(ours, truth, text, names, len(examples)),
                entities(theirs, truth, text, names, len(examples)),
                np.stack([np.bincount(text, weights, len(examples)) for weights in of_words], 1),
            ],
            axis=1,
        )
        figures = _figures(counts.sum(axis=0))
        value, difference, agreement, lost, kl = bootstrap(
            lambda index: _figures(counts[index].sum(axis=1)), len(examples)
        )
        return Scorecard(
            metric="entity F1" if of_entities else "accuracy of words",
            examples=len(examples),
            data=examples.name,
            value=float(figures[0]),
            interval=value,
            teacher_value=float(figures[0] - figures[1]),
            difference=float(figures[1]),
            difference_interval=difference,
            agreement=float(figures[2]),
            agreement_interval=agreement,
            lost=int((teacher_right & ~right).sum()),
            gained=int((right & ~teacher_right).sum()),
            lost_share=float(figures[3]),
            lost_interval=lost,
            kl_nats=float(figures[4]),
            kl_interval=kl,
            truncated=truncated,
            unit="words",
            method=RESAMPLED,
        )


def as_unlabelled(examples: Examples, words: NDArray[np.int64]) -> Examples:
    """The examples with `IGNORED` for each of their words (N,)."""
    offsets = np.concatenate([[0], np.cumsum(words)])
    return Examples(examples.name, examples.table, np.full(offsets[-1], IGNORED), None, examples.digest, offsets)


def _said(rows: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Which words (R,) were read at all, and not cut off."""
    return in_parts(lambda part: part.any(axis=1), rows)


def _classes(rows: NDArray[np.floating], outside: int) -> NDArray[np.int64]:
    """Class of each word (R,); `outside` for one that was cut off."""
    return np.where(_said(rows), most_likely(rows), outside)


def entity_counts(
    said: NDArray[np.int64], truth: NDArray[np.int64], text: NDArray[np.int64], names: Sequence[str], n: int
) -> NDArray[np.float64]:
    """Entities of each text that are right, said and true (n, 3), by seqeval's reading of classes.

    Args:
        said: class of each word (R,).
        truth: its label (R,).
        text: which text it is of (R,), ascending.
        names: the classes.
        n: texts.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    words = [np.array(names, dtype=object)[classes] for classes in (said, truth)]
    cuts = np.searchsorted(text, np.arange(n + 1))
    counts = np.zeros((n, 3))
    for i, (start, end) in enumerate(pairwise(cuts)):
        ours, true = (set(get_entities(one[start:end].tolist())) for one in words)
        counts[i] = len(ours & true), len(ours), len(true)
    return counts


def word_counts(
    said: NDArray[np.int64], truth: NDArray[np.int64], text: NDArray[np.int64], names: Sequence[str], n: int
) -> NDArray[np.float64]:
    """Words of each text that are right, said and true (n, 3); the last two are the same. See `entity_counts`."""
    right, all_of = (np.bincount(text, weights, n) for weights in (said == truth, np.ones(len(text))))
    return np.stack([right, all_of, all_of], axis=1)


def _figures(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """F1, its difference to the teacher's, the shares agreed on and lost, and the mean KL (…, 5), from sums (…, 11).

    F1 is twice the right ones over those said and those true; 0 where there are neither.
    """
    ours, theirs = (2 * sums[..., i] / np.maximum(sums[..., i + 1] + sums[..., i + 2], 1) for i in (0, 3))
    words, said = (np.maximum(sums[..., i], 1) for i in (7, 10))
    return np.stack([ours, ours - theirs, sums[..., 6] / words, sums[..., 8] / words, sums[..., 9] / said], axis=-1)
