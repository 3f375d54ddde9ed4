"""Work that is done is not done again: each step's folder is named by a hash of all that it depends on."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from potstill.pipeline.lineage.record import versions
from potstill.validate.errors import InputError
from potstill.validate.files import ASIDE, read_json, sha256_json, whole_folder, write_json

MARKER = "potstill-run.json"
WORK = ".work-"  # starts the name of a folder with checkpoints of a training that is not done


def run_of(package: Path) -> Path | None:
    """The folder of the run that a package lies in."""
    out = package.resolve().parent.parent
    return out if (out / MARKER).is_file() and (out / "recipe.yaml").is_file() else None


@contextmanager
def run_folder(out: Path) -> Iterator[Path]:
    """The folder of a run, made where it is not there, and held by this process alone.

    Raises:
        InputError: it holds something else, it is a file, or another run works in it.
    """
    if out.is_file():
        raise InputError(f"{out} is a file; give a folder for --out")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise InputError(
            f"{out} holds something else; give a new or an empty folder, or one that a run of potstill made"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / MARKER, {"format": "potstill-run/1", "potstill": versions()["potstill"]})
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise InputError(f"cannot write in {out}: {error.strerror}; give another --out") from error
    try:
        with FileLock(out / ".lock", timeout=0):
            _sweep(out)
            yield out
    except Timeout as error:
        raise InputError(f"another run of potstill works in {out}; wait for it, or give another --out") from error


def _sweep(out: Path) -> None:
    """Remove what a killed run was building beside its place; checkpoints to go on from (`.work-…`) stay."""
    for folder in (out, out / "stages", out / "packages"):
        for path in folder.glob(f"{ASIDE}*"):
            shutil.rmtree(path)


class Cache:
    """The steps of a run under one folder.

    A step's folder appears under its name only when it is whole, so that being there means being done.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._versions = versions()

    def key(self, name: str, **depends: Any) -> str:
        """A hash of a step's settings and inputs, and of the versions that matter."""
        return sha256_json({"step": name, "versions": self._versions, **depends})

    def place(self, name: str, key: str) -> Path:
        """Where a step's results are, or will be."""
        return self.folder / f"{name}-{key[:10]}"

    def done(self, name: str, key: str) -> bool:
        """Whether a step's whole folder is there."""
        record = self.place(name, key) / "record.json"
        return record.is_file() and read_json(record).get("key") == key

    @contextmanager
    def making(self, name: str, key: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """A folder to fill and a record to complete; both take their place when the block ends without an error."""
        record: dict[str, Any] = {"key": key}
        with whole_folder(self.place(name, key)) as aside:
            yield aside, record
            write_json(aside / "record.json", record)


@dataclass(frozen=True)
class Planned:
    """A step before its turn: its folder's name, the hash of all that it depends on, and what of it is done."""

    step: str
    key: str
    made: bool
    judged: bool = True

    @property
    def done(self) -> bool:
        """Whether nothing is left of it."""
        return self.made and self.judged
