"""Examples from files or the hub, with the columns a task asks for."""

import csv
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from potstill.validate.errors import InputError, Unreachable, did_you_mean
from potstill.validate.files import sha256_file, sha256_folder, sha256_json

Rows = Mapping[str, Any]
TEXT_TYPES = ("string", "large_string")
READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class Table(Protocol):
    """Rows by index: `table[[3, 1]]` gives a dict from column to a sequence of two values."""

    def __len__(self) -> int: ...
    def __getitem__(self, indices: Any) -> Any: ...


@dataclass(frozen=True)
class Arrays:
    """A table of numpy arrays of one length."""

    columns: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, indices: Sequence[int] | NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        return {name: array[indices] for name, array in self.columns.items()}


@dataclass(frozen=True)
class Examples:
    """Labelled examples.

    Attributes:
        name: how a person would speak of it: the file and its key.
        table: the features, under the task's own column names.
        labels: class of each example, int64, shape (N,), once `with_labels` has checked them; before that
            whatever the source holds.
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
        return np.concatenate([self.labels[self.offsets[i] : self.offsets[i + 1]] for i in indices])

    def rows(self, indices: Sequence[int]) -> Rows:
        """The features of some examples: column to sequence of values."""
        rows: Rows = self.table[list(indices)]
        return rows

    def take(self, indices: Sequence[int], what: str) -> "Examples":
        """Some of the examples, in the order of `indices`; `what` is added to the name."""
        index = np.asarray(indices, dtype=np.int64)
        table = (
            Arrays(self.table[index]) if isinstance(self.table, Arrays) else self.table.select(index)  # type: ignore[attr-defined]
        )
        return Examples(
            name=f"{self.name} ({what})",
            table=table,
            labels=self.labels[index],
            label_names=self.label_names,
            digest=sha256_json([self.digest, sha256_json(index.tolist())]),
        )

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
            f"{examples.name} names the classes {_few(own)}, the model {_few(names)}; they must be the same classes"
        )
    if own and generic and len(own) != len(names):
        raise InputError(f"{examples.name} has {len(own)} classes ({_few(own)}), the model {len(names)}")
    if labels.dtype.kind in "OUS":
        unknown = sorted({str(value) for value in labels if _as_in(place, str(value)) not in place})
        if unknown:
            raise InputError(
                f"{examples.name} has labels that the model does not know: {_few(unknown)}; "
                f"the model's classes are {_few(names)}"
            )
        return np.array([place[_as_in(place, str(value))] for value in labels], dtype=np.int64)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise InputError(
            f"labels of {examples.name} are {labels.dtype} of shape {labels.shape}; "
            "expected whole numbers or class names, one for each example"
        )
    if own and not generic:
        return np.array([place[_as_in(place, own[label])] for label in labels], dtype=np.int64)
    outside = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(outside):
        raise InputError(
            f"{examples.name} has the label {labels[outside[0]]} in row {outside[0] + 1}; "
            f"the model has {len(names)} classes, 0 to {len(names) - 1} ({_few(names)})"
        )
    whole: NDArray[np.int64] = labels.astype(np.int64)
    return whole


def _as_in(place: Mapping[str, int], name: str) -> str:
    """A class name in the spelling of `place`: as it is, else without regard to case."""
    return name if name in place else name.casefold()


def _few(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_not_empty(examples: Examples) -> None:
    """Refuse a set without examples.

    Raises:
        InputError: it is empty.
    """
    if len(examples) == 0:
        raise InputError(f"the evaluation set {examples.name} is empty")


def shared(one: Examples, other: Examples) -> int:
    """How many examples of `one` are in `other` too, by their features, to the byte."""
    return sum((Counter(_prints(one)) & Counter(_prints(other))).values())


def _prints(examples: Examples) -> Iterator[bytes]:
    """A hash of each example's features."""
    table: Any = examples.table
    if isinstance(table, Arrays):
        columns = list(table.columns.values())
    else:
        import datasets

        for name, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))
        columns = [table[name] for name in table.column_names]
    for values in zip(*columns, strict=True):
        yield hashlib.sha1(b"\0".join(map(_bytes, values)), usedforsecurity=False).digest()


