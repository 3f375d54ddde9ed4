"""What `potstill clean` prints."""

from pathlib import Path

from rich.markup import escape

from potstill.compress.clean import BY_WISH, Cleaned, record_of
from potstill.pipeline.tell import console, plain_table
from potstill.validate.units import counted


def print_cleaned(cleaned: Cleaned, out: Path | None) -> None:
    """The share of each rule, and one example."""
    rows = cleaned.input["rows"]
    table = plain_table(f"{escape(cleaned.input['file'])}: {counted(rows, 'row')}")
    table.add_column("rule", no_wrap=True)
    for heading in ("rows", "share", "dropped", "cut"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("e.g.", overflow="fold")
    for name, found in cleaned.rules.items():
        first = found.examples[0] if found.examples else None
        shown = f"line {first['line']}: {first['why']}" if first else ""
        table.add_row(
            name,
            f"{found.rows:,}",
            f"{found.rows / rows:.2%}",
            f"{found.dropped:,}",
            f"{found.cut:,}" if name == "identity" else "",
            escape(shown),
        )
    console.print(table)
    for name in BY_WISH:
        if cleaned.rules[name].rows and name not in cleaned.settings.drop:
            console.print(f"{name} were only counted; --drop {name} drops them")
    if bad := cleaned.rules["malformed"].examples:
        more = cleaned.rules["malformed"].rows - len(bad)
        console.print(
            f"malformed: line {', '.join(str(one['line']) for one in bad)}{f' and {more:,} more' if more else ''}",
            highlight=False,
        )
    if cleaned.against:
        hit, of = len(cleaned.against["hit"]), cleaned.against["examples"]
        console.print(f"pieces of {hit:,} of {counted(of, 'evaluation example')} were found", highlight=False)
    console.print(
        f"{cleaned.rows:,} of {counted(rows, 'row')} {'are in' if out else 'would be left'}"
        + (f" {escape(str(out))}; what was found: {escape(str(record_of(out)))}" if out else ""),
        highlight=False,
        soft_wrap=True,
    )
