"""The same texts in the tokens of two models, a teacher and a student with a tokenizer of its own.

Where both have a boundary in the text, a *mark*, both have read the same; between two marks are the same bytes. A table
of such examples has, for each piece of a text, `tokens` and `read` of the teacher and `own_tokens` and `own_read` of
the student (see `tokens.py`), and the marks: `at` and `own_at`, the tokens that end there, and `spans`, the bytes since
the mark before (0 at the first).

Shapes: N pieces, R tokens that one of the models predicts, M marks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.validate.encoder import Encoder
from potstill.validate.examples import IGNORED, Examples, Rows

OWN, THEIRS = "own_", "their_"  # before the names of columns: of a student, and of the model that one is compared with
END = 2**31 - 1  # where the token that ends texts ends
AT_ONCE = 1000  # pieces read at a time
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Spelled:
    """A text in one model's tokens: ids, where each ends (in bytes of the text, rising), and how many are only read."""

    tokens: list[int]
    ends: Ints
    read: int
    most: int  # tokens of a piece


@dataclass(frozen=True)
class Between:
    """A table as one model reads it beside another: the columns of the first as they are called, the second's `their_…`

    `unit` is `at` of the teacher, whoever is compared.
    """

    table: Any
    ours: str
    theirs: str

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, indices: Any) -> dict[str, Any]:
        rows = self.table[indices]
        found = {name: values for name, values in rows.items() if not name.startswith(OWN)}
        for name in ("tokens", "read", "at"):
            found[name], found[THEIRS + name] = rows[self.ours + name], rows[self.theirs + name]
        return found | {"unit": rows["at"]}

    def select(self, indices: Ints) -> "Between":
        """Some of the rows, in that order."""
        return Between(self.table.select(indices), self.ours, self.theirs)


def in_two(examples: Examples) -> bool:
    """Whether a set of examples holds the tokens of two models."""
    return OWN + "tokens" in getattr(examples.table, "column_names", ())


def prefix_of(encode: Encoder | None) -> str:
    """Which of the two models an encoder is of, by how its columns begin."""
    return getattr(encode, "prefix", "")


def read_by(examples: Examples, encode: Encoder) -> Examples:
    """The examples with the labels (R,) and the offsets of the model that an encoder feeds."""
    return _read_by(examples, prefix_of(encode)) if in_two(examples) else examples


def between(examples: Examples, ours: Encoder, theirs: Encoder) -> Examples:
    """The examples to judge one model beside another; labels and offsets are those of the first."""
    if not in_two(examples):
        return examples
    table = Between(examples.table, prefix_of(ours), prefix_of(theirs))
    return replace(_read_by(examples, prefix_of(ours)), table=table)


def of_the_other(examples: Examples) -> Examples:
    """Examples that `between` gave, with the labels and the offsets of the model that is compared with."""
    return _read_by(examples, THEIRS)


