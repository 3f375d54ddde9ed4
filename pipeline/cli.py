"""The command line: verbs that build a recipe and walk it, and a few that only tell.

Heavy packages are imported inside the verbs, so that `--help` answers at once.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from potstill.pipeline.data_verbs import clean
from potstill.pipeline.device_verbs import devices, profile, report
from potstill.pipeline.generating import generate
from potstill.pipeline.kinship_verb import Several, kinship
from potstill.pipeline.licence_verbs import DecidedByOption, LicencesOption, licences, licences_said
from potstill.pipeline.options import (
    ColumnsOption,
    EmulateOption,
    EvalOption,
    JsonOption,
    LengthOption,
    OutOption,
    PerturbOption,
    PreprocessingOption,
    SearchOption,
    SeedOption,
    ShiftedOption,
    SlicesOption,
    TaskOption,
    WeightsOption,
    print_json,
)
from potstill.pipeline.ranks import crew, rank
from potstill.pipeline.trust_verbs import sign, verify
from potstill.validate.errors import InputError, PotstillError

if TYPE_CHECKING:
    from potstill.pipeline.recipe import Recipe

app = typer.Typer(
    name="potstill",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Distil a model that is too big into one that runs on a phone or a laptop, with proof after every step.",
    epilog="Exit codes: 0 done, 2 wrong use or input, 3 a gate failed or a licence stops it, 4 a device or service "
    "could not be reached, 1 a fault of ours.",
)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    _state["debug"] = debug
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("potstill"))
        raise typer.Exit


app.command()(generate)
app.command()(profile)
app.command()(report)
app.command()(clean)
app.command()(licences)
app.command()(verify)
app.command()(sign)
app.command(cls=Several)(kinship)
app.add_typer(devices, name="devices")

_state = {"debug": False}
STOPPED = 130  # what a shell calls a program that was stopped by Ctrl-C


@app.command()
def compress(
    teacher: Annotated[str, typer.Argument(help="Folder, hub name, or package.module:factory with --weights.")],
    task: TaskOption,
    train: Annotated[str, typer.Option("--train", help="Examples to learn from.")],
    eval_: EvalOption,
    out: OutOption,
    weights: WeightsOption = None,
    columns: ColumnsOption = None,
    student: Annotated[str | None, typer.Option("--student", help="layers=3,vocabulary=used, or a checkpoint.")] = None,
    student_weights: Annotated[
        Path | None, typer.Option("--student-weights", help="Weights file, for a factory.")
    ] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Passes over the training examples.")] = None,
    max_drop: Annotated[str | None, typer.Option("--max-drop", help="Most that may be lost: 2pp or 1%.")] = None,
    slices: SlicesOption = None,
    shifted: ShiftedOption = None,
    perturb: PerturbOption = None,
    max_length: LengthOption = None,
    licences: LicencesOption = None,
    decided_by: DecidedByOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Distil a teacher into a small student, judged against the teacher."""
    mapping = _mapping(task, teacher, weights, eval_, columns, max_length, max_drop, seed)
    mapping["data"] |= {"train": train} | _judged_by(slices, shifted, perturb)
    mapping |= licences_said(licences, decided_by)
    mapping["stages"] = [{"distill": {} if epochs is None else {"epochs": epochs}}]
    if student_weights and not student:
        raise InputError("--student-weights are weights for --student package.module:factory; say which")
    if student:
        mapping["student"] = _student(student, student_weights)
    _walk(_build(mapping, {"stages.0.distill.epochs": "--epochs"}), out, as_json)


