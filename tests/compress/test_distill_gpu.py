"""Distillation on a CUDA device."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from potstill.compress.distill import Distill
from potstill.compress.lesson import Lesson
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.predictor import TorchPredictor
from potstill.validate.task import TASKS, Model
from tests.predicted import predicted

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def model(width: int) -> Model:
    torch.manual_seed(width)
    core = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 3))
    return Model(core, ArrayEncoder(), ("x",), ("0", "1", "2"), Checkpoint("a.b:c"), core)


def examples(n: int, teacher: Model) -> Examples:
    x = np.random.default_rng(0).normal(size=(n, 20)).astype(np.float32)
    with torch.inference_mode():
        labels = teacher.module(torch.from_numpy(x)).argmax(dim=1).numpy()
    return Examples("made", Arrays({"x": x}), labels, None, "d")


def test_a_student_trained_in_bf16_agrees_with_its_teacher(tmp_path: Path) -> None:
    teacher, student = model(64), model(32)
    data = examples(4000, teacher)
    train, held_out, judge = (data.take(range(a, b), "part") for a, b in ((0, 3000), (3000, 3300), (3300, 4000)))
    seen: list[torch.dtype] = []
    handle = student.module.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    log = Distill(epochs=20, batch_size=64)(student, Lesson(TASKS["module"], teacher, train, held_out, 0, tmp_path))
    handle.remove()
    wanted = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    assert set(seen) == {wanted}
    logits = predicted(TorchPredictor(student, "student", torch.device("cpu")), judge)
    assert (logits.argmax(axis=1) == judge.labels).mean() > 0.93
    assert all(np.isfinite(entry["loss"]) for entry in log if "loss" in entry)
    assert next(student.module.parameters()).device.type == "cpu"
