"""What a teacher says of itself, found and cut; and answers that refuse. The phrases are in `phrases.yaml`."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from potstill.compress.data_rows import words
from potstill.compress.unfinished import FENCE

TABLE = Path(__file__).parent / "phrases.yaml"
END = re.compile(r"[.!?…]+[\"'”’»)\]*_]*(?:[^\S\n]+|(?=\n|$))|[。！？]+[”』」]*|(?=\n)|(?<=\n)")  # of a sentence
QUOTES = "\"'“„«「"
LEAST_LEFT = 8  # words
OPENING = 400  # letters in which a refusal shows


@dataclass(frozen=True)
class Phrase:
    """One row of the table.

    Attributes:
        id: its name.
        pattern: what it looks like.
        means: what it says.
        source: whose words they are.
        hit: texts that it is in.
        honest: texts that it is not in.
    """

    id: str
    pattern: re.Pattern[str]
    means: str
    source: str
    hit: tuple[str, ...]
    honest: tuple[str, ...]


@cache
def table() -> Any:
    """`phrases.yaml` as it is."""
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


@cache
def identity_phrases() -> tuple[Phrase, ...]:
    """What a teacher says of itself."""
    named = table()
    lists = {
        "vendor": rf"(?:{_joined(named['vendors'])})(?![A-Za-z])",
        "kind": rf"(?<![A-Za-z]){_joined(named['kind'])}(?![A-Za-z])",
        "make": named["make"],
    }
    for which, names in named["names"].items():
        lists[which] = rf"(?:{'|'.join(one['name'] for one in names)})(?![A-Za-z0-9])"
    return tuple(_phrase(one, lists) for one in named["identity"])


@cache
def refusal_phrases() -> tuple[Phrase, ...]:
    """How an answer starts that refuses."""
    refusals = table()["refusals"]
    lists = {name: refusals[name] for name in ("cannot", "do", "do_alone")}
    return tuple(_phrase(one, lists) for one in refusals["phrases"])


def _joined(text: str) -> str:
    """A pattern that is written on several lines."""
    return text.replace("\n", "")


def _phrase(one: Mapping[str, Any], lists: Mapping[str, str]) -> Phrase:
    pattern = one["pattern"]
    if "rest" in one:
        pattern = rf"(?:{pattern})(?=[^.!?。！？\n]{{0,150}}?(?:{one['rest']}))"
    for name, value in lists.items():
        pattern = pattern.replace(f"{{{name}}}", value)
    compiled = re.compile(pattern, re.IGNORECASE)
    return Phrase(one["id"], compiled, one["means"], one["source"], tuple(one["hit"]), tuple(one["honest"]))


def _straight(text: str) -> str:
    """A text of the same length with ' for ’."""
    return text.replace("’", "'")


def refusal(text: str) -> Phrase | None:
    """The phrase by which an answer refuses at its start, if it does."""
    opening = _straight(text.lstrip()[:OPENING])
    return next((phrase for phrase in refusal_phrases() if phrase.pattern.match(opening)), None)


@dataclass(frozen=True)
class Cut:
    """A text without what a teacher says of itself.

    Attributes:
        text: what is left; None where that is nothing useful: fewer than 8 words or than half of them, or where it was
            said inside a block of code.
        phrases: what was found.
        sentences: what was cut.
    """

    text: str | None
    phrases: tuple[Phrase, ...]
    sentences: tuple[str, ...]


def cut_identity(text: str) -> Cut | None:
    """Cut each sentence in which a teacher says who it is; None where there is none."""
    straight = _straight(text)
    if not _may_hold(straight):
        return None
    found = [
        (phrase, match.span())
        for phrase in identity_phrases()
        for match in phrase.pattern.finditer(straight)
        if straight[max(0, match.start() - 1)] not in QUOTES
    ]
    if not found:
        return None
    ends = [match.span() for match in END.finditer(text)]
    fences = [match.start() for match in FENCE.finditer(text)]
    spans = sorted({_sentence(text, ends, *span) for _, span in found})
    in_code = any(bisect_left(fences, begin) % 2 for begin, _ in spans)
    kept, last = [], 0
    for begin, end in spans:
        kept.append(text[last:begin])
        last = max(last, end)
    left = "".join([*kept, text[last:]]).strip()
    count = len(words(left))
    useful = not in_code and count >= LEAST_LEFT and 2 * count >= len(words(text))
    phrases = tuple(dict.fromkeys(phrase for phrase, _ in found))
    return Cut(left if useful else None, phrases, tuple(text[slice(*span)].strip() for span in spans))


def _sentence(text: str, ends: Sequence[tuple[int, int]], begin: int, end: int) -> tuple[int, int]:
    """Where the sentence around a piece begins and ends; a line's last one with the lines' end, if it was all of it."""
    before = bisect_right(ends, begin, key=lambda one: one[1])
    after = bisect_left(ends, end, key=lambda one: one[0])
    first = ends[before - 1][1] if before else 0
    last = ends[after][1] if after < len(ends) else len(text)
    if first == 0 or text[first - 1] == "\n":
        while text[last : last + 1] == "\n":
            last += 1
    return first, last


def _may_hold(text: str) -> bool:
    """Whether a text may hold a phrase, by a look that is 10 times as quick."""
    gate, small = table()["gate"], text.lower()
    return any(piece in small for piece in gate["pieces"]) or re.search(gate["words"], small) is not None
