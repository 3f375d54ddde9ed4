"""The scorecards of language models: next tokens of texts, and the likeliest of several answers.

Shapes: N examples, R predicted tokens of all of them, V tokens of the vocabulary, D documents or questions.
"""

import math

import numpy as np
from numpy.typing import NDArray

from potstill.validate.aligned import Between, of_the_other, parts
from potstill.validate.examples import IGNORED, Examples
from potstill.validate.metrics import bootstrap, divergences, in_parts, most_likely, proportion
from potstill.validate.scorecard import CLOSED_FORMS, RESAMPLED, Perplexity, Scorecard, check_alike, paired
from potstill.validate.tokens import CHOICE


def judge_tokens(
    mine: NDArray[np.floating], teacher: NDArray[np.floating], examples: Examples, truncated: int
) -> Scorecard:
    """Accuracy of the next token, and perplexity; intervals by a bootstrap over documents.

    Of answers to prompts also `exact match`: the share that greedy decoding would write to the last token, which is so
    just where each token is the likeliest after those before it.

    Args:
        mine: logits (R, V).
        teacher: logits (R, V).
        examples: pieces of texts, as `pieces_of` makes them.
        truncated: how many were cut off.
    """
    labels, offsets = examples.labels, examples.offsets
    check_alike(mine, teacher, len(labels))
    assert offsets is not None
    known = labels != IGNORED
    of, read, size = columns_of(examples, "document", "read", "bytes")
    document = np.repeat(of, np.diff(offsets))[known]
    ours, theirs, truth = most_likely(mine)[known], most_likely(teacher)[known], labels[known]
    right, teacher_right = ours == truth, theirs == truth
    of_tokens = (
        np.ones(len(truth)), right, teacher_right, ours == theirs, teacher_right & ~right,
        divergences(teacher, mine)[known], surprisals(mine, labels)[known], surprisals(teacher, labels)[known],
    )  # fmt: skip
    n = int(document.max()) + 1
    counts = np.stack([np.bincount(document, weights, n) for weights in of_tokens], axis=1)
    counts = counts[counts[:, 0] > 0]
    figures = _figures(counts.sum(axis=0))
    bits = counts[:, -2:].sum(axis=0) / math.log(2) / max(1, size.sum())
    intervals = bootstrap(lambda index: _figures(counts[index].sum(axis=1)), len(counts))
    value, difference, agreement, lost, kl, perplexity, ratio = figures.tolist()
    return Scorecard(
        metric="next-token accuracy",
        examples=len(counts),
        data=examples.name,
        value=value,
        interval=intervals[0],
        teacher_value=value - difference,
        difference=difference,
        difference_interval=intervals[1],
        agreement=agreement,
        agreement_interval=intervals[2],
        lost=int((teacher_right & ~right).sum()),
        gained=int((right & ~teacher_right).sum()),
        lost_share=lost,
        lost_interval=intervals[3],
        kl_nats=kl,
        kl_interval=intervals[4],
        truncated=truncated,
        unit="tokens",
        method=RESAMPLED,
        beside={"exact match": float((counts[:, 0] == counts[:, 1]).mean())} if (read > 1).any() else {},
        perplexity=Perplexity(
            perplexity, intervals[5], perplexity / ratio, ratio, intervals[6], len(truth), *bits.tolist()
        ),
    )


def judge_choices(
    mine: NDArray[np.floating], teacher: NDArray[np.floating], examples: Examples, truncated: int
) -> Scorecard:
    """How often the right one of several answers is the likeliest, by the sum of its tokens' log-probabilities.

    As `acc` of the Language Model Evaluation Harness (Gao 2024); beside it, as its `acc_norm`, by that sum over the
    answer's length in bytes. Arguments as for `judge_tokens`; each answer is an example.
    """
    other = of_the_other(examples) if isinstance(examples.table, Between) else examples
    if other is examples:
        check_alike(mine, teacher, len(examples.labels))
    question, choice, answer, size = columns_of(examples, "document", CHOICE, "answer", "bytes")
    first = np.unique(question, return_index=True)[1]

    def likeliest(rows: NDArray[np.floating], read: Examples, per: NDArray[np.int64]) -> NDArray[np.int64]:
        assert read.offsets is not None
        of = np.repeat(np.arange(len(read)), np.diff(read.offsets))
        lost = np.bincount(of, surprisals(rows, read.labels), len(read)) / per
        order = np.lexsort((choice, lost, question))
        inorder: NDArray[np.int64] = choice[order[np.unique(question[order], return_index=True)[1]]]
        return inorder

    truth, ones = answer[first], np.ones_like(size)
    ours, theirs = likeliest(mine, examples, ones), likeliest(teacher, other, ones)
    same = int((ours == theirs).sum())
    return Scorecard(
        metric="accuracy of choices",
        data=examples.name,
        agreement=same / len(truth),
        agreement_interval=proportion(same, len(truth)),
        truncated=truncated,
        unit="questions",
        method=CLOSED_FORMS,
        beside={"by length in bytes": float((likeliest(mine, examples, size) == truth).mean())},
        **paired(ours == truth, theirs == truth),
    )


def surprisals(rows: NDArray[np.floating], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """−log p of each token (R,), in nats, from logits (R, V), computed in float64 in parts; 0 for `IGNORED`."""
    from scipy.special import log_softmax

    def of(some: NDArray[np.floating], truth: NDArray[np.int64]) -> NDArray[np.float64]:
        logs = log_softmax(some.astype(np.float64), axis=1)
        found = -np.take_along_axis(logs, np.maximum(truth, 0), axis=1)[:, 0]
        return np.where(truth[:, 0] == IGNORED, 0.0, found)

    return in_parts(of, rows, labels[:, None])


def columns_of(examples: Examples, *names: str) -> list[NDArray[np.int64]]:
    """Some columns of whole numbers (N,)."""
    found = [[np.asarray(rows[name], dtype=np.int64) for name in names] for rows in parts(examples)]
    return [np.concatenate(column) for column in zip(*found, strict=True)]


def _figures(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Accuracy, its difference to the teacher's, shares agreed on and lost, KL, perplexity, its ratio (…, 7)."""
    tokens = sums[..., 0]
    right, theirs, same, lost, apart, mine, others = (sums[..., i] / tokens for i in range(1, 8))
    return np.stack([right, right - theirs, same, lost, apart, np.exp(mine), np.exp(mine - others)], axis=-1)
