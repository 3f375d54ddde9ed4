"""The scorecard of language models with different tokenizers, in units that do not depend on them.

Shapes: N pieces of texts, R tokens that one model predicts, S those of the other, D documents.
"""

import math

import numpy as np
from numpy.typing import NDArray

from potstill.validate.aligned import THEIRS, Ints, of_the_other, parts
from potstill.validate.errors import InputError
from potstill.validate.examples import IGNORED, Examples, Rows
from potstill.validate.metrics import bootstrap, most_likely
from potstill.validate.next_tokens import columns_of, surprisals
from potstill.validate.scorecard import RESAMPLED, Perplexity, Scorecard


def judge_bytes(
    mine: NDArray[np.floating], teacher: NDArray[np.floating], examples: Examples, truncated: int
) -> Scorecard:
    """Probability of a byte, its geometric mean: e to the mean of log p over the bytes that both models predict.

    The bytes of a piece between its first and its last mark count, see `aligned.py`: both models have read the same
    before them. Perplexity is for each of the teacher's tokens there, so that its ratio means what it means between
    models of one tokenizer; bits per byte are −log₂ p. Of answers to prompts also `exact match`. Agreement, flips and
    KL are of tokens, and not defined here.

    Args:
        mine: logits (R, V).
        teacher: logits (S, W), of the teacher or of another model.
        examples: that `between` gave.
        truncated: how many were cut off.

    Raises:
        InputError: the rows are not over these examples.
    """
    other = of_the_other(examples)
    for logits, labels in ((mine, examples.labels), (teacher, other.labels)):
        if len(logits) != len(labels):
            raise InputError(f"a model gave {len(logits)} rows for {len(labels)} tokens; predict {examples.name} anew")
    document, read = columns_of(examples, "document", "read")
    marks = np.array([_ends(rows, i) for rows in parts(examples) for i in range(len(rows["spans"]))], dtype=np.int64)
    size, unit, ours, theirs = marks[:, 0], marks[:, 1], marks[:, 2:4], marks[:, 4:6]
    of_pieces = (size, unit, _between(surprisals(mine, examples.labels), examples, ours),
                 _between(surprisals(teacher, other.labels), other, theirs))  # fmt: skip
    n = int(document.max()) + 1
    counts = np.stack([np.bincount(document, weights, n) for weights in of_pieces], axis=1)
    counts = counts[counts[:, 0] > 0]
    figures = _figures(counts.sum(axis=0))
    intervals = bootstrap(lambda index: _figures(counts[index].sum(axis=1)), len(counts))
    value, difference, perplexity, ratio = figures.tolist()
    return Scorecard(
        metric="probability of a byte",
        examples=len(counts),
        data=examples.name,
        value=value,
        interval=intervals[0],
        teacher_value=value - difference,
        difference=difference,
        difference_interval=intervals[1],
        truncated=truncated,
        unit="bytes",
        method=RESAMPLED,
        beside={"exact match": _exact(mine, examples, document)} if (read > 1).any() else {},
        perplexity=Perplexity(
            perplexity, intervals[2], perplexity / ratio, ratio, intervals[3], int(counts[:, 1].sum()),
            -math.log2(value), -math.log2(value - difference),
        ),
    )  # fmt: skip


def _ends(rows: Rows, i: int) -> list[int]:
    """Of a piece: bytes and teacher's tokens between its first and last mark, and these marks of both models."""
    if not rows["spans"][i]:
        return [0] * 6
    unit, ours, theirs = (rows[name][i] for name in ("unit", "at", f"{THEIRS}at"))
    return [sum(rows["spans"][i]), unit[-1] - unit[0], ours[0], ours[-1], theirs[0], theirs[-1]]


def _between(lost: NDArray[np.float64], examples: Examples, marks: Ints) -> NDArray[np.float64]:
    """What is lost of each piece (N,) between two of its tokens (N, 2), of what is lost at each predicted one (R,)."""
    assert examples.offsets is not None
    upto, start = np.concatenate([[0.0], np.cumsum(lost)]), examples.offsets[:-1]
    found: NDArray[np.float64] = upto[start + marks[:, 1]] - upto[start + marks[:, 0]]
    return found


def _exact(rows: NDArray[np.floating], examples: Examples, document: Ints) -> float:
    """The share of answers that greedy decoding would write to the last token."""
    assert examples.offsets is not None
    wrong = (most_likely(rows) != examples.labels) & (examples.labels != IGNORED)
    asked = np.bincount(np.repeat(document, np.diff(examples.offsets)), examples.labels != IGNORED)
    missed = np.bincount(np.repeat(document, np.diff(examples.offsets)), wrong)
    return float((missed[asked > 0] == 0).mean())


def _figures(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probability of a byte, its difference to the teacher's, perplexity, its ratio (…, 4)."""
    size, unit, mine, theirs = (sums[..., i] for i in range(4))
    value, teacher = np.exp(-mine / size), np.exp(-theirs / size)
    return np.stack([value, value - teacher, np.exp(mine / unit), np.exp((mine - theirs) / unit)], axis=-1)
