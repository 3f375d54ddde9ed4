"""The verdict on licences as a person or a program reads it, before a run and by `potstill licences`."""

from typing import TYPE_CHECKING, Any

from rich.console import Console

from potstill.pipeline.lineage.licences import Licence, Service, table
from potstill.pipeline.lineage.origins import of_data, of_service, verdict_of_recipe
from potstill.pipeline.lineage.said import LicencesSpec
from potstill.pipeline.lineage.terms import NO_LAWYER, Verdict, verdict_on

if TYPE_CHECKING:
    from potstill.pipeline.recipe import Recipe

STYLE = {"allowed": "green", "allowed if": "green", "unknown": "yellow", "forbidden": "bold red"}


def tell_licences(recipe: "Recipe", console: Console) -> Verdict:
    """Stop where the verdict on a recipe says so, else print it.

    Raises:
        GateFailed: forbidden, or unknown and nobody decided.
        InputError: a source says two things of its licence.
    """
    verdict = verdict_of_recipe(recipe)
    verdict.check()
    print_verdict(verdict, console)
    return verdict


def terms_of_generation(host: str, model: str, prompts: str, said: LicencesSpec, console: Console) -> Verdict:
    """The same for `potstill generate`: the service's terms, and the licence of the prompts."""
    verdict = verdict_on([*of_service(host, model, said), *of_data("prompts", prompts, said)], said, "text-generation")
    verdict.check()
    print_verdict(verdict, console)
    return verdict


def print_verdict(verdict: Verdict, console: Console) -> None:
    """The verdict, a line for each source; in short where everything is simply allowed."""
    first, *rest = verdict.in_words()
    console.print(first, style=STYLE[verdict.level], highlight=False, markup=False)
    if verdict.level != "allowed":
        for line in [*rest, NO_LAWYER]:
            console.print(line, style="dim", highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_table(console: Console) -> None:
    """All licences and services, with their answers; two lines each."""
    for one in table().licences:
        asks = [f"a name that begins with {one.prefix}" if one.prefix else "", f"“{one.credit}”" if one.credit else ""]
        asks += ["a notice" if one.notice else "", "its text" if one.keep else "", "credit" if one.credited else ""]
        wants = f"; wants {', '.join(filter(None, asks))}" if any(asks) else ""
        told = f"outputs may teach: {one.outputs}; what is made of it: {one.weights}; commercial use: "
        _tell_entry(console, one, f"{told}{one.limit or one.commercial}{wants}")
    for service in table().services:
        _tell_entry(console, service, f"answers may teach: {service.outputs}")
    console.print(NO_LAWYER, style="dim", highlight=False, markup=False)


def _tell_entry(console: Console, one: Licence | Service, told: str) -> None:
    console.print(f"{one.id}: {one.title}", style="bold", highlight=False, markup=False)
    seen = {"text": "read", "quoted": "read as quoted", "no": "not read"}[one.seen]
    console.print(f"  {told}; {seen} {one.read}: {one.source}", highlight=False, markup=False, soft_wrap=True)


def table_to_json() -> Any:
    """The table as plain data."""
    return table().model_dump(mode="json")