@app.command()
def export(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder, hub name, package.module:factory with --weights, or an ONNX file in float32.")
    ],
    target: Annotated[list[str], typer.Option("--target", help="Name of a target; give it once for each.")],
    calibrate: Annotated[str, typer.Option("--calibrate", help="Examples for activation ranges; not those of --eval.")],
    eval_: EvalOption,
    out: OutOption,
    task: Annotated[str | None, typer.Option("--task", help="Default: read from the checkpoint.")] = None,
    weights: WeightsOption = None,
    preprocessing: PreprocessingOption = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="Whom to judge against; default: the checkpoint.")
    ] = None,
    teacher_weights: Annotated[
        Path | None, typer.Option("--teacher-weights", help="Weights file, for a factory.")
    ] = None,
    columns: ColumnsOption = None,
    max_drop: Annotated[str | None, typer.Option("--max-drop", help="Most that may be lost: 1pp or 1%.")] = None,
    slices: SlicesOption = None,
    shifted: ShiftedOption = None,
    perturb: PerturbOption = None,
    max_length: LengthOption = None,
    search_time: SearchOption = None,
    emulate_time: EmulateOption = None,
    licences: LicencesOption = None,
    decided_by: DecidedByOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Turn a checkpoint or an ONNX file into one package for each target, judged as ONNX Runtime runs it."""
    from potstill.pipeline.starter import task_of
    from potstill.validate.checkpoint import Checkpoint

    if teacher_weights and not teacher:
        raise InputError("--teacher-weights are weights for --teacher package.module:factory; say which")
    judge = (teacher, teacher_weights) if teacher else (checkpoint, weights)
    task = task or task_of(Checkpoint(checkpoint, weights, preprocessing))
    mapping = _mapping(task, judge[0], judge[1], eval_, columns, max_length, max_drop, seed)
    if preprocessing:
        mapping["teacher"]["preprocessing"] = str(preprocessing)
    mapping["data"] |= {"calibrate": calibrate} | _judged_by(slices, shifted, perturb)
    mapping |= (
        licences_said(licences, decided_by)
        | {"targets": target}
        | {name: {"time": time} for name, time in _times(search_time, emulate_time).items()}
    )
    if teacher:
        mapping["student"] = _student(checkpoint, weights)
    _walk(_build(mapping, {}), out, as_json)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML; `potstill init` writes one.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the run; default: runs/<recipe's name>.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Change a value: distill.epochs=5.")] = None,
    search_time: SearchOption = None,
    emulate_time: EmulateOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan with its cost, and do nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compress, export and profile by one recipe."""
    from potstill.pipeline.recipe import load_recipe
    from potstill.pipeline.stages import STAGES

    overrides = [*(set_ or []), *(f"{name}.time={time}" for name, time in _times(search_time, emulate_time).items())]
    loaded = load_recipe(recipe, stage_types=STAGES, target_names=_target_names(), overrides=overrides)
    _walk(loaded, out or Path("runs") / recipe.stem, as_json, dry_run=dry_run)


