"""What the telling verbs print: targets, a measurement, the doctor's findings."""

from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from potstill.pipeline.doctor import Finding
from potstill.pipeline.options import print_json
from potstill.targets.host import Fit, Host, fits, here, runs_here
from potstill.targets.target import Target, describe
from potstill.validate.errors import InputError

console = Console()


def plain_table(title: str, caption: str | None = None, show_header: bool = True) -> Table:
    """A table without walls, which leaves an 80-column terminal to the words."""
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_header=show_header,
        pad_edge=False,
    )


def print_targets(known: list[Target]) -> None:
    """All targets, and which of them this machine computes like."""
    table = plain_table(
        "Targets", "alike: this machine computes as the target does; potstill targets NAME shows every value"
    )
    table.add_column("name", no_wrap=True)
    for heading in ("what it is", "conv", "matmul", "alike"):
        table.add_column(heading)
    for target in known:
        same, _ = runs_here(target)
        table.add_row(
            target.id,
            target.title,
            target.quantize.convolution.method,
            target.quantize.matmul.method,
            "yes" if same else "no",
        )
    console.print(table)


def print_target(target: Target) -> None:
    """One target, each value with its source."""
    table = plain_table(f"{target.id}: {target.title}")
    for heading, ratio in (("value of", 3), ("is", 2), ("source", 4)):
        table.add_column(heading, overflow="fold", ratio=ratio)
    for field, value, source in describe(target):
        if not (field.startswith("quantize.") and value == "none"):  # what a scheme leaves out
            table.add_row(*map(escape, (field, value, source)))
    console.print(table)
    console.print(runs_here(target)[1], highlight=False)


def tell_fits(known: list[Target], as_json: bool) -> None:
    """Which targets fit this machine, the best first, and why the others do not.

    Raises:
        InputError: none does.
    """
    host = here()
    found = fits(known, host)
    if as_json:
        rows = [{"id": one.target.id, "fits": one.fits, "why": one.why} for one in found]
        best = found[0].target.id if found[0].fits else None
        print_json({"machine": asdict(host), "best": best, "targets": rows})
    else:
        _print_fits(found, host)
    if not found[0].fits:
        raise InputError(
            f"none of {len(found)} targets fits this machine; write one of your own (docs/targets.md)"
            if len(found) > 1
            else found[0].why.removesuffix(".")
        )


def _print_fits(found: list[Fit], host: Host) -> None:
    shown = plain_table(
        f"Targets for {host.cpu} ({host.system}, {host.arch})", "of those that fit, the first asks for most"
    )
    for heading in ("name", "fits", "why"):
        shown.add_column(heading, no_wrap=heading == "name")
    for one in found:
        shown.add_row(one.target.id, "[green]yes[/]" if one.fits else "no", escape(one.why))
    console.print(shown)


def print_findings(findings: list[Finding]) -> None:
    """The doctor's table."""
    table = plain_table("Doctor")
    table.add_column("")
    table.add_column("what", no_wrap=True)
    for heading in ("found", "to get it"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        mark = "[green]✓[/]" if finding.ok else "[yellow]–[/]" if finding.optional else "[bold red]✗[/]"
        table.add_row(mark, finding.what, escape(finding.found), "" if finding.ok else escape(finding.how))
    console.print(table)


def print_verified(folder: Path, checked: list[dict[str, str]]) -> None:
    """What was verified of a folder, and what could not be."""
    table = plain_table(str(folder), show_header=False)
    for one in checked:
        style = "green" if one["outcome"] == "holds" else "yellow"
        table.add_row(escape(one["what"]), f"[{style}]{one['outcome']}[/]", escape(one["told"]))
    console.print(table)
