"""What the telling verbs print: targets, a measurement, the doctor's findings."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from potstill.pipeline.doctor import Finding
from potstill.targets.host import runs_here
from potstill.targets.measurement import Measurement
from potstill.targets.target import Target, describe

console = Console()


def _table(title: str, caption: str | None = None, show_header: bool = True) -> Table:
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
    table = _table(
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
    table = _table(f"{target.id}: {target.title}")
    for heading, ratio in (("value of", 3), ("is", 2), ("source", 4)):
        table.add_column(heading, overflow="fold", ratio=ratio)
    for field, value, source in describe(target):
        if not (field.startswith("quantize.") and value == "none"):  # what a scheme leaves out
            table.add_row(*map(escape, (field, value, source)))
    console.print(table)
    console.print(runs_here(target)[1], highlight=False)


def print_measurement(measurement: Measurement) -> None:
    """What a package costs, each figure with its unit and how it was taken."""
    where = measurement.where
    shapes = ", ".join(f"{name} {shape}" for name, shape in measurement.inputs.items())
    table = _table(
        f"{measurement.package}, {measurement.kind} on {where.cpu} ({where.system}, {where.cores} cores)",
        f"{measurement.runs} runs after {measurement.warmup} to warm up, {measurement.threads} threads, input {shapes}",
        show_header=False,
    )
    cold = "from disk" if measurement.page_cache_dropped else "the file may have been in the page cache"
    memory = "not available" if measurement.peak_memory_mb is None else f"{measurement.peak_memory_mb:.1f} MB"
    for name, value, note in (
        ("median", f"{measurement.median_ms:.3f} ms", ""),
        ("min", f"{measurement.min_ms:.3f} ms", ""),
        ("p90", f"{measurement.p90_ms:.3f} ms", "noisy where other programs run"),
        ("first run", f"{measurement.first_run_ms:.1f} ms", "before the warm-up"),
        ("cold load", f"{measurement.load_ms:.1f} ms", cold),
        (
            "peak memory",
            memory,
            f"over the {measurement.baseline_mb:.0f} MB of the imports ({measurement.memory_method})",
        ),
        ("model file", f"{measurement.file_mb:.2f} MB", ""),
        ("nodes by provider", ", ".join(f"{p}: {n}" for p, n in measurement.provider_nodes.items()), "before fusion"),
    ):
        table.add_row(name, value, f"[dim]{escape(note)}[/]")
    console.print(table)
    for provider in measurement.missing_providers:
        console.print(f"[bold yellow]{provider} is not here[/]: the target wants it, and the CPU ran instead")
    operators = _table("Time by operator")
    for heading in ("operator", "nodes", "share", "provider"):
        operators.add_column(heading, justify="right" if heading in ("nodes", "share") else "left")
    for one in measurement.operators[:12]:
        operators.add_row(one.operator, str(one.count), f"{one.share:.1%}", one.provider)
    if measurement.unattributed_share is not None:
        operators.add_row("[dim]between operators[/]", "", f"{measurement.unattributed_share:.1%}", "")
    console.print(operators)


def print_findings(findings: list[Finding]) -> None:
    """The doctor's table."""
    table = _table("Doctor")
    table.add_column("")
    table.add_column("what", no_wrap=True)
    for heading in ("found", "to get it"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        mark = "[green]✓[/]" if finding.ok else "[yellow]–[/]" if finding.optional else "[bold red]✗[/]"
        table.add_row(mark, finding.what, escape(finding.found), "" if finding.ok else escape(finding.how))
    console.print(table)
