"""Every request to a service and what came of it, one line each, appended as it happens.

    {"asked": KEY, "by": "teacher", "time": …, "bound": [tokens in, tokens out], "request": {…}}
    {"answered": KEY, "by": "teacher", "time": …, "tokens": [in, out] or null, "body": {…}}
    {"failed": KEY, "by": "teacher", "time": …, "why": "429 …", "may_cost": false, "refused": false}

A line is handed to the system before the next request is sent, so that a killed process loses none. In memory are the
keys and where their answers lie, not the answers.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from potstill.validate.errors import InputError

BY = ("teacher", "judge")


class Journal:
    """An open journal; `open_journal` gives one.

    Attributes:
        torn: bytes of a last line without an end, which the next one replaces.
        spent: tokens in and out of the answers, by who was asked.
        possible: tokens in and out, at most, of tries that may have cost and told no usage.
        failures: how often each failure came, over all runs.
        models: that were asked, as they were named.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.torn = 0
        self.spent = {by: [0, 0] for by in BY}
        self.possible = {by: [0, 0] for by in BY}
        self.failures: Counter[str] = Counter()
        self.models: dict[str, set[str]] = {by: set() for by in BY}
        self._file, self._path = file, path
        self._answers: dict[str, int] = {}
        self._refused: set[str] = set()
        self._end = 0
        self._read()

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def answer(self, key: str) -> Any:
        """The body that answered a request; None where none did."""
        place = self._answers.get(key)
        if place is None:
            return None
        self._file.seek(place)
        return json.loads(self._file.readline())["body"]

    def asked(self, key: str, by: str, bound: tuple[int, int], request: Any) -> None:
        """A request is about to be sent; it takes at most so many tokens in and out."""
        self._append({"asked": key, "by": by, "bound": bound, "request": request})

    def answered(self, key: str, by: str, tokens: tuple[int, int] | None, body: Any) -> None:
        """It was answered."""
        self._answers[key] = self._append({"answered": key, "by": by, "tokens": tokens, "body": body})

    def failed(self, key: str, by: str, why: str, may_cost: bool, refused: bool) -> None:
        """It was not answered; `refused`: and never will be."""
        line = {"failed": key, "by": by, "why": why, "may_cost": may_cost, "refused": refused}
        self._append(line)
        self._note_failure(line)

    def is_refused(self, key: str) -> bool:
        """Whether the service refused this very request before."""
        return key in self._refused

    def _note_failure(self, line: dict[str, Any]) -> None:
        self.failures[line["why"].partition(":")[0]] += 1
        if line["refused"]:
            self._refused.add(line["failed"])

    def _append(self, line: dict[str, Any]) -> int:
        """Write a line; gives where it begins."""
        place = self._file.seek(self._end)
        self._file.truncate()  # a torn line goes
        line["time"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        text = json.dumps(line, ensure_ascii=False)
        self._end += self._file.write(text.encode(errors="backslashreplace") + b"\n")
        self._file.flush()
        return place

    def _read(self) -> None:
        """Read what is there, but for a last line that a killed process left torn."""
        bounds: dict[str, tuple[str, list[int]]] = {}  # of tries without an outcome
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                self.torn = len(line)
                break
            self._take(number, self._end, line, bounds)
            self._end += len(line)
        for by, bound in bounds.values():
            _add(self.possible[by], bound)

    def _take(self, number: int, place: int, line: bytes, bounds: dict[str, tuple[str, list[int]]]) -> None:
        try:
            entry = json.loads(line)
            event = next(word for word in ("asked", "answered", "failed") if word in entry)
            key, by = entry[event], entry["by"]
            if event == "asked":
                if key in bounds:  # a try before this one, killed or of another process
                    _add(self.possible[by], bounds[key][1])
                bounds[key] = (by, entry["bound"])
                self.models[by].add(entry["request"]["model"])
                return
            _, bound = bounds.pop(key)
            if event == "answered":
                self._answers[key] = place
                _add((self.spent if entry["tokens"] else self.possible)[by], entry["tokens"] or bound)
                return
            self._note_failure(entry)
            if entry["may_cost"]:
                _add(self.possible[by], bound)
        except (ValueError, LookupError, TypeError, StopIteration):
            raise InputError(
                f"{self._path}: line {number} is no line of such a journal; move the file away, or give another --out"
            ) from None


def _add(total: list[int], tokens: list[int]) -> None:
    total[0] += tokens[0]
    total[1] += tokens[1]


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """The journal at a path, made where there is none; held by one process.

    Raises:
        InputError: another process holds it, or a line in it is none of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f"{path.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"{path} is being written by another process; wait for it, or give another --out") from None
    try:
        path.touch()
        with path.open("r+b") as file:
            yield Journal(file, path)
            file.flush()
            os.fsync(file.fileno())
    finally:
        lock.release()
