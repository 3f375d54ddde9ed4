"""What distillation gives, and what it costs; each side in turn on one machine.

    helps           students of digits, CIFAR-10 and SST-2 by labels alone, by soft labels, and by the defaults, with
                    equal budgets over 3 seeds; how many of the three gain, by an interval that excludes zero
    loop_ratio      samples/s of the `distill` stage over those of a bare PyTorch loop: teacher's forward, student's
                    forward and backward, clipping, AdamW. ResNet-56 to ResNet-8, batches of 64 from memory.
                    Timer: from the start of the first training forward to the start of the last
    cache_speedup   seconds of five epochs without kept outputs over those with them. Timer: whole trainings, the
                    filling, saving and evaluating included
    memory_ratio    peak anonymous memory of a training on 20,000 texts over that on 1,000, each in its own process
    torchdistill    the same teacher, student, images and settings by torchdistill: accuracy, and samples/s of ours
                    over theirs, in turn. Timer: as for loop_ratio on our side, around its loop on theirs

`QUICK=1` takes fewer examples and epochs (10 minutes on 2 cores). Prints tables; the last line is JSON, also in
`results/distillation.json` (or `distillation-quick.json`). Needs the real checkpoints and data: POTSTILL_DATA.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from against_torchdistill import against_torchdistill
from distillation_cases import Case, case
from distillation_memory import memory

from potstill.compress.distill import Distill
from potstill.compress.losses import hard, kl
from potstill.pipeline.lineage import record as lineage
from potstill.validate.data import Examples
from potstill.validate.files import write_json
from potstill.validate.metrics import most_likely
from potstill.validate.predictor import TorchPredictor, predict
from potstill.validate.task import Model

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("POTSTILL_DATA", ROOT.parent / "shared" / "data"))
QUICK = os.environ.get("QUICK") == "1"
CASES, SEEDS = ("digits", "cifar10", "sst2"), (0, 1, 2)
ARMS: dict[str, dict[str, Any]] = {
    "alone": {"losses": {"hard": 1.0}},
    "soft": {"losses": {"kl": 0.9, "hard": 0.1}},
    "defaults": {},
}
REPEATS, DRAWS, BATCH = 3, 10_000, 64
CPU = torch.device("cpu")


def right(name: str, arm: str, seed: int, outputs: Path) -> NDArray[np.bool_]:
    """Which test examples a student of one arm and seed has right."""
    torch.set_num_threads(1)
    made = case(name, DATA, QUICK)
    student = made.student(seed)
    with tempfile.TemporaryDirectory() as work:
        Distill(**made.settings, **ARMS[arm])(student, made.lesson(seed, Path(work), outputs))
    return said(student, made) == made.test.labels


def said(model: Model, made: Case) -> NDArray[np.int64]:
    """The class that a model says of each test example."""
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder, "logits.npy")
        return most_likely(predict(TorchPredictor(model, "the model", CPU), made.test, made.task.length_of, into))


def twins(made: Case) -> dict[str, str]:
    """The first arm with the same losses as each: with two classes the defaults are soft labels, trained once."""
    lesson = made.lesson(0, Path(), None)
    losses = {arm: Distill(**made.settings, **ARMS[arm]).terms(lesson, lesson.teacher) for arm in ARMS}
    return {arm: next(first for first in ARMS if losses[first] == losses[arm]) for arm in ARMS}


def helps(outputs: Path, console: Console) -> dict[str, Any]:
    """Accuracies of the arms, and the gains with their intervals, by case."""
    all_made = {name: case(name, DATA, QUICK) for name in CASES}
    same = {name: twins(made) for name, made in all_made.items()}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        jobs = {
            (name, arm, seed): pool.submit(right, name, arm, seed, outputs)
            for name in reversed(CASES)
            for seed in SEEDS
            for arm in ARMS
            if same[name][arm] == arm
        }
        found = {key: job.result() for key, job in jobs.items()}
    table = Table(title="Accuracy in %, mean of 3 seeds; gain of the defaults over labels alone", title_justify="left")
    for heading in ("", "teacher", *ARMS, "gain, 95 % interval"):
        table.add_column(heading)
    cases = {}
    for name, made in all_made.items():
        arms = {arm: np.stack([found[name, same[name][arm], seed] for seed in SEEDS]) for arm in ARMS}
        low, high = interval(arms["defaults"], arms["alone"])
        one: dict[str, Any] = {arm: [float(row.mean()) for row in rows] for arm, rows in arms.items()}
        one |= {"teacher": float((said(made.teacher, made) == made.test.labels).mean())}
        one |= {"gain": float(arms["defaults"].mean() - arms["alone"].mean()), "interval": [low, high]}
        one |= {
            "train": len(made.train),
            "test": len(made.test),
            "settings": str(made.settings),
        }
        cases[name] = one
        cells = [f"{100 * statistics.mean(one[arm]):.1f}" for arm in ARMS]
        gain = f"{100 * one['gain']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        table.add_row(name, f"{100 * one['teacher']:.1f}", *cells, gain)
    console.print(table)
    return cases


def interval(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> tuple[float, float]:
    """95 % interval of the difference of accuracies (seeds, examples), by a bootstrap over seeds and over examples."""
    rng = np.random.default_rng(0)
    difference = ours.astype(np.float64) - theirs
    seeds, examples = difference.shape
    means = np.empty(DRAWS)
    for i in range(DRAWS):
        by_seed = rng.integers(seeds, size=seeds)
        means[i] = difference[by_seed][:, rng.integers(examples, size=examples)].mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


class Clock:
    """Times of a student's training forwards."""

    def __init__(self, student: Model) -> None:
        self._times: list[float] = []
        student.module.register_forward_pre_hook(self._tick)

    def _tick(self, module: torch.nn.Module, _inputs: Any) -> None:
        if module.training:
            self._times.append(time.perf_counter())

    def rate(self, batch: int) -> float:
        """Samples per second, from the start of the first to the start of the last."""
        return batch * (len(self._times) - 1) / (self._times[-1] - self._times[0])


