"""Data to learn from, cleaned: what is in the evaluation set, what a teacher says of itself, refusals, duplicates.

The file is read twice, and what may be nearly the same once more. Memory holds a hash and a sketch of each row.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, field, replace
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any, BinaryIO

import numpy as np
from pydantic.dataclasses import dataclass

from potstill.compress.data_rows import NAMES, Row, line_at, lines, normal, parse, parse_judging
from potstill.compress.near_rows import Sketches
from potstill.compress.overlap import Overlap
from potstill.compress.phrases import Cut, cut_identity, refusal
from potstill.compress.unfinished import unfinished
from potstill.validate import near_texts
from potstill.validate.errors import InputError, did_you_mean
from potstill.validate.files import sha256_file, whole_file, write_json
from potstill.validate.progress import track

RULES = {  # in this order: a row that several would drop is dropped by the first
    "malformed": "no JSON object with a text",
    "overlap": "a piece of the evaluation set",
    "identity": "what a teacher says of itself",
    "refusals": "refuses at its start",
    "truncated": "ends before it is over",
    "exact": "the same as an earlier row",
    "near": f"nearly the same as a longer row: {near_texts.RULE}",
}
BY_WISH = ("refusals", "truncated")
SHOWN, LETTERS = 5, 120  # examples of a rule, and letters of each
SHORT_ANSWER = 100  # letters: below that an answer to a prompt is only looked for exactly
STAYS, CUT, DROPPED = range(3)


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """What is wished.

    Attributes:
        against: rows that judge, of which others must not hold a piece; those of multiple choice, too.
        ngram: words of such a piece (Brown et al. 2020, appendix C: 13).
        drop: what is dropped beyond what always is: `refusals`, `truncated`.
        columns: what the files call `text`, `prompt`, `messages`, `reasoning` and `finish_reason`, where not so.
    """

    against: Path | None = None
    ngram: int = 13
    drop: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ngram < 5:
            raise InputError(
                f"--ngram is {self.ngram}, expected 5 words or more: fewer are in every text; 13 is the usual"
            )
        for name in self.drop:
            if name not in BY_WISH:
                raise InputError(f"--drop {name} is not known{did_you_mean(name, list(BY_WISH))}")
        for name in self.columns:
            if name not in NAMES:
                raise InputError(f"--columns: {name!r} is none of a row's{did_you_mean(name, list(NAMES))}")


@dataclass
class Found:
    """What a rule found.

    Attributes:
        means: what it looks for.
        rows: in how many rows it found that; of duplicates among rows that no other rule dropped.
        dropped: how many rows it dropped.
        cut: how many rows lost a sentence and stay.
        examples: the first few: line from 1, why, and a piece of the text.
    """

    means: str
    rows: int = 0
    dropped: int = 0
    cut: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    def note(self, line: int, why: str, text: str) -> None:
        """Count a row."""
        self.rows += 1
        if len(self.examples) < SHOWN:
            self.examples.append({"line": line, "why": why, "text": _short(text)})


@dataclass(frozen=True)
class Cleaned:
    """What was done with a file.

    Attributes:
        settings: what was wished.
        input: file, SHA-256 and rows (lines that are not blank).
        against: the evaluation set: file, SHA-256, examples, `hit` (rows from 1 of which a piece was found), and how
            many n-grams were left out as a form's wording; None without one.
        rules: what each found.
        rows: how many are left.
        output: file and SHA-256; None where nothing was written.
        versions: of what made it.
    """

    settings: Cleaning
    input: dict[str, Any]
    against: dict[str, Any] | None
    rules: dict[str, Found]
    rows: int
    output: dict[str, Any] | None
    versions: dict[str, str]

    def to_json(self) -> Any:
        """Plain data."""
        plain: dict[str, Any] = asdict(self)
        plain["settings"]["against"] = self.settings.against and self.settings.against.name
        for rule in plain["rules"].values():
            rule["share"] = rule["rows"] / self.input["rows"]
        return plain


def record_of(out: Path) -> Path:
    """Where the record of a cleaned file lies."""
    return out.with_name(f"{out.name}.record.json")


def clean(source: Path, out: Path | None, wish: Cleaning) -> Cleaned:
    """Clean a file of rows (JSON lines), and write what is left and a record beside it.

    Args:
        source: rows as `data_rows` says.
        out: the file to write; None to only tell.
        wish: what is looked for and dropped.

    Raises:
        InputError: no such file, no row in it, an evaluation set that cannot be read, or an output that is an input.
    """
    if not source.is_file():
        raise InputError(f"no such file: {source}; expected JSON lines with a text each")
    if out:
        _check_output(out, [source, *([wish.against] if wish.against else [])])
    known, overlap = _judging(wish) or (None, None)
    look = _Look(wish, overlap)
    with source.open("rb") as file:
        look.read(file)
        look.compare(file)
        cleaned = Cleaned(
            settings=wish,
            input={"file": source.name, "sha256": sha256_file(source), "rows": len(look.fates)},
            against=known and known | {"hit": sorted(index + 1 for index in look.hit)},
            rules=look.found,
            rows=len(look.fates) - look.fates.count(DROPPED),
            output=None,
            versions={"python": python_version()} | {name: version(name) for name in ("potstill", "numpy")},
        )
        if out is None:
            return cleaned
        with whole_file(out) as aside, whole_file(record_of(out)) as record:
            with aside.open("wb") as written:
                look.write(file, written)
                os.fsync(written.fileno())
            cleaned = replace(cleaned, output={"file": out.name, "sha256": sha256_file(aside)})
            write_json(record, cleaned.to_json())
    return cleaned


def _check_output(out: Path, inputs: Sequence[Path]) -> None:
    if out.is_dir():
        raise InputError(f"{out} is a folder; expected the name of a file to write")
    for target in (out, record_of(out)):
        for path in inputs:
            if path.exists() and target.exists() and target.samefile(path):
                raise InputError(f"{target} would replace {path}, which is read; give --out another name")


def _judging(wish: Cleaning) -> tuple[dict[str, Any], Overlap] | None:
    """What is known of the evaluation set, and what of it is looked for; its prompts and texts are not kept."""
    if wish.against is None:
        return None
    if not wish.against.is_file():
        raise InputError(f"no such file: {wish.against}; expected JSON lines with a text each")
    with wish.against.open("rb") as file:
        overlap = Overlap(_prompts_and_texts(file, wish), wish.ngram)
    if not overlap.examples:
        raise InputError(f"{wish.against} is empty: expected JSON lines with a text each")
    known = {"file": wish.against.name, "sha256": sha256_file(wish.against), "examples": overlap.examples}
    return known | {"common_ngrams": overlap.common}, overlap


def _prompts_and_texts(file: BinaryIO, wish: Cleaning) -> Iterator[tuple[str, str]]:
    for number, _, line in lines(file):
        try:
            row = parse_judging(line, wish.columns)
        except ValueError as error:
            raise InputError(
                f"{file.name}, line {number} {error}; mend it: no evaluation example is passed over"
            ) from None
        yield row.prompt, row.written


def _short(text: str) -> str:
    plain = normal(text[: 2 * LETTERS])
    return plain if len(plain) <= LETTERS else plain[: LETTERS - 1] + "…"


def _cut(row: Row) -> tuple[Row | None, list[Cut]]:
    """A row without what a teacher says of itself, None where nothing useful is left; and what was cut."""
    found = {name: cut_identity(getattr(row, name)) for name in ("text", "reasoning")}
    cuts = {name: cut for name, cut in found.items() if cut}
    left: dict[str, Any] = {name: cut.text for name, cut in cuts.items() if cut.text is not None}
    return (replace(row, **left) if len(left) == len(cuts) else None), list(cuts.values())


class _Look:
    """What is found in a file, and what becomes of each row."""

    def __init__(self, wish: Cleaning, overlap: Overlap | None) -> None:
        self.wish, self.overlap = wish, overlap
        self.found = {rule: Found(means) for rule, means in RULES.items() if rule != "overlap" or overlap}
        self.hit: set[int] = set()
        self.fates = bytearray()  # of each row
        self._numbers, self._places = array("Q"), array("Q")  # the line of each row
        self._seen: dict[bytes, int] = {}
        self._near = {parts: (Sketches(parts), array("Q"), array("Q")) for parts in (1, 2)}  # sketch, row, length

    def read(self, file: BinaryIO) -> None:
        """Read all rows once.

        Raises:
            InputError: there is no row.
        """
        size, waiting = file.seek(0, 2), 0
        file.seek(0)
        with track("rows, kB", size // 1000) as advance:
            for number, place, line in lines(file):
                self._numbers.append(number)
                self._places.append(place)
                self.fates.append(self._row(number, line))
                if (waiting := waiting + len(line)) > 100_000:
                    advance(waiting // 1000)
                    waiting %= 1000
        if not self.fates:
            raise InputError(f"{file.name} is empty: expected JSON lines with a text each")
        if (bad := self.found["malformed"]).rows == len(self.fates):
            raise InputError(
                f"none of the {bad.rows:,} lines of {file.name} is a row: line {bad.examples[0]['line']} "
                f"{bad.examples[0]['why']}; if the text has another name, say --columns text=NAME"
            )

    def _row(self, number: int, line: bytes) -> int:
        """Apply the rules that see one row, and that of exact duplicates; what becomes of the row."""
        try:
            row = parse(line, self.wish.columns)
        except ValueError as error:
            self.found["malformed"].note(number, str(error), line[:500].decode(errors="replace"))
            self.found["malformed"].dropped += 1
            return DROPPED
        reasons = []
        if self.overlap and (hits := self.overlap.hits(row)):
            self.hit |= set(hits)
            first = min(hits)
            self.found["overlap"].note(number, f"of evaluation example {first + 1}", hits[first])
            reasons.append("overlap")
        left, cuts = _cut(row)
        if cuts:
            phrases = ", ".join(dict.fromkeys(phrase.id for cut in cuts for phrase in cut.phrases))
            self.found["identity"].note(number, phrases, cuts[0].sentences[0])
            if left is None:
                reasons.append("identity")
        if phrase := refusal(row.text):
            self.found["refusals"].note(number, phrase.id, row.text)
            reasons.append("refusals")
        if why := unfinished(row.written, row.finish_reason):
            self.found["truncated"].note(number, why, row.written[-LETTERS:])
            reasons.append("truncated")
        reasons = [reason for reason in reasons if reason not in BY_WISH or reason in self.wish.drop]
        if reasons or left is None:
            self.found[reasons[0]].dropped += 1
            return DROPPED
        if self._is_known(number, left):
            return DROPPED
        if cuts:
            self.found["identity"].cut += 1
        return CUT if cuts else STAYS

    def _is_known(self, number: int, row: Row) -> bool:
        """Whether an earlier row is the same; where not, the row is sketched."""
        prompt, written = normal(row.prompt), normal(row.written)
        key = hashlib.blake2b(
            f"{prompt}\0{written}".encode(errors="surrogatepass"), digest_size=16, usedforsecurity=False
        ).digest()
        first = self._seen.setdefault(key, number)
        if first != number:
            self.found["exact"].note(number, f"the same as line {first}", written)
            self.found["exact"].dropped += 1
            return True
        if not prompt or len(written) >= SHORT_ANSWER:
            parts = (row.prompt, row.written) if prompt else (row.written,)
            sketches, rows, lengths = self._near[len(parts)]
            sketches.add(parts)
            rows.append(len(self.fates))
            lengths.append(sum(map(len, parts)))
        return False

    def compare(self, file: BinaryIO) -> None:
        """Find near duplicates among the rows that stay."""
        self._seen = {}
        for parts, (sketches, rows, lengths) in self._near.items():

            def texts(i: int, parts: int = parts, rows: "array[int]" = rows) -> tuple[str, ...]:
                row = self._again(line_at(file, self._places[rows[i]]))
                return (row.prompt, row.written)[-parts:]

            partner = sketches.search(np.array(lengths, np.int64), texts)
            for i in np.flatnonzero(partner >= 0).tolist():
                other = self._numbers[rows[int(partner[i])]]
                shown = texts(i)[-1] if self.found["near"].rows < SHOWN else ""
                self.found["near"].note(self._numbers[rows[i]], f"nearly line {other}", shown)
                self.found["near"].dropped += 1
                self.found["identity"].cut -= self.fates[rows[i]] == CUT
                self.fates[rows[i]] = DROPPED

    def _again(self, line: bytes) -> Row:
        """A row that stays, as it stays."""
        row, _ = _cut(parse(line, self.wish.columns))
        assert row is not None
        return row

    def write(self, file: BinaryIO, written: BinaryIO) -> None:
        """Write the rows that stay: as they were to the byte, but for those that lost a sentence."""
        file.seek(0)
        for fate, (_, _, line) in zip(self.fates, lines(file), strict=False):
            if fate == STAYS:
                written.write(line.rstrip(b"\r\n") + b"\n")
            elif fate == CUT:
                row = self._again(line)
                names = {name: self.wish.columns.get(name, name) for name in ("text", "reasoning")}
                changed = {column: getattr(row, name) for name, column in names.items() if column in row.value}
                text = json.dumps(row.value | changed, ensure_ascii=False)
                written.write(text.encode(errors="backslashreplace") + b"\n")
        written.flush()
