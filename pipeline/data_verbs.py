"""The verbs of the command line that look after data to learn from. Heavy packages are imported inside."""

from pathlib import Path
from typing import Annotated

import typer

from potstill.pipeline.options import JsonOption, print_json
from potstill.validate.errors import InputError


def clean(
    data: Annotated[Path, typer.Argument(help="Rows to learn from: JSON lines with text, and prompt or messages.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The file to write; a record lies beside it: FILE.record.json.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="Rows that judge; others that hold a piece of them are dropped.")
    ] = None,
    ngram: Annotated[int, typer.Option("--ngram", help="Words of such a piece.")] = 13,
    drop: Annotated[
        list[str] | None,
        typer.Option("--drop", help="What is only counted otherwise: refusals, truncated; once for each."),
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", help="Which columns hold what: text=answer,prompt=question.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell, and write nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Clean text to learn from: duplicates, pieces of the evaluation set, a teacher's name, refusals."""
    from potstill.compress.clean import Cleaning
    from potstill.compress.clean import clean as do
    from potstill.pipeline.recipe import parse_pairs

    if (out is None) != dry_run:
        raise InputError("--dry-run writes nothing, so leave --out away" if out else "give --out FILE, or --dry-run")
    named = parse_pairs(columns, as_text=True) if columns else {}
    cleaned = do(data, out, Cleaning(against=against, ngram=ngram, drop=tuple(drop or ()), columns=named))
    if as_json:
        print_json(cleaned.to_json())
        return
    from potstill.pipeline.tell_clean import print_cleaned

    print_cleaned(cleaned, out)
