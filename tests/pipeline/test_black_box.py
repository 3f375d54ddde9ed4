"""A recipe whose teacher answers over HTTP, against a real server."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.compress import api
from potstill.pipeline.cli import call
from potstill.pipeline.recipe import Recipe, build_recipe, load_recipe
from potstill.pipeline.stages import STAGES
from potstill.validate.errors import InputError
from tests.conftest import stories
from tests.service import Says, Service, completion


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A teacher that goes on with a story in its own way, refuses one prompt and is cut off in another."""
    monkeypatch.setattr(api, "FIRST_WAIT_S", 0.005)
    server, told = Service(), stories(60, 5)

    def answer(seen: Any) -> Says:
        number = int(seen.prompt.split()[-1])
        if number == 7:
            return Says(completion("I'm sorry, but I can't help with that."))
        return Says(completion(told[number], finish_reason="length" if number == 9 else "stop"))

    server.answer = answer
    yield server
    server.close()


@pytest.fixture
def recipe(service: Service, story_teacher: Path, story_files: dict[str, Path], tmp_path: Path) -> Path:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"tom sees {i}"}) + "\n" for i in range(60)))
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": "ann likes", "text": text}) + "\n" for text in stories(30, 6)))
    file = tmp_path / "recipe.yaml"
    file.write_text(f"""
task: text-generation
teacher: {{api: "{service.url}", model: big, price_in: 1, price_out: 2, max_cost: 5}}
student: {{checkpoint: {story_teacher}}}
data: {{prompts: {prompts}, eval: {asked}}}
stages: [{{distill: {{epochs: 1, learning_rate: 1e-3}}}}]
gate: {{max_drop: 50pp}}
""")
    return file


def test_what_it_wrote_is_cleaned_and_learned(recipe: Path, service: Service, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert call(["run", str(recipe), "--dry-run"]) == 0
    assert "to ask of big at 127.0.0.1" in capsys.readouterr().out
    assert not service.seen
    assert call(["run", str(recipe), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "estimated cost: up to $" in said
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    numbers = {int(row["prompt"].split()[-1]) for row in rows}
    assert not numbers & {7, 9}
    assert {"text", "prompt", "teacher"} <= set(rows[0])
    record = json.loads((out / "train.jsonl.record.json").read_text())
    assert record["rules"]["refusals"]["dropped"] == 1
    ledger = json.loads((out / "ledger.json").read_text())
    assert [entry["kind"] for entry in ledger["entries"]] == ["teacher", "start", "stage"]
    assert ledger["recipe"]["data"]["train"] == str(out / "train.jsonl")
    assert ledger["recipe"]["teacher"]["api"]["model"] == "big"
    (log, *_) = ledger["entries"][2]["log"]
    assert "hard" in log
    assert "kl" not in log
    card = (out / "student" / "README.md").read_text()
    assert "from the teacher `big`, which answers at a server of one's own: it was made" in card
    assert "- `big` wrote texts to given prompts; they were cleaned, and the student learned them." in card
    assert "127.0.0.1" not in card
    asked = len(service.seen)
    assert call(["run", str(recipe), "--out", str(out)]) == 0
    assert len(service.seen) == asked  # nothing is asked twice
    kept = yaml.safe_load((out / "recipe.yaml").read_text())
    assert "train" not in kept["data"]
    assert load_recipe(out / "recipe.yaml", stage_types=STAGES, target_names=[]) == load_recipe(
        recipe, stage_types=STAGES, target_names=[]
    )


def test_the_service_is_not_there(recipe: Path, service: Service, tmp_path: Path, capsys: Any) -> None:
    service.close()
    assert call(["run", str(recipe), "--out", str(tmp_path / "out")]) == 4
    assert not (tmp_path / "out" / "ledger.json").exists()


def test_nothing_is_left_to_learn_from(recipe: Path, service: Service, tmp_path: Path, capsys: Any) -> None:
    service.answer = lambda seen: Says(completion("I'm sorry, but I can't help with that."))
    assert call(["run", str(recipe), "--out", str(tmp_path / "out"), "--json"]) == 2
    said = capsys.readouterr()
    assert "0 texts of the teacher's are left to learn from, expected 2 or more; what was dropped stands" in said.err
    assert said.out == ""
    service.answer = lambda seen: Says(completion(""))
    assert call(["run", str(recipe), "--out", str(tmp_path / "other")]) == 2
    assert re.search("no answer of big is left to learn from; why stands in .*record.json", capsys.readouterr().err)


def built(base: Path, **changes: Any) -> Recipe:
    (base / "p.jsonl").write_text('{"prompt": "a"}\n')
    (base / "e.jsonl").write_text('{"text": "a"}\n')
    mapping: dict[str, Any] = {
        "task": "text-generation", "teacher": {"api": "http://localhost:1/v1", "model": "big"},
        "student": {"checkpoint": "own/small"}, "data": {"prompts": "p.jsonl", "eval": "e.jsonl"},
        "stages": ["distill"],
    }  # fmt: skip
    return build_recipe(mapping | changes, stage_types=STAGES, target_names=[], base=base)


def test_the_short_spelling(tmp_path: Path) -> None:
    found = built(tmp_path)
    assert found.teacher.checkpoint == "own/small"
    assert found.teacher.api
    assert found.teacher.api.api == "http://localhost:1/v1"
    assert found.stages[0].settings == {"losses": {"hard": 1.0}}
    own = built(tmp_path, stages=[{"distill": {"losses": {"hard": 1.0, "kl": 0.1}}}])
    assert own.stages[0].settings == {"losses": {"hard": 1.0, "kl": 0.1}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "text-classification"}, "a teacher behind an API writes texts: the task is text-generation"),
        ({"student": {"layers": 2}}, "a teacher behind an API has no weights to cut; give student: {checkpoint:"),
        ({"data": {"eval": "e.jsonl"}}, "a teacher behind an API answers prompts: give data.prompts"),
        (
            {"data": {"eval": "e.jsonl", "prompts": "p.jsonl", "train": "e.jsonl"}},
            "data.train: is what the teacher writes to data.prompts; give one of both",
        ),
        ({"teacher": "own/big", "data": {"eval": "e.jsonl", "prompts": "p.jsonl", "train": "p.jsonl"}},
         "data.prompts: are for a teacher behind an API"),
        ({"teacher": {"api": "http://localhost:1/v1", "model": "big", "samples": 0}}, "samples"),
        ({"teacher": {"api": "localhost", "model": "big"}}, "expected the address of a service"),
        ({"teacher": {"api": "http://localhost:1/v1", "model": "big", "sampels": 2}}, "did you mean 'samples'"),
    ],
)  # fmt: skip
def test_what_cannot_be(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        built(tmp_path, **changes)


def test_by_one_process(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call(["run", str(recipe)]) == 2
    assert "a teacher behind an API is asked by one process: potstill generate first" in capsys.readouterr().err
