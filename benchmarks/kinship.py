"""Whose child a model is: how often the right parent is named, and how often one that is none.

Each draw splits scikit-learn's digits anew: 597 judge, and of the other 1,200 every model learns from a part of its own
drawn by chance: 500 for the four teachers (two convolutional nets, two perceptrons) and the eight references (teachers'
and students' builds, four of each), 1,000 for students and models trained alone. Each teacher teaches two students of
other builds by Potstill's own distillation (soft labels at temperature 4); four models of the students' builds learn
alone.

    right, wrong           students whose own teacher is named, and those of whom another one is
    unnamed                students of whom nobody is named
    named_without_parent   models trained alone of whom a parent is named

The suspects are the four teachers, at `kinship`'s default alpha. Measure and settings were chosen on draws below
`FIRST`, which are not reported. `QUICK=1` takes one draw instead of three. Prints a table; the last line is JSON, also
in `results/kinship.json` (or `kinship-quick.json`).
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from provenance import provenance
from rich.console import Console
from rich.table import Table
from torch import nn

from potstill.compress.distill import Distill
from potstill.compress.lesson import Lesson
from potstill.pipeline.demo_models import DigitNet
from potstill.pipeline.material import split
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import Arrays, Examples
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.files import write_json
from potstill.validate.kinship import Kinship, kinship
from potstill.validate.task import TASKS, Model

ROOT = Path(__file__).resolve().parents[1]
QUICK = os.environ.get("QUICK") == "1"
FIRST, DRAWS, EPOCHS = 10, 1 if QUICK else 3, 80
TAUGHT: dict[str, Any] = {"epochs": 150, "batch_size": 64, "temperature": 4.0, "losses": {"kl": 0.9, "hard": 0.1}}


class Perceptron(nn.Module):
    """Pixels (B, 8, 8, 1) from 0 to 16, to logits (B, 10), by two hidden layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, 10)."""
        found: torch.Tensor = self.layers(x / 8 - 1)
        return found


TEACHERS = (
    lambda: DigitNet((32, 32, 64, 64)),
    lambda: Perceptron(256),
    lambda: DigitNet((64, 64)),
    lambda: Perceptron(64),
)
STUDENTS = (lambda: DigitNet((16, 16, 32, 64)), lambda: Perceptron(48))


def digits(draw: int) -> tuple[Examples, Examples]:
    """Examples to learn from, and those that judge."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, order = pixels.reshape(-1, 8, 8, 1).astype(np.float32), np.random.default_rng(draw).permutation(len(labels))
    first, second = (
        Examples(f"digits {name}", Arrays({"x": x[index]}), labels[index].astype(np.int64), None, f"{name}-{draw}")
        for name, index in (("to learn", order[:1200]), ("judging", order[1200:]))
    )
    return first, second


def model(core: nn.Module) -> Model:
    """A module as a model of ten classes."""
    source = "potstill.pipeline.demo_models:student"
    return Model(core.eval(), ArrayEncoder(), ("x",), tuple(map(str, range(10))), Checkpoint(source), core)