def judged_rows(examples: Examples, chosen: NDArray[np.bool_], rows: int) -> tuple[Ints, Ints]:
    """Numbers of the rows that two models have for some of the examples (N,), of `rows` for the first in all."""

    def per(of: Examples) -> Ints:
        return np.full(len(of), rows // len(of)) if of.offsets is None else np.diff(of.offsets)

    other = of_the_other(examples) if isinstance(examples.table, Between) else examples
    ours, others = (np.flatnonzero(np.repeat(chosen, per(one))) for one in (examples, other))
    return ours, others


def _read_by(examples: Examples, prefix: str) -> Examples:
    labels = [one for rows in parts(examples) for one in labels_in(rows, prefix)]
    offsets = np.cumsum([0, *map(len, labels)])
    return replace(examples, labels=np.concatenate([np.zeros(0, np.int64), *labels]), offsets=offsets)


def parts(examples: Examples) -> Iterator[Rows]:
    """All rows, some at a time."""
    for start in range(0, len(examples), AT_ONCE):
        yield examples.rows(range(start, min(start + AT_ONCE, len(examples))))


def labels_in(rows: Rows, prefix: str) -> list[Ints]:
    """The next tokens of each piece, `IGNORED` for those that are only read."""
    found = []
    for tokens, read in zip(rows[f"{prefix}tokens"], rows[f"{prefix}read"], strict=True):
        ids = np.asarray(tokens[1:], dtype=np.int64)
        found.append(np.where(np.arange(1, len(tokens)) < read, IGNORED, ids))
    return found


def met(rows: Rows) -> tuple[Ints, Ints]:
    """Of a batch the rows of the student, and those of the teacher, at marks: what comes next after the same text.

    Both number the rows of the whole batch, the first piece's before the second's; marks after which one of both
    predicts nothing are left out.
    """
    ours, theirs, mine, others = [], [], 0, 0
    for i in range(len(rows["at"])):
        at, own = np.asarray(rows["at"][i], dtype=np.int64), np.asarray(rows[OWN + "at"][i], dtype=np.int64)
        last, own_last = len(rows["tokens"][i]) - 1, len(rows[OWN + "tokens"][i]) - 1
        both = (at < last) & (own < own_last)
        ours.append(mine + own[both])
        theirs.append(others + at[both])
        mine, others = mine + own_last, others + last
    return np.concatenate(ours), np.concatenate(theirs)


def ends_in_bytes(text: str, ends: Sequence[int]) -> Ints:
    """Places in a text, in letters, as places in its UTF-8 bytes; none before the one before it."""
    at = np.maximum.accumulate(np.asarray(ends, dtype=np.int64))
    if text.isascii():
        return at
    letters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (letters > 0x7F).astype(np.int64) + (letters > 0x7FF) + (letters > 0xFFFF)
    found: Ints = np.concatenate([[0], np.cumsum(sizes)])[at]
    return found


def pieces(text: str, one: Spelled, other: Spelled) -> Iterator[tuple[dict[str, Any], bool]]:
    """A text in pieces of both models, cut where both have a boundary; and whether tokens of a piece were cut off.

    A piece is cut off only where more tokens than a model takes lie between two marks. One of less than two tokens,
    which predicts nothing, is left out unless it is all there is.
    """
    raw = text.encode()
    marks = np.intersect1d(one.ends, other.ends)
    at, own = (np.searchsorted(side.ends, marks, side="right") - 1 for side in (one, other))
    places, start, before, found = np.minimum(marks, len(raw)), (0, 0), 0, 0
    whole = len(one.tokens), len(other.tokens)
    while start[0] < whole[0] or start[1] < whole[1]:
        end, after = _next(start, whole, (at, own), (one.most, other.most)), len(raw)
        if end != whole:
            after = int(places[np.searchsorted(own, end[1] - 1)])
        tokens = one.tokens[start[0] : end[0]][: one.most], other.tokens[start[1] : end[1]][: other.most]
        cut = (len(tokens[0]), len(tokens[1])) != (end[0] - start[0], end[1] - start[1])
        inside = (at >= start[0]) & (at < start[0] + len(tokens[0]))
        inside &= (own >= start[1]) & (own < start[1] + len(tokens[1]))
        if min(map(len, tokens)) > 1 or (end == whole and not found):
            here, found = places[inside], found + 1
            yield {
                "text": raw[before:after].decode(), "tokens": tokens[0], "read": one.read if start == (0, 0) else 1,
                "at": (at[inside] - start[0]).tolist(), OWN + "tokens": tokens[1],
                OWN + "read": other.read if start == (0, 0) else 1, OWN + "at": (own[inside] - start[1]).tolist(),
                "spans": np.diff(here, prepend=here[:1]).tolist(),
            }, cut  # fmt: skip
        start, before = end, after


def in_one_piece(text: str, one: Spelled, other: Spelled) -> dict[str, Any]:
    """An answer with its prompt as one piece; what is beyond the length of either is cut off."""
    size = len(text.encode())
    marks = np.intersect1d(one.ends[: one.most], other.ends[: other.most])
    at, own = (np.searchsorted(side.ends[: side.most], marks, side="right") - 1 for side in (one, other))
    known = (at >= one.read - 1) & (own >= other.read - 1)
    places = np.minimum(marks, size)[known]
    return {
        "text": text, "tokens": one.tokens[: one.most], "read": one.read, "at": at[known].tolist(),
        OWN + "tokens": other.tokens[: other.most], OWN + "read": other.read, OWN + "at": own[known].tolist(),
        "spans": np.diff(places, prepend=places[:1]).tolist(),
    }  # fmt: skip


def _next(
    start: tuple[int, int], whole: tuple[int, int], at: tuple[Ints, Ints], most: tuple[int, int]
) -> tuple[int, int]:
    """Where a piece of two tokens or more ends, in tokens of both: at the last mark that leaves it short enough.

    At the next mark where there is none such.
    """
    if whole[0] - start[0] <= most[0] and whole[1] - start[1] <= most[1]:
        return whole
    after = (at[0] > start[0]) & (at[1] > start[1])
    fits = after & (at[0] < start[0] + most[0]) & (at[1] < start[1] + most[1])
    chosen = np.flatnonzero(fits)[-1:] if fits.any() else np.flatnonzero(after)[:1]
    return (int(at[0][chosen[0]]) + 1, int(at[1][chosen[0]]) + 1) if len(chosen) else whole
