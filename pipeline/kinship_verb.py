"""`potstill kinship`: how close a model's outputs are to each suspect's. Heavy packages are imported inside."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from potstill.pipeline.kinship_texts import are_texts, compare_texts, plain, print_identity
from potstill.pipeline.options import ColumnsOption, JsonOption, LengthOption, print_json
from potstill.validate.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from potstill.validate.examples import Examples
    from potstill.validate.kinship import Kinship
    from potstill.validate.model import Model, Task

SEVERAL = ("--suspects", "--references")
WORDS = "This is evidence, not proof"


class Several(TyperCommand):
    """A command whose options in `SEVERAL` take all words up to the next option: `--suspects A B C`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Say the option again before each further word."""
        words: list[str] = []
        option = None
        for word in args:
            if word.startswith("-"):
                option = word if word in SEVERAL else None
                words += [] if option else [word]
            else:
                words += [option, word] if option else [word]
        return super().parse_args(ctx, words)


def kinship(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder, hub name, package, ONNX file, package.module:factory=WEIGHTS; or a .jsonl of what it wrote."
        ),
    ],
    suspects: Annotated[list[str], typer.Option("--suspects", help="Who may be its parent, written alike: A B C.")],
    task: Annotated[str | None, typer.Option("--task", help="Of the models; none for texts.")] = None,
    eval_: Annotated[str | None, typer.Option("--eval", help="Examples that all of them answer.")] = None,
    references: Annotated[
        list[str] | None,
        typer.Option("--references", help="Models of the same task that are kin to none of these: R1 R2 …."),
    ] = None,
    alpha: Annotated[
        float, typer.Option("--alpha", help="Most that may be the chance of naming a parent of a model without one.")
    ] = 0.05,
    columns: ColumnsOption = None,
    max_length: LengthOption = None,
    as_json: JsonOption = False,
) -> None:
    """Whose child a model is: how close its outputs are to each suspect's, against strangers. Evidence, not proof."""
    from potstill.pipeline.recipe import parse_pairs
    from potstill.validate.kinship import kinship as compare
    from potstill.validate.task import TASKS

    names = [model, *suspects, *(references or [])]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise InputError(f"{twice} is given twice; give each model once, as the model, a suspect or a reference")
    if not 0 < alpha < 0.5:
        raise InputError(f"--alpha is {alpha:g}, expected more than 0 and less than 0.5, like 0.05")
    named = parse_pairs(columns, as_text=True) if columns else {}
    if are_texts(names):
        found, says = compare_texts(names, len(suspects), named, alpha)
        if as_json:
            print_json(plain(found, says, model, f"{verdict(model, found)} {WORDS}."))
        else:
            _print(model, model, found, bool(references))
            print_identity(says)
        return
    if task is None or eval_ is None:
        raise InputError("models are compared by their answers: give --task and --eval, or .jsonl files of their texts")
    if task not in TASKS or TASKS[task].gives != "class":
        known = ", ".join(word for word, one in TASKS.items() if one.gives == "class")
        raise InputError(
            f"--task is {task!r}; kinship compares models that give one class ({known}), or .jsonl files of their texts"
        )
    examples = TASKS[task].examples(eval_, named, judging=True)
    outputs, labels = _answers(TASKS[task], names, examples, {"max_length": max_length} if max_length else {})
    mine, theirs, others = outputs[0], outputs[1 : len(suspects) + 1], outputs[len(suspects) + 1 :]
    found = compare(mine, dict(zip(suspects, theirs, strict=True)), others, labels, alpha)
    if as_json:
        print_json(asdict(found) | {"model": model, "data": examples.name, "says": f"{verdict(model, found)} {WORDS}."})
    else:
        _print(model, examples.name, found, bool(references))


def verdict(model: str, found: "Kinship") -> str:
    """Who is named, or nobody, in one sentence."""
    if found.named is None:
        return f"Nobody is named: no suspect is closer to {model} than strangers may be."
    also = f"; {', '.join(found.also)} closer than strangers may be, too" if found.also else ""
    return f"{found.named} is named: the closest to {model}, closer than strangers may be{also}."


def _answers(
    task: "Task", names: list[str], examples: "Examples", options: dict[str, Any]
) -> "tuple[list[NDArray[Any]], NDArray[Any]]":
    """Logits (N, C) of each model on the examples that have a label, classes as the first has them; labels (N,)."""
    import tempfile

    import numpy as np

    from potstill.validate.data import IGNORED, check_not_empty
    from potstill.validate.predictor import TorchPredictor, best_device, predict

    check_not_empty(examples)
    if task.word == "module":
        options = {"example": examples.rows([0])}
    found: list[NDArray[Any]] = []
    labels: tuple[str, ...] = ()
    for name in names:
        model = _opened(task, name, options)
        if not labels:
            labels = model.labels
            examples = task.checked(examples, labels, encode=model.encode, judging=True)
            known = examples.labels != IGNORED
        if sorted(model.labels) != sorted(labels):
            raise InputError(
                f"{name} has the classes {', '.join(model.labels)}, and {names[0]} {', '.join(labels)}; kinship "
                "compares models of the same classes"
            )
        order = [model.labels.index(label) for label in labels]
        with tempfile.TemporaryDirectory() as folder:
            predictor = TorchPredictor(model, name, best_device())
            logits = predict(predictor, examples, task.length_of, Path(folder) / "logits.npy")
            found.append(np.asarray(logits[known][:, order]))
            del logits
    return found, examples.labels[known]


def _opened(task: "Task", name: str, options: dict[str, Any]) -> "Model":
    """A model by what was typed."""
    from potstill.validate.checkpoint import Checkpoint, is_factory

    source, _, weights = name.partition("=")
    if not is_factory(source):
        return task.load(Checkpoint(name), **options)
    if not weights:
        raise InputError(f"{name} is a factory without weights; write it as {name}=WEIGHTS.safetensors")
    return task.load(Checkpoint(source, Path(weights)), **options)


def _print(model: str, data: str, found: "Kinship", referred: bool) -> None:
    """A table with a row for each suspect and measure, and what it says."""
    from rich.markup import escape

    from potstill.pipeline.tell import console, plain_table
    from potstill.validate.units import counted

    table = plain_table(
        f"{escape(model)} on {counted(found.examples, 'example')} of {escape(data)}, {found.wrong:,} of them wrong"
        if found.wrong
        else f"{escape(model)}, {counted(found.examples, 'example')}",
        "closeness: partial correlation, others held fixed; 95 %; found: what is named 4 times in 5",
    )
    for heading in ("suspect", "by", "closeness", "a stranger's", "found", "p (Holm)"):
        table.add_column(heading, overflow="fold")
    for one in found.closeness:
        own, stranger = (f"{low:+.2f} to {high:+.2f}" for low, high in (one.interval, one.stranger))
        values = (f"{one.value:+.2f} ({own})", stranger, f"{one.detectable:+.2f}", f"{one.p_holm:.2g}")
        table.add_row(escape(one.suspect), one.measure, *values)
    console.print(table)
    console.print(escape(verdict(model, found)), highlight=False, soft_wrap=True)
    if not referred:
        console.print("No references were given: suspects are each other's strangers; if two are kin, it finds less.")
    console.print(
        f"{WORDS}: a model that learned from the same data, from a sibling of the suspect or from the same "
        "pretrained weights is close, too.",
        highlight=False,
    )