def _bytes(value: Any) -> bytes:
    """A feature as bytes: an array's, an image file's, a text's."""
    if isinstance(value, dict):
        return value["bytes"] or Path(value["path"]).read_bytes()
    return value.tobytes() if isinstance(value, np.ndarray) else str(value).encode()


def check_evaluation_set(examples: Examples) -> None:
    """Refuse a set that cannot judge anything.

    Raises:
        InputError: the set is empty or holds one class only.
    """
    check_not_empty(examples)
    if len(np.unique(examples.labels)) == 1:
        raise InputError(
            f"the evaluation set {examples.name} holds one class only ({examples.labels[0]}); "
            "a model that always says that class would be perfect on it"
        )


def load_examples(source: str, features: Sequence[str], columns: Mapping[str, str]) -> Examples:
    """Read examples and give their columns the task's names.

    Args:
        source: CSV, TSV (never quoted), JSON lines or Parquet file; `.npz` with `x` and `y`, where `FILE:train`
            picks `train_x` and `train_y`, or `x_train` and `y_train`; a folder of class folders of images;
            a hub dataset `name` or `name:split`.
        features: the task's feature columns, e.g. `("text",)`.
        columns: from the task's name to the source's, e.g. `{"text": "sentence"}`.

    Raises:
        InputError: the source is not there, cannot be read, or lacks a column.
        Unreachable: a hub name that the hub did not give.
    """
    stem, key = split_key(source)
    path = Path(stem).expanduser()
    if path.suffix == ".npz":
        return _from_npz(path, key, features, columns)
    if path.is_dir():
        return _from_image_folder(path, features, columns)
    if path.suffix in READERS:
        return _from_file(path, features, columns)
    if source.startswith((".", "/", "~")) or path.suffix:
        raise InputError(
            f"no such data: {source}; expected one of {', '.join([*READERS, '.npz'])}, "
            "a folder of class folders of images, or a hub dataset name"
        )
    return _from_hub(stem, key or "train", features, columns)


def split_key(source: str) -> tuple[str, str | None]:
    """`FILE:key` into file and key; a plain path has no key."""
    stem, colon, key = source.rpartition(":")
    return (stem, key) if colon and stem and "/" not in key and "\\" not in key else (source, None)


