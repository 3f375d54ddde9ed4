"""Questions whose answer is a span of a text.

Shapes: N examples, B of them in a batch, T tokens of question and context together.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import load_examples
from potstill.validate.encoder import Encoder, Inputs, TextEncoder
from potstill.validate.errors import InputError
from potstill.validate.examples import IGNORED, Examples, Rows, check_not_empty
from potstill.validate.metrics import bootstrap, proportion
from potstill.validate.model import MASKED, Gives, LogitsOf, Model
from potstill.validate.scorecard import RESAMPLED, Scorecard
from potstill.validate.text import OfText

LONGEST_ANSWER = 30  # tokens
TRIED = 20  # starts, and ends, of the highest logits
AT_ONCE = 256  # examples encoded at a time to read their answers
Span = tuple[int, int]


@dataclass
class SpansEncoder(TextEncoder):
    """Questions and contexts through the checkpoint's own tokenizer; only the context is cut.

    Beside the tokenizer's arrays (B, T): `context` (B, T) int64, 1 at the context's tokens; and where rows hold
    `answers`, `targets` (2B,) int64: the tokens where each first answer starts and ends, `IGNORED` where it was cut.
    """

    def __call__(self, rows: Rows) -> Inputs:
        """Token ids, masks, which tokens are the context's, and targets."""
        encoded, offsets, context = self._encoded(rows)
        inputs = self.arrays(encoded) | {"context": context.astype(np.int64)}
        if "answers" in rows:
            spans = [_target(*one) for one in zip(rows["answers"], offsets, context, strict=True)]
            inputs["targets"] = np.array(spans, dtype=np.int64).reshape(-1)
        return inputs

    def places(self, rows: Rows) -> NDArray[np.int64]:
        """Where each token starts and ends in its text, in characters: (B, T, 2)."""
        cut = self.truncated
        offsets = self._encoded(rows)[1]
        self.truncated = cut
        return offsets

    def _encoded(self, rows: Rows) -> tuple[Any, NDArray[np.int64], NDArray[np.bool_]]:
        try:
            encoded = self.tokenize(
                list(rows["question"]), list(rows["context"]), truncation="only_second", return_offsets_mapping=True
            )
        except Exception as error:  # the tokenizers library raises Exception itself
            if "truncat" not in str(error).lower():
                raise
            raise InputError(
                f"a question fills all of max_length ({self.max_length}) and leaves nothing for its context; "
                "give a larger data.max_length"
            ) from error
        parts = [[part == 1 for part in encoded.sequence_ids(i)] for i in range(len(rows["question"]))]
        return encoded, np.array(encoded["offset_mapping"], dtype=np.int64), np.array(parts)


def _target(answers: Mapping[str, Any], offsets: NDArray[np.int64], context: NDArray[np.bool_]) -> Span:
    """First and last token of the first answer; `IGNORED` twice where the input does not hold it, or there is none."""
    if not len(answers["text"]):
        return IGNORED, IGNORED
    start = int(answers["answer_start"][0])
    end = start + len(answers["text"][0])
    within = np.flatnonzero(context & (offsets[:, 1] > start) & (offsets[:, 0] < end))
    if not len(within) or offsets[within[0], 0] > start or offsets[within[-1], 1] < end:
        return IGNORED, IGNORED
    return int(within[0]), int(within[-1])


