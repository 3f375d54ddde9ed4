"""Prompts for a teacher: JSON lines with `prompt` or `messages`, or a text file with one on each line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from potstill.compress.api_settings import ApiTeacher
from potstill.validate.errors import InputError

EXPECTED = 'expected {"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}, with "answer" if it is known'


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        given: the text, or the messages.
        answer: the right one, where it is known.
        grown: whether it was grown from others.
    """

    given: str | list[dict[str, str]]
    answer: str | None = None
    grown: bool = False

    @property
    def text(self) -> str:
        """The text, or the last message's."""
        return self.given if isinstance(self.given, str) else self.given[-1]["content"]

    @property
    def fields(self) -> dict[str, Any]:
        """It as a part of a row."""
        return {"prompt" if isinstance(self.given, str) else "messages": self.given}


class Prompts:
    """The prompts of a file, read anew each time; the second and later ones of a kind are left out.

    Raises:
        InputError: no such file, no prompt in it, or a line that is none for this teacher.

    Attributes:
        repeated: how many were left out.
    """

    def __init__(self, path: Path, teacher: ApiTeacher) -> None:
        if path.suffix not in (".jsonl", ".txt") or not path.is_file():
            reason = "is no file of prompts" if path.exists() else "is not there"
            raise InputError(f"{path} {reason}; expected .jsonl, or .txt with a prompt on each line")
        self._path, self._teacher = path, teacher
        self.repeated = 0
        self._count = sum(1 for _ in self)
        if not self._count:
            raise InputError(f"{path} has no prompt in it")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Prompt]:
        seen: set[bytes] = set()
        self.repeated = 0
        with self._path.open(encoding="utf-8-sig", errors="strict") as file:
            for number, line in enumerate(self._lines(file), 1):
                if not line.strip():
                    continue
                prompt = Prompt(line.strip()) if self._path.suffix == ".txt" else self._parse(line, number)
                digest = self._digest(prompt, number)
                if digest in seen:
                    self.repeated += 1
                    continue
                seen.add(digest)
                yield prompt

    def _lines(self, file: Any) -> Iterator[str]:
        try:
            yield from file
        except UnicodeDecodeError as error:
            raise InputError(f"{self._path} is no text in UTF-8: {error.reason}") from None

    def _digest(self, prompt: Prompt, number: int) -> bytes:
        try:
            plain = json.dumps(prompt.given, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(f"{self._path.name}, line {number}: holds half a sign (a lone surrogate)") from None
        return blake2b(plain, digest_size=16).digest()

    def _parse(self, line: str, number: int) -> Prompt:
        where = f"{self._path.name}, line {number}"
        try:
            row = json.loads(line)
        except ValueError:
            raise InputError(f"{where}: not JSON; {EXPECTED}") from None
        given = _given(row)
        if given is None:
            raise InputError(f"{where}: no prompt; {EXPECTED}")
        if self._teacher.completions and not isinstance(given, str):
            raise InputError(f"{where}: messages are for chat; completions takes a prompt")
        answer = row.get("answer")
        if answer is not None and (isinstance(answer, bool) or not isinstance(answer, str | int | float)):
            raise InputError(f"{where}: the answer is {answer!r}, expected text or a number")
        if self._teacher.check == "exact" and answer is None:
            raise InputError(f"{where}: no answer; check: exact compares with the answer of each prompt")
        return Prompt(given, None if answer is None else str(answer))


def _given(row: Any) -> str | list[dict[str, str]] | None:
    """A row's prompt or messages; None where it has not one of them, whole."""
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        return None
    given = row.get("prompt", row.get("messages"))
    if isinstance(given, str):
        return given if given.strip() and "prompt" in row else None
    if not isinstance(given, list) or not given:
        return None
    fits = all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in given
    )
    return [{"role": one["role"], "content": one["content"]} for one in given] if fits and "messages" in row else None
