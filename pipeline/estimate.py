"""What a run will cost before it starts: time, memory and disk, from a few timed batches. Estimated, not measured."""

import copy
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from potstill.compress.distill import Distill, rehearsal
from potstill.compress.prune import Prune
from potstill.compress.qat import Qat, quantized
from potstill.pipeline import searching
from potstill.pipeline.cache import Planned
from potstill.pipeline.ledger import size_in_words
from potstill.pipeline.packing import graph_step
from potstill.pipeline.run import Run
from potstill.pipeline.stages import STAGES
from potstill.targets.host import runs_here
from potstill.targets.target import OPSETS, load_target
from potstill.validate.data import Examples
from potstill.validate.errors import InputError
from potstill.validate.fake_quant import Formats
from potstill.validate.predictor import TorchPredictor, best_device
from potstill.validate.task import Model

BATCHES = 2  # timed, after one to warm up
EXPORT_SECONDS = 8.0  # torch to ONNX, or quantising and profiling, of a small model; grows with the model
EXPORT_SECONDS_PER_MB = 0.1
ADAM_COPIES = 3  # a training checkpoint holds the weights and Adam's two moments
CHECKPOINTS_KEPT = 3  # best, last, and the one being written


@dataclass(frozen=True)
class Step:
    """One step of a plan.

    Attributes:
        name: of its folder.
        what: in words.
        done: whether nothing is left of it.
        seconds: what is left of it, 0 when it is done.
        search_seconds: that a search may take on top if the gate is missed.
    """

    name: str
    what: str
    done: bool
    seconds: float
    search_seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """The steps of a run and what they need, estimated.

    Attributes:
        steps: in order.
        memory_bytes: peak of this process, or of the accelerator when there is one.
        memory_free_bytes: what the machine has for it.
        disk_bytes: that the run will write.
        disk_free_bytes: on the disk of its folder.
        device: where it trains.
        licences: the verdict on them, as plain data.
    """

    steps: list[Step]
    memory_bytes: int
    memory_free_bytes: int
    disk_bytes: int
    disk_free_bytes: int
    device: str
    licences: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of all steps that are left."""
        return sum(step.seconds for step in self.steps)

    @property
    def search_seconds(self) -> float:
        """The most that searches may take on top, if every package misses its gate."""
        return sum(step.search_seconds for step in self.steps)

    def check(self) -> None:
        """Refuse a run that will not fit.

        Raises:
            InputError: the estimate of memory or disk is above what is free.
        """
        for what, need, free, hint in (
            ("memory", self.memory_bytes, self.memory_free_bytes, "a smaller batch_size or student"),
            ("disk", self.disk_bytes, self.disk_free_bytes, "another --out, or freeing space"),
        ):
            if need > free:
                raise InputError(
                    f"the run will not fit: about {size_in_words(need)} of {what} are needed and "
                    f"{size_in_words(free)} are free; try {hint}"
                )

    def in_words(self) -> str:
        """One line."""
        more = f" (searches where packages miss the gate: at most {duration(self.search_seconds)} more)"
        return (
            f"estimated: about {duration(self.seconds)} on {self.device}{more if self.search_seconds else ''}, "
            f"{self.memory_bytes / 1e9:.1f} GB of memory, {self.disk_bytes / 1e9:.2f} GB of disk"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"kind": "estimated", "seconds": self.seconds, "search_seconds": self.search_seconds} | asdict(self)


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def estimate(run: Run) -> Plan:
    """Load what the recipe names, time a few batches of each kind that is left to do, and multiply.

    Raises:
        InputError: whatever the run itself would refuse: data, labels, checkpoints.
    """
    material, device = run.material, best_device()
    planned = run.plan()
    left = not all(step.done for step in planned)
    fresh = bool(run.recipe.student or run.recipe.stages)
    student = material.new_student() if fresh and left else material.teacher
    steps = [_step(run, one) for one in planned]
    if left:
        costs = _costs(run, student, device, {step.step for step in planned if not step.made})
        steps = [replace(step, seconds=0.0 if step.done else costs(step.name)) for step in steps]
    return Plan(
        steps=steps,
        memory_bytes=_memory_used(device),
        memory_free_bytes=_memory_free(device),
        disk_bytes=_disk(run, student) if left else 0,
        disk_free_bytes=shutil.disk_usage(_existing(run.out)).free,
        device=str(device),
    )


def _step(run: Run, planned: Planned) -> Step:
    """A step of the plan, without its own time."""
    name, most, what = planned.step, 0.0, _what(run, planned.step)
    if name.startswith("packages/"):
        target = next(one for one in map(load_target, run.recipe.targets) if name == f"packages/{one.id}")
        most = searching.most_seconds(run.material, run.cache, run.out / name, planned.key, target)
        what += f"; if it misses the gate, a search of at most {duration(most)}" if most else ""
    return Step(name, what, planned.done, 0.0, most)


def _what(run: Run, step: str) -> str:
    """A few words on a step."""
    number, _, name = step.partition("-")
    if name in STAGES and number.isdigit():
        stage = run.recipe.build_stages(STAGES)[int(number) - 2]
        loop, rounds = _loop(stage)
        return f"{rounds * loop.steps(len(run.material.lesson_examples[0])):,} steps of {loop.batch_size} examples"
    return {
        "0-teacher": "predict the evaluation set",
        "1-student": "make and judge the student",
        "graph": "the float32 ONNX graph, compared with the model",
        "reference": "the teacher's own ONNX; time all in turn",
    }.get("graph" if step.startswith("graph-") else step, "quantise, judge in ONNX Runtime, profile")


def _costs(run: Run, student: Model, device: torch.device, left: set[str]) -> Callable[[str], float]:
    """Seconds of each step, made (where it is in `left`) and judged; a training is timed only if it is left to do."""
    material = run.material
    examples = sum(map(len, (material.eval, *material.elsewhere.values())))
    teacher_seconds = _predicting(run, material.teacher, device) * examples
    student_seconds = _predicting(run, student, device) * examples
    one_by_one = _predicting(run, student, torch.device("cpu"), batch=1) * examples if run.recipe.targets else 0.0
    exporting = EXPORT_SECONDS + EXPORT_SECONDS_PER_MB * student.parameters * 4 / 1e6
    graphs = {graph_step(opset) for opset in OPSETS}
    making = dict.fromkeys((*graphs, "reference"), exporting)
    judging = {"0-teacher": teacher_seconds, "1-student": student_seconds, **dict.fromkeys((*graphs, "reference"), 0.0)}
    for index, (spec, stage) in enumerate(zip(run.recipe.stages, run.recipe.build_stages(STAGES), strict=True)):
        name = f"{index + 2}-{spec.name}"
        making[name], judging[name] = _training(run, stage, student, device) if name in left else 0.0, student_seconds
    for name in left:
        making.setdefault(name, exporting if name.startswith("packages/") else 0.0)
    for name in run.recipe.targets:
        target = load_target(name)
        if target.emulate and not runs_here(target)[0]:
            step = f"packages/{target.id}"
            judging[step] = one_by_one + run.recipe.emulate.seconds
    return lambda step: making.get(step, 0.0) * (step in left) + judging.get(step, one_by_one)


def _timed(work: Callable[[], object], times: int = BATCHES) -> float:
    """Seconds of one call, after one to warm up."""
    work()
    started = time.perf_counter()
    for _ in range(times):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


def _predicting(run: Run, model: Model, device: torch.device, batch: int | None = None) -> float:
    """Seconds to predict one example."""
    predictor = TorchPredictor(model, "timing", device)
    before = model.encode.truncated
    examples = run.material.eval
    size = min(batch or predictor.batch_size, len(examples))
    rows = examples.rows(_typical(examples, size, run.material.task.length_of))
    seconds = _timed(lambda: predictor(rows)) / size
    model.encode.truncated = before
    return seconds


def _typical(examples: Examples, size: int, length_of: str | None) -> list[int]:
    """Indices of a batch of usual cost: of texts, which are batched by length, those around the mean length."""
    if length_of is None:
        return list(range(size))
    order = _by_length(examples, length_of)
    lengths = examples.lengths(length_of)[order]
    middle = int(np.searchsorted(lengths, np.mean(lengths)))
    start = max(0, min(middle - size // 2, len(order) - size))
    return order[start : start + size]


def _by_length(examples: Examples, column: str) -> list[int]:
    """Indices of texts from short to long."""
    return [int(i) for i in np.argsort(examples.lengths(column))]


def _loop(stage: Distill | Qat | Prune) -> tuple[Distill, int]:
    """The training inside a stage, and how often it takes place."""
    if isinstance(stage, Distill):
        return stage, 1
    return stage.distill, stage.rounds if isinstance(stage, Prune) else 1


def _training(run: Run, stage: Distill | Qat | Prune, student: Model, device: torch.device) -> float:
    """Seconds of all steps of a training stage, from real steps on a copy of the student."""
    lesson, student = run.material.lesson(Path(), None), copy.deepcopy(student)
    if isinstance(stage, Qat):
        student.module = quantized(student.in_float(), lesson, Formats(), BATCHES)
    loop, rounds = _loop(stage)
    train, column = lesson.train, run.material.task.length_of
    size = min(loop.batch_size, len(train))
    typical = _typical(train, size, column)
    with rehearsal(loop, student, lesson, device) as step:
        if column:  # the longest texts decide the memory, the usual ones the time
            step(_by_length(train, column)[-size:])
        seconds = _timed(lambda: step(typical))
    return seconds * loop.accumulate * loop.steps(len(train)) * rounds


def _memory_used(device: torch.device) -> int:
    """Peak so far: a batch as large as any was trained on."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _memory_free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0]) + int(torch.cuda.memory_reserved())
    return int(psutil.virtual_memory().available) + int(psutil.Process().memory_info().rss)


