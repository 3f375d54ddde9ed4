"""What a run gives away beside its ledger: the student that passed last, and the packages."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.pipeline.card import model_card
from potstill.pipeline.ledger import Entry
from potstill.validate.files import whole_folder, write_text

STUDENT, PACKAGES = "student", "packages"


def publish_student(out: Path, recipe: dict[str, Any], entries: Sequence[Entry], warnings: list[str]) -> None:
    """Copy the checkpoint of the last entry, which passed, to `student/` of a run's folder, with its card."""
    with whole_folder(out / STUDENT) as aside:
        shutil.copytree(out / entries[-1].folder / "checkpoint", aside, dirs_exist_ok=True)
        write_text(aside / "README.md", model_card("Student", recipe, list(entries), warnings))


def stale(out: Path, entries: Sequence[Entry]) -> list[str]:
    """Which of a run folder's student and packages are from before, and were not passed by this run's limits."""
    made = {entry.folder for entry in entries if entry.kind == "package"}
    if any(entry.kind == "stage" and entry.verdict and entry.verdict.passed for entry in entries):
        made.add(STUDENT)
    there = [out / STUDENT, *sorted((out / PACKAGES).glob("[!.]*"))]
    names = [place.relative_to(out).as_posix() for place in there if place.is_dir()]
    return [name for name in names if name not in made]
