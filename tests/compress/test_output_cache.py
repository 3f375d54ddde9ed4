"""The teachers' outputs on disk: what comes back, what does not, and what a training does with them."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp, softmax

from potstill.compress.distill import Distill
from potstill.compress.lesson import Lesson
from potstill.compress.output_cache import OutputCache
from potstill.validate.data import load_examples
from potstill.validate.encoder import TextEncoder
from potstill.validate.errors import InputError
from potstill.validate.task import Model

RNG = np.random.default_rng(0)
Fresh = Callable[..., Model]


def logits(rows: int, width: int) -> torch.Tensor:
    return torch.from_numpy(RNG.normal(0, 4, (rows, width))).float()


def test_classes_come_back_as_log_probabilities_in_float16(tmp_path: Path) -> None:
    cache, outputs = OutputCache(tmp_path, 100, 10, True), logits(40, 10)
    rows = RNG.permutation(100)[:40]
    written = cache.write(rows, outputs)
    read = cache.read(rows)
    assert read is not None
    assert read.dtype == torch.float32
    assert torch.equal(read, written)
    wanted = log_softmax(outputs.double().numpy(), axis=1)
    assert np.array_equal(read.numpy(), wanted.astype(np.float32).astype(np.float16).astype(np.float32))
    assert cache.filled() == 40
    back = cache.read(rows[::-1][:3])
    assert back is not None
    assert torch.equal(back, read.flip(0)[:3])


def test_embeddings_come_back_as_they_are(tmp_path: Path) -> None:
    cache, outputs = OutputCache(tmp_path, 8, 3000, False), logits(8, 3000)
    assert torch.equal(cache.write(range(8), outputs), outputs.half().float())


@pytest.mark.parametrize(("width", "classes"), [(2, True), (1024, True), (1025, True), (384, False)])
def test_the_file_is_as_large_as_is_said(width: int, classes: bool, tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, 50, width, classes)
    stat = (tmp_path / "outputs.bin").stat()
    assert stat.st_size == 50 * cache.bytes_per_row
    assert stat.st_blocks * 512 >= stat.st_size  # the space is taken at once
    assert json.loads((tmp_path / "cache.json").read_text())["bytes_per_row"] == cache.bytes_per_row
    assert cache.bytes_per_row == 4 + (2 * width if width <= 1024 else 2 * 256 + 4 + 4 * 256)


def test_of_many_classes_the_top_and_the_mass_of_the_others_are_kept(tmp_path: Path) -> None:
    width, outputs = 3000, logits(6, 3000)
    read = OutputCache(tmp_path, 6, width, True).write(range(6), outputs).double().numpy()
    exact = log_softmax(outputs.double().numpy(), axis=1)
    order = np.argsort(-exact, axis=1)
    for row, (found, wanted, places) in enumerate(zip(read, exact, order, strict=True)):
        top, rest = places[:256], places[256:]
        assert np.allclose(found[top], wanted[top], rtol=1e-3), row
        assert np.ptp(found[rest]) == 0.0
        assert logsumexp(found[rest]) == pytest.approx(logsumexp(wanted[rest]), abs=1e-5)
        assert np.exp(found).sum() == pytest.approx(1.0, abs=2e-3)  # float16 of the largest


def test_a_class_that_cannot_be_stays_finite(tmp_path: Path) -> None:
    outputs = torch.tensor([[0.0, -torch.inf, 1.0]])
    read = OutputCache(tmp_path, 1, 3, True).write([0], outputs)
    assert read.isfinite().all()
    assert np.allclose(softmax(read.numpy()), softmax(outputs.numpy()), atol=1e-3)


def test_rows_that_are_not_there_or_were_torn_are_not_read(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, 10, 4, True)
    cache.write([2, 3, 4], logits(3, 4))
    assert cache.read([2, 3]) is not None
    assert cache.read([3, 5]) is None
    with (tmp_path / "outputs.bin").open("r+b") as file:  # the last bytes of row 3 were not written
        file.seek(4 * cache.bytes_per_row - 2)
        file.write(b"\0\0")
    again = OutputCache(tmp_path, 10, 4, True)
    assert again.read([3]) is None
    assert again.read([2, 4]) is not None
    assert again.filled() == 2


def test_a_record_at_another_row_is_no_record(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, 4, 4, True)
    cache.write([1], logits(1, 4))
    with (tmp_path / "outputs.bin").open("r+b") as file:
        file.seek(cache.bytes_per_row)
        record = file.read(cache.bytes_per_row)
        file.seek(2 * cache.bytes_per_row)
        file.write(record)
    assert OutputCache(tmp_path, 4, 4, True).read([2]) is None


WRITER = """
import sys
import torch
from pathlib import Path
from potstill.compress.output_cache import OutputCache
cache = OutputCache(Path({folder!r}), 3000, 5, True)
start = int(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for row in [*range(start, 3000, 2), *range(1000)]:  # every second row, then rows that the other writes too
    cache.write([row], torch.arange(5.0)[None] * (row % 7))
if start:
    print("written", flush=True)
    sys.stdin.readline()
"""


def test_two_processes_write_at_once_and_one_is_killed(tmp_path: Path) -> None:
    code = WRITER.format(folder=str(tmp_path / "cache"))
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    assert writers[1].stdout is not None
    assert writers[1].stdout.readline() == "written\n"
    writers[1].send_signal(signal.SIGKILL)
    assert writers[0].communicate(timeout=120)[0] == ""
    assert [writer.wait() for writer in writers] == [0, -signal.SIGKILL]
    cache = OutputCache(tmp_path / "cache", 3000, 5, True)
    assert cache.filled() == 3000
    read = cache.read(range(3000))
    assert read is not None
    wanted = log_softmax(np.arange(5.0) * (np.arange(3000)[:, None] % 7), axis=1)
    assert np.allclose(read.numpy(), wanted, rtol=1e-3)


def test_outputs_of_another_shape_are_refused(tmp_path: Path) -> None:
    OutputCache(tmp_path, 4, 4, True)
    with pytest.raises(InputError, match=r"holds outputs of another shape \(.*\"width\": 4.*\); remove it"):
        OutputCache(tmp_path, 4, 5, True)


@pytest.mark.parametrize(("value", "classes"), [(1e6, False), (float("nan"), True), (float("inf"), False)])
def test_values_that_float16_cannot_hold_are_refused(value: float, classes: bool, tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, 4, 2, classes)
    with pytest.raises(InputError, match="do not fit float16, or are not finite; say cache: false"):
        cache.write([0], torch.tensor([[value, 0.0]]))
    assert cache.filled() == 0


def test_a_full_disk_is_said_at_once_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device: .*outputs.bin"):
        OutputCache(tmp_path, 4, 4, True)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert OutputCache(tmp_path, 4, 4, True).filled() == 0


# In a training.


class Calls:
    """How often a model runs."""

    def __init__(self, model: Model) -> None:
        self.count = 0
        model.module.register_forward_hook(self._heard)

    def _heard(self, *_: Any) -> None:
        self.count += 1


@pytest.fixture
def cached(lesson: Lesson) -> Lesson:
    return dataclasses.replace(lesson, outputs=lesson.work.parent / "outputs")


def elsewhere(lesson: Lesson, name: str, **changed: Any) -> Lesson:
    return dataclasses.replace(lesson, work=lesson.work.parent / name, **changed)


def files(lesson: Lesson) -> set[str]:
    assert lesson.outputs is not None
    return {path.name for path in lesson.outputs.iterdir()}


def taught(log: list[dict[str, float]]) -> float:
    return log[-1]["taught_rows"]


def test_from_the_second_epoch_on_the_teacher_does_not_run(cached: Lesson, fresh: Fresh) -> None:
    calls = Calls(cached.teacher)
    assert taught(Distill(epochs=3)(fresh(), cached)) == 512 + 60
    assert calls.count == 16 + 2 + 1  # training batches, held-out batches, and once to learn the width
    assert taught(Distill(epochs=1)(fresh(), elsewhere(cached, "again"))) == 0
    assert calls.count == 19 + 1
    assert len(files(cached)) == 2  # training and held-out examples


def test_without_the_cache_it_runs_every_time(cached: Lesson, lesson: Lesson, fresh: Fresh) -> None:
    wanted = 2 * 512 + 2 * 60
    assert taught(Distill(epochs=2, cache=False)(fresh(), cached)) == wanted
    assert taught(Distill(epochs=2)(fresh(), elsewhere(lesson, "none"))) == wanted
    assert cached.outputs is not None
    assert not cached.outputs.exists()


def test_the_cache_teaches_what_the_teacher_says(cached: Lesson, lesson: Lesson, fresh: Fresh) -> None:
    one, other = fresh(), fresh()
    Distill(epochs=1)(one, cached)
    Distill(epochs=1)(other, elsewhere(lesson, "plain"))
    for a, b in zip(one.core.parameters(), other.core.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-4)  # float16


def test_another_loss_on_the_same_outputs_uses_the_same_file_but_vectors_do_not(cached: Lesson, fresh: Fresh) -> None:
    Distill(epochs=0.1)(fresh(), cached)
    before = files(cached)
    Distill(epochs=0.1, losses={"dist": 1.0})(fresh(), elsewhere(cached, "dist"))
    assert files(cached) == before
    Distill(epochs=0.1, losses={"similarity": 1.0})(fresh(), elsewhere(cached, "similarity"))
    assert len(files(cached)) == 4


def test_vectors_are_kept_as_they_are(cached: Lesson, lesson: Lesson, fresh: Fresh) -> None:
    losses = []
    for where in (cached, elsewhere(lesson, "plain")):
        log = Distill(epochs=0.2, losses={"similarity": 1.0})(fresh(), where)
        losses.append([entry["loss"] for entry in log if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def changed_example(lesson: Lesson, texts: dict[str, Path], tmp_path: Path) -> Lesson:
    lines = texts["train"].read_text().splitlines()
    lines[3] = "the film is grim\t0"
    path = tmp_path / "train.tsv"
    path.write_text("\n".join(lines) + "\n")
    train = load_examples(str(path), ("text",), {"text": "sentence"}).with_labels(lesson.teacher.labels)
    return elsewhere(lesson, "data", train=train.take(range(512), "train"))


def changed_weights(lesson: Lesson, *_: Any) -> Lesson:
    with torch.no_grad():
        next(iter(lesson.teacher.core.parameters()))[5] += 0.1
    return elsewhere(lesson, "weights")


def changed_length(lesson: Lesson, *_: Any) -> Lesson:
    assert isinstance(lesson.teacher.encode, TextEncoder)
    encode = dataclasses.replace(lesson.teacher.encode, max_length=9)
    return elsewhere(lesson, "length", teacher=dataclasses.replace(lesson.teacher, encode=encode))


@pytest.mark.parametrize("change", [changed_example, changed_weights, changed_length])
def test_other_data_weights_or_lengths_are_taught_anew(
    change: Callable[..., Lesson], cached: Lesson, fresh: Fresh, texts: dict[str, Path], tmp_path: Path
) -> None:
    Distill(epochs=1)(fresh(), cached)
    before = files(cached)
    log = Distill(epochs=1)(fresh(), change(cached, texts, tmp_path))
    new = files(cached) - before
    assert len(new) == (1 if change is changed_example else 2)  # the held-out examples are the same
    assert taught(log) == 512 + (0 if change is changed_example else 60)


def test_views_that_are_counted_are_kept_and_others_are_not(
    picture_lesson: Lesson, conv: Callable[..., Model], tmp_path: Path
) -> None:
    kept = dataclasses.replace(picture_lesson, outputs=tmp_path / "outputs")
    assert taught(Distill(epochs=4, augment=("flip",), views=2)(conv((8, 6), 1), kept)) == 2 * 512 + 60
    first = files(kept)
    anew = Distill(epochs=4, augment=("flip",))
    assert taught(anew(conv((8, 6), 1), elsewhere(kept, "anew"))) == 4 * 512  # only held-out examples are kept
    assert files(kept) == first


@pytest.mark.parametrize(
    ("settings", "seed"),
    [
        ({"augment": ("shift",), "views": 2}, 0),
        ({"augment": ("flip",), "views": 3}, 0),
        ({"augment": ("flip",), "views": 2}, 1),
    ],
)
def test_other_views_are_taught_anew(
    settings: dict[str, Any], seed: int, picture_lesson: Lesson, conv: Callable[..., Model], tmp_path: Path
) -> None:
    kept = dataclasses.replace(picture_lesson, outputs=tmp_path / "outputs")
    Distill(epochs=1, augment=("flip",), views=2)(conv((8, 6), 1), kept)
    log = Distill(epochs=1, **settings)(conv((8, 6), 1), elsewhere(kept, "other", seed=seed))
    assert taught(log) == 512
    assert len(files(kept)) == 3