def _disk(run: Run, student: Model) -> int:
    """Bytes that are written: checkpoints while training, the stages' own, graphs and packages."""
    weights = student.parameters * 4
    training = weights * ADAM_COPIES * CHECKPOINTS_KEPT if run.recipe.stages else 0
    kept = weights * (len(run.recipe.stages) + 2 + len(run.recipe.targets) + (1 if run.recipe.targets else 0))
    reference = run.material.teacher.parameters * 4 if run.recipe.targets else 0
    predicted = _bytes_predicted(run) * (len(run.recipe.stages) + 2 + len(run.recipe.targets))
    return training + kept + reference + predicted


def _bytes_predicted(run: Run) -> int:
    """What a model's predictions on all sets of examples take, in float16, by the width of one batch."""
    material = run.material
    count = min(8, len(material.eval))
    before = material.teacher.encode.truncated
    rows = TorchPredictor(material.teacher, "the teacher", best_device())(material.eval.rows(list(range(count))))
    material.teacher.encode.truncated = before
    return rows.size * 2 // count * sum(map(len, (material.eval, *material.elsewhere.values())))


def _existing(path: Path) -> Path:
    """The nearest folder that is there."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


def print_plan(plan: Plan, console: Console) -> None:
    """A plan as a table."""
    table = Table(
        title="Plan",
        title_justify="left",
        caption_justify="left",
        caption="estimated from a few timed batches; what is done already is not done again",
    )
    for heading in ("step", "what", "left"):
        table.add_column(heading)
    for step in plan.steps:
        table.add_row(step.name, step.what, "done" if step.done else f"about {duration(step.seconds)}")
    console.print(table)
    console.print(
        f"[bold]in all[/] {plan.in_words()}; free: {plan.memory_free_bytes / 1e9:.1f} GB of memory, "
        f"{plan.disk_free_bytes / 1e9:.1f} GB of disk",
        highlight=False,
    )
