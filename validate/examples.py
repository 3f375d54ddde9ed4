"""Examples: rows of features with their labels.

Shapes: N examples, R labels of some of them; R is N where each has one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from potstill.validate.errors import InputError
from potstill.validate.files import sha256_json

Rows = Mapping[str, Any]
IGNORED = -100  # the label of what has none: left out of every loss and metric


class Table(Protocol):
    """Rows by index: `table[[3, 1]]` gives a dict from column to a sequence of two values."""

    def __len__(self) -> int: ...
    def __getitem__(self, indices: Any) -> Any: ...
    def select(self, indices: Any) -> "Table":
        """Some of the rows, in that order."""
        ...


@dataclass(frozen=True)
class Arrays:
    """A table of numpy arrays of one length, which may lie on disk; rows are copied when they are read.

    Attributes:
        columns: the arrays by name.
        index: which of their rows the table has, in order; None for all.
    """

    columns: Mapping[str, NDArray[Any]]
    index: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())) if self.index is None else self.index)

    def __getitem__(self, indices: Sequence[int] | NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        rows = indices if self.index is None else self.index[indices]
        return {name: np.asarray(array[rows]) for name, array in self.columns.items()}

    def select(self, indices: NDArray[np.int64]) -> "Arrays":
        """Some of the rows, in that order."""
        return Arrays(self.columns, indices if self.index is None else self.index[indices])


@dataclass(frozen=True)
class Pairs:
    """A table whose rows are two texts each: `table[[3, 1]]` gives four, the two of row 3 before the two of row 1."""

    table: Any

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, indices: Any) -> dict[str, list[str]]:
        rows = self.table[indices]
        return {"text": [text for pair in zip(rows["text"], rows["text2"], strict=True) for text in pair]}

    def select(self, indices: NDArray[np.int64]) -> "Pairs":
        """Some of the rows, in that order."""
        return Pairs(self.table.select(indices))


@dataclass(frozen=True)
class Examples:
    """Labelled examples.

    Attributes:
        name: how a person would speak of it: the file and its key.
        table: the features, under the task's own column names.
        labels: class of each example, int64, shape (N,), once `with_labels` has checked them; before that
            whatever the source holds; `IGNORED` for one without a label. Scores are float64.
        label_names: the classes that the source itself names, in order, if it does.
        digest: SHA-256 of the content.
        offsets: where an example has several labels (a class for each word): example i's are
            `labels[offsets[i]:offsets[i + 1]]`, int64, shape (N + 1,).
    """

    name: str
    table: Table
    labels: NDArray[Any]
    label_names: tuple[str, ...] | None
    digest: str
    offsets: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels) if self.offsets is None else len(self.offsets) - 1

    def labels_of(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """The labels (R,) of some examples, one example's after the other's."""
        if self.offsets is None:
            one_each: NDArray[np.int64] = self.labels[list(indices)]
            return one_each
        parts = [self.labels[self.offsets[i] : self.offsets[i + 1]] for i in indices]
        return np.concatenate([self.labels[:0], *parts])

    def rows(self, indices: Sequence[int]) -> Rows:
        """The features of some examples: column to sequence of values."""
        rows: Rows = self.table[list(indices)]
        return rows

    def take(self, indices: Sequence[int], what: str) -> "Examples":
        """Some of the examples, in the order of `indices`; `what` is added to the name."""
        index = np.asarray(indices, dtype=np.int64)
        counts = None if self.offsets is None else np.diff(self.offsets)[index]
        return Examples(
            name=f"{self.name} ({what})",
            table=self.table.select(index),
            labels=self.labels_of(index.tolist()),
            label_names=self.label_names,
            digest=sha256_json([self.digest, sha256_json(index.tolist())]),
            offsets=None if counts is None else np.concatenate([[0], np.cumsum(counts)]),
        )

    def lengths(self, column: str) -> NDArray[np.int64]:
        """Length (N,) of each example in a column, in characters or words; of two texts, the longer one's."""
        parts = (range(start, min(start + 10_000, len(self))) for start in range(0, len(self), 10_000))
        found = [len(value) for part in parts for value in self.rows(part)[column]]
        longest: NDArray[np.int64] = np.array(found, dtype=np.int64).reshape(len(self), -1).max(axis=1)
        return longest

    def with_labels(self, names: Sequence[str]) -> "Examples":
        """The same examples with labels as indices into `names`, the classes of a model.

        Raises:
            InputError: a label is missing or outside the model's classes, or the source names other classes.
        """
        return replace(self, labels=_indices(self, tuple(names)), label_names=tuple(names))


