"""The verb that tells of licences, and the options by which others are told. Heavy packages are imported inside."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potstill.pipeline.options import JsonOption, print_json

if TYPE_CHECKING:
    from potstill.compress.api_settings import ApiTeacher
    from potstill.pipeline.lineage.terms import Verdict

LicencesOption = Annotated[
    str | None,
    typer.Option(
        "--licences",
        help="Licences that no card or file says: teacher=apache-2.0,data=own; also student, api, made, use, competes.",
    ),
]
DecidedByOption = Annotated[
    str | None,
    typer.Option("--decided-by", help="Who decided where a licence is not known; stands in the record and the card."),
]


def licences_said(licences: str | None, decided_by: str | None) -> dict[str, Any]:
    """What the options say, as a part of a recipe; nothing where they say nothing."""
    from potstill.pipeline.recipe import parse_pairs

    said = parse_pairs(licences) if licences else {}
    said |= {"decided_by": decided_by} if decided_by else {}
    return {"licences": said} if said else {}


def check_terms(
    teacher: "ApiTeacher", prompts: Path, licences: str | None, decided_by: str | None, as_json: bool
) -> dict[str, Any]:
    """Tell the terms of a service that is to write data, and the licence of its prompts; the verdict as plain data.

    Raises:
        GateFailed: forbidden, or unknown and nobody decided.
        InputError: an option names a licence that nobody knows.
    """
    from rich.console import Console

    from potstill.pipeline.lineage.said import LicencesSpec
    from potstill.pipeline.lineage.telling import terms_of_generation
    from potstill.pipeline.yaml_lines import Problem, as_error, check, dotted

    said, faults = check(LicencesSpec, licences_said(licences, decided_by).get("licences", {}))
    if faults:
        told = [Problem(None, f"--licences {dotted(path)}", text) for path, text in faults]
        raise as_error("command line", told)
    verdict = terms_of_generation(teacher.host, teacher.model, str(prompts), said, Console(stderr=as_json))
    return verdict.to_json()


def licences(
    what: Annotated[
        str | None, typer.Argument(help="A recipe, a checkpoint's folder, or a model of the hub; default: the table.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The verdict on a recipe's licences and terms, what a checkpoint's are, or the table of them all."""
    from rich.console import Console

    from potstill.pipeline.lineage.telling import print_table, print_verdict, table_to_json

    if what is None:
        print_json(table_to_json()) if as_json else print_table(Console())
        return
    verdict = _verdict(what)
    if as_json:
        print_json(verdict.to_json())
    else:
        print_verdict(verdict, Console())
    if what.endswith((".yaml", ".yml")):
        verdict.check()


def _verdict(what: str) -> "Verdict":
    from potstill.pipeline.lineage.origins import short, verdict_of_recipe
    from potstill.pipeline.lineage.reading import read_checkpoint
    from potstill.pipeline.lineage.said import LicencesSpec
    from potstill.pipeline.lineage.terms import Origin, verdict_on

    if what.endswith((".yaml", ".yml")):
        from potstill.pipeline.recipe import load_recipe
        from potstill.pipeline.stages import STAGES
        from potstill.targets.target import target_names

        return verdict_of_recipe(load_recipe(Path(what), stage_types=STAGES, target_names=target_names()))
    origin = Origin("teacher", short(what), ("teaches", "weights"), read_checkpoint(what))
    return verdict_on([origin], LicencesSpec(), "text-generation")
