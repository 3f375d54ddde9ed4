"""Sentence embeddings: a vector for each text, judged by how alike pairs of texts are.

Shapes: N pairs, 2N texts, T tokens, D width of a vector; teacher and student may differ in D.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from potstill.validate.checkpoint import Checkpoint, open_folder, reading_weights
from potstill.validate.data import load_examples
from potstill.validate.encoder import Encoder
from potstill.validate.errors import InputError
from potstill.validate.examples import IGNORED, Examples, Pairs, Rows, check_not_empty
from potstill.validate.files import read_json
from potstill.validate.metrics import RESAMPLES, bootstrap, in_parts, proportion
from potstill.validate.model import Gives, LogitsOf, Model
from potstill.validate.scorecard import RESAMPLED, Scorecard, paired
from potstill.validate.text import OfText

MOST_RANKED = 10**7  # of resampled pairs: beyond, fewer resamples
TEXTS = 512  # compared with queries at a time


class PooledOf(LogitsOf):
    """The mean of the last hidden states over a text's own tokens, made a unit vector: (B, D).

    As sentence-transformers does by default (Reimers and Gurevych 2019, "Sentence-BERT", section 3: MEAN).
    """

    def pick(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Mean over the attention mask, then length 1."""
        hidden: Tensor = outputs.last_hidden_state
        mask = inputs["attention_mask"][..., None].to(hidden.dtype)
        return F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1), dim=-1)


class FeatureExtraction(OfText):
    """A unit vector for each text.

    Learned from single texts (`text`), without labels. Judged on pairs (`text`, `text2`): with scores (`label`) by the
    rank correlation of cosine and score (Spearman; Agirre 2012, SemEval's STS, as sentence-transformers computes it),
    without scores by recall@1: how often `text2` is the nearest of all to its `text`.
    """

    word = "feature-extraction"
    features: tuple[str, ...] = ("text",)
    length_of: str | None = "text"
    gives: Gives = "vector"
    probe: ClassVar[Rows] = {"text": ["a"]}
    classes = False
    wrap = PooledOf
    output = "sentence_embedding"

    def load(
        self, checkpoint: Checkpoint, labels: tuple[str, ...] | None = None, like: Model | None = None, **options: Any
    ) -> Model:
        """Load with its tokenizer; see `Task.load`.

        Raises:
            InputError: it is a sentence-transformers checkpoint that pools otherwise than by the mean.
        """
        if not checkpoint.is_factory and not checkpoint.onnx:
            _check_pooling(checkpoint)
        return super().load(checkpoint, labels, like, **options)

    def examples(
        self, source: str, columns: Mapping[str, str], *, judging: bool = False, labelled: bool = True
    ) -> Examples:
        """Read texts to learn from, or pairs of texts to judge on; see `Task.examples`."""
        if not judging:
            return load_examples(source, ("text",), columns, label=None)
        examples = load_examples(source, ("text", "text2"), columns, labelled=False)
        return replace(examples, table=Pairs(examples.table))

    def checked(
        self, examples: Examples, names: tuple[str, ...], *, encode: Encoder | None = None, judging: bool = False
    ) -> Examples:
        """Scores as float64; labels of texts to learn from are not looked at. See `Task.checked`.

        Raises:
            InputError: the scores are no numbers, or all the same.
        """
        if not judging:
            return examples
        check_not_empty(examples)
        if (examples.labels == IGNORED).all():
            return examples
        if examples.labels.dtype.kind not in "iuf" or not np.isfinite(examples.labels).all():
            raise InputError(f"labels of {examples.name} are {examples.labels.dtype}; expected a score for each pair")
        if len(np.unique(examples.labels)) < 2:
            raise InputError(f"all pairs of {examples.name} have the score {examples.labels[0]}; nothing can be ranked")
        return replace(examples, labels=examples.labels.astype(np.float64))

    def judge(
        self,
        mine: NDArray[np.floating],
        teacher: NDArray[np.floating],
        examples: Examples,
        encode: Encoder | None = None,
        truncated: int = 0,
    ) -> Scorecard:
        """Vectors (2N, D) of both texts of each pair, one after the other; see `Task.judge`."""
        n = len(examples)
        if len(mine) != 2 * n or len(teacher) != 2 * n:
            raise InputError(f"the model gave {len(mine)} vectors and the teacher {len(teacher)} for {n} pairs")
        by = _by_rank if examples.labels.dtype.kind == "f" else _by_search
        return replace(by(mine, teacher, examples), truncated=truncated)


