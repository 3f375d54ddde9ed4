"""The training of the student: soft labels of a teacher beside the hard labels of the data.

Shapes: B examples in a batch, C classes, H × W pixels.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.data import Dataset, RandomSampler, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from potstill.compress.losses import hard_loss, similarity_loss, soft_loss
from potstill.compress.teacher import Teacher
from potstill.validate.data import IGNORED, Examples, Rows
from potstill.validate.errors import InputError
from potstill.validate.predictor import best_device
from potstill.validate.progress import track
from potstill.validate.task import Model, Task, quiet_transformers

MOST_STEPS_BETWEEN_SAVES = 500


@plain_dataclass(frozen=True)
class Lesson:
    """What a training stage works with.

    Attributes:
        task: how examples are grouped.
        teacher: the model to learn from.
        train: the examples to learn.
        held_out: training examples that only choose the best checkpoint; never the evaluation set.
        seed: of the order and of dropout.
        work: folder for checkpoints while training; what is there is taken up again.
    """

    task: Task
    teacher: Model
    train: Examples
    held_out: Examples
    seed: int
    work: Path


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Distill:
    """Train a student on the teacher's soft labels and the data's hard labels.

    The loss is w · T² KL(teacher ‖ student at temperature T) + (1 − w) · cross-entropy (Hinton, Vinyals and
    Dean 2015, "Distilling the knowledge in a neural network"). AdamW, a linear warm-up over the first tenth
    of the steps, then a linear decay to zero. bf16 on CUDA devices that have it, float32 elsewhere. The checkpoint
    with the lowest loss on held-out training examples is kept.

    Attributes:
        epochs: passes over the training examples.
        temperature: T; higher softens the teacher's distribution.
        soft_weight: w, from 0 (labels only) to 1 (teacher only).
        batch_size: examples a step.
        learning_rate: peak; by default 1e-4 for a transformers model, 2e-3 for a module of one's own.
        weight_decay: AdamW's, on all weights but biases and norms.
        augment: for image arrays (H, W, 3): `flip` left-right and `shift` by up to an eighth of the side.
            Teacher and student see the same view (Beyer 2022, "a good teacher is patient and consistent").
    """

    epochs: float = 3
    temperature: float = 2.0
    soft_weight: float = 0.9
    batch_size: int = 32
    learning_rate: float | None = None
    weight_decay: float = 0.01
    augment: tuple[Literal["flip", "shift"], ...] = ()

    def __post_init__(self) -> None:
        """Refuse settings that cannot train."""
        for name in ("epochs", "temperature", "batch_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, and is {getattr(self, name):g}")
        if not 0 <= self.soft_weight <= 1:
            raise ValueError(f"soft_weight must be from 0 to 1, and is {self.soft_weight:g}")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must be above 0 and below 1, and is {self.learning_rate:g}")

    def __call__(self, student: Model, lesson: Lesson) -> list[dict[str, float]]:
        """Train `student` in place; a training that was cut off goes on from its last whole checkpoint.

        Returns:
            The log: dicts with `step`, `epoch` and `loss` (with its parts `soft` and `hard`) or `eval_loss`.

        Raises:
            InputError: the loss is not finite, or the examples cannot be augmented so.
        """
        if self.augment and lesson.task.features != ("x",):
            raise InputError(f"augment works on image arrays x, which the task {lesson.task.word!r} does not read")
        device = best_device()
        collate = Collator(lesson, student, self.augment)
        progress = _Progress()
        trainer = DistillTrainer(
            model=student.module.to(device),
            args=self._arguments(student, lesson, device),
            train_dataset=Indices(len(lesson.train), "train"),
            eval_dataset=Indices(len(lesson.held_out), "held_out"),
            data_collator=collate,
            callbacks=[progress, _StopOnNaN()],
        )
        trainer.pop_callback(_printer())
        trainer.give(self, lesson, student, Teacher(lesson.teacher, device), _lengths(lesson))
        with progress, quiet_transformers():
            trainer.train(resume_from_checkpoint=last_whole_checkpoint(lesson.work))
        student.module.to("cpu").eval()
        return [
            {k: float(v) for k, v in entry.items() if isinstance(v, int | float)} for entry in trainer.state.log_history
        ]

    def steps(self, examples: int) -> int:
        """Optimizer steps over all epochs."""
        return max(1, int(-(-examples // self.batch_size) * self.epochs))

    def _arguments(self, student: Model, lesson: Lesson, device: torch.device) -> TrainingArguments:
        steps = self.steps(len(lesson.train))
        save_every = max(1, min(MOST_STEPS_BETWEEN_SAVES, -(-len(lesson.train) // self.batch_size), steps))
        default = 2e-3 if student.checkpoint.is_factory else 1e-4
        return TrainingArguments(
            output_dir=str(lesson.work.resolve()),
            num_train_epochs=self.epochs,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size,
            learning_rate=self.learning_rate or default,
            weight_decay=self.weight_decay,
            warmup_steps=max(1, steps // 10),
            bf16=device.type == "cuda" and torch.cuda.is_bf16_supported(),
            use_cpu=device.type == "cpu",
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
        )


class Indices(Dataset[tuple[str, int]]):
    """Stands for a set of examples; the collator reads the rows."""

    def __init__(self, n: int, part: str) -> None:
        self._n, self._part = n, part

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self._part, int(index)


class Collator:
    """Rows by index, encoded for the teacher and for the student; once when both encode alike."""

    def __init__(self, lesson: Lesson, student: Model, augment: Sequence[str] = ()) -> None:
        self._parts = {"train": lesson.train, "held_out": lesson.held_out}
        self._student, self._teacher, self._augment = student, lesson.teacher, augment

    def __call__(self, items: list[tuple[str, int]]) -> dict[str, Any]:
        """Tensors for one batch: what student and teacher are fed, by name, and labels (R,)."""
        part, indices = items[0][0], [index for _, index in items]
        examples = self._parts[part]
        rows = examples.rows(indices)
        if part == "train" and self._augment:
            rows = augmented(rows, self._augment)
        cpu = torch.device("cpu")
        student = self._student.tensors(rows, cpu)
        teacher = student if self._student.encode is self._teacher.encode else self._teacher.tensors(rows, cpu)
        labels = student["targets"] if "targets" in student else torch.from_numpy(examples.labels_of(indices))
        return {"student": student, "teacher": teacher, "labels": labels}


def augmented(rows: Rows, ways: Sequence[str]) -> Rows:
    """Flipped and shifted copies of image arrays (B, H, W, channels), by torch's seeded generator.

    Raises:
        InputError: the arrays are no such images.
    """
    x: NDArray[Any] = np.array(rows["x"])
    if x.ndim != 4 or x.shape[3] not in (1, 3):
        raise InputError(f"augment needs images of shape (height, width, 1 or 3), and x is {x.shape[1:]}")
    if "flip" in ways:
        flip = (torch.rand(len(x)) < 0.5).numpy()
        x[flip] = x[flip, :, ::-1]
    if "shift" in ways:
        reach = max(1, x.shape[1] // 8)
        padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
        for i, (down, right) in enumerate(torch.randint(0, 2 * reach + 1, (len(x), 2)).tolist()):
            x[i] = padded[i, down : down + x.shape[1], right : right + x.shape[2]]
    return {**rows, "x": x}


class DistillTrainer(Trainer):  # type: ignore[misc]
    """transformers' training loop with the distillation loss."""

    def give(
        self, settings: Distill, lesson: Lesson, student: Model, teacher: Teacher, lengths: list[int] | None
    ) -> None:
        """What the loss and the sampler need beside the loop's own arguments."""
        self._settings, self._student, self._teacher, self._lengths = settings, student, teacher, lengths
        self._vectors = lesson.task.word == "feature-extraction"
        self._parts: dict[str, list[Tensor]] = {"soft": [], "hard": []}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """w · soft + (1 − w) · hard; a weight of zero spares its part."""
        outputs = model(*(inputs["student"][name] for name in self._student.input_names))
        logits, w = self._student.read(outputs, inputs["student"]), self._settings.soft_weight
        nothing = logits.new_zeros(())
        soft, hard = nothing, nothing
        if self._vectors:
            soft = similarity_loss(logits, self._teacher(inputs["teacher"]))
        elif w > 0:
            soft = soft_loss(logits, self._teacher(inputs["teacher"]), self._settings.temperature)
        if w < 1 and (inputs["labels"] != IGNORED).any():
            hard = hard_loss(logits, inputs["labels"])
        if model.training:
            self._parts["soft"].append(soft.detach())
            self._parts["hard"].append(hard.detach())
        return w * soft + (1 - w) * hard

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss to what is logged."""
        if "loss" in logs and self._parts["soft"]:
            logs |= {name: torch.stack(parts).mean().item() for name, parts in self._parts.items()}
            self._parts = {"soft": [], "hard": []}
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The loss alone."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save copies of the tensors: weights that are tied share memory, which safetensors refuses."""
        tensors = state_dict or self.model.state_dict()
        super()._save(output_dir, {name: tensor.detach().clone() for name, tensor in tensors.items()})

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        if self._lengths is None:
            return RandomSampler(self.train_dataset)
        return LengthGroupedSampler(self.args.train_batch_size, lengths=self._lengths)  # type: ignore[no-any-return]


