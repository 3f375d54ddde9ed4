"""The three settings in which distillation is tried: a teacher, a student that starts alike in every arm, and data.

digits      scikit-learn's digits: a convolutional net of 66,000 weights, trained here, to one of 10,000; 60 examples
cifar10     the published ResNet-56 to ResNet-8
sst2        a 6-layer BERT of MiniLM's shape to the 2 layers spread evenly over it
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from potstill.compress.lesson import Lesson
from potstill.compress.student import Student
from potstill.pipeline.demo_models import DigitNet
from potstill.pipeline.material import split
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples, load_examples
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.task import TASKS, Model, Task

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Case:
    """A teacher, students of it, and data.

    Attributes:
        name: as in the table.
        task: of all models.
        teacher: the model to learn from.
        train, test: examples to learn and to judge.
        student: a new student by its seed, the same in every arm.
        settings: of the stage in every arm: the training budget.
    """

    name: str
    task: Task
    teacher: Model
    train: Examples
    test: Examples
    student: Callable[[int], Model]
    settings: dict[str, Any]

    def lesson(self, seed: int, work: Path, outputs: Path | None) -> Lesson:
        """The lesson of one seed."""
        train, held_out = split(self.train, seed)
        return Lesson(self.task, self.teacher, train, held_out, seed, work, outputs=outputs)


def case(name: str, data: Path, quick: bool) -> Case:
    """A case by its name; `data` holds the real checkpoints and data."""
    return {"digits": _digits, "cifar10": _cifar10, "sst2": _sst2}[name](data, quick)


def _digits(data: Path, quick: bool) -> Case:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = pixels.reshape(-1, 8, 8, 1).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(x))
    parts = [
        Examples(f"digits {name}", Arrays({"x": x[index]}), labels[index].astype(np.int64), None, f"digits-{name}")
        for name, index in (("teacher", order[:1200]), ("train", order[:60]), ("test", order[1200:]))
    ]
    torch.manual_seed(0)
    teacher = _module(DigitNet((32, 32, 64, 64)), "potstill.pipeline.demo_models:teacher", 10)
    _fit(teacher.module, torch.from_numpy(x[order[:1200]]), torch.from_numpy(labels[order[:1200]]), epochs=12)

    def student(seed: int) -> Model:
        torch.manual_seed(seed)
        return _module(DigitNet((32, 32)), "potstill.pipeline.demo_models:student", 10)

    return Case("digits", TASKS["module"], teacher, parts[1], parts[2], student, {"epochs": 400, "batch_size": 32})


def _cifar10(data: Path, quick: bool) -> Case:
    import sys

    sys.path.insert(0, str(ROOT / "examples" / "cifar10"))
    from model import ResNet, resnet56  # type: ignore[import-not-found]

    folder, task = data / "cifar10", TASKS["module"]
    labels = [str(i) for i in range(10)]
    train, test = (
        load_examples(str(folder / f"{name}.npz"), ("x",), {}).with_labels(labels)
        for name in ("train_lossless", "test")
    )
    core = resnet56()
    state = torch.load(folder / "resnet56-4bfd9763.th", map_location="cpu", weights_only=True)["state_dict"]
    core.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})

    def student(seed: int) -> Model:
        torch.manual_seed(seed)
        return _module(ResNet(1), "model:resnet8", 10)

    budget = {"epochs": 8, "views": 2} if quick else {"epochs": 50, "views": 8}
    budget |= {"batch_size": 64, "learning_rate": 5e-3, "augment": ("flip", "shift")}
    return Case("cifar10", task, _module(core, "model:resnet56", 10), train, test, student, budget)


def _sst2(data: Path, quick: bool) -> Case:
    task = TASKS["text-classification"]
    teacher = task.load(Checkpoint(str(data / "sst2-teacher")), max_length=64)
    train, test = (
        load_examples(str(data / "sst2" / f"{name}.tsv"), ("text",), {"text": "sentence"}).with_labels(teacher.labels)
        for name in ("train", "dev")
    )
    few = np.sort(np.random.default_rng(0).permutation(len(train))[: 2000 if quick else 8000])

    def student(seed: int) -> Model:
        return Student(layers=2)(teacher, task, {"max_length": 64}, seed)

    budget = {"epochs": 2 if quick else 3, "learning_rate": 4e-4}
    return Case("sst2", task, teacher, train.take(few.tolist(), "some"), test, student, budget)


def _module(core: nn.Module, source: str, classes: int) -> Model:
    names = tuple(str(i) for i in range(classes))
    return Model(core.eval(), ArrayEncoder(), ("x",), names, Checkpoint(source), core)


def _fit(module: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int) -> None:
    """Train a teacher on labels."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    module.train()
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            nn.functional.cross_entropy(module(x[index]), y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
    module.eval()
