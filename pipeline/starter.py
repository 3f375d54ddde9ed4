"""`potstill init`: a commented recipe that runs."""

import json
from pathlib import Path
from string import Template
from typing import get_args

from potstill.compress.student import layers_of
from potstill.pipeline.recipe import OF_TEXT, TaskWord, load_recipe, parse_pairs
from potstill.pipeline.stages import STAGES
from potstill.targets.host import runs_here
from potstill.targets.target import load_target, target_names
from potstill.validate.checkpoint import Checkpoint, open_folder, reading_weights
from potstill.validate.errors import InputError
from potstill.validate.files import write_text

TASK_OF = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "Model": "feature-extraction",
}
RECIPE = Template("""\
# potstill run $file --dry-run    shows the plan and what it costs
# potstill run $file              does it; stopped, the same command goes on where it was

task: $task                      # or another: $tasks

teacher:
  checkpoint: $teacher           # a folder that transformers opens, a hub name, or package.module:factory
$weights
data:
  train: $train                  # CSV, TSV, JSON lines, Parquet, .npz[:key], a folder of class folders, a hub dataset
  eval: $eval                    # judges every step; never trained or calibrated on
# calibrate: $train              # examples for activation ranges; default: the training examples
# shifted: other.tsv             # a second set of other origin that judges, under the same gate
# perturb: [$perturb]            # judge on eval made harder, too
$columns
$student
stages:
  - distill:
      epochs: $epochs
#     losses: {kl: 0.9, hard: 0.1}   # by name, each with a weight; the default suits the task
#     temperature: 2.0           # softens the teacher's distribution

gate:
  max_drop: 2pp                  # points of the metric against the teacher; 1% is a hundredth of the teacher's value
# undecided: strict              # lets only what the whole 95 % interval decides pass; default: the estimate decides
# max_slice_drop: 5pp            # of the worst slice; also max_calibration_error
# min_agreement: 95%             # with the teacher; also max_flips, max_divergence, max_perplexity_rise
# max_latency: 20ms              # of a package; also max_size, max_memory, max_fallback

targets:                         # potstill targets lists them
$targets
# search: {time: 10min}          # where a package misses the gate: to repair it, then to leave nodes in float; 0: not
# emulate: {time: 10s}           # for each package that this machine computes otherwise than its target; 0: not

# What cards and LICENSE files say of licences is read; potstill licences $file tells. What they do not say, say here:
# licences: {teacher: apache-2.0, data: own}       # own: made by yourself; decided_by: NAME where it is not known

seed: 0
""")


def write_recipe(
    out: Path,
    *,
    teacher: str,
    weights: Path | None,
    task: str | None,
    train: str,
    eval_: str,
    student: str | None,
    columns: str | None,
) -> None:
    """Write a recipe that passes every check; an existing file is left alone.

    Raises:
        InputError: the file is there, the task or the student cannot be told, or the recipe does not check.
    """
    if out.exists():
        raise InputError(f"{out} is there already; give another --out")
    checkpoint = Checkpoint(teacher, weights)
    if checkpoint.onnx:
        raise InputError(
            f"{teacher} is an ONNX file; a recipe that distils needs a checkpoint. Try: potstill export {teacher}"
        )
    task = task or task_of(checkpoint)
    pairs = parse_pairs(columns, as_text=True) if columns else {}
    text = RECIPE.substitute(
        file=out,
        task=task,
        tasks=", ".join(one for one in get_args(TaskWord) if one != task),
        teacher=json.dumps(teacher),
        train=json.dumps(train),
        eval=json.dumps(eval_),
        weights=f"  weights: {json.dumps(str(weights))}\n" if weights else "",
        columns=f"  columns: {json.dumps(pairs)}\n" if pairs else "# columns: {text: sentence, label: label}\n",
        student=_student_block(checkpoint, student),
        perturb="typos" if task in OF_TEXT else "noise",
        epochs=30 if checkpoint.is_factory else 3,
        targets="\n".join(f"  - {name}" for name in _likely_targets()),
    )
    write_text(out, text)
    try:
        load_recipe(out, stage_types=STAGES, target_names=target_names())
    except InputError:
        out.unlink()
        raise


def task_of(checkpoint: Checkpoint) -> str:
    """The task that a checkpoint's architecture was made for."""
    alone = checkpoint.onnx and not (checkpoint.beside_onnx / "config.json").is_file()
    if checkpoint.is_factory or alone:
        return "module"
    from transformers import AutoConfig

    folder = str(checkpoint.beside_onnx) if checkpoint.onnx else open_folder(checkpoint)
    with reading_weights(checkpoint):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    names = config.architectures or [""]
    for ending, task in TASK_OF.items():
        if names[0].endswith(ending):
            return task
    raise InputError(
        f"{checkpoint} is a {names[0] or 'model of unknown kind'}; say --task {' or '.join(TASK_OF.values())}"
    )


def _student_block(checkpoint: Checkpoint, student: str | None) -> str:
    """The student that was asked for, else half of the teacher's layers."""
    if student is None:
        if checkpoint.is_factory:
            raise InputError("a factory's module cannot be cut; give --student package.module:factory")
        student = f"layers={max(1, layers_of(checkpoint) // 2)}"
    if "=" not in student:
        return f"student:\n  checkpoint: {json.dumps(student)}\n"
    lines = [f"  {name}: {value}" for name, value in parse_pairs(student).items()]
    return "\n".join(["student:                         # cut from the teacher; or checkpoint: NAME", *lines, ""])


def _likely_targets() -> list[str]:
    """The target that this machine computes like, and a phone."""
    alike = [name for name in target_names() if runs_here(load_target(name))[0]]
    return [*(alike or ["laptop-x86-avx2"])[:1], "phone-arm64-dotprod"]