def loop(made: Case) -> float:
    """Samples/s of the stage over those of a bare loop; median of alternating repeats."""
    few, ratios = made.train.take(range(40 * BATCH + 64), "few"), []
    for repeat in range(1 if QUICK else REPEATS):
        student = made.student(0)
        clock = Clock(student)
        _train(made, student, few.take(range(40 * BATCH), "train"), few, {"epochs": 1, "cache": False}, repeat)
        bare = made.student(0)
        bare_clock = Clock(bare)
        _bare_loop(made, bare, 40)
        ratios.append(clock.rate(BATCH) / bare_clock.rate(BATCH))
    return statistics.median(ratios)


def _train(made: Case, student: Model, train: Examples, few: Examples, settings: dict[str, Any], seed: int) -> None:
    with tempfile.TemporaryDirectory() as work:
        lesson = made.lesson(seed, Path(work) / "work", Path(work) / "outputs")
        lesson = replace(lesson, train=train, held_out=few.take(range(len(few) - 64, len(few)), "held out"))
        Distill(batch_size=BATCH, losses={"kl": 0.9, "hard": 0.1}, **settings)(student, lesson)


def _bare_loop(made: Case, student: Model, steps: int) -> None:
    """The same work in the plainest loop."""
    x, y = torch.from_numpy(made.train.rows(range(steps * BATCH))["x"]), torch.from_numpy(made.train.labels)
    module, teacher = student.module.train(), made.teacher.module.eval()
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3, weight_decay=0.01)
    for index in torch.randperm(steps * BATCH).split(BATCH):
        inputs = x[index].float()
        logits = module(inputs)
        with torch.no_grad():
            theirs = teacher(inputs)
        (0.9 * kl(logits, theirs) + 0.1 * hard(logits, y[index])).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def cache(made: Case) -> float:
    """Seconds of five epochs without kept outputs over seconds with them; median of alternating repeats."""
    few, ratios = made.train.take(range(20 * BATCH + 64), "few"), []
    train = few.take(range(20 * BATCH), "train")
    for repeat in range(1 if QUICK else REPEATS):
        seconds = []
        for kept in (False, True):
            started = time.perf_counter()
            _train(made, made.student(0), train, few, {"epochs": 5, "cache": kept}, repeat)
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def main() -> None:
    """Measure, print, and end with a line of JSON."""
    if not DATA.is_dir():
        sys.exit(f"no real data at {DATA}; set POTSTILL_DATA")
    torch.set_num_threads(1)
    console, started = Console(stderr=False, width=120), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        cases = helps(Path(name) / "outputs", console)
        cifar10 = case("cifar10", DATA, QUICK)
        figures: dict[str, Any] = {"loop_ratio": loop(cifar10), "cache_speedup": cache(cifar10)}
        figures |= memory(Path(name), DATA)
        figures["torchdistill"] = against_torchdistill(cifar10, DATA, Path(name), QUICK)
    machine = lineage.machine()
    table = Table(title=f"{machine['cpu']}, {machine['cores']} cores, one thread each", title_justify="left")
    for heading in ("what", "figure"):
        table.add_column(heading)
    for key, value in figures.items():
        table.add_row(key, json.dumps(value) if isinstance(value, dict) else f"{value:.3f}")
    console.print(table)
    gains = [one["interval"][0] > 0 for one in cases.values()]
    losses = [one["interval"][1] < 0 for one in cases.values()]
    record: dict[str, Any] = {"helps": sum(gains), "harms": sum(losses), "cases": cases, **figures, "quick": QUICK}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    record |= {"minutes": (time.monotonic() - started) / 60, "machine": machine, "versions": lineage.versions()}
    record |= {"python": sys.version.split()[0], "commit": commit.strip() or "unknown"}
    write_json(ROOT / "benchmarks" / "results" / f"distillation{'-quick' if QUICK else ''}.json", record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
