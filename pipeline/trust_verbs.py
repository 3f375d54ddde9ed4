"""The verbs of the command line that tell where an artefact came from, and sign it. Heavy packages come late."""

from pathlib import Path
from typing import Annotated

import typer

from potstill.pipeline.options import JsonOption, print_json
from potstill.validate.errors import GateFailed

FolderArgument = Annotated[Path, typer.Argument(help="Folder of a package, or of a checkpoint that Potstill made.")]


def verify(
    folder: FolderArgument,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="The teacher's folder, weights or ONNX file; default: the run's.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Folder of the run that made it; default: the one it lies in.")
    ] = None,
    public_key: Annotated[
        Path | None, typer.Option("--public-key", help="It must be signed by this Ed25519 key, in PEM.")
    ] = None,
    golden: Annotated[bool, typer.Option("--golden", help="Run a package's golden samples here, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check every hash up to the teacher, and name the first thing that does not fit."""
    from potstill.pipeline.lineage.verify import Verification
    from potstill.pipeline.tell import print_verified

    verification, failure = Verification(folder, teacher, run, public_key, golden), None
    try:
        verification()
    except GateFailed as error:
        failure = error
    if as_json:
        checked = [vars(one) for one in verification.checked]
        print_json({"folder": str(folder), "checked": checked, "broken": str(failure) if failure else None})
    else:
        print_verified(folder, [vars(one) for one in verification.checked])
    if failure:
        raise failure


def sign(
    folder: FolderArgument,
    key: Annotated[Path, typer.Option("--key", help="A private Ed25519 key in PEM; it is read and never copied.")],
) -> None:
    """Sign a package or a checkpoint whose hashes fit: SHA256SUMS and its signature are put beside the files."""
    from potstill.pipeline.lineage import signing
    from potstill.pipeline.lineage.verify import Verification

    Verification(folder).itself()
    name = signing.sign(folder, key, lambda: str(typer.prompt(f"password of {key}", hide_input=True, err=True)))
    typer.echo(f"signed {folder} with the key SHA256:{name}")