def _check_pooling(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose own configuration says another pooling than the mean."""
    from transformers.utils import cached_file

    with reading_weights(checkpoint):
        found = cached_file(
            open_folder(checkpoint), "1_Pooling/config.json", _raise_exceptions_for_missing_entries=False
        )
    if found is None:
        return
    prefix, config = "pooling_mode_", read_json(Path(found))
    ways = [name.removeprefix(prefix) for name, on in config.items() if name.startswith(prefix) and on]
    if ways != ["mean_tokens"]:
        raise InputError(
            f"{checkpoint} pools by {', '.join(ways)}; only the mean over a text's tokens is known. Give a checkpoint "
            "that pools by the mean, or package.module:factory"
        )


def _unit(vectors: NDArray[np.floating]) -> NDArray[np.float64]:
    """Vectors of length 1 in float64, so that a product is a cosine."""
    exact: NDArray[np.float64] = vectors.astype(np.float64)
    lengths: NDArray[np.float64] = np.linalg.norm(exact, axis=1, keepdims=True)
    return exact / np.maximum(lengths, 1e-12)


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank correlation of the rows of (S, N) with those of (S, N), ties at their mean rank; 0 where all tie."""
    from scipy.stats import rankdata

    ranks = [rankdata(one, axis=1) for one in (a, b)]
    x, y = (one - one.mean(axis=1, keepdims=True) for one in ranks)
    spread = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    found: NDArray[np.float64] = np.where(spread > 0, (x * y).sum(axis=1) / np.maximum(spread, 1e-300), 0.0)
    return found


def _by_rank(mine: NDArray[np.floating], teacher: NDArray[np.floating], examples: Examples) -> Scorecard:
    """Spearman's correlation of cosines with the scores."""
    scores, n = examples.labels, len(examples)
    ours, theirs = (in_parts(_cosines, one[::2], one[1::2]) for one in (mine, teacher))

    def figures(index: NDArray[np.int64]) -> NDArray[np.float64]:
        truth = scores[index]
        value = spearman(ours[index], truth)
        return np.stack([value, value - spearman(theirs[index], truth)], axis=1)

    value, difference = figures(np.arange(n)[None])[0]
    resamples = min(RESAMPLES, max(200, MOST_RANKED // n))
    interval, difference_interval = bootstrap(figures, n, resamples=resamples)
    return Scorecard(
        metric="Spearman",
        examples=n,
        data=examples.name,
        value=float(value),
        interval=interval,
        teacher_value=float(value - difference),
        difference=float(difference),
        difference_interval=difference_interval,
        method=RESAMPLED,
        beside={"Spearman with the teacher": float(spearman(ours[None], theirs[None])[0])},
        correlation=True,
        unit="pairs",
    )


def _by_search(mine: NDArray[np.floating], teacher: NDArray[np.floating], examples: Examples) -> Scorecard:
    """Recall@1: the share of texts whose nearest among all second texts is their own."""
    texts = np.array(examples.rows(range(len(examples)))["text"][1::2], dtype=object)
    place = np.unique(texts.astype(str), return_inverse=True)[1]  # the same text twice is one
    ours, theirs = (place[_nearest(one[::2], one[1::2])] for one in (mine, teacher))
    same = int((ours == theirs).sum())
    return Scorecard(
        metric="recall@1",
        data=examples.name,
        agreement=same / len(examples),
        agreement_interval=proportion(same, len(examples)),
        unit="texts",
        **paired(ours == place, theirs == place),
    )


def _cosines(one: NDArray[np.floating], other: NDArray[np.floating]) -> NDArray[np.float64]:
    """Cosine (N,) of each vector of (N, D) with its fellow in the other (N, D)."""
    found: NDArray[np.float64] = (_unit(one) * _unit(other)).sum(axis=1)
    return found


def _nearest(queries: NDArray[np.floating], texts: NDArray[np.floating]) -> NDArray[np.int64]:
    """Index (N,) of the text (N, D) with the largest cosine to each query (N, D), the first of equal ones."""

    def of(some: NDArray[np.floating]) -> NDArray[np.int64]:
        unit, best, found = _unit(some), np.full(len(some), -np.inf), np.zeros(len(some), dtype=np.int64)
        for start in range(0, len(texts), TEXTS):
            cosines = unit @ _unit(texts[start : start + TEXTS]).T
            at, top = cosines.argmax(axis=1), cosines.max(axis=1)
            found, best = np.where(top > best, start + at, found), np.maximum(best, top)
        return found

    return in_parts(of, queries)
