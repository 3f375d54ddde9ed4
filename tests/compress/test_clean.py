"""A file of rows cleaned: what is dropped, cut, counted, written and told."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from potstill.compress.clean import Cleaning, clean, record_of
from potstill.validate.errors import InputError

SEA = "The sea was calm that day, and the old man rowed far out to look for the fish he had dreamt of all week."
HILL = "On the hill stands a mill whose sails have not turned since the miller moved to the town beyond the river."
AI = "As an AI language model developed by OpenAI, I have never seen it."
ROWS: list[tuple[dict[str, Any] | str, str]] = [  # and what becomes of each
    ({"text": SEA, "id": 7}, "stays"),
    ({"text": SEA.replace(" ", "\n")}, "exact"),
    ('{"text": "broken', "malformed"),
    ({"text": f"{HILL} {AI}", "note": "é"}, "cut"),
    ({"text": "I am ChatGPT."}, "identity"),
    ({"text": "I'm sorry, but I can't assist with that request.", "prompt": "Help me."}, "refusals"),
    ({"text": f"{SEA[:-1]}, and a day."}, "stays"),
    ({"text": "A man who is tall went to a town. There he met", "finish_reason": None}, "truncated"),
    ({"text": "It ends.", "prompt": "Tell me", "finish_reason": "length"}, "truncated"),
    ({"text": "They say: eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn."}, "overlap"),
    ({"text": "4", "prompt": "What is two and two?"}, "stays"),
    ({"text": "4", "prompt": "What is two  and two?"}, "exact"),
    ({"text": "4", "prompt": "What's two and two?"}, "stays"),
    ({"text": "4", "prompt": "What is two and two?", "reasoning": "Two and two are four."}, "stays"),
]
JUDGING = [{"text": "Eins, zwei, drei, vier, fünf, sechs, sieben, acht, neun, zehn, elf, zwölf, dreizehn, vierzehn!"}]


def write(path: Path, rows: list[dict[str, Any] | str]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data.jsonl", [row for row, _ in ROWS])


@pytest.fixture
def judging(tmp_path: Path) -> Path:
    return write(tmp_path / "judging.jsonl", [{"text": "The first one is of no use to anybody at all here."}, *JUDGING])


def test_each_row_has_its_fate(data: Path, judging: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "clean.jsonl"
    before = data.read_bytes()
    cleaned = clean(data, out, Cleaning(against=judging, drop=("refusals", "truncated")))
    assert data.read_bytes() == before
    stay = [line for line, (_, fate) in zip(before.splitlines(), ROWS, strict=True) if fate in ("stays", "cut")]
    near = stay.pop(0)  # the row that a longer one nearly is
    assert near == before.splitlines()[0]
    cut = stay.index(before.splitlines()[3])
    written = out.read_bytes().splitlines()
    assert json.loads(written[cut]) == {"text": HILL, "note": "é"}
    assert [line for line in written if line != written[cut]] == [line for line in stay if line != stay[cut]]
    dropped = {name: found.dropped for name, found in cleaned.rules.items()}
    assert dropped == {
        "malformed": 1,
        "overlap": 1,
        "identity": 1,
        "refusals": 1,
        "truncated": 2,
        "exact": 2,
        "near": 1,
    }
    assert (cleaned.rows, cleaned.rules["identity"].cut) == (len(written), 1) == (len(ROWS) - sum(dropped.values()), 1)


def test_the_record_says_what_was_found(data: Path, judging: Path, tmp_path: Path) -> None:
    out = tmp_path / "clean.jsonl"
    cleaned = clean(data, out, Cleaning(against=judging))
    record = json.loads(record_of(out).read_text())
    assert record == json.loads(json.dumps(cleaned.to_json()))
    digest = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (data, judging, out)}
    assert record["input"] == {"file": "data.jsonl", "sha256": digest[data], "rows": len(ROWS)}
    assert record["output"] == {"file": "clean.jsonl", "sha256": digest[out]}
    assert record["against"] | {"sha256": digest[judging], "examples": 2, "hit": [2]} == record["against"]
    rules = record["rules"]
    assert [one["line"] for one in rules["malformed"]["examples"]] == [3]
    assert rules["truncated"] | {"rows": 2, "dropped": 0, "share": 2 / len(ROWS)} == rules["truncated"]
    assert rules["overlap"]["examples"][0]["text"].startswith("eins zwei drei")
    assert rules["overlap"]["examples"][0]["text"].endswith("dreizehn")
    assert rules["exact"]["examples"][0]["why"] == "the same as line 1"
    assert rules["near"]["examples"][0] | {"line": 1, "why": "nearly line 7"} == rules["near"]["examples"][0]
    assert record["settings"] == {"against": "judging.jsonl", "ngram": 13, "drop": [], "columns": {}}
    assert set(record["versions"]) == {"python", "potstill", "numpy"}


def test_only_some_examples_are_kept_and_shortened(tmp_path: Path) -> None:
    rows: list[dict[str, Any] | str] = [{"text": f"{i} {SEA} " * 3} for i in range(9)]
    cleaned = clean(write(tmp_path / "d.jsonl", [row for row in rows for _ in range(2)]), None, Cleaning())
    exact = cleaned.rules["exact"]
    assert (exact.rows, len(exact.examples)) == (9, 5)
    assert {len(one["text"]) for one in exact.examples} == {120}


def test_rows_that_leave_for_another_reason_hold_no_place(tmp_path: Path) -> None:
    cut_short: dict[str, Any] = {"text": SEA, "finish_reason": "length"}
    data = write(tmp_path / "d.jsonl", [cut_short, {"text": SEA, "finish_reason": "stop"}])
    assert clean(data, None, Cleaning()).rules["exact"].dropped == 1
    cleaned = clean(data, tmp_path / "c.jsonl", Cleaning(drop=("truncated",)))
    assert cleaned.rules["exact"].dropped == 0
    assert json.loads((tmp_path / "c.jsonl").read_text())["finish_reason"] == "stop"


def test_answers_are_near_where_their_prompts_are(tmp_path: Path) -> None:
    asked, other = "Please tell me about the sea, the old man and his boat.", "What did the old man dream of that week?"
    system = {"role": "system", "content": "Be brief."}
    rows: list[dict[str, Any] | str] = [
        {"prompt": asked, "text": SEA},
        {"prompt": other, "text": SEA},
        {"prompt": asked, "text": HILL},
        {"messages": [system, {"role": "user", "content": f"{asked}!"}], "text": f"{SEA} So."},
    ]
    cleaned = clean(write(tmp_path / "d.jsonl", rows), tmp_path / "c.jsonl", Cleaning())
    assert cleaned.rules["near"].examples[0] == {"line": 1, "why": "nearly line 4", "text": SEA}
    assert [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()] == rows[1:]


def test_thoughts_are_cleaned_too_and_odd_letters_survive(tmp_path: Path) -> None:
    rows: list[dict[str, Any] | str] = [
        {"text": f"{HILL} \ud800", "reasoning": f"{SEA} {AI}", "teacher": "x"},
        {"text": SEA, "reasoning": "I am ChatGPT."},
    ]
    cleaned = clean(write(tmp_path / "d.jsonl", rows), tmp_path / "c.jsonl", Cleaning())
    assert (cleaned.rules["identity"].cut, cleaned.rules["identity"].dropped) == (1, 1)
    assert json.loads((tmp_path / "c.jsonl").read_text()) == {
        "text": f"{HILL} \ud800", "reasoning": SEA, "teacher": "x"
    }  # fmt: skip


def test_other_columns_are_read_and_kept(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [{"answer": f"{HILL} {AI}", "question": "Where?"}])
    clean(data, tmp_path / "c.jsonl", Cleaning(columns={"text": "answer", "prompt": "question"}))
    assert json.loads((tmp_path / "c.jsonl").read_text()) == {"answer": HILL, "question": "Where?"}


def test_what_is_cleaned_stays_as_it_is(data: Path, judging: Path, tmp_path: Path) -> None:
    wish = Cleaning(against=judging, drop=("refusals", "truncated"))
    clean(data, tmp_path / "one.jsonl", wish)
    again = clean(tmp_path / "one.jsonl", tmp_path / "two.jsonl", wish)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert not any(found.rows for found in again.rules.values())


def test_inputs_are_never_replaced(data: Path, judging: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.jsonl"
    link.symlink_to(data)
    for out in (data, link, judging):
        with pytest.raises(InputError, match=f"{out.name} would replace .*, which is read; give --out another name"):
            clean(data, out, Cleaning(against=judging))
    record_of(tmp_path / "x").symlink_to(data)
    with pytest.raises(InputError, match=r"x\.record\.json would replace .*data\.jsonl"):
        clean(data, tmp_path / "x", Cleaning())
    with pytest.raises(InputError, match="is a folder; expected the name of a file to write"):
        clean(data, tmp_path, Cleaning())


def test_a_failure_leaves_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("potstill.compress.clean.write_json", fail)
    with pytest.raises(OSError, match="No space"):
        clean(data, tmp_path / "new" / "c.jsonl", Cleaning())
    assert not list((tmp_path / "new").iterdir())


def test_bad_input_says_what_to_do(data: Path, tmp_path: Path) -> None:
    def said(source: Path, **wish: Any) -> str:
        with pytest.raises(InputError) as caught:
            clean(source, None, Cleaning(**wish))
        return str(caught.value)

    missing, empty = tmp_path / "no.jsonl", write(tmp_path / "empty.jsonl", ["", " "])
    assert said(missing) == f"no such file: {missing}; expected JSON lines with a text each"
    assert said(data, against=missing) == f"no such file: {missing}; expected JSON lines with a text each"
    assert said(empty) == f"{empty} is empty: expected JSON lines with a text each"
    assert said(data, against=empty) == f"{empty} is empty: expected JSON lines with a text each"
    assert said(write(tmp_path / "b.jsonl", ["", '{"txt": "a"}', "[]"])).endswith(
        "b.jsonl is a row: line 2 has no 'text'; if the text has another name, say --columns text=NAME"
    )
    assert said(data, against=data) == (
        f"{data}, line 3 is no JSON (Unterminated string starting at: line 1 column 10 (char 9)); mend it: no "
        "evaluation example is passed over"
    )
    assert said(data, ngram=4).startswith("--ngram is 4, expected 5 words or more")
    assert said(data, drop=("refusal",)) == "--drop refusal is not known; did you mean 'refusals'?"
    assert said(data, columns={"txt": "a"}) == "--columns: 'txt' is none of a row's; did you mean 'text'?"