def trained_alone(core: nn.Module, examples: Examples) -> Model:
    """A model that learned from labels alone."""
    x, y = torch.from_numpy(examples.rows(range(len(examples)))["x"]), torch.from_numpy(examples.labels)
    optimizer = torch.optim.AdamW(core.parameters(), lr=2e-3)
    core.train()
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x)).split(64):
            nn.functional.cross_entropy(core(x[index]), y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model(core)


def distilled(core: nn.Module, teacher: Model, examples: Examples, seed: int) -> Model:
    """A student of a teacher."""
    student, (train, held_out) = model(core), split(examples, seed)
    with tempfile.TemporaryDirectory() as folder:
        Distill(**TAUGHT)(student, Lesson(TASKS["module"], teacher, train, held_out, seed, Path(folder)))
    return student


def answers(one: Model, examples: Examples) -> NDArray[np.float32]:
    """Logits (N, 10)."""
    one.module.eval()
    with torch.inference_mode():
        found: NDArray[np.float32] = one.module(torch.from_numpy(examples.rows(range(len(examples)))["x"])).numpy()
    return found


def judged(draw: int) -> list[dict[str, Any]]:
    """What is said of each model of a draw."""
    torch.manual_seed(draw)
    whole, judging = digits(draw)
    rng = np.random.default_rng(draw)

    def some(count: int) -> Examples:
        return whole.take(rng.permutation(len(whole))[:count].tolist(), "some")

    teachers = [trained_alone(build(), some(500)) for build in TEACHERS]
    references = [trained_alone(build(), some(500)) for build in (*TEACHERS, *STUDENTS, *STUDENTS)]
    suspects = {f"teacher {k}": answers(one, judging) for k, one in enumerate(teachers, 1)}
    strangers = [answers(one, judging) for one in references]

    def asked(parent: str | None, build: int, one: Model) -> dict[str, Any]:
        logits = answers(one, judging)
        found = kinship(logits, suspects, strangers, judging.labels)
        accuracy = float((logits.argmax(axis=1) == judging.labels).mean())
        return {"draw": draw, "parent": parent, "build": build, "accuracy": accuracy} | told(found, parent)

    rows = []
    for k, teacher in enumerate(teachers, 1):
        for build, make in enumerate(STUDENTS):
            seed = 10 * draw + 2 * k + build
            rows.append(asked(f"teacher {k}", build, distilled(make(), teacher, some(1000), seed)))
    return rows + [asked(None, build, trained_alone(make(), some(1000))) for build, make in enumerate(STUDENTS * 2)]


def told(found: Kinship, parent: str | None) -> dict[str, Any]:
    """Who is named, and how close the parent, or else the closest suspect, is by logits."""
    closest = min(
        (one for one in found.closeness if one.measure == "logits" and one.suspect == (parent or one.suspect)),
        key=lambda one: one.p,
    )
    return {
        "named": found.named, "also": found.also, "value": closest.value, "interval": closest.interval,
        "stranger": closest.stranger, "detectable": closest.detectable, "p_holm": closest.p_holm,
    }  # fmt: skip


def counted(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How often the right one, another one and nobody is named."""
    students = [row for row in rows if row["parent"]]
    alone = [row for row in rows if not row["parent"]]
    return {
        "students": len(students),
        "right": sum(row["named"] == row["parent"] for row in students),
        "wrong": sum(row["named"] not in (None, row["parent"]) for row in students),
        "unnamed": sum(row["named"] is None for row in students),
        "alone": len(alone),
        "named_without_parent": sum(row["named"] is not None for row in alone),
    }


def main() -> None:
    """Train, ask, print, and end with a line of JSON."""
    console = Console(width=120)
    torch.set_num_threads(1)
    rows = []
    for draw in range(FIRST, FIRST + DRAWS):
        rows += judged(draw)
        print(draw, counted(rows), file=sys.stderr, flush=True)
    table = Table(title="the parent, or else the closest suspect, by logits", title_justify="left")
    for heading in ("draw", "parent", "accuracy, %", "named", "closeness", "a stranger's", "p (Holm)"):
        table.add_column(heading)
    for row in rows:
        own, stranger = (" to ".join(f"{end:+.2f}" for end in row[name]) for name in ("interval", "stranger"))
        values = (row["parent"] or "none", f"{100 * row['accuracy']:.1f}", row["named"] or "nobody")
        table.add_row(str(row["draw"]), *values, f"{row['value']:+.2f} ({own})", stranger, f"{row['p_holm']:.2g}")
    console.print(table)
    record = counted(rows) | {"quick": QUICK, "draws": DRAWS, "models": rows} | provenance()
    write_json(ROOT / "benchmarks" / "results" / f"kinship{'-quick' if QUICK else ''}.json", record)
    print(json.dumps({key: value for key, value in record.items() if key != "models"}))


if __name__ == "__main__":
    main()