def _lengths(lesson: Lesson) -> list[int] | None:
    """Text lengths in characters, to batch texts of like length; None for other tasks."""
    column = lesson.task.length_of
    return [len(text) for text in lesson.train.rows(range(len(lesson.train)))[column]] if column else None


def last_whole_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that was written to its end; one cut off in the middle is removed.

    transformers writes `trainer_state.json` last.
    """
    found = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(found):
        if (path / "trainer_state.json").is_file() and (path / "trainer_state.json").read_text().endswith("}\n"):
            return str(path)
        shutil.rmtree(path)
    return None


def _printer() -> type[TrainerCallback]:
    from transformers import PrinterCallback

    return PrinterCallback  # type: ignore[no-any-return]


class _StopOnNaN(TrainerCallback):  # type: ignore[misc]
    """Stops a training whose loss is not finite, with what to try."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        value = logs.get("loss", logs.get("eval_loss", 0.0))
        if not np.isfinite(value):
            raise InputError(
                f"the loss is {value} at step {state.global_step}; try a lower learning_rate "
                f"(now {args.learning_rate:g}), or look for examples with broken inputs"
            )


class _Progress(TrainerCallback):  # type: ignore[misc]
    """A progress bar over the steps, with the last loss."""

    def __enter__(self) -> None:
        self._bar: Any = None
        self._note = ""

    def __exit__(self, *exc: Any) -> None:
        if self._bar:
            self._bar.__exit__(*exc)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = track("distilling", state.max_steps)
        self._advance = self._bar.__enter__()
        self._advance(state.global_step, "")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(1, self._note)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self._note = f"loss {logs['loss']:.3f}"
