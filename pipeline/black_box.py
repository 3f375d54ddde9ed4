"""A recipe whose teacher answers over HTTP: what it writes, cleaned, is what students learn from.

Such a teacher has no weights and gives no distributions: students are judged against their own checkpoint before any
training, which stands in the teacher's place. It needs no torch, so that a recipe is checked at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.validate.errors import InputError
from potstill.validate.units import counted

if TYPE_CHECKING:
    from potstill.pipeline.recipe import Recipe

WRITTEN, LEARNED = "teacher.jsonl", "train.jsonl"  # in the run's folder: as it was written, and cleaned
HARD = {"losses": {"hard": 1.0}}
Report = Callable[[tuple[str | int, ...], str], None]


def expand_api(data: dict[str, Any]) -> None:
    """`teacher: {api: …, model: …}` in the long form: under the key `api`, beside the student's own checkpoint.

    Stages that are given no losses learn from the texts alone.
    """
    teacher, student = data.get("teacher"), data.get("student")
    if not isinstance(teacher, dict) or "api" not in teacher or isinstance(teacher["api"], dict):
        return
    own = student.get("checkpoint") if isinstance(student, dict) else None
    data["teacher"] = {"checkpoint": own or "none", "api": teacher}
    stages = data.get("stages")
    for stage in stages if isinstance(stages, list) else []:
        if isinstance(stage, dict) and isinstance(stage.get("distill"), dict):
            stage["distill"] = HARD | stage["distill"]


def check_api(data: dict[str, Any], report: Report) -> None:
    """Report what a teacher behind an API needs and is not there, and what goes with no other."""
    teacher, student = data.get("teacher"), data.get("student")
    part: Any = data.get("data") if isinstance(data.get("data"), dict) else {}
    if not isinstance(teacher, dict) or not teacher.get("api"):
        if part.get("prompts"):
            report(("data", "prompts"), "are for a teacher behind an API: teacher: {api: ADDRESS, model: NAME}")
        return
    if data.get("task") != "text-generation":
        report(("teacher",), "a teacher behind an API writes texts: the task is text-generation")
    if not isinstance(student, dict) or not student.get("checkpoint"):
        report(("student",), "a teacher behind an API has no weights to cut; give student: {checkpoint: FOLDER}")
    if not part.get("prompts"):
        report(("data",), "a teacher behind an API answers prompts: give data.prompts")
    if part.get("train"):
        report(("data", "train"), "is what the teacher writes to data.prompts; give one of both")


def tell_estimate(recipe: "Recipe", out: Path, as_json: bool) -> None:
    """What is to be asked of a teacher behind an API, and what that may cost, after the terms; nothing is asked."""
    from rich.console import Console

    from potstill.compress.api_estimate import estimate
    from potstill.pipeline.generating import print_estimate
    from potstill.pipeline.lineage.telling import tell_licences
    from potstill.pipeline.options import print_json

    assert recipe.teacher.api
    licences = tell_licences(recipe, Console(stderr=as_json))
    found = estimate(recipe.teacher.api, Path(str(recipe.data.prompts)), out / WRITTEN)
    print_json(vars(found) | {"licences": licences.to_json()}) if as_json else print_estimate(found, recipe.teacher.api)


def with_written(recipe: "Recipe", out: Path, quiet: bool = False) -> "Recipe":
    """The recipe with what its teacher wrote, cleaned, as `data.train`; others as they are.

    What was answered before is not asked again. `quiet` prints nothing.

    Raises:
        Unreachable: the service is not there.
        InputError: it refuses, or no text is left to learn from.
    """
    if recipe.teacher.api is None:
        return recipe
    from potstill.compress.api_estimate import estimate
    from potstill.compress.clean import Cleaning, clean
    from potstill.compress.generate import generate, record_of
    from potstill.pipeline.generating import print_estimate, print_record
    from potstill.pipeline.tell_clean import print_cleaned

    teacher, prompts, written = recipe.teacher.api, Path(str(recipe.data.prompts)), out / WRITTEN
    if not quiet:
        print_estimate(estimate(teacher, prompts, written), teacher)
    record = generate(teacher, prompts, written)
    if not quiet:
        print_record(record, written)
    judging = Path(recipe.data.eval)
    against = judging if judging.suffix == ".jsonl" else None
    if not record.kept:
        raise InputError(f"no answer of {teacher.model} is left to learn from; why stands in {record_of(written)}")
    cleaned = clean(written, out / LEARNED, Cleaning(against=against, drop=("refusals", "truncated")))
    if not quiet:
        print_cleaned(cleaned, out / LEARNED)
    if cleaned.rows < 2:
        raise InputError(
            f"{counted(cleaned.rows, 'text')} of the teacher's are left to learn from, expected 2 or more; what was "
            f"dropped stands in {out / LEARNED}.record.json"
        )
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": str(out / LEARNED)})})
