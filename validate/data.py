"""Examples from files or the hub, with the columns a task asks for."""

import csv
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from potstill.validate.errors import InputError, Unreachable, did_you_mean
from potstill.validate.examples import (
    IGNORED,
    Arrays,
    Examples,
    Pairs,
    Rows,
    Table,
    check_evaluation_set,
    check_not_empty,
    few,
    join,
)
from potstill.validate.files import sha256_file, sha256_folder, sha256_json

__all__ = [
    "IGNORED", "READERS", "Arrays", "Examples", "Pairs", "Rows", "Table", "check_evaluation_set", "check_not_empty",
    "join", "load_columns", "load_examples", "split_key",
]  # fmt: skip
TEXT_TYPES = ("string", "large_string")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".aiff")
READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_examples(
    source: str,
    features: Sequence[str],
    columns: Mapping[str, str],
    label: str | None = "label",
    labelled: bool = True,
    optional: Sequence[str] = (),
) -> Examples:
    """Read examples and give their columns the task's names.

    Args:
        source: CSV, TSV (never quoted), JSON lines or Parquet file; `.npz` with `x` and `y`, where `FILE:train`
            picks `train_x` and `train_y`, or `x_train` and `y_train`; a folder of class folders of images or
            sounds; a hub dataset `name` or `name:split`.
        features: the task's feature columns, e.g. `("text",)`.
        columns: from the task's name to the source's, e.g. `{"text": "sentence"}`.
        label: the task's name for the column of labels; a column of lists gives several labels an example. None
            where examples have no labels: all are `IGNORED` then.
        labelled: whether the column of labels must be there; where it need not and is not, all are `IGNORED`.
        optional: feature columns that are read where they are there.

    Raises:
        InputError: the source is not there, cannot be read, or lacks a column.
        Unreachable: a hub name that the hub did not give.
    """
    stem, key = split_key(source)
    path = Path(stem).expanduser()
    want = _Wanted(tuple(features), columns, label, labelled, tuple(optional))
    if path.suffix == ".npz":
        return _from_npz(path, key, want)
    return _from_table(*_table(source, "audio" in features, labelled), want)


def load_columns(source: str, names: Sequence[str], of_sounds: bool = False) -> dict[str, list[Any]]:
    """Columns beside those of a task, one value for each example; a class as its name, None for a missing value.

    Args:
        source: as in `load_examples`, which must have read it before.
        names: of the columns.
        of_sounds: whether a folder is one of sounds.

    Raises:
        InputError: the source lacks a column, or it has more than one value for an example.
    """
    if not names:
        return {}
    import datasets

    stem, key = split_key(source)
    if stem.endswith(".npz"):
        with np.load(Path(stem).expanduser(), allow_pickle=False) as archive:
            held = {_without_key(name, key): name for name in archive.files if _without_key(name, key)}
            _check_columns(source, names, list(held))
            arrays = {name: archive[held[name]] for name in names}
        many = [name for name, array in arrays.items() if array.ndim != 1]
        if many:
            raise InputError(f"data.slices: {many[0]!r} has the shape {arrays[many[0]].shape}, expected (examples,)")
        return {name: array.tolist() for name, array in arrays.items()}
    _, table, _ = _table(source, of_sounds, labelled=False)
    _check_columns(source, names, table.column_names)
    found = {}
    for name in names:
        kind, values = table.features[name], table.data.column(name).to_pylist()
        if not isinstance(kind, datasets.Value | datasets.ClassLabel):
            raise InputError(f"data.slices: column {name!r} holds {kind}, expected one word or number for each example")
        named = isinstance(kind, datasets.ClassLabel)
        found[name] = [kind.names[i] if i is not None and i >= 0 else None for i in values] if named else values
    return found


def _check_columns(source: str, names: Sequence[str], known: list[str]) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"data.slices: {Path(source).name} has no column {name!r}{did_you_mean(name, known)}")


def _table(source: str, of_sounds: bool, labelled: bool) -> tuple[str, Any, str]:
    """A source that is no .npz: its name, a table of `datasets`, and the SHA-256 of its content."""
    stem, key = split_key(source)
    path = Path(stem).expanduser()
    if path.is_dir():
        return path.name, _class_folders(path, of_sounds, labelled), sha256_folder(path)
    if path.suffix in READERS:
        return path.name, _file(path), sha256_file(path)
    if source.startswith((".", "/", "~")) or path.suffix:
        raise InputError(
            f"no such data: {source}; expected one of {', '.join([*READERS, '.npz'])}, "
            "a folder of class folders of images or sounds, or a hub dataset name"
        )
    table, split = _hub(stem, key or "train"), key or "train"
    return f"{stem}:{split}", table, f"hub:{stem}:{split}:{table._fingerprint}"