class SpansOf(LogitsOf):
    """A transformers model as a function to the logits of starts and ends (B, T, 2)."""

    def pick(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Starts beside ends."""
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)


class QuestionAnswering(OfText):
    """The span of a context that answers a question; every question has an answer there (SQuAD 1.1, Rajpurkar 2016).

    Outputs (B, T, 2) become rows (2B, T): over the tokens, the logits of the start and then of the end of each
    example's answer, `MASKED` outside of the context. Teacher and student share the tokenizer, so that both mean the
    same tokens. A context that is too long is cut, not read in several windows; an answer that was cut off is missed.
    """

    word = "question-answering"
    features: tuple[str, ...] = ("question", "context", "answers")
    length_of: str | None = "context"
    gives: Gives = "span"
    probe: ClassVar[Rows] = {"question": ["a"], "context": ["a"]}
    ndim = 3
    classes = False
    wrap = SpansOf
    encode_by = SpansEncoder

    def load(
        self, checkpoint: Checkpoint, labels: tuple[str, ...] | None = None, like: Model | None = None, **options: Any
    ) -> Model:
        """Load with its tokenizer; see `Task.load`.

        Raises:
            InputError: its tokenizer is not that of `like`.
        """
        model = super().load(checkpoint, labels, like, **options)
        if like and not model.encode.same_as(like.encode):
            raise InputError(
                f"{checkpoint} has another tokenizer than its teacher {like.checkpoint}; an answer is a span of "
                "tokens, so both must have the same one"
            )
        return model

    def read(self, outputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Outputs (B, T, 2) to rows (2B, T)."""
        outside = tensors["context"][:, None] == 0
        return outputs.transpose(1, 2).masked_fill(outside, MASKED).flatten(0, 1)

    def examples(
        self, source: str, columns: Mapping[str, str], *, judging: bool = False, labelled: bool = True
    ) -> Examples:
        """Read `question`, `context` and `answers` as SQuAD has them (`text` and `answer_start`, lists)."""
        if not labelled:
            examples = load_examples(source, ("question", "context"), columns, label=None)
            nothing: Any = [{"text": [], "answer_start": []}] * len(examples)
            table: Any = examples.table
            return replace(examples, table=table.add_column("answers", nothing))
        examples = load_examples(source, self.features, columns, label=None)
        for i, answers in enumerate(examples.rows(range(len(examples)))["answers"]):
            if not answers["text"] or len(answers["text"]) != len(answers["answer_start"]):
                raise InputError(
                    f"{examples.name} has {len(answers['text'])} texts and {len(answers['answer_start'])} starts "
                    f"of answers in row {i + 1}; expected at least one answer, as in SQuAD 1.1"
                )
        return examples

    def checked(
        self, examples: Examples, names: tuple[str, ...], *, encode: Encoder | None = None, judging: bool = False
    ) -> Examples:
        """The examples as they are; see `Task.checked`."""
        if judging:
            check_not_empty(examples)
        return examples

    def judge(
        self,
        mine: NDArray[np.floating],
        teacher: NDArray[np.floating],
        examples: Examples,
        encode: Encoder | None = None,
        truncated: int = 0,
    ) -> Scorecard:
        """F1 of the words of the best span, and beside it the share of exact matches; see `Task.judge`.

        Rows may be wider than the other's by what is masked there: a package of one length pads further.

        Raises:
            InputError: the rows are not over the same tokens.
        """
        n, both = len(examples), min(mine.shape[1], teacher.shape[1])
        beyond = any((one[:, both:] > MASKED).any() for one in (mine, teacher))
        if beyond or not len(mine) == len(teacher) == 2 * n or not isinstance(encode, SpansEncoder):
            raise InputError(
                f"the model's outputs are {mine.shape}, the teacher's {teacher.shape}, for {n} questions; "
                "they must be over the same tokens"
            )
        said = _said([mine, teacher], examples, encode)
        golds = [answers["text"] for answers in examples.rows(range(n))["answers"]]
        scores = np.array([[squad_scores(text, gold) for text, gold in zip(one, golds, strict=True)] for one in said])
        ours, theirs = scores[0, :, 0], scores[1, :, 0]
        values = np.stack([ours, ours - theirs], axis=1)
        interval, difference = bootstrap(lambda index: values[index].mean(axis=1), n)
        same = sum(normalized(a) == normalized(b) for a, b in zip(*said, strict=True))
        return Scorecard(
            metric="SQuAD F1",
            examples=n,
            data=examples.name,
            value=float(ours.mean()),
            interval=interval,
            teacher_value=float(theirs.mean()),
            difference=float((ours - theirs).mean()),
            difference_interval=difference,
            agreement=same / n,
            agreement_interval=proportion(same, n),
            truncated=truncated,
            method=f"{RESAMPLED}; Wilson’s for the agreement",
            beside={"exact match": float(scores[0, :, 1].mean())},
        )


def _said(rows: Sequence[NDArray[np.floating]], examples: Examples, encode: SpansEncoder) -> list[list[str]]:
    """The text of the best span of each example, for each model's rows (2N, T)."""
    said: list[list[str]] = [[] for _ in rows]
    for first in range(0, len(examples), AT_ONCE):
        index = range(first, min(first + AT_ONCE, len(examples)))
        raw = examples.rows(index)
        for i, context, places in zip(index, raw["context"], encode.places(raw), strict=True):
            for texts, one in zip(said, rows, strict=True):
                span = best_span(*one[2 * i : 2 * i + 2, : len(places)])
                texts.append(context[places[span[0], 0] : places[span[1], 1]] if span else "")
    return said


def best_span(starts: NDArray[np.floating], ends: NDArray[np.floating]) -> Span | None:
    """First and last token of the span with the highest sum of logits (T,), of at most `LONGEST_ANSWER` tokens.

    Among the `TRIED` highest starts and ends, as usual for SQuAD (Devlin 2019, "BERT", section 4.2); None where no
    such span lies in the context.
    """
    tried = [np.argsort(-logits, kind="stable")[:TRIED] for logits in (starts, ends)]
    tried = [tokens[logits[tokens] > MASKED] for tokens, logits in zip(tried, (starts, ends), strict=True)]
    a, b = np.meshgrid(*tried, indexing="ij")
    right = (b >= a) & (b - a < LONGEST_ANSWER)
    if not right.any():
        return None
    sums = np.where(right, starts[a].astype(np.float64) + ends[b], -np.inf)
    best = np.unravel_index(int(sums.argmax()), sums.shape)
    return int(a[best]), int(b[best])


def normalized(text: str) -> str:
    """A text as SQuAD's own script compares it: lower case, without punctuation, articles and double spaces."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def squad_scores(said: str, golds: Sequence[str]) -> tuple[float, float]:
    """F1 over words, and 1 for an exact match, each against the true answer that fits best (SQuAD 1.1)."""
    words = normalized(said).split()
    best = 0.0
    for gold in golds:
        true = normalized(gold).split()
        common = sum((Counter(words) & Counter(true)).values())
        best = max(best, 2 * common / (len(words) + len(true)) if common else 0.0)
    return best, float(any(normalized(said) == normalized(gold) for gold in golds))
