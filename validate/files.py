"""Files that are whole or not there: written aside, flushed, then renamed. And their hashes."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ASIDE = ".potstill-"  # starts the name of a folder that is being built


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_each(folder: Path) -> dict[str, str]:
    """SHA-256 of each file under a folder, by its relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def sha256_folder(folder: Path) -> str:
    """SHA-256 over the relative names and contents of all files under a folder, in hex."""
    total = hashlib.sha256()
    for name, found in sha256_each(folder).items():
        total.update(f"{name}\0{found}\n".encode())
    return total.hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value in a canonical form, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()


def seal(record: Mapping[str, Any]) -> str:
    """SHA-256 of all that a record says, but for its own `seal`."""
    return sha256_json({name: value for name, value in record.items() if name != "seal"})


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its seal, so that an edit is found."""
    plain: dict[str, Any] = json.loads(json.dumps(record))  # as it will be read
    return plain | {"seal": seal(plain)}


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A file to fill; it takes the name `target` only if the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        aside.chmod(0o644)
        aside.replace(target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the whole new one."""
    with whole_file(path) as aside, aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; it takes the name `target` only if the block ends without an error.

    An older folder of that name is replaced. The work happens beside it, so a killed process leaves
    only a folder whose name starts with `ASIDE`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{ASIDE}{target.name}."))
    aside.chmod(0o755)
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for path in aside.rglob("*"):  # some libraries write files that only their owner may read
        path.chmod(0o755 if path.is_dir() else 0o644)
    old = None
    if target.exists():
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{ASIDE}{target.name}.old."))
        target.replace(old / "folder")
    aside.replace(target)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def cache_home() -> Path:
    """Where Potstill keeps what it fetched or built, for this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "potstill")


def short_folder() -> str | None:
    """A folder for temporary ones where the usual one is too long for a socket below it, whose path has 107 letters."""
    return "/tmp" if len(tempfile.gettempdir()) > 40 and Path("/tmp").is_dir() else None


def take_space(path: Path, size: int) -> None:
    """Reserve a file's bytes, so that a full disk is an error now and no fault of a memory map later.

    Raises:
        OSError: the disk is full; the file is removed.
    """
    try:
        with path.open("ab") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(1, size))
            else:
                os.truncate(file.fileno(), max(1, size))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files under a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
