"""`potstill clean` as it is typed."""

import json
from pathlib import Path

import pytest

from potstill.pipeline import cli

SEA = "The sea was calm that day, and the old man rowed far out to look for the fish he had dreamt of all week."


@pytest.fixture
def data(tmp_path: Path) -> Path:
    refused = {"prompt": "Help.", "text": "I'm sorry, but I can't assist with that."}
    rows = [{"text": SEA}, {"text": f"{SEA} "}, refused]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + "{\n")
    return path


def words(text: str) -> str:
    return " ".join(text.split())


def test_it_writes_and_tells(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, judging = tmp_path / "c.jsonl", tmp_path / "judging.jsonl"
    judging.write_text(json.dumps({"text": "nothing of this is in any row"}) + "\n")
    assert cli.call(["clean", str(data), "--out", str(out), "--against", str(judging)]) == 0
    said = words(capsys.readouterr().out)
    assert "data.jsonl: 4 rows" in said
    assert "exact 1 25.00% 1 line 2: the same as line 1" in said
    assert "refusals 1 25.00% 0 line 3: en-sorry" in said
    assert "refusals were only counted; --drop refusals drops them" in said
    assert "malformed: line 4" in said
    assert "pieces of 0 of 1 evaluation example were found" in said
    assert "2 of 4 rows are in" in said
    assert len(out.read_text().splitlines()) == 2


def test_a_dry_run_only_tells(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(["clean", str(data), "--dry-run", "--drop", "refusals"]) == 0
    said = words(capsys.readouterr().out)
    assert "1 of 4 rows would be left" in said
    assert "only counted" not in said
    assert cli.call(["clean", str(data), "--dry-run", "--json", "--columns", "text=text"]) == 0
    assert json.loads(capsys.readouterr().out)["rules"]["exact"]["dropped"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_it_wants_a_file_or_a_dry_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(["clean", str(data)]) == 2
    assert "give --out FILE, or --dry-run" in capsys.readouterr().err
    assert cli.call(["clean", str(data), "--dry-run", "--out", str(tmp_path / "c.jsonl")]) == 2
    assert "--dry-run writes nothing, so leave --out away" in capsys.readouterr().err
