"""What a recipe's examples are used for."""

from pathlib import Path

import pytest
from rich.console import Console

from potstill.pipeline.material import Material
from potstill.pipeline.recipe import build_recipe
from potstill.pipeline.run import Run
from potstill.pipeline.stages import STAGES
from potstill.targets.target import target_names
from potstill.validate.leaks import shared


@pytest.mark.parametrize("key", ["train", "calibrate"])
def test_ranges_are_not_measured_on_what_judges(
    key: str, text_teacher: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    leaky = tmp_path / "leaky.tsv"
    clean, leaked = texts["calibrate"].read_text(), texts["eval"].read_text().splitlines(keepends=True)[1:31]
    leaky.write_text(clean + "".join(leaked))
    mapping = {
        "task": "text-classification",
        "teacher": str(text_teacher),
        "data": {"eval": str(texts["eval"]), key: str(leaky), "columns": {"text": "sentence"}},
        "targets": ["laptop-x86-vnni"],
    }
    material = Material(build_recipe(mapping, stage_types=STAGES, target_names=target_names(), base=tmp_path))
    assert material.calibrate is not None
    assert material.measured is not None
    both = len(shared(material.calibrate, material.eval))
    assert 30 <= both < len(material.calibrate)
    assert len(material.measured) == len(material.calibrate) - both
    assert len(shared(material.measured, material.eval)) == 0
    kept = material.measured.rows(range(len(material.measured)))["text"]
    assert set(kept) <= {line.split("\t")[0] for line in clean.splitlines()}


def test_a_package_hangs_on_the_examples_that_calibrate_it(
    text_teacher: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    """An evaluation set that holds some of them takes them away, and the package is made again; no other one does."""
    lines = texts["eval"].read_text()
    taken = "".join(texts["calibrate"].read_text().splitlines(keepends=True)[1:41])
    (tmp_path / "fewer.tsv").write_text("".join(lines.splitlines(keepends=True)[:100]))
    (tmp_path / "overlap.tsv").write_text(lines + taken)

    def key(judged: Path) -> str:
        mapping = {
            "task": "text-classification",
            "teacher": str(text_teacher),
            "data": {"eval": str(judged), "calibrate": str(texts["calibrate"]), "columns": {"text": "sentence"}},
            "targets": ["laptop-x86-vnni"],
        }
        recipe = build_recipe(mapping, stage_types=STAGES, target_names=target_names(), base=tmp_path)
        steps = Run(recipe, tmp_path / "out", Console(quiet=True)).plan()
        return next(step.key for step in steps if step.step == "packages/laptop-x86-vnni")

    assert key(texts["eval"]) == key(tmp_path / "fewer.tsv")
    assert key(texts["eval"]) != key(tmp_path / "overlap.tsv")


def test_one_example_in_both_sets_is_told_as_one(text_teacher: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    leaky = tmp_path / "leaky.tsv"
    clean, leaked = texts["calibrate"].read_text(), texts["eval"].read_text().splitlines(keepends=True)[1]
    leaky.write_text(clean + leaked)
    mapping = {
        "task": "text-classification",
        "teacher": str(text_teacher),
        "data": {"eval": str(texts["eval"]), "calibrate": str(leaky), "columns": {"text": "sentence"}},
        "targets": ["laptop-x86-vnni"],
    }
    material = Material(build_recipe(mapping, stage_types=STAGES, target_names=target_names(), base=tmp_path))
    assert material.calibrate is not None
    assert material.warnings == ["1 of the 200 evaluation examples is in data.calibrate too."]
    material.check_calibration(1)
    assert material.warnings[1].startswith("The activation ranges come from 1 example only; give 256 or more of the ")
