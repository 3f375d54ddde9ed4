"""What a run gives away beside its ledger: the student that passed last, and the packages."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from potstill.export.package import BOM
from potstill.export.papers import put
from potstill.pipeline.ledger import Entry
from potstill.pipeline.lineage.additions import with_additions
from potstill.pipeline.lineage.bom import checkpoint_bom
from potstill.pipeline.lineage.card import About, model_card
from potstill.pipeline.lineage.terms import with_licences
from potstill.validate.checkpoint import RECORD
from potstill.validate.files import read_json, sealed, whole_folder, write_json, write_text

STUDENT, PACKAGES = "student", "packages"


def publish_student(
    out: Path, about: About, entries: Sequence[Entry], warnings: list[str], say: Callable[[str, str], None]
) -> None:
    """Copy the checkpoint of the last entry, which passed, to `student/` of a run's folder.

    Its card, the verdict in its record, and the licences and notices that go along are those of this run.
    """
    with whole_folder(out / STUDENT) as aside:
        shutil.copytree(out / entries[-1].folder / "checkpoint", aside, dirs_exist_ok=True)
        record = sealed(with_licences(read_json(aside / RECORD), about.verdict))
        write_json(aside / RECORD, record)
        if materials := checkpoint_bom(aside, record):
            write_text(aside / BOM, materials)
        put(aside, about.verdict.texts)
        card = model_card("Student", about, list(entries), warnings)
        write_text(aside / "README.md", with_additions(out, STUDENT, card, say))


def stale(out: Path, entries: Sequence[Entry]) -> list[str]:
    """Which of a run folder's student and packages are from before, and were not passed by this run's limits."""
    made = {entry.folder for entry in entries if entry.kind == "package"}
    if any(entry.kind == "stage" and entry.verdict and entry.verdict.passed for entry in entries):
        made.add(STUDENT)
    there = [out / STUDENT, *sorted((out / PACKAGES).glob("[!.]*"))]
    names = [place.relative_to(out).as_posix() for place in there if place.is_dir()]
    return [name for name in names if name not in made]
