"""What the road costs beyond the work itself, against a bare loop that does the same work, in turn in one process.

    training    samples/s of the `distill` stage against a bare PyTorch loop: two forwards, one backward, AdamW;
                timer: around whole trainings of the same number of steps, first steps included
    profile     median of `potstill profile` against a bare ONNX Runtime loop on the same package;
                timer: around `session.run` alone, on both sides
    repeat      the same package profiled twice: ratio of the medians
    judging     seconds to judge 10,000 predictions against seconds to make them

Data: scikit-learn's digits and the demo's models. Prints a table; the last line is JSON, also in `results/road.json`.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

from potstill.compress.distill import Distill
from potstill.compress.lesson import Lesson
from potstill.compress.losses import hard, kl
from potstill.pipeline import demo
from potstill.pipeline.lineage import record as lineage
from potstill.pipeline.material import Material
from potstill.pipeline.recipe import build_recipe
from potstill.pipeline.stages import STAGES
from potstill.pipeline.walk import walk
from potstill.targets.profile import profile
from potstill.targets.request import read_package
from potstill.targets.target import target_names
from potstill.validate.files import write_json
from potstill.validate.predictor import TorchPredictor, best_device, predict

REPEATS = 3
STEPS, BATCH = 150, 64


def training(material: Material, folder: Path) -> float:
    """Ratio of samples/s, the stage's over the bare loop's; median of alternating repeats."""
    train = material.lesson_examples[0]
    stage = Distill(epochs=STEPS * BATCH / len(train), batch_size=BATCH)
    ratios = []
    for repeat in range(REPEATS):
        student = material.new_student()
        lesson = Lesson(material.task, material.teacher, train, train.take(range(64), "few"), 0, folder / str(repeat))
        started = time.perf_counter()
        log = stage(student, lesson)
        ours = time.perf_counter() - started
        steps = int(max(entry["step"] for entry in log))
        ratios.append(_bare_training(material, steps) / ours)
    return statistics.median(ratios)


def _bare_training(material: Material, steps: int) -> float:
    """Seconds of the same steps in the plainest loop."""
    train, device = material.lesson_examples[0], best_device()
    student, teacher = material.new_student().module.to(device).train(), material.teacher.module.to(device).eval()
    x, y = torch.from_numpy(train.rows(range(len(train)))["x"]), torch.from_numpy(train.labels)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    started = time.perf_counter()
    for step in range(steps):
        index = torch.randint(0, len(x), (BATCH,), generator=torch.Generator().manual_seed(step))
        inputs, labels = x[index].to(device), y[index].to(device)
        logits = student(inputs)
        with torch.no_grad():
            theirs = teacher(inputs)
        (0.9 * kl(logits, theirs) + 0.1 * hard(logits, labels)).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


def profiling(package: Path) -> tuple[float, float]:
    """Ratio of the profile's median to a bare loop's, and of a second profile's to the first's."""
    ratios, repeats = [], []
    for _ in range(REPEATS):
        first = profile(package, runs=1000, threads=1).median_ms
        ratios.append(first / _bare_runs(package))
        repeats.append(profile(package, runs=1000, threads=1).median_ms / first)
    return statistics.median(ratios), statistics.median(repeats)


def _bare_runs(package: Path) -> float:
    """Median milliseconds of `session.run` in a plain loop."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(package / "model.onnx", options)
    feeds = {
        name: np.fromfile(one["file"], dtype=one["dtype"]).reshape(one["shape"])
        for name, one in read_package(package).spec()["inputs"].items()
    }
    times = []
    for _ in range(1010):
        started = time.perf_counter_ns()
        session.run(None, feeds)
        times.append((time.perf_counter_ns() - started) / 1e6)
    return statistics.median(times[10:])


def judging(material: Material) -> float:
    """Seconds of judging over seconds of predicting, for 10,000 examples."""
    examples = material.eval.take(np.arange(10_000) % len(material.eval), "repeated")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        predictor = TorchPredictor(material.teacher, "teacher", best_device())
        logits = predict(predictor, examples, None, Path(folder, "logits.npy"))
        predicted = time.perf_counter() - started
        started = time.perf_counter()
        material.task.judge(logits, logits, examples)
        return (time.perf_counter() - started) / predicted


def main() -> None:
    """Measure, print, and end with a line of JSON."""
    console = Console(stderr=False)
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "demo"
        mapping: dict[str, Any] = demo.prepare(out)
        recipe = build_recipe(mapping, stage_types=STAGES, target_names=target_names(), base=Path.cwd())
        walk(recipe, out, quiet=True)
        material = Material(recipe)
        against_bare, repeat = profiling(out / "packages" / "laptop-x86-vnni")
        result = {
            "training_ratio": training(material, Path(name)),
            "profile_ratio": against_bare,
            "repeat_ratio": repeat,
            "judging_share": judging(material),
        }
    machine = lineage.machine()
    table = Table(title=f"{machine['cpu']}, {machine['cores']} cores; medians of {REPEATS}", title_justify="left")
    for heading in ("what", "figure"):
        table.add_column(heading)
    for key, value in result.items():
        table.add_row(key, f"{value:.3f}")
    console.print(table)
    record = result | {"machine": machine, "versions": lineage.versions(), "python": sys.version.split()[0]}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    write_json(Path(__file__).parent / "results" / "road.json", record | {"commit": commit.strip() or "unknown"})
    print(json.dumps(record))


if __name__ == "__main__":
    main()
