"""Progress bars with the time left, on standard error."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)


class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, steps: int, note: str = "") -> None:
        """By some steps, with a word beside the bar."""
        ...


@contextmanager
def track(label: str, total: int) -> Iterator[Advance]:
    """A bar over `total` steps; call what it yields with the steps done since."""
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(label, total=total, note="")

        def advance(steps: int, note: str = "") -> None:
            progress.update(bar, advance=steps, note=note)

        yield advance