@dataclass(frozen=True)
class _Wanted:
    """What is asked of a source; see `load_examples`."""

    features: tuple[str, ...]
    columns: Mapping[str, str]
    label: str | None
    labelled: bool
    optional: tuple[str, ...] = ()

    def __call__(self, name: str, present: Sequence[str], usual: str | None = None) -> dict[str, str]:
        """From the task's names to those of a source that has the columns `present`.

        `usual`: what such a source calls its labels.
        """
        named = {feature: self.columns.get(feature, feature) for feature in (*self.features, *self.optional)}
        named = {name: column for name, column in named.items() if name not in self.optional or column in present}
        if self.label:
            column = self.columns.get(self.label, usual or self.label)
            if self.labelled or column in present:
                named[self.label] = column
        for column in named.values():
            if column not in present:
                raise InputError(
                    f"{name} has no column {column!r}{did_you_mean(column, list(present))}; "
                    "say which columns to use, e.g. --columns text=sentence,label=label"
                )
        return named


def split_key(source: str) -> tuple[str, str | None]:
    """`FILE:key` into file and key; a plain path has no key."""
    stem, colon, key = source.rpartition(":")
    return (stem, key) if colon and stem and "/" not in key and "\\" not in key else (source, None)


def _from_npz(path: Path, key: str | None, want: _Wanted) -> Examples:
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            held = archive.files
            names = {_without_key(name, key): name for name in archive.files if _without_key(name, key)}
            arrays = {short: _on_disk(archive, name) for short, name in names.items()}
    except (OSError, ValueError, TypeError, EOFError, KeyError, BadZipFile) as error:
        raise InputError(f"cannot read {path}: {error}; expected an .npz of plain arrays") from error
    if not arrays:
        raise InputError(f"{path} has no arrays {key}_x and {key}_y; it holds {few(held)}")
    name = f"{path.name}:{key}" if key else path.name
    wanted = want(name, list(arrays), usual="y")
    table = {feature: arrays[wanted[feature]] for feature in want.features}
    count = len(next(iter(table.values())))
    labels = np.array(arrays[wanted[want.label]]) if want.label in wanted else np.full(count, IGNORED)
    for feature, array in table.items():
        if len(array) != len(labels):
            raise InputError(f"{name}: {wanted[feature]} has {len(array)} rows and {wanted['label']} {len(labels)}")
        if array.dtype.kind == "f" and not all(np.isfinite(part).all() for part in _in_parts(array)):
            raise InputError(f"{name}: {wanted[feature]} holds values that are not finite")
    return Examples(name, Arrays(table), labels, None, sha256_json([sha256_file(path), key, wanted]))


def _on_disk(archive: Any, name: str) -> NDArray[Any]:
    """An array of an .npz as a memory map of a temporary file, so that memory does not grow with its length."""
    with archive.zip.open(f"{name}.npy") as member, tempfile.TemporaryFile() as file:
        shutil.copyfileobj(member, file)
        size = file.tell()
        file.seek(0)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        start = file.tell()
        if dtype.hasobject:
            raise ValueError(f"{name} holds objects")
        if size == start:  # nothing to map
            return np.empty(shape, dtype)
        return np.memmap(file, dtype, "r", start, shape, order="F" if fortran else "C")


def _in_parts(array: NDArray[Any], rows: int = 10_000) -> Iterator[NDArray[Any]]:
    """Some rows after the others."""
    return (array[start : start + rows] for start in range(0, len(array), rows))


def _without_key(name: str, key: str | None) -> str:
    """`x` for the array `train_x` or `x_train` under the key `train`; empty for an array of another key."""
    if key is None:
        return name
    if name.startswith(f"{key}_"):
        return name.removeprefix(f"{key}_")
    return name.removesuffix(f"_{key}") if name.endswith(f"_{key}") else ""


def _file(path: Path) -> Any:
    import datasets

    if not path.is_file():
        raise InputError(f"no such file: {path}")
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    if READERS[path.suffix] == "csv":
        options["keep_default_na"] = False  # the word "null" is a word
    with _quiet_datasets():
        try:
            return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train", **options)
        except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
            if path.stat().st_size == 0 or "corresponds to no data" in str(error):
                raise InputError(f"{path} is empty: expected a row of column names, and rows") from error
            raise InputError(f"cannot read {path}: {error.__cause__ or error}") from error


def _class_folders(path: Path, of_sounds: bool, labelled: bool) -> Any:
    import datasets

    if of_sounds:
        return _sounds(path, labelled)
    with _quiet_datasets():
        try:
            return datasets.load_dataset("imagefolder", data_dir=str(path.resolve()), split="train")
        except (datasets.exceptions.DatasetGenerationError, ValueError, FileNotFoundError) as error:
            raise InputError(
                f"cannot read images from {path}: {error.__cause__ or error}; "
                "expected one folder for each class with image files in it"
            ) from error


