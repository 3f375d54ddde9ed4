"""How a training runs: number formats, compilation, accumulation, when it stops, where it goes on."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from potstill.compress.distill import Distill, rehearsal
from potstill.compress.lesson import Collator, Lesson
from potstill.validate.data import Arrays
from potstill.validate.errors import InputError
from potstill.validate.task import Model
from tests.forked import Forked

Conv = Callable[[tuple[int, int], int], Model]
Log = list[dict[str, float]]


def elsewhere(lesson: Lesson, name: str, **changed: Any) -> Lesson:
    return dataclasses.replace(lesson, work=lesson.work.parent / name, **changed)


def course(log: Log, name: str = "loss") -> list[float]:
    return [entry[name] for entry in log if name in entry]


def difference(one: Model, other: Model) -> float:
    theirs = other.core.state_dict()
    return max((value - theirs[name]).abs().max().item() for name, value in one.core.state_dict().items())


class Formats:
    """The number formats that a model gave."""

    def __init__(self, model: Model) -> None:
        self.seen: set[torch.dtype] = set()
        model.module.register_forward_hook(lambda _m, _i, output: self.seen.add(output.dtype))


def test_bf16_trains_and_leaves_weights_in_float32(picture_lesson: Lesson, conv: Conv) -> None:
    student = conv((8, 6), 1)
    ours, theirs = Formats(student), Formats(picture_lesson.teacher)
    log = Distill(epochs=2, precision="bf16", losses={"kl": 1.0, "features": 1.0})(student, picture_lesson)
    assert ours.seen == {torch.float32, torch.bfloat16}  # float32 once, to learn the shapes of layers
    assert theirs.seen == {torch.float32, torch.bfloat16}
    assert course(log)[-1] < 0.9 * course(log)[0]
    assert {parameter.dtype for parameter in student.core.parameters()} == {torch.float32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_fp16_needs_a_cuda_device(picture_lesson: Lesson, conv: Conv) -> None:
    with pytest.raises(InputError, match="precision: fp16 needs a CUDA device; on a CPU say bf16 or float32"):
        Distill(precision="fp16")(conv((8, 6), 1), picture_lesson)


@pytest.mark.slow
@pytest.mark.parametrize("losses", [None, {"kl": 1.0, "features": 1.0}], ids=["outputs", "layers"])
def test_compiled_it_learns_the_same(losses: dict[str, Any] | None, picture_lesson: Lesson, conv: Conv) -> None:
    plain, compiled = conv((8, 6), 1), conv((8, 6), 1)
    Distill(epochs=1, losses=losses)(plain, elsewhere(picture_lesson, "plain"))
    Distill(epochs=1, losses=losses, compile=True)(compiled, elsewhere(picture_lesson, "compiled"))
    assert difference(plain, compiled) < 1e-4
    assert compiled.module._compiled_call_impl is None


@pytest.mark.parametrize("losses", [{"kl": 0.9, "hard": 0.1}, {"kl": 1.0, "features": 0.5}], ids=["outputs", "layers"])
def test_two_half_batches_are_one_batch(losses: dict[str, Any], picture_lesson: Lesson, conv: Conv) -> None:
    whole, halves = conv((8, 6), 1), conv((8, 6), 1)
    log = Distill(epochs=2, losses=losses)(whole, elsewhere(picture_lesson, "whole"))
    stage = Distill(epochs=2, losses=losses, batch_size=16, accumulate=2)
    assert stage.steps(512) == Distill(epochs=2).steps(512) == 32
    other = stage(halves, elsewhere(picture_lesson, "halves"))
    assert difference(whole, halves) < 1e-4
    assert other[-1]["step"] == log[-1]["step"] == 32
    assert course(other) == pytest.approx(course(log), rel=1e-3)


@pytest.mark.parametrize(("examples", "batch", "accumulate", "epochs", "steps"), [
    (512, 32, 1, 3, 48), (500, 32, 1, 1, 16), (500, 32, 3, 2, 12), (500, 32, 1, 0.1, 2), (10, 32, 4, 1, 1),
])  # fmt: skip
def test_steps_are_as_many_as_are_said(
    examples: int, batch: int, accumulate: int, epochs: float, steps: int, picture_lesson: Lesson, conv: Conv
) -> None:
    stage = Distill(epochs=epochs, batch_size=batch, accumulate=accumulate, losses={"hard": 1.0})
    assert stage.steps(examples) == steps
    lesson = dataclasses.replace(picture_lesson, train=picture_lesson.train.take(range(examples), "part"))
    assert stage(conv((4, 4), 1), lesson)[-1]["step"] == steps


def test_patience_stops_a_training_that_does_not_get_better(picture_lesson: Lesson, conv: Conv) -> None:
    stage = {"epochs": 20, "learning_rate": 0.1}
    log = Distill(**stage, patience=2)(conv((8, 6), 1), picture_lesson)
    held = course(log, "eval_loss")
    best = held.index(min(held))
    assert len(held) == best + 1 + 2
    assert log[-1]["step"] < Distill(**stage).steps(512)


def test_a_training_that_diverges_says_when_and_what_to_try(picture_lesson: Lesson, conv: Conv) -> None:
    said = (
        r"the training diverged: the loss is [\d.e+]+ at step \d+ and was [\d.]+ at the start; "
        r"try a lower learning_rate \(now 0.9\)"
    )
    with pytest.raises(InputError, match=said):
        Distill(epochs=6, learning_rate=0.9, losses={"features": 1.0})(conv((8, 6), 1), picture_lesson)


def test_the_one_broken_row_is_among_those_that_are_named(picture_lesson: Lesson, conv: Conv) -> None:
    x = picture_lesson.train.rows(range(512))["x"].astype(np.float32)
    x[300, 0, 0, 0] = np.nan
    lesson = dataclasses.replace(
        picture_lesson, train=dataclasses.replace(picture_lesson.train, table=Arrays({"x": x}))
    )
    seen: list[list[int]] = []
    student = conv((8, 6), 1)
    encode = student.encode

    class Noting:
        truncated = 0

        def __call__(self, rows: Any) -> Any:
            seen.append([int(i) for i in np.flatnonzero(np.isnan(rows["x"]).any(axis=(1, 2, 3)))])
            return encode(rows)

        def save(self, folder: Path) -> None:
            encode.save(folder)

    student.encode = Noting()  # type: ignore[assignment]
    with pytest.raises(InputError, match="the loss is nan at step .* look for broken inputs in these rows") as caught:
        Distill(epochs=1, losses={"hard": 1.0})(student, lesson)
    message = str(caught.value)
    rows = message.partition("batch of rows ")[2].partition(" of blobs")[0].split(", ")
    assert len(rows) == 32
    assert "301" in rows
    training = seen[1:]  # after the samples for shapes
    step = int(message.partition("at step ")[2].partition(",")[0])
    assert [bool(batch) for batch in training[:step]] == [False] * (step - 1) + [True]


def test_several_gpus_without_torchrun_get_no_batch_each(
    picture_lesson: Lesson, conv: Conv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    arguments = Distill()._arguments(conv((8, 6), 1), picture_lesson, torch.device("cpu"))
    assert arguments.n_gpu <= 1
    assert arguments.train_batch_size == arguments.eval_batch_size == 32


def test_a_rehearsal_leaves_no_trace(picture_lesson: Lesson, conv: Conv) -> None:
    student = conv((8, 6), 1)
    before = {name: value.clone() for name, value in student.core.state_dict().items()}
    stage = Distill(losses={"kl": 1.0, "features": 1.0})
    with rehearsal(stage, student, picture_lesson, torch.device("cpu")) as step:
        step(range(16))
    assert all(torch.equal(value, before[name]) for name, value in student.core.state_dict().items())
    for model in (student, picture_lesson.teacher):
        assert not any(module._forward_hooks for module in model.module.modules())


# A training that is killed.


def test_checkpoints_of_another_training_are_not_taken_up(picture_lesson: Lesson, conv: Conv) -> None:
    Distill(epochs=0.2)(conv((8, 6), 1), picture_lesson)
    with pytest.raises(InputError, match="work holds checkpoints of another training; remove it, or give another"):
        Distill(epochs=1, losses={"features": 1.0})(conv((8, 6), 1), picture_lesson)


class Killed(Collator):
    """Ends its process at the first batch after the second checkpoint, as signal 9 does."""

    work: Path

    def __call__(self, items: list[tuple[str, int, int]]) -> dict[str, Any]:
        if len(list(Killed.work.glob("checkpoint-*/trainer_state.json"))) >= 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(items)


def _train(stage: Distill, student: Model, lesson: Lesson, out: Path, killed: bool) -> None:
    import potstill.compress.distill as module

    torch.set_num_threads(1)
    if killed:
        Killed.work, module.Collator = lesson.work, Killed  # type: ignore[misc]
    log = stage(student, lesson)
    torch.save({"weights": student.core.state_dict(), "step": log[-1]["step"]}, out)
    os._exit(0)


def dropping(conv: Conv) -> Model:
    """A student with dropout, whose masks must be drawn again alike."""
    student = conv((8, 6), 1)
    core: Any = student.core
    core.out = nn.Sequential(nn.Dropout(0.3), core.out)
    return student


@pytest.mark.parametrize(
    "settings",
    [
        {"losses": {"kl": 1.0, "features": 1.0}},  # with projections
        {"losses": {"kl": 0.9, "hard": 0.1}, "patience": 3, "learning_rate": 0.02},  # with kept outputs
        {"augment": ("flip", "shift"), "views": 2},
    ],
    ids=["projections", "cache and patience", "views"],
)
def test_a_killed_training_goes_on_to_the_same_weights(
    settings: dict[str, Any], picture_lesson: Lesson, conv: Conv, tmp_path: Path
) -> None:
    stage = Distill(epochs=12, **settings)

    def ended(name: str, killed: bool = False) -> int | None:
        """The exit code of a training."""
        lesson = elsewhere(picture_lesson, name, outputs=tmp_path / f"{name}-outputs")
        process = Forked(target=_train, args=(stage, dropping(conv), lesson, tmp_path / f"{name}.pt", killed))
        process.start()
        process.join()
        return process.exitcode

    assert (ended("whole"), ended("killed", killed=True)) == (0, -signal.SIGKILL)
    assert not (tmp_path / "killed.pt").exists()
    assert ended("killed") == 0
    one, other = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "killed"))
    assert one["step"] == other["step"]
    assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])
