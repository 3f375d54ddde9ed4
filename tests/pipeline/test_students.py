"""Students of every kind on the whole road: cut, trained, kept, opened again."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from potstill.pipeline import cli
from potstill.pipeline.recipe import load_recipe
from potstill.pipeline.run import Run
from potstill.pipeline.stages import STAGES
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.task import TASKS

TEXT = TASKS["text-classification"]


def recipe_of(folder: Path, teacher: Path, train: Path, evaluation: Path, student: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        f"task: text-classification\nteacher: {teacher}\nstudent: {student}\nstages: [distill: {{epochs: 0.5}}]\n"
        f"data: {{train: {train}, eval: {evaluation}, columns: {{text: sentence}}}}\n"
    )
    return path


def student_key(path: Path) -> str:
    run = Run(load_recipe(path, stage_types=STAGES, target_names=[]), path.parent / "out", Console(quiet=True))
    return {step.step: step.key for step in run.plan()}["1-student"]


def without(word: str, source: Path, target: Path) -> Path:
    """The same file without the lines that hold a word."""
    target.write_text("".join(line for line in source.open() if word not in line.split("\t")[0].split()))
    return target


def test_a_student_that_is_cut_every_way(text_teacher: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    student = "{layers: [0, 2, 3], hidden: 24, neurons: 40, vocabulary: used, rank: 0.25}"
    train = without("lovely", texts["train"], tmp_path / "train.tsv")
    path = recipe_of(tmp_path, text_teacher, train, texts["eval"], student)
    assert cli.call(["run", str(path), "--out", str(tmp_path / "out")]) == 0
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert ledger["entries"][1]["what"] == (
        "3 of 4 layers (0, 2, 3), 24 of 32 wide, 40 of 64 neurons, tokens in use, rank 25%"
    )
    assert any("lacks" in warning and "the teacher's 0" in warning for warning in ledger["warnings"])
    made = TEXT.load(Checkpoint(str(tmp_path / "out" / "student")))
    config = made.core.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 24, 3)
    assert (config.intermediate_size, config.vocab_size) == (40, 24)
    record = json.loads((tmp_path / "out" / "student" / "potstill.json").read_text())
    assert {*record["low_rank"].values()} == {6}
    assert record["stages"][0]["settings"]["vocabulary"] == "used"
    assert ledger["entries"][-1]["parameters"] == made.parameters


@pytest.mark.parametrize(
    ("student", "same"),
    [("{layers: 2}", True), ("{vocabulary: used}", False), ("{layers: 2, pick: importance}", False)],
)
def test_a_cut_by_the_examples_hangs_on_them(
    text_teacher: Path, texts: dict[str, Path], tmp_path: Path, student: str, same: bool
) -> None:
    path = recipe_of(tmp_path, text_teacher, texts["train"], texts["eval"], student)
    before = student_key(path)
    fewer = without("lovely", texts["train"], tmp_path / "fewer.tsv")
    recipe_of(tmp_path, text_teacher, fewer, texts["eval"], student)
    assert (student_key(path) == before) is same
