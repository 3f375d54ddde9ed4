"""The tables and sentences of `formats.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

HEADINGS = (
    "side",
    "accuracy",
    "as float",
    "kB",
    "ms",
    "Haswell: accuracy, points (n), answers as here",
    "s (of CPU)",
    "peak, MB",
)


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table for each model, and its verdict."""
    console = Console(width=150)
    for row in rows:
        table = Table(title=f"{row['model']}, {row['n']} examples", title_justify="left")
        for heading in HEADINGS:
            table.add_column(heading)
        for side, figures in row["sides"].items():
            table.add_row(side, *cells(figures))
        console.print(table)
        for sentence in row["verdict"]["said"]:
            console.print(f"  {sentence}", highlight=False)


def cells(figures: Mapping[str, Any]) -> list[str]:
    """The cells of a side after its name; a side without a file that runs says why."""
    cost = [f"{figures['seconds']:.0f} ({figures['cpu_seconds']:.0f})", f"{figures['peak_mb']:.0f}"]
    if "why" in figures:
        return [figures["why"], "", "", "", "", *cost]
    emulated = figures["avx2"]
    return [
        f"{figures['accuracy']:.1%}",
        f"{figures['agreement']:.1%}",
        f"{figures['bytes'] / 1e3:.0f}",
        f"{figures['ms']:.3f}",
        f"{emulated['accuracy']:.1%}, {emulated['change_points']:+.1f} ({emulated['n']}), "
        f"{emulated['agreement_with_here']:.1%} the same",
        *(cost if figures["seconds"] else ["", ""]),
    ]


def print_rest(record: Mapping[str, Any]) -> None:
    """Calibration, search and export in a sentence each."""
    each, search = record["calibration_ms_per_sample"], record["search"]
    said = [
        f"calibration: peak memory with 4,096 examples is {record['calibration_memory_ratio']:.3f} of that with 64; "
        f"{each['ours']:.2f} ms for one more example, quantize_static {each['theirs']:.2f}",
        f"search: plain int8 {search['plain_points']:+.1f} points, {'passes' if search['plain_passed'] else 'fails'}; "
        f"searched {search['kept_points']:+.1f}, {'passes' if search['kept_passed'] else 'fails'}"
        + (f", {search['int8_share']:.1%} in int8, {search['seconds']:.0f} s" if "tries" in search else ""),
        "export: "
        + ", ".join(
            f"{one['seconds']:.0f} s ({one['cpu_seconds']:.0f} of CPU) for {count}"
            for count, one in record["export_seconds"].items()
        ),
    ]
    for sentence in said:
        print(sentence)