def _sounds(path: Path, labelled: bool) -> Any:
    """A table of the sound files in class folders, or in one folder where no labels are needed.

    Not by `datasets`, which wants a decoder of its own for that.
    """
    import datasets

    files = sorted(file for file in path.glob("*/*") if file.suffix.lower() in SOUNDS)
    if not files and not labelled:
        files = sorted(file for file in path.glob("*") if file.suffix.lower() in SOUNDS)
    if not files:
        raise InputError(
            f"cannot read sounds from {path}: expected one folder for each class with {', '.join(SOUNDS)} files in it"
        )
    names = sorted({file.parent.name for file in files})
    file = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    kinds = datasets.Features({"audio": file, "label": datasets.ClassLabel(names=names)})
    sounds = [{"bytes": None, "path": str(file.resolve())} for file in files]
    return datasets.Dataset.from_dict({"audio": sounds, "label": [file.parent.name for file in files]}, features=kinds)


def _hub(name: str, split: str) -> Any:
    import datasets

    with _quiet_datasets():
        try:
            return datasets.load_dataset(name, split=split)
        except ValueError as error:
            raise InputError(f"the hub dataset {name!r} cannot be read: {error}") from error
        except (OSError, ConnectionError, RuntimeError) as error:
            raise Unreachable(f"{name!r} is no file here, and the hub did not give it: {error}") from error


def _from_table(name: str, table: Any, digest: str, want: _Wanted) -> Examples:
    """Rename a `datasets` table's columns, take the labels out, and refuse missing values."""
    import datasets

    wanted = want(name, table.column_names)
    for column in wanted.values():
        nulls = table.data.column(column).null_count
        if nulls:
            raise InputError(f"{name}: column {column!r} has {nulls} missing values of {len(table)}")
    features = [name for name in wanted if name != want.label]
    for feature in features:
        kind = table.features[wanted[feature]]
        if not _holds(kind, feature):
            raise InputError(
                f"{name}: column {wanted[feature]!r} holds {kind}, expected {feature}; say another --columns"
            )
    labels, names, offsets = np.full(len(table), IGNORED), None, None
    if want.label in wanted:
        labels, names, offsets = _labels(name, table, wanted[want.label])
    table = table.select_columns([wanted[feature] for feature in features])
    table = table.rename_columns({wanted[f]: f for f in features if wanted[f] != f})
    if isinstance(table.features.get("audio"), datasets.Audio):  # it is decoded when it is encoded
        table = table.cast_column("audio", datasets.Audio(decode=False))
    return Examples(name, table, labels, names, sha256_json([digest, wanted]), offsets)


def _holds(kind: Any, feature: str) -> bool:
    """Whether a column of this type of `datasets` holds what the feature asks for."""
    import datasets

    if feature == "image":
        return isinstance(kind, datasets.Image)
    if feature == "audio":
        return isinstance(kind, datasets.Audio) or (isinstance(kind, dict) and {"bytes", "path"} <= set(kind))
    if feature in ("tokens", "choices"):
        return isinstance(kind, datasets.List) and getattr(kind.feature, "dtype", "") in TEXT_TYPES
    if feature == "answers":
        return isinstance(kind, dict) and {"text", "answer_start"} <= set(kind)
    if feature == "answer":
        return getattr(kind, "dtype", "").startswith(("int", "uint"))
    return getattr(kind, "dtype", "") in TEXT_TYPES


def _labels(
    name: str, table: Any, column: str
) -> tuple[NDArray[Any], tuple[str, ...] | None, NDArray[np.int64] | None]:
    """A column of labels: the labels, the classes it names, and where each example's begin if it has several.

    Raises:
        InputError: a label within a list is missing.
    """
    import datasets
    import pyarrow.compute as pc

    kind = table.features[column]
    if not isinstance(kind, datasets.List):
        names = tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else None
        return np.asarray(table.with_format("numpy")[column][:]), names, None
    lists = table.data.column(column)
    flat = pc.list_flatten(lists)
    if flat.null_count:
        raise InputError(f"{name}: column {column!r} has {flat.null_count} missing values within its lists")
    counts = pc.list_value_length(lists).to_numpy()
    labels = np.array(flat.to_pylist()) if len(flat) else np.zeros(0, dtype=np.int64)
    names = tuple(kind.feature.names) if isinstance(kind.feature, datasets.ClassLabel) else None
    return labels, names, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


class _quiet_datasets:  # noqa: N801 - reads as a statement
    """No progress bars of the reader inside."""

    def __enter__(self) -> None:
        import datasets

        datasets.disable_progress_bars()

    def __exit__(self, *exc: object) -> None:
        import datasets

        datasets.enable_progress_bars()
