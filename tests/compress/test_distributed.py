"""Training in two processes, as `torchrun` starts them (gloo, on the CPU): the same student as in one."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from potstill.compress.distill import Distill
from potstill.compress.lesson import Collator, Lesson
from potstill.compress.output_cache import OutputCache
from potstill.validate.data import Arrays, Examples
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.errors import InputError
from potstill.validate.task import Model
from tests.forked import Forked
from tests.waiting import free_port, wait_for

Conv = Callable[[tuple[int, int], int], Model]


class Recording(Collator):
    """Notes which training examples each batch holds; may stop its process after a folder's second checkpoint."""

    seen: list[list[int]] = []  # noqa: RUF012 - of this process
    stops_at: Path | None = None

    def __call__(self, items: list[tuple[str, int, int]]) -> dict[str, Any]:
        if Recording.stops_at and len(list(Recording.stops_at.glob("checkpoint-*/trainer_state.json"))) >= 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        batch = super().__call__(items)
        if batch["part"] == "train":
            Recording.seen.append(batch["items"].tolist())
        return batch


def _work(
    rank: int, size: int, port: int, stage: Distill, student: Model, lesson: Lesson, out: Path, stops: bool
) -> None:
    """One process: trains and leaves its weights, log and batches, or the error."""
    import potstill.compress.distill as module

    setting = {"WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in setting.items()}
    torch.set_num_threads(1)
    Recording.seen.clear()
    Recording.stops_at = lesson.work if stops else None
    module.Collator = Recording  # type: ignore[misc]
    found: dict[str, Any] = {"error": ""}
    try:
        found["log"] = stage(student, lesson)
        found["weights"] = student.core.state_dict()
        found["seen"] = list(Recording.seen)
    except InputError as error:
        found["error"] = str(error)
    torch.save(found, out / f"{rank}.pt")
    os._exit(0)


class Team:
    """Processes that train together."""

    def __init__(
        self, stage: Distill, student: Model, lesson: Lesson, out: Path, size: int = 2, stops: bool = False
    ) -> None:
        out.mkdir(exist_ok=True)
        self.out, port = out, free_port()
        self.members = [
            Forked(target=_work, args=(rank, size, port, stage, student, lesson, out, stops)) for rank in range(size)
        ]
        for member in self.members:
            member.start()

    def results(self) -> list[dict[str, Any]]:
        for member in self.members:
            member.join(timeout=400)
            assert member.exitcode == 0
        return [torch.load(self.out / f"{rank}.pt", weights_only=True) for rank in range(len(self.members))]


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max((one["weights"][key] - other["weights"][key]).abs().max().item() for key in one["weights"])


@pytest.fixture
def cached(picture_lesson: Lesson, tmp_path: Path) -> Lesson:
    return dataclasses.replace(picture_lesson, outputs=tmp_path / "outputs")


def elsewhere(lesson: Lesson, name: str) -> Lesson:
    place = lesson.work.parent
    return dataclasses.replace(lesson, work=place / name, outputs=place / f"{name}-outputs")


def test_two_processes_give_the_student_of_one(cached: Lesson, conv: Conv, tmp_path: Path) -> None:
    stage = Distill(epochs=3, losses={"kl": 0.9, "hard": 0.1})
    (alone,) = Team(stage, conv((8, 6), 1), elsewhere(cached, "alone"), tmp_path / "a", size=1).results()
    first, second = Team(stage, conv((8, 6), 1), cached, tmp_path / "b").results()
    assert difference(first, second) == 0.0
    assert difference(alone, first) < 1e-4
    # Each has its half of the same batches.
    assert len(alone["seen"]) == 48
    assert [a + b for a, b in zip(first["seen"], second["seen"], strict=True)] == alone["seen"]
    assert {len(batch) for batch in first["seen"]} == {16}
    # Both say the loss of the whole batch.
    for name in ("loss", "kl", "eval_loss"):
        ours, theirs = ([entry[name] for entry in found["log"] if name in entry] for found in (first, alone))
        assert ours == pytest.approx(theirs, rel=0.05 if name == "eval_loss" else 1e-3), name
    # Both wrote what their teacher said; in the second epoch none runs. 60 held-out rows are filled up to 64.
    assert first["log"][-1]["taught_rows"] == 512 + 64
    assert cached.outputs is not None
    filled = {OutputCache(path, rows, 4, True).filled() for path in cached.outputs.iterdir() for rows in (_rows(path),)}
    assert filled == {512, 60}


def _rows(path: Path) -> int:
    from potstill.validate.files import read_json

    return int(read_json(path / "cache.json")["rows"])


def test_a_killed_team_goes_on_to_the_same_weights(cached: Lesson, conv: Conv, tmp_path: Path) -> None:
    stage = Distill(epochs=10, patience=10)
    whole = Team(stage, conv((8, 6), 1), elsewhere(cached, "whole"), tmp_path / "w").results()[0]
    team = Team(stage, conv((8, 6), 1), cached, tmp_path / "k", stops=True)
    processes = [psutil.Process(member.pid) for member in team.members]
    wait_for(lambda: any(process.status() == psutil.STATUS_STOPPED for process in processes), seconds=400)
    for process in processes:
        process.suspend()  # so that none sees another one's end
    for process in processes:
        process.kill()
    for member in team.members:
        member.join()
        assert member.exitcode == -signal.SIGKILL
    resumed = Team(stage, conv((8, 6), 1), cached, tmp_path / "k").results()[0]
    assert resumed["log"][-1]["step"] == whole["log"][-1]["step"]
    assert len(resumed["seen"]) < len(whole["seen"])
    assert difference(whole, resumed) == 0.0


def layered(width: int, seed: int) -> Model:
    """A stack of two layers on numbers, whose weights FSDP spreads layer by layer."""
    torch.manual_seed(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(10, 10) for _ in range(2)])
            self.out = nn.Linear(10, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = torch.relu(layer(x))
            return self.out(x)  # type: ignore[no-any-return]

    from potstill.validate.checkpoint import Checkpoint

    core = Net()
    return Model(core, ArrayEncoder(), ("x",), tuple(map(str, range(width))), Checkpoint("torch.nn:Identity"), core)


@pytest.fixture
def numbers(picture_lesson: Lesson) -> Lesson:
    x = np.random.default_rng(0).normal(size=(160, 10)).astype(np.float32)
    examples = Examples("numbers", Arrays({"x": x}), np.zeros(160, dtype=np.int64), None, "d")
    parts = {"train": examples.take(range(128), "train"), "held_out": examples.take(range(128, 160), "held out")}
    return dataclasses.replace(picture_lesson, teacher=layered(3, 0), **parts)


def test_a_teacher_spread_over_the_processes_teaches_the_same(numbers: Lesson, tmp_path: Path) -> None:
    whole = Team(Distill(epochs=4), layered(3, 1), elsewhere(numbers, "whole"), tmp_path / "w").results()[0]
    spread_lesson = elsewhere(numbers, "spread")
    stage = Distill(epochs=4, shard_teacher=True)
    spread = Team(stage, layered(3, 1), spread_lesson, tmp_path / "s").results()[0]
    assert difference(whole, spread) < 1e-6
    assert spread["log"][-1]["taught_rows"] == 128 + 32
    # One process finds all of its rows kept, the other none: they still run the teacher together.
    assert spread_lesson.outputs is not None
    for path in spread_lesson.outputs.iterdir():
        file, rows = path / "outputs.bin", _rows(path)
        content = bytearray(file.read_bytes())
        content[: len(content) // rows * (rows // 2)] = bytes(len(content) // rows * (rows // 2))
        file.write_bytes(content)
    again = dataclasses.replace(spread_lesson, work=tmp_path / "again")
    assert difference(spread, Team(stage, layered(3, 1), again, tmp_path / "g").results()[0]) < 1e-6


def test_a_loss_that_one_process_loses_stops_both_with_the_row(numbers: Lesson, tmp_path: Path) -> None:
    x = numbers.train.rows(range(128))["x"].copy()
    x[77] = np.inf
    broken = dataclasses.replace(numbers, train=dataclasses.replace(numbers.train, table=Arrays({"x": x})))
    stage = Distill(epochs=1, losses={"hard": 1.0})
    said = [found["error"] for found in Team(stage, layered(3, 1), broken, tmp_path / "e").results()]
    assert said[0] == said[1]
    assert "the loss is" in said[0]
    rows = said[0].partition("batch of rows ")[2].partition(" of ")[0]
    assert "78" in rows.split(", ")
    assert len(rows.split(", ")) == 16


def test_batches_that_cannot_be_shared_out(picture_lesson: Lesson, conv: Conv, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="shard_teacher spreads the teacher over the processes of torchrun, and there"):
        Distill(shard_teacher=True)(conv((8, 6), 1), picture_lesson)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="batch_size 32 is shared out over 3 processes; give a multiple of that"):
        Distill()(conv((8, 6), 1), picture_lesson)