@app.command()
def targets(
    name: Annotated[str | None, typer.Argument(help="A target, or a YAML file of your own, to show whole.")] = None,
    here: Annotated[bool, typer.Option("--here", help="Which fit this machine by its CPU, the best first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the targets; show one, each value with its source; or name those that fit this machine."""
    from potstill.pipeline.tell import print_target, print_targets, tell_fits
    from potstill.targets.target import load_target, target_names

    known = [load_target(one) for one in ([name] if name else target_names())]
    if here:
        tell_fits(known, as_json)
    elif name:
        print_json(known[0].model_dump(mode="json")) if as_json else print_target(known[0])
    else:
        print_json({t.id: t.title for t in known}) if as_json else print_targets(known)


@app.command()
def check(
    package: Annotated[Path, typer.Argument(help="Folder of a package.")],
    target: Annotated[str | None, typer.Option("--target", help="Default: the one it was made for.")] = None,
    max_fallback: Annotated[
        str | None, typer.Option("--max-fallback", help="Most of nodes and work that may leave the accelerator: 0%.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Hold a package against a target without the device: size, opset, shapes, numbers, operators, fallback."""
    from potstill.pipeline.checking import check_package

    check_package(package, target, max_fallback, as_json)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """What works on this machine, what is missing, and how to get it."""
    from potstill.pipeline.doctor import examine
    from potstill.pipeline.tell import print_findings

    findings = examine()
    print_json([vars(finding) for finding in findings]) if as_json else print_findings(findings)


@app.command()
def demo(out: OutOption = Path("runs/demo"), as_json: JsonOption = False) -> None:
    """The whole way on handwritten digits, offline, in under three minutes."""
    from potstill.pipeline.demo import prepare

    _walk(_build(prepare(out), {}), out, as_json)


@app.command()
def init(
    teacher: Annotated[str, typer.Argument(help="Folder, hub name, or package.module:factory with --weights.")],
    train: Annotated[str, typer.Option("--train", help="Examples to learn from.")],
    eval_: EvalOption,
    task: Annotated[str | None, typer.Option("--task", help="Default: read from the checkpoint.")] = None,
    weights: WeightsOption = None,
    student: Annotated[str | None, typer.Option("--student", help="Default: half of the teacher's layers.")] = None,
    columns: ColumnsOption = None,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a commented recipe that runs."""
    from potstill.pipeline.starter import write_recipe

    write_recipe(
        out, teacher=teacher, weights=weights, task=task, train=train, eval_=eval_, student=student, columns=columns
    )
    typer.echo(f"wrote {out}; look at its plan with: potstill run {out} --dry-run")


def _mapping(
    task: str,
    teacher: str,
    weights: Path | None,
    eval_: str,
    columns: str | None,
    max_length: int | None,
    max_drop: str | None,
    seed: int,
) -> dict[str, Any]:
    """The part of a recipe that every verb has."""
    from potstill.pipeline.recipe import parse_pairs

    data: dict[str, Any] = {"eval": eval_}
    if columns:
        data["columns"] = parse_pairs(columns, as_text=True)
    if max_length is not None:
        data["max_length"] = max_length
    teacher_spec = {"checkpoint": teacher} | ({"weights": str(weights)} if weights else {})
    mapping: dict[str, Any] = {"task": task, "teacher": teacher_spec, "data": data, "seed": seed}
    return mapping | ({"gate": {"max_drop": max_drop}} if max_drop is not None else {})


def _times(search: str | None, emulate: str | None) -> dict[str, str]:
    """The times that were given, by the part of a recipe that they are of."""
    return {name: time for name, time in (("search", search), ("emulate", emulate)) if time is not None}


def _judged_by(slices: list[str] | None, shifted: str | None, perturb: list[str] | None) -> dict[str, Any]:
    """What a recipe's data say of judging beside the evaluation set."""
    return {"slices": slices or [], "perturb": perturb or []} | ({"shifted": shifted} if shifted else {})


def _student(text: str, weights: Path | None) -> dict[str, Any]:
    """`layers=3,hidden=192` or a checkpoint."""
    from potstill.pipeline.recipe import parse_pairs

    if "=" in text and not Path(text).exists():
        return parse_pairs(text) | ({"weights": str(weights)} if weights else {})
    return {"checkpoint": text} | ({"weights": str(weights)} if weights else {})


OPTIONS = {
    "task": "--task",
    "teacher": "TEACHER",
    "teacher.weights": "--weights",
    "teacher.preprocessing": "--preprocessing",
    "data.train": "--train",
    "data.eval": "--eval",
    "data.calibrate": "--calibrate",
    "data.columns": "--columns",
    "data.slices": "--slice",
    "data.shifted": "--shifted",
    "data.perturb": "--perturb",
    "data.max_length": "--max-length",
    "gate.max_drop": "--max-drop",
    "search": "--search-time",
    "emulate": "--emulate-time",
    "student": "--student",
    "licences": "--licences",
    "licences.decided_by": "--decided-by",
    "targets": "--target",
    "seed": "--seed",
}


def _build(mapping: dict[str, Any], options: dict[str, str]) -> "Recipe":
    from potstill.pipeline.recipe import build_recipe
    from potstill.pipeline.stages import STAGES

    return build_recipe(
        mapping, stage_types=STAGES, target_names=_target_names(), base=Path.cwd(), option_names=OPTIONS | options
    )


def _target_names() -> list[str]:
    from potstill.targets.target import target_names

    return target_names()


def _walk(recipe: "Recipe", out: Path, as_json: bool, dry_run: bool = False) -> None:
    """Walk a recipe, or print its plan; the ledger and the report are written whatever the gates say."""
    from potstill.pipeline.black_box import tell_estimate
    from potstill.pipeline.walk import follow, plan, walk

    if recipe.teacher.api and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a teacher behind an API is asked by one process: potstill generate first, and torchrun after")
    if recipe.teacher.api and dry_run:
        tell_estimate(recipe, out, as_json)
        return
    if rank():
        raise typer.Exit(0 if dry_run else crew.follow(follow(recipe, out)))
    if dry_run:
        cost = plan(recipe, out, quiet=as_json)
        if as_json:
            print_json(cost.to_json())
        return
    with crew.led():
        ledger, failure = walk(recipe, out, quiet=as_json)
        if as_json:
            print_json(ledger.to_json())
        if failure:
            raise failure


def main() -> NoReturn:
    """Run the command line; errors become one sentence and an exit code."""
    sys.exit(call(sys.argv[1:]))


def call(words: Sequence[str]) -> int:
    """Run one command, given its words, and return the exit code; what it has to say goes to the standard streams."""
    _state["debug"] = False
    try:
        code = app(list(words), standalone_mode=False)
        if code == STOPPED:
            return _say(KeyboardInterrupt(), code, "stopped; nothing is lost: the same command goes on where it was")
        return code if isinstance(code, int) else 0
    except PotstillError as error:
        return _say(error, error.exit_code)
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            return _say(
                error,
                InputError.exit_code,
                f"the disk is full ({error.filename or 'while writing'}); what was whole "
                "before is kept: free some space, and the same command goes on where it was",
            )
        return _say(error, 1, f"{error}; this is a fault of ours, --debug shows where")
    except Exception as error:
        shown = getattr(error, "format_message", None)  # typer's own errors of use
        if shown:  # of a group without a verb they are its help, printed already, and no words
            return _say(error, InputError.exit_code, shown()) if shown() else InputError.exit_code
        if "No space left" in str(error):
            return _say(
                error,
                InputError.exit_code,
                "the disk is full; what was whole before is kept: free some space, and the "
                "same command goes on where it was",
            )
        return _say(error, 1, f"{type(error).__name__}: {error}; this is a fault of ours, --debug shows where")


def _say(error: BaseException, code: int, text: str | None = None) -> int:
    """One sentence on standard error, by the first process, after the traceback with --debug; the exit code."""
    if rank():
        return code
    if _state["debug"]:
        traceback.print_exception(error)
    typer.secho(f"potstill: {text or error}", fg=typer.colors.RED, err=True)
    return code


if __name__ == "__main__":
    main()