def _from_npz(path: Path, key: str | None, features: Sequence[str], columns: Mapping[str, str]) -> Examples:
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        archive = np.load(path, allow_pickle=False)
        names = {_without_key(name, key): name for name in archive.files if _without_key(name, key)}
        arrays = {short: archive[name] for short, name in names.items()}
    except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
        raise InputError(f"cannot read {path}: {error}; expected an .npz of plain arrays") from error
    if not arrays:
        raise InputError(f"{path} has no arrays {key}_x and {key}_y; it holds {_few(archive.files)}")
    name = f"{path.name}:{key}" if key else path.name
    wanted = {feature: columns.get(feature, feature) for feature in features} | {"label": columns.get("label", "y")}
    _require(name, wanted.values(), list(arrays))
    table = {feature: arrays[wanted[feature]] for feature in features}
    labels = arrays[wanted["label"]]
    for feature, array in table.items():
        if len(array) != len(labels):
            raise InputError(f"{name}: {wanted[feature]} has {len(array)} rows and {wanted['label']} {len(labels)}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(f"{name}: {wanted[feature]} holds values that are not finite")
    return Examples(name, Arrays(table), labels, None, sha256_json([sha256_file(path), key, wanted]))


def _without_key(name: str, key: str | None) -> str:
    """`x` for the array `train_x` or `x_train` under the key `train`; empty for an array of another key."""
    if key is None:
        return name
    if name.startswith(f"{key}_"):
        return name.removeprefix(f"{key}_")
    return name.removesuffix(f"_{key}") if name.endswith(f"_{key}") else ""


def _from_file(path: Path, features: Sequence[str], columns: Mapping[str, str]) -> Examples:
    import datasets

    if not path.is_file():
        raise InputError(f"no such file: {path}")
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    if READERS[path.suffix] == "csv":
        options["keep_default_na"] = False  # the word "null" is a word
    with _quiet_datasets():
        try:
            table = datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train", **options)
        except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
            if path.stat().st_size == 0 or "corresponds to no data" in str(error):
                raise InputError(f"{path} is empty: expected a row of column names, and rows") from error
            raise InputError(f"cannot read {path}: {error.__cause__ or error}") from error
    return _from_table(path.name, table, features, columns, sha256_file(path))


def _from_image_folder(path: Path, features: Sequence[str], columns: Mapping[str, str]) -> Examples:
    import datasets

    with _quiet_datasets():
        try:
            table = datasets.load_dataset("imagefolder", data_dir=str(path.resolve()), split="train")
        except (
            datasets.exceptions.DatasetGenerationError,
            datasets.exceptions.EmptyDatasetError,
            ValueError,
            FileNotFoundError,
        ) as error:
            raise InputError(
                f"cannot read images from {path}: {error.__cause__ or error}; "
                "expected one folder for each class with image files in it"
            ) from error
    return _from_table(path.name, table, features, columns, sha256_folder(path))


def _from_hub(name: str, split: str, features: Sequence[str], columns: Mapping[str, str]) -> Examples:
    import datasets

    with _quiet_datasets():
        try:
            table = datasets.load_dataset(name, split=split)
        except ValueError as error:
            raise InputError(f"the hub dataset {name!r} cannot be read: {error}") from error
        except (OSError, ConnectionError, RuntimeError) as error:
            raise Unreachable(f"{name!r} is no file here, and the hub did not give it: {error}") from error
    return _from_table(f"{name}:{split}", table, features, columns, f"hub:{name}:{split}:{table._fingerprint}")


def _from_table(name: str, table: Any, features: Sequence[str], columns: Mapping[str, str], digest: str) -> Examples:
    """Rename a `datasets` table's columns, take the labels out, and refuse missing values."""
    import datasets

    wanted = {feature: columns.get(feature, feature) for feature in (*features, "label")}
    _require(name, wanted.values(), table.column_names)
    label = table.features[wanted["label"]]
    labels = np.asarray(table.with_format("numpy")[wanted["label"]][:])
    for column in wanted.values():
        nulls = table.data.column(column).null_count
        if nulls:
            raise InputError(f"{name}: column {column!r} has {nulls} missing values of {len(table)}")
    for feature in features:
        kind = table.features[wanted[feature]]
        right = isinstance(kind, datasets.Image) if feature == "image" else getattr(kind, "dtype", "") in TEXT_TYPES
        if not right:
            raise InputError(
                f"{name}: column {wanted[feature]!r} holds {kind}, expected {feature}; say another --columns"
            )
    table = table.select_columns([wanted[f] for f in features])
    table = table.rename_columns({wanted[f]: f for f in features if wanted[f] != f})
    names = tuple(label.names) if isinstance(label, datasets.ClassLabel) else None
    return Examples(name, table, labels, names, sha256_json([digest, wanted]))


def _require(name: str, wanted: Any, present: list[str]) -> None:
    for column in wanted:
        if column not in present:
            raise InputError(
                f"{name} has no column {column!r}{did_you_mean(column, present)}; "
                "say which columns to use, e.g. --columns text=sentence,label=label"
            )


class _quiet_datasets:  # noqa: N801 - reads as a statement
    """No progress bars of the reader inside."""

    def __enter__(self) -> None:
        import datasets

        datasets.disable_progress_bars()

    def __exit__(self, *exc: object) -> None:
        import datasets

        datasets.enable_progress_bars()
