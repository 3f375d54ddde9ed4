"""Rows of text to learn from: JSON lines, read one at a time.

A row has `text`, what is learned. Beside it may be what it answers (`prompt`, or `messages` as chat APIs take them),
`reasoning`, the thoughts before the answer, and `finish_reason`, why its writer stopped.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, BinaryIO

NAMES = ("text", "prompt", "messages", "reasoning", "finish_reason")
WITHOUT_SPACES = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Thai, Lao, kana, Han
WORD = re.compile(rf"[{WITHOUT_SPACES}]|(?:(?![{WITHOUT_SPACES}])\w)+")


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        text: what is learned.
        reasoning: the thoughts before it; empty for none.
        prompt: what it answers: the turns of a conversation that are not the system's; empty for none.
        finish_reason: why its writer stopped, as it said; None where it did not.
        value: all of the row, as it was read.
    """

    text: str
    reasoning: str
    prompt: str
    finish_reason: str | None
    value: dict[str, Any]

    @property
    def written(self) -> str:
        """All that is learned: reasoning and text."""
        return f"{self.reasoning}\n{self.text}" if self.reasoning else self.text


def lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """The lines of a file that are not blank: number from 1, place in bytes, content."""
    place = 0
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, place, line
        place += len(line)


def line_at(file: BinaryIO, place: int) -> bytes:
    """The line that starts at a place in bytes."""
    file.seek(place)
    return file.readline()


def parse(line: bytes, columns: Mapping[str, str] = MappingProxyType({})) -> Row:
    """A row from its line.

    Args:
        line: one JSON object.
        columns: what the object calls what `NAMES` says, where not so.

    Raises:
        ValueError: it is no row; says why.
    """
    return _row(_object(line), columns)


def parse_judging(line: bytes, columns: Mapping[str, str] = MappingProxyType({})) -> Row:
    """A row of an evaluation set: as `parse`, or with `choices`, of which the one numbered `answer` is the text.

    Raises:
        ValueError: as `parse`, or `answer` numbers no choice.
    """
    value = _object(line)
    if "choices" not in value:
        return _row(value, columns)
    choices, answer = value["choices"], value.get("answer")
    if not isinstance(choices, list) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError("has 'choices' without the number of one of them, from 0, as 'answer'")
    return _row(value | {columns.get("text", "text"): choices[answer]}, columns)


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.strip())
    except ValueError as error:
        raise ValueError(f"is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"is {_kind(value)}, expected an object")
    return value


def _row(value: dict[str, Any], columns: Mapping[str, str]) -> Row:
    named = {name: columns.get(name, name) for name in NAMES}
    if named["text"] not in value:
        raise ValueError(f"has no {named['text']!r}")
    text = _text(value, named["text"])
    if not text.strip():
        raise ValueError(f"has an empty {named['text']!r}")
    return Row(
        text=text,
        reasoning=_text(value, named["reasoning"]),
        prompt=_text(value, named["prompt"]) or _turns(value.get(named["messages"])),
        finish_reason=_text(value, named["finish_reason"]) or None,
        value=value,
    )


def _text(value: dict[str, Any], name: str) -> str:
    found = value.get(name)
    if not isinstance(found, str | None):
        raise ValueError(f"has {name!r} as {_kind(found)}, expected a text")
    return found or ""


def _turns(messages: Any) -> str:
    """The content of messages, but for the system's: texts, or lists of parts of which the texts count."""
    if messages is None:
        return ""
    turns = []
    try:
        for message in messages:
            if message["role"] not in ("system", "developer"):
                content = message["content"]
                turns.append(content if isinstance(content, str) else "\n".join(p.get("text", "") for p in content))
    except (TypeError, KeyError, AttributeError):
        raise ValueError("has 'messages' that are no list of objects with 'role' and 'content'") from None
    return "\n".join(turns)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def normal(text: str) -> str:
    """A text with its letters composed (Unicode's NFC) and each run of spaces and line ends as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def words(text: str) -> list[str]:
    """Words in one case, without punctuation; of scripts that are written without spaces each letter is a word."""
    return WORD.findall(unicodedata.normalize("NFC", text).casefold())
