"""A run from the outside: the folder held, the cost said before, the ledger and the report written after."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from potstill.pipeline import yaml_lines
from potstill.pipeline.black_box import with_written
from potstill.pipeline.cache import run_folder
from potstill.pipeline.emulating import to_warn_of
from potstill.pipeline.estimate import Plan, estimate, print_plan
from potstill.pipeline.exhibits import exhibits
from potstill.pipeline.ledger import Ledger, candidate_in_words, print_ledger, without_leaks
from potstill.pipeline.lineage.telling import tell_licences
from potstill.pipeline.recipe import Recipe
from potstill.pipeline.report import unchecked, write_report
from potstill.pipeline.run import Run
from potstill.pipeline.stages import STAGES
from potstill.pipeline.step_words import split_in_words
from potstill.validate.errors import PotstillError
from potstill.validate.files import write_text


def walk(recipe: Recipe, out: Path, quiet: bool = False) -> tuple[Ledger, PotstillError | None]:
    """Walk a recipe in a folder and write `recipe.yaml`, `ledger.json` and `report.html` there.

    Args:
        recipe: what to do.
        out: the run's folder.
        quiet: print nothing on standard output.

    Returns:
        The ledger, and what stopped the run if something did, such as a `GateFailed`; all that was made is kept.

    Raises:
        InputError: the recipe, the data or the folder cannot be used, or the run will not fit; nothing was begun.
        GateFailed: licences or terms forbid it, or are unknown and nobody decided; nothing was begun.
        Unreachable: a teacher behind an API is not there.
    """
    console = Console(stderr=quiet)
    licences = tell_licences(recipe, console)
    with run_folder(out):
        write_text(out / "recipe.yaml", yaml_lines.dump(recipe.to_mapping()))
        run = Run(with_written(recipe, out, quiet), out, console)
        run.licences = licences
        cost = estimate(run)
        cost.check()
        if cost.seconds:
            console.print(f"[dim]{cost.in_words()}[/]", highlight=False)
        failure: PotstillError | None = None
        try:
            run()
        except PotstillError as error:
            failure = error
        ledger = run.ledger()
        if failure and not ledger.entries:
            raise failure
        ledger.write(out / "ledger.json")
        shown = exhibits(run.material.eval, ledger.entries)
        write_report(ledger, out / "report.html", title=out.name, examples=shown)
        print_ledger(ledger, console)
        for sentence in filter(None, (split_in_words(ledger), candidate_in_words(ledger))):
            console.print(sentence, highlight=False, markup=False)
        console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True, markup=False)
        for warning in filter(None, [*ledger.warnings, without_leaks(ledger), *to_warn_of(ledger.entries)]):
            console.print(f"[yellow]{escape(warning)}[/]", highlight=False)
        open_points = unchecked(ledger)
        if open_points:
            count = f"{len(open_points)} point{'s stand' if len(open_points) > 1 else ' stands'}"
            console.print(f'{count} under "What was not checked" there', highlight=False)
    return ledger, failure


def follow(recipe: Recipe, out: Path) -> Callable[..., None]:
    """How another process takes part in a run.

    Returns:
        What to do when the first process calls: a stage by its number, on a student from the folder of its checkpoint
        (None: a copy of the teacher), in the training's folder.
    """
    run = Run(recipe, out, Console(quiet=True))

    def train(stage: int, student: str | None, work: str) -> None:
        model = run.material.load(Path(student)) if student else run.material.new_student()
        recipe.build_stages(STAGES)[stage](model, run.lesson(Path(work)))

    return train


def plan(recipe: Recipe, out: Path, quiet: bool = False) -> Plan:
    """Say what a run would do and cost, after the verdict on its licences; nothing is written."""
    console = Console(stderr=quiet)
    licences = tell_licences(recipe, console)
    cost = replace(estimate(Run(recipe, out, console)), licences=licences.to_json())
    if not quiet:
        print_plan(cost, console)
    cost.check()
    return cost
