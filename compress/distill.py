"""The training of the student: the teachers' outputs and layers beside the labels of the data."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import transformers
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import EarlyStoppingCallback, TrainingArguments

from potstill.compress.layer_losses import LAYERS
from potstill.compress.lesson import Collator, Indices, Lesson, Order
from potstill.compress.losses import AS_VECTORS, SOFT
from potstill.compress.meeting import check_losses, meeting_of
from potstill.compress.on_policy import Writer
from potstill.compress.output_cache import OutputCache
from potstill.compress.pupil import Pupil, Taught
from potstill.compress.teacher import Teacher, Weighing, identity, sharded
from potstill.compress.terms import Term, terms
from potstill.compress.trainer import DistillTrainer, Progress
from potstill.compress.views import Views, Way
from potstill.validate.errors import InputError
from potstill.validate.files import sha256_json
from potstill.validate.predictor import best_device
from potstill.validate.task import Model, quiet_transformers

MOST_STEPS_BETWEEN_SAVES = 500
OF_VECTORS: Mapping[str, float] = {"similarity": 1.0}  # the student may have another width
OF_CLASSES: Mapping[str, float] = {"hard": 1.0, "kl": 0.5, "dist": 2.0}
OF_OTHER_TOKENS: Mapping[str, float] = {"hard": 1.0}  # texts alone; see docs/decisions.md
OF_FEWER_TOKENS: Mapping[str, float | dict[str, Any]] = {"kl": {"weight": 1.0, "temperature": 1.0}, "hard": 1.0}
OF_TOKENS: Mapping[str, float | dict[str, Any]] = {"kl": {"weight": 0.9, "temperature": 1.0}, "hard": 0.1}
OTHERWISE: Mapping[str, float] = {"kl": 0.9, "hard": 0.1}

Log = list[dict[str, float]]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Distill:
    """Train a student on what its teachers say and on the data's labels.

    By default the loss is 0.9 · T² KL(teacher ‖ student at temperature T) + 0.1 · cross-entropy (Hinton, Vinyals and
    Dean 2015, "Distilling the knowledge in a neural network"); for three classes or more cross-entropy, 0.5 · KL and
    2 · DIST (Huang 2022); for embeddings their similarities (Tung 2019); for next tokens T is 1, as the teacher's
    distribution is soft by itself, both have the weight 1 for a student with fewer tokens, and one with others learns
    by cross-entropy alone. AdamW, a linear warm-up over the first tenth of the steps, then a linear decay to zero. The
    checkpoint with the lowest loss on held-out training examples is kept.

    Under `torchrun` each batch is shared out over the processes, and gradients are averaged: the same student as by
    one process where a loss is a mean over examples. Three kinds are not quite that: of words or tokens each process
    takes the mean over its own, of which they have unequal numbers; `dist` and `similarity` compare the examples of
    each process among themselves; and a last batch that is not whole is filled up with examples of the first.

    Attributes:
        epochs: passes over the training examples.
        temperature: T of the losses that have one; higher softens the teacher's distribution. By default each
            loss's own: 2 for the divergences and `dist` (1 for next tokens), 4 for `decoupled`.
        losses: weights by name (`kl: 0.9`), or a mapping with `weight`, settings of its own and, for layers,
            `layers`; see losses.py and layer_losses.py. By default what suits the task.
        batch_size: examples a step, over all processes.
        learning_rate: peak; by default 1e-4 for a transformers model, 2e-3 for a module of one's own.
        weight_decay: AdamW's, on all weights but biases and norms.
        augment: for image arrays (H, W, 3): `flip` left-right and `shift` by up to an eighth of the side.
            Teacher and student see the same view (Beyer 2022, "a good teacher is patient and consistent").
        views: of each augmented example, taken in turn by the epochs, so that teachers' outputs can be kept; None
            makes a new one in each epoch.
        weighing: of several teachers: `fixed`, or per example by `confidence`.
        cache: keep the teachers' outputs on disk, so that the next epoch does not run them. No effect where layers
            are matched, which are too large, or views are not counted.
        precision: `auto` is bf16 on CUDA devices that have it, float32 elsewhere.
        compile: the student by `torch.compile`.
        accumulate: batches of `batch_size` for one step of the optimizer.
        checkpointing: compute activations anew in the backward pass, to save memory; transformers models only.
        patience: stop after so many evaluations on held-out examples without a better one; None never stops.
        on_policy: share of the batches whose texts the student writes itself, of 0 to 1; language models only.
        shard_teacher: spread a teacher that fits on no single device over the processes of `torchrun` (FSDP).
    """

    epochs: float = 3
    temperature: float | None = None
    losses: dict[str, float | dict[str, Any]] | None = None
    batch_size: int = 32
    learning_rate: float | None = None
    weight_decay: float = 0.01
    augment: tuple[Way, ...] = ()
    views: int | None = None
    weighing: Weighing = "fixed"
    cache: bool = True
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    compile: bool = False
    accumulate: int = 1
    checkpointing: bool = False
    patience: int | None = None
    on_policy: float = 0.0
    shard_teacher: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that cannot train."""
        for name in ("epochs", "temperature", "batch_size", "accumulate", "views", "patience"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, and is {value:g}")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must be above 0 and below 1, and is {self.learning_rate:g}")
        if not 0 <= self.on_policy <= 1:
            raise ValueError(f"on_policy must be from 0 to 1, and is {self.on_policy:g}")
        if self.views and not self.augment:
            raise ValueError("views are of augmented examples; say which: augment: [flip, shift]")
        if self.losses is not None:
            terms(self.losses)

    def __call__(self, student: Model, lesson: Lesson) -> Log:
        """Train `student` in place; a training that was cut off goes on from its last whole checkpoint.

        Returns:
            The log: dicts with `step`, `epoch` and `loss` (with its parts by name) or `eval_loss`; the last one says
            for how many rows the teachers ran (`taught_rows`) and for how many their outputs came from disk
            (`kept_rows`), over all epochs and evaluations.

        Raises:
            InputError: the loss is not finite or diverges, the examples cannot be augmented so, or the losses do not
                fit the models.
        """
        self._check(student, lesson, best_device())
        arguments = self._arguments(student, lesson, best_device())  # joins the processes, gives each its device
        work = Work(self, student, lesson, arguments.device)
        progress = Progress()
        callbacks = [progress, *([EarlyStoppingCallback(self.patience)] if self.patience else [])]
        trainer = DistillTrainer(
            model=work.pupil,
            args=arguments,
            train_dataset=Indices("train", len(lesson.train)),
            eval_dataset=Indices("held_out", len(lesson.held_out)),
            data_collator=work.collate,
            callbacks=callbacks,
        )
        order = Order(len(lesson.train), lesson.seed, _lengths(lesson), self.batch_size)
        trainer.give(
            work.pupil, work.teacher, order, work.kept, lesson.train.name, self.shard_teacher, work.writer, work.meeting
        )
        try:
            with progress, quiet_transformers():
                trainer.train(resume_from_checkpoint=trainer.taken_up())
        finally:
            work.close()
            student.module.to("cpu").eval()
        log = [
            {k: float(v) for k, v in entry.items() if isinstance(v, int | float)} for entry in trainer.state.log_history
        ]
        return [*log, {"step": float(trainer.state.global_step), **trainer.taught()}]

    def terms(self, lesson: Lesson, student: Model) -> list[Term]:
        """The losses with their weights; by default those of the task, and of the student's tokens.

        Correlations beside the divergence where each example has one of three classes or more; what was tried stands
        in docs/decisions.md. With two classes a correlation says nothing, and of words and spans the columns are no
        classes of examples.
        """
        if self.losses:
            return terms(self.losses, self.temperature)
        if lesson.task.gives == "vector":
            return terms(OF_VECTORS, self.temperature)
        if lesson.task.gives == "tokens":
            meeting = meeting_of(student, lesson.teacher)
            of_its_own = OF_OTHER_TOKENS if meeting.columns is None else OF_FEWER_TOKENS
            return terms(of_its_own if meeting.own else OF_TOKENS, self.temperature)
        one_of_many = lesson.task.gives == "class" and len(lesson.teacher.labels) > 2
        return terms(OF_CLASSES if one_of_many else OTHERWISE, self.temperature)

    def steps(self, examples: int) -> int:
        """Optimizer steps over all epochs."""
        batches = -(-examples // self.batch_size)
        return max(1, math.ceil(-(-batches // self.accumulate) * self.epochs))

    def _check(self, student: Model, lesson: Lesson, device: torch.device) -> None:
        """Refuse settings that do not fit the models, the task or the device."""
        if self.augment and lesson.task.features != ("x",):
            raise InputError(f"augment works on image arrays x, which the task {lesson.task.word!r} does not read")
        if self.precision == "fp16" and device.type != "cuda":
            raise InputError("precision: fp16 needs a CUDA device; on a CPU say bf16 or float32")
        if self.checkpointing and not hasattr(student.core, "gradient_checkpointing_enable"):
            raise InputError(f"checkpointing is for transformers models; {student.checkpoint} is a module of one's own")
        if self.batch_size % world_size():
            raise InputError(
                f"batch_size {self.batch_size} is shared out over {world_size()} processes; give a multiple of that"
            )
        if self.on_policy and lesson.task.gives != "tokens":
            raise InputError(f"on_policy is for language models, which write; the task is {lesson.task.word}")
        check_losses(self.terms(lesson, student), student, lesson, self.on_policy)
        if self.on_policy and not any(term.name in SOFT for term in self.terms(lesson, student)):
            raise InputError("on_policy needs a loss that reads the teacher, such as kl: what is written has no labels")
        if self.shard_teacher and world_size() == 1:
            raise InputError("shard_teacher spreads the teacher over the processes of torchrun, and there is one only")

    def _arguments(self, student: Model, lesson: Lesson, device: torch.device) -> TrainingArguments:
        steps = self.steps(len(lesson.train))
        save_every = max(1, min(MOST_STEPS_BETWEEN_SAVES, -(-steps // max(1, round(self.epochs))), steps))
        default = 2e-3 if student.checkpoint.is_factory else 1e-4
        precision = self._precision(device)
        arguments = TrainingArguments(
            output_dir=str(lesson.work.resolve()),
            num_train_epochs=self.epochs,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulate,
            learning_rate=self.learning_rate or default,
            weight_decay=self.weight_decay,
            warmup_steps=max(1, steps // 10),
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            use_cpu=device.type == "cpu",
            ddp_backend="gloo" if device.type == "cpu" and world_size() > 1 else None,
            accelerator_config={"split_batches": True},
            eval_strategy="steps",
            eval_steps=save_every,
            save_strategy="steps",
            save_steps=save_every,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            logging_steps=max(1, min(50, steps // 20)),
            logging_nan_inf_filter=False,
            seed=lesson.seed,
            remove_unused_columns=False,
            dataloader_pin_memory=device.type == "cuda",
            report_to=[],
            disable_tqdm=True,
            restore_callback_states_from_checkpoint=True,
        )
        arguments._n_gpu = min(1, arguments.n_gpu)  # else several GPUs without torchrun get a batch each (DataParallel)
        return arguments

    def _precision(self, device: torch.device) -> str:
        if self.precision != "auto":
            return self.precision
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


class Work:
    """All that a training needs: the pupil, its teachers, and how batches are made."""

    def __init__(self, stage: Distill, student: Model, lesson: Lesson, device: torch.device) -> None:
        self._stage, self._lesson = stage, lesson
        found = stage.terms(lesson, student)
        layered = any(term.name in LAYERS for term in found)
        teachers = lesson.teachers if layered or any(term.name in SOFT for term in found) else ()
        samples = lesson.train.rows([0, min(1, len(lesson.train) - 1)])
        cpu = torch.device("cpu")
        student.module.cpu()
        lesson.teacher.module.cpu()
        encoded = student.tensors(samples, cpu), lesson.teacher.tensors(samples, cpu)
        torch.manual_seed(lesson.seed)
        self.pupil = Pupil(student, lesson.teacher, found, encoded).to(device)
        self._module, core = student.module, cast(Any, student.core)
        self._core = core
        if stage.checkpointing:
            with quiet_transformers():
                core.gradient_checkpointing_enable({"use_reentrant": False})
        if stage.compile:
            student.module.compile()
        width = _width(lesson.teacher, encoded[1]) if teachers and not layered else None
        of_classes = bool(lesson.teacher.labels) or lesson.task.gives == "tokens"
        logits = of_classes and not any(term.name in AS_VECTORS for term in found)
        self.kept = self._keep_outputs(width, logits, stage._precision(device)) if stage.cache and width else {}
        self.teacher = self._teacher(teachers, device) if teachers else None
        self.meeting = meeting_of(student, lesson.teacher)
        self.writer = Writer(student, teachers, lesson, stage.on_policy) if stage.on_policy else None
        views = Views(stage.augment, len(lesson.train), lesson.seed) if stage.augment else None
        self.collate = Collator(lesson, student, teachers, views, stage.views or 0, self.kept, stage.shard_teacher)

    def _teacher(self, members: Sequence[Model], device: torch.device) -> Teacher:
        weights = self._lesson.weights or (1.0,) * len(members)
        if self._stage.shard_teacher:
            members = [sharded(member) for member in members]
        return Teacher(members, weights, self._stage.weighing, device, self.pupil.teacher_points())

    def _keep_outputs(self, width: int, logits: bool, precision: str) -> dict[str, OutputCache]:
        """The files of the teachers' outputs, each named by all that decides them."""
        stage, lesson, kept = self._stage, self._lesson, {}
        if lesson.outputs is None:
            return {}
        weights = lesson.weights or (1.0,) * len(lesson.teachers)
        who = [
            identity(lesson.teachers, weights, stage.weighing),
            precision,
            torch.__version__,
            transformers.__version__,
        ]
        counted = not stage.augment or stage.views is not None
        for part, examples, ways in (("train", lesson.train, stage.augment), ("held_out", lesson.held_out, ())):
            if part == "train" and not counted:
                continue
            views = stage.views if ways and stage.views else 1
            key = sha256_json([who, examples.digest, [*ways], views, lesson.seed if ways else None, logits])
            rows = views * len(examples.labels)
            kept[part] = OutputCache(lesson.outputs / f"teacher-{key[:16]}", rows, width, logits)
        return kept

    def close(self) -> None:
        """Leave the student and the teacher as they were."""
        self.pupil.close()
        if self.teacher:
            self.teacher.close()
        self._module._compiled_call_impl = None
        if self._stage.checkpointing:
            with quiet_transformers():
                self._core.gradient_checkpointing_disable()


@contextmanager
def rehearsal(
    stage: Distill, student: Model, lesson: Lesson, device: torch.device
) -> Iterator[Callable[[Sequence[int]], None]]:
    """A function that takes one training step on examples by number, teachers included, and keeps nothing.

    To estimate time and memory: the weights stay as they are.
    """
    stage._check(student, lesson, device)
    work = Work(stage, student, lesson, device)
    optimizer = torch.optim.AdamW(work.pupil.parameters(), lr=0.0, weight_decay=0.0)
    work.pupil.train()

    def step(indices: Sequence[int]) -> None:
        batch = work.collate([("train", 0, i) for i in indices])
        taught = work.teacher([_on(device, tensors) for tensors in batch["teachers"]]) if work.teacher else Taught(None)
        keep = None if batch["keep"] is None else batch["keep"].to(device)
        taught = work.meeting(taught, batch["met"])
        parts = work.pupil(_on(device, batch["student"]), taught, batch["labels"].to(device), keep)
        work.pupil.weighted(parts).backward()
        optimizer.step()
        optimizer.zero_grad()

    try:
        yield step
    finally:
        work.close()


def world_size() -> int:
    """How many processes `torchrun` started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _on(device: torch.device, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _width(teacher: Model, tensors: Mapping[str, Tensor]) -> int | None:
    """C of the teacher's outputs; None where it depends on the examples, so that they cannot be kept."""
    if "targets" in tensors:
        return None
    with torch.no_grad():
        return int(teacher.answers(tensors).shape[1])


def _lengths(lesson: Lesson) -> list[int] | None:
    """Lengths of texts, to batch those of like length; None for other tasks."""
    column = lesson.task.length_of
    return [int(n) for n in lesson.train.lengths(column)] if column else None
