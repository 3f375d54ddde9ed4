"""A recipe with several teachers, whose outputs are kept for the next run."""

import shutil
from pathlib import Path

import pytest

from potstill.pipeline.cli import call
from potstill.validate.files import read_json

RECIPE = """
task: text-classification
teacher: {teacher}
other_teachers: [{{checkpoint: {other}, weight: 0.5}}]
teacher_outputs: {folder}/outputs
data: {{train: {train}, eval: {eval}, columns: {{text: sentence}}}}
student: {{layers: 1}}
stages: [distill: {{epochs: 2, weighing: confidence}}]
seed: {seed}
"""


def run(folder: Path, teacher: Path, other: Path, texts: dict[str, Path], seed: int, name: str) -> int:
    recipe = RECIPE.format(folder=folder, teacher=teacher, other=other, seed=seed, **texts)
    (folder / f"{name}.yaml").write_text(recipe)
    return call(["run", str(folder / f"{name}.yaml"), "--out", str(folder / name)])


def rows(folder: Path) -> tuple[float, float]:
    """For how many rows the teachers ran, and for how many they were read."""
    entry = next(one for one in read_json(folder / "ledger.json")["entries"] if one["name"] == "distill")
    return entry["log"][-1]["taught_rows"], entry["log"][-1]["kept_rows"]


def test_two_teachers_run_once_for_two_runs(text_teacher: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    other = shutil.copytree(text_teacher, tmp_path / "other")
    assert run(tmp_path, text_teacher, other, texts, 0, "first") == 0
    taught, kept = rows(tmp_path / "first")
    assert taught == 600  # each training example and each held out once
    assert kept >= 600
    assert run(tmp_path, text_teacher, other, texts, 0, "second") == 0
    assert rows(tmp_path / "second") == (0, taught + kept)


def test_a_teacher_that_does_not_load_is_an_error(
    text_teacher: Path, image_teacher: Path, texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, text_teacher, tmp_path / "none", texts, 0, "missing") == 2
    assert "other_teachers.0.checkpoint" in capsys.readouterr().err
    broken = shutil.copytree(text_teacher, tmp_path / "cut-off")
    (broken / "model.safetensors").write_bytes(b"no weights")
    assert run(tmp_path, text_teacher, broken, texts, 0, "broken") == 2
    assert "cannot read the weights" in capsys.readouterr().err
    assert run(tmp_path, text_teacher, image_teacher, texts, 0, "foreign") == 2
