"""The same distillation by Potstill and by torchdistill, in turn: accuracy and samples per second, side by side.

torchdistill lives in an environment of its own, `.venv-torchdistill` (`make bench-distillation` makes it): it needs
torchvision. Both sides start from the same weights and see the same images for the same number of steps, with the
same loss, optimizer and schedule; the order of the batches is each side's own. torchdistill keeps the last weights,
Potstill those with the lowest loss on 64 held-out images.
"""

import json
import statistics
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distillation_cases import Case
from safetensors.torch import save_file

from potstill.compress.distill import Distill
from potstill.validate.predictor import TorchPredictor, predict

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-torchdistill" / "bin" / "python"
SETTINGS = {"batch_size": 64, "learning_rate": 2e-3, "weight_decay": 0.01, "temperature": 4.0}
SOFT, REPEATS = 0.9, 3


def against_torchdistill(made: Case, data: Path, folder: Path, quick: bool) -> dict[str, Any]:
    """Both sides' figures; a line that says so where torchdistill is not installed."""
    if not PYTHON.is_file():
        return {"skipped": f"no {PYTHON.relative_to(ROOT)}: make bench-distillation installs it"}
    epochs, count = (1, 1280) if quick else (2, 2560)
    arrays = {"test_x": made.test.table.columns["x"], "test_y": made.test.labels}  # type: ignore[attr-defined]
    arrays |= {"train_x": made.train.table.columns["x"][:count], "train_y": made.train.labels[:count]}  # type: ignore[attr-defined]
    np.savez(folder / "arrays.npz", **arrays)
    rows: list[tuple[dict[str, float], dict[str, Any]]] = []
    for seed in range(1 if quick else REPEATS):
        start = made.student(seed)
        save_file({k: v.clone() for k, v in start.core.state_dict().items()}, folder / "student.safetensors")
        rows.append((_ours(made, start, epochs, count, seed), _theirs(data, folder, epochs, seed)))
    ours, theirs = zip(*rows, strict=True)
    speeds = [a["samples_per_second"] / b["samples_per_second"] for a, b in rows]
    return {
        "accuracy": statistics.mean(one["accuracy"] for one in ours),
        "their_accuracy": statistics.mean(one["accuracy"] for one in theirs),
        "speed_ratio": statistics.median(speeds),
        "samples_per_second": statistics.median(one["samples_per_second"] for one in ours),
        "their_samples_per_second": statistics.median(one["samples_per_second"] for one in theirs),
        "epochs": epochs,
        "images": count,
        "versions": theirs[0]["versions"],
    }


def _ours(made: Case, student: Any, epochs: int, count: int, seed: int) -> dict[str, float]:
    times: list[float] = []

    def tick(module: torch.nn.Module, _inputs: Any) -> None:
        if module.training:
            times.append(time.perf_counter())

    student.module.register_forward_pre_hook(tick)
    held_out = made.train.take(range(len(made.train) - 64, len(made.train)), "held out")
    with tempfile.TemporaryDirectory() as work:
        lesson = made.lesson(seed, Path(work), None)
        lesson = replace(lesson, train=made.train.take(range(count), "train"), held_out=held_out)
        Distill(epochs=epochs, losses={"kl": SOFT, "hard": 1 - SOFT}, cache=False, **SETTINGS)(student, lesson)  # type: ignore[arg-type]
        logits = predict(TorchPredictor(student, "ours", torch.device("cpu")), made.test, None, Path(work, "ours.npy"))
        accuracy = float((logits.argmax(axis=1) == made.test.labels).mean())
    rate = (len(times) - 1) * int(SETTINGS["batch_size"]) / (times[-1] - times[0])
    return {"samples_per_second": rate, "accuracy": accuracy}


def _theirs(data: Path, folder: Path, epochs: int, seed: int) -> dict[str, Any]:
    model = ROOT / "examples" / "cifar10" / "model.py"
    setting = SETTINGS | {
        "arrays": str(folder / "arrays.npz"), "teacher": f"{model}:resnet56", "student": f"{model}:resnet8",
        "teacher_weights": str(data / "cifar10" / "resnet56-4bfd9763.th"),
        "student_weights": str(folder / "student.safetensors"),
        "epochs": epochs, "soft_weight": SOFT, "seed": seed, "threads": 1,
    }  # fmt: skip
    (folder / "setting.json").write_text(json.dumps(setting))
    command = [str(PYTHON), str(Path(__file__).parent / "torchdistill_worker.py"), str(folder / "setting.json")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures: dict[str, Any] = json.loads(said.splitlines()[-1])
    return figures
