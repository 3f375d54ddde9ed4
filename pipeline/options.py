"""Options that several verbs of the command line share."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

TaskOption = Annotated[
    str,
    typer.Option(
        "--task",
        help="text-classification, token-classification, question-answering, feature-extraction, text-generation, "
        "image-classification, audio-classification or module.",
    ),
]
WeightsOption = Annotated[Path | None, typer.Option("--weights", help="Weights file, for package.module:factory.")]
EvalOption = Annotated[
    str,
    typer.Option(
        "--eval",
        help="Examples that judge: CSV, TSV, JSON lines, Parquet, .npz[:key], "
        "a folder of class folders, or a hub dataset.",
    ),
]
ColumnsOption = Annotated[
    str | None, typer.Option("--columns", help="Which columns hold what: text=sentence,label=label.")
]
SlicesOption = Annotated[
    list[str] | None,
    typer.Option("--slice", help="Column of --eval to judge slices by; give it once for each."),
]
ShiftedOption = Annotated[
    str | None, typer.Option("--shifted", help="A second set that judges, of other origin than --eval; same gate.")
]
PerturbOption = Annotated[
    list[str] | None,
    typer.Option("--perturb", help="Judge on --eval made harder, too: noise, typos, …; give it once for each."),
]
PreprocessingOption = Annotated[
    Path | None,
    typer.Option(
        "--preprocessing", help="For an ONNX file: folder of its config and tokenizer or processor; default: its own."
    ),
]
SearchOption = Annotated[
    str | None,
    typer.Option(
        "--search-time",
        help="Where the gate is missed: how long to repair the integers, then to search for nodes to leave in float, "
        "for each target; 0: not. Default: 10min.",
    ),
]
EmulateOption = Annotated[
    str | None,
    typer.Option(
        "--emulate-time",
        help="Where this machine computes otherwise than a target: how long its package is run under an emulator of "
        "the target's CPU; 0: not. Default: 10s.",
    ),
]
LengthOption = Annotated[int | None, typer.Option("--max-length", help="Text only: tokens kept of an example.")]
OutOption = Annotated[Path, typer.Option("--out", help="Folder of the run; the same command goes on where it was.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")]


def print_json(value: Any) -> None:
    """Plain data on standard output, for `--json`."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
