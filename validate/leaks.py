"""Evaluation examples that are among the examples a model learned from: to the byte, or nearly.

Shapes: N evaluation examples, M others.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from potstill.validate import near_pictures, near_texts
from potstill.validate.examples import Arrays, Examples, Pairs
from potstill.validate.units import counted

PRINTED_AT_ONCE = 1024  # rows of arrays read at a time to hash them


@dataclass(frozen=True)
class Leak:
    """What of an evaluation set is among other examples; rows are numbered from 1.

    Attributes:
        source: which others, by their key in a recipe's `data`.
        examples: N.
        exact: the rows of the evaluation set that are among the others to the byte.
        near: the rows of the evaluation set with a near duplicate among the others, and one such row there; exact ones
            are among them. None where near duplicates are not looked for.
        rule: what was taken for a near duplicate.
    """

    source: str
    examples: int
    exact: list[int]
    near: list[tuple[int, int]] | None
    rule: str = ""

    @property
    def rows(self) -> set[int]:
        """The rows of the evaluation set that are among the others, exactly or nearly."""
        return {*self.exact, *(row for row, _ in self.near or [])}

    def in_words(self) -> str | None:
        """One sentence on the near duplicates beyond the exact ones, if there are any."""
        beyond = [pair for pair in self.near or [] if pair[0] not in set(self.exact)]
        if not beyond:
            return None
        row, other = beyond[0]
        return (
            f"{len(beyond):,} {'more ' if self.exact else ''}of the {counted(self.examples, 'evaluation example')} "
            f"{'has' if len(beyond) == 1 else 'have'} a near duplicate in data.{self.source} ({self.rule}), "
            f"e.g. row {row:,} and row {other:,} there."
        )


def leak(source: str, judging: Examples, others: Examples, exact: NDArray[np.int64]) -> Leak:
    """Look for near duplicates; `exact`: the indices (K,) of evaluation examples that `shared` found in `others`."""
    found = near(judging, others)
    rows = (exact + 1).tolist()
    if found is None:
        return Leak(source, len(judging), rows, None)
    rule, pairs = found
    return Leak(source, len(judging), rows, [(int(a) + 1, int(b) + 1) for a, b in pairs], rule)


def leaked_rows(leaks: Sequence[Leak]) -> set[int]:
    """Rows, from 1, of the evaluation set that are in any of the others."""
    return {row for one in leaks for row in one.rows}


def leaks_from_json(value: Any) -> list[Leak]:
    """The leaks that `leaks_to_json` gave."""
    return TypeAdapter(list[Leak]).validate_python(value)


def leaks_to_json(leaks: Sequence[Leak]) -> Any:
    """Plain data."""
    return TypeAdapter(list[Leak]).dump_python(list(leaks), mode="json")


# To the byte.


def shared(judging: Examples, others: Examples) -> NDArray[np.int64]:
    """Indices (K,) of the examples of `judging` that are in `others` too, by their features, to the byte.

    A pair of texts is among others when both are.
    """
    mine = list(_prints(judging))
    known = set(mine)
    there = {found for found in _prints(others) if found in known}
    both: NDArray[np.bool_] = np.array([found in there for found in mine], dtype=bool)
    if isinstance(judging.table, Pairs):
        both = both[::2] & both[1::2]
    return np.flatnonzero(both)


def _prints(examples: Examples) -> Iterator[bytes]:
    """A hash of each example's features; of a pair, of each text."""
    table: Any = examples.table
    if isinstance(table, Arrays):
        for start in range(0, len(table), PRINTED_AT_ONCE):
            rows = table[list(range(start, min(start + PRINTED_AT_ONCE, len(table))))]
            yield from map(_print, zip(*rows.values(), strict=True))
        return
    if isinstance(table, Pairs):
        columns = [np.array(table[list(range(len(table)))]["text"], dtype=object)]
    else:
        import datasets

        for name, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))
        columns = [table[name] for name in table.column_names]
    yield from map(_print, zip(*columns, strict=True))


def _print(values: Iterable[Any]) -> bytes:
    """A hash of some features."""
    return hashlib.sha1(b"\0".join(map(_bytes, values)), usedforsecurity=False).digest()


def _bytes(value: Any) -> bytes:
    """A feature as bytes: an array's, an image's or sound's file, a text's."""
    if isinstance(value, dict) and "bytes" in value:
        return value["bytes"] or Path(value["path"]).read_bytes()
    return value.tobytes() if isinstance(value, np.ndarray) else str(value).encode()


# Nearly.


def near(judging: Examples, others: Examples) -> tuple[str, NDArray[np.int64]] | None:
    """Near duplicates of evaluation examples among others, in one pass over the others.

    Memory: what is compared of the evaluation set, and of a part of the others. A pair of texts has a near duplicate
    when both of its texts have one.

    Returns:
        What was taken for a near duplicate, and pairs (K, 2) of indices in `judging` and in `others`; None for
        examples that are neither texts nor pictures.
    """
    way = next((way for way in (near_texts, near_pictures) if all(map(way.can_read, (judging, others)))), None)
    if way is None:
        return None
    found = way.search(judging, others).partner.reshape(len(judging), -1)  # (N, 1), or (N, 2) of pairs
    rows = np.flatnonzero((found >= 0).all(axis=1))
    return way.RULE, np.stack([rows, found[rows, 0]], axis=1)