def _indices(examples: Examples, names: tuple[str, ...]) -> NDArray[np.int64]:
    """Labels as indices into `names`; see `Examples.with_labels`."""
    labels, own = examples.labels, examples.label_names
    generic = all(name in (f"LABEL_{i}", str(i)) for i, name in enumerate(names))
    place = {name.casefold(): i for i, name in enumerate(names)}  # POSITIVE and positive are one class
    if len(place) < len(names):
        place = {name: i for i, name in enumerate(names)}
    if own and not generic and {_as_in(place, name) for name in own} != set(place):
        raise InputError(
            f"{examples.name} names the classes {few(own)}, the model {few(names)}; they must be the same classes"
        )
    if own and generic and len(own) != len(names):
        raise InputError(f"{examples.name} has {len(own)} classes ({few(own)}), the model {len(names)}")
    if labels.dtype.kind in "OUS":
        unknown = sorted({str(value) for value in labels if _as_in(place, str(value)) not in place})
        if unknown:
            raise InputError(
                f"{examples.name} has labels that the model does not know: {few(unknown)}; "
                f"the model's classes are {few(names)}"
            )
        return np.array([place[_as_in(place, str(value))] for value in labels], dtype=np.int64)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise InputError(
            f"labels of {examples.name} are {labels.dtype} of shape {labels.shape}; "
            "expected whole numbers or class names, one for each example"
        )
    known = labels != IGNORED
    if own and not generic:
        places = np.array([place[_as_in(place, name)] for name in own], dtype=np.int64)
        return np.where(known, places[np.where(known, labels, 0)], IGNORED)
    outside = np.flatnonzero(known & ((labels < 0) | (labels >= len(names))))
    if len(outside):
        at = outside[0] if examples.offsets is None else np.searchsorted(examples.offsets, outside[0], "right") - 1
        raise InputError(
            f"{examples.name} has the label {labels[outside[0]]} in row {at + 1}; "
            f"the model has {len(names)} classes, 0 to {len(names) - 1} ({few(names)})"
        )
    whole: NDArray[np.int64] = labels.astype(np.int64)
    return whole


def _as_in(place: Mapping[str, int], name: str) -> str:
    """A class name in the spelling of `place`: as it is, else without regard to case."""
    return name if name in place else name.casefold()


def few(names: Sequence[str], most: int = 6) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_not_empty(examples: Examples) -> None:
    """Refuse a set without examples.

    Raises:
        InputError: it is empty.
    """
    if len(examples) == 0:
        raise InputError(f"the evaluation set {examples.name} is empty")


def join(examples: Examples, more: Examples) -> Examples:
    """Two sets as one, the first before the second; columns and classes must be the same.

    Raises:
        InputError: their columns are of different kinds or shapes.
    """
    one, other = examples.table, more.table
    try:
        if isinstance(one, Arrays) and isinstance(other, Arrays):
            mine, theirs = one[np.arange(len(one))], other[np.arange(len(other))]
            table: Any = Arrays({name: np.concatenate([mine[name], theirs[name]]) for name in mine})
        else:
            import datasets

            table = datasets.concatenate_datasets([one, other.cast(one.features)])  # type: ignore[attr-defined]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{examples.name} and {more.name} cannot be joined: {error}") from error
    offsets = None
    if examples.offsets is not None and more.offsets is not None:
        offsets = np.concatenate([examples.offsets, examples.offsets[-1] + more.offsets[1:]])
    return Examples(
        name=f"{examples.name} and {more.name}",
        table=table,
        labels=np.concatenate([examples.labels, more.labels]),
        label_names=examples.label_names,
        digest=sha256_json([examples.digest, more.digest]),
        offsets=offsets,
    )


def check_evaluation_set(examples: Examples) -> None:
    """Refuse a set that cannot judge anything.

    Raises:
        InputError: the set is empty or holds one class only.
    """
    check_not_empty(examples)
    labels = np.unique(examples.labels[examples.labels != IGNORED])
    if not len(labels):
        raise InputError(f"the evaluation set {examples.name} has no labels; without them nothing can be judged")
    if len(labels) == 1:
        raise InputError(
            f"the evaluation set {examples.name} holds one class only ({labels[0]}); "
            "a model that always says that class would be perfect on it"
        )
