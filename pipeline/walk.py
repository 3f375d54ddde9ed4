"""A run from the outside: the folder held, the cost said before, the ledger and the report written after."""

from pathlib import Path

from rich.console import Console

from potstill.pipeline import yaml_lines
from potstill.pipeline.cache import run_folder
from potstill.pipeline.estimate import Plan, estimate, print_plan
from potstill.pipeline.ledger import Ledger, print_ledger
from potstill.pipeline.recipe import Recipe
from potstill.pipeline.report import write_report
from potstill.pipeline.run import Run
from potstill.validate.errors import GateFailed
from potstill.validate.files import write_text


def walk(recipe: Recipe, out: Path, quiet: bool = False) -> Ledger:
    """Walk a recipe in a folder and write `recipe.yaml`, `ledger.json` and `report.html` there.

    Args:
        recipe: what to do.
        out: the run's folder.
        quiet: print nothing on standard output.

    Raises:
        GateFailed: a gate did not let a step pass; all that was made is kept, ledger and report included.
        InputError: the recipe, the data or the folder cannot be used, or the run will not fit.
    """
    console = Console(stderr=quiet)
    with run_folder(out):
        write_text(out / "recipe.yaml", yaml_lines.dump(recipe.to_mapping()))
        run = Run(recipe, out, console)
        cost = estimate(run)
        cost.check()
        if cost.seconds:
            console.print(f"[dim]{cost.in_words()}[/]", highlight=False)
        failure: GateFailed | None = None
        try:
            run()
        except GateFailed as error:
            failure = error
        ledger = run.ledger()
        ledger.write(out / "ledger.json")
        write_report(ledger, out / "report.html", title=out.name)
        print_ledger(ledger, console)
        console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)
        if failure:
            raise failure
    return ledger


def plan(recipe: Recipe, out: Path, quiet: bool = False) -> Plan:
    """Say what a run would do and cost; nothing is written."""
    console = Console(stderr=quiet)
    cost = estimate(Run(recipe, out, console))
    if not quiet:
        print_plan(cost, console)
    cost.check()
    return cost
