"""Models and lessons that the tests of the training share."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from potstill.compress import api
from potstill.compress.api_settings import ApiTeacher
from potstill.compress.generate import Record, generate
from potstill.compress.lesson import Lesson
from potstill.compress.student import Student
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples, load_examples
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.task import TASKS, Model
from tests.service import Ask, Service

TEXT = TASKS["text-classification"]


@pytest.fixture
def teacher(text_teacher: Path) -> Model:
    return TEXT.load(Checkpoint(str(text_teacher)))


@pytest.fixture
def lesson(teacher: Model, texts: dict[str, Path], tmp_path: Path) -> Lesson:
    """512 sentences to learn (16 batches), 60 held out."""
    train = load_examples(str(texts["train"]), ("text",), {"text": "sentence"}).with_labels(teacher.labels)
    parts = train.take(range(512), "train"), train.take(range(540, 600), "held out")
    return Lesson(TEXT, teacher, *parts, 0, tmp_path / "work")


@pytest.fixture
def fresh(teacher: Model, lesson: Lesson) -> Callable[..., Model]:
    """A cut of the teacher with weights that were forgotten: `fresh(layers=2, hidden=16)`."""

    def make(layers: int = 2, hidden: int | None = None) -> Model:
        student = Student(layers=layers, hidden=hidden)(teacher, TEXT, {}, 0, lesson.train if hidden else None)
        torch.manual_seed(1)
        for parameter in student.core.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.1)
        return student

    return make


def convolutional(widths: tuple[int, int], seed: int) -> Model:
    """Pictures (B, 12, 12, 3) to 4 classes: convolutions on 12 × 12 and, after pooling, on 6 × 6 pixels."""
    torch.manual_seed(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, widths[0], 3, padding=1), nn.Conv2d(widths[0], widths[1], 3, padding=1)
            self.out = nn.Linear(9 * widths[1], 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.one(x.permute(0, 3, 1, 2) / 128 - 1))
            x = torch.relu(self.two(nn.functional.avg_pool2d(x, 2)))
            return self.out(nn.functional.avg_pool2d(x, 2).flatten(1))  # type: ignore[no-any-return]

    core = Net()
    return Model(core, ArrayEncoder(), ("x",), tuple("0123"), Checkpoint("torch.nn:Identity"), core)


@pytest.fixture
def conv() -> Callable[[tuple[int, int], int], Model]:
    """`conv((8, 8), seed)`: a convolutional network."""
    return convolutional


@pytest.fixture
def picture_lesson(arrays: Path, tmp_path: Path) -> Lesson:
    """512 arrays of pictures to learn, 60 held out; the teacher is a convolutional network, untrained."""
    with np.load(arrays) as file:
        x, y = file["train_x"], file["train_y"]
    examples = Examples("blobs", Arrays({"x": x}), y, None, "d")
    parts = examples.take(range(512), "train"), examples.take(range(540, 600), "held out")
    return Lesson(TASKS["module"], convolutional((12, 16), 0), *parts, 0, tmp_path / "work")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(api, "FIRST_WAIT_S", 0.005)
    server = Service()
    yield server
    server.close()


@pytest.fixture
def ask(service: Service, tmp_path: Path) -> Ask:
    def run(*prompts: str | dict[str, Any], **settings: Any) -> Record:
        file = tmp_path / "prompts.jsonl"
        rows = [{"prompt": prompt} if isinstance(prompt, str) else prompt for prompt in prompts]
        file.write_text("\n".join(map(json.dumps, rows)))
        return generate(ApiTeacher(**{"api": service.url, "model": "big"} | settings), file, tmp_path / "out.jsonl")

    return run
