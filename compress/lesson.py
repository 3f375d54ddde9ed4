"""What a training stage works with, and its batches.

Shapes: B examples in a batch, R rows (examples; words for tagging).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from potstill.compress.output_cache import OutputCache
from potstill.compress.views import Views
from potstill.validate.aligned import labels_in, met, prefix_of
from potstill.validate.data import Examples
from potstill.validate.examples import IGNORED
from potstill.validate.task import Model, Task


@dataclass(frozen=True)
class Lesson:
    """What a training stage works with.

    Attributes:
        task: how examples are grouped.
        teacher: the model to learn from; with `others`, the first of several.
        train: the examples to learn; labels of `IGNORED` where there are none.
        held_out: training examples that only choose the best checkpoint; never the evaluation set.
        seed: of the order, of views and of dropout.
        work: folder for checkpoints while training; what is there is taken up again.
        others: further teachers over the same classes.
        weights: of the teachers, one for each; by default all alike.
        outputs: folder for the teachers' outputs, shared by all trainings that use the same; None keeps none.
    """

    task: Task
    teacher: Model
    train: Examples
    held_out: Examples
    seed: int
    work: Path
    others: tuple[Model, ...] = ()
    weights: tuple[float, ...] = ()
    outputs: Path | None = None

    @property
    def teachers(self) -> tuple[Model, ...]:
        """All of them."""
        return (self.teacher, *self.others)


class Indices(Dataset[tuple[str, int, int]]):
    """Stands for a set of examples; the collator reads the rows. An item is (part, epoch, example)."""

    def __init__(self, part: str, examples: int) -> None:
        self.part, self._examples = part, examples

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, item: int) -> tuple[str, int, int]:
        return self.part, item // self._examples, item % self._examples


class Order(Sampler[int]):
    """A new order for each epoch, from the seed and the epoch alone: the same on every process and after a resume.

    An item is epoch · N + example. With `lengths`, texts of like length are batched together.
    """

    def __init__(self, examples: int, seed: int, lengths: list[int] | None, batch_size: int) -> None:
        self._examples, self._seed, self._lengths, self._batch_size = examples, seed, lengths, batch_size
        self._epoch = 0

    def __len__(self) -> int:
        return self._examples

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop at the start of each epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        if self._lengths is None:
            order = torch.randperm(self._examples, generator=generator).tolist()
        else:
            order = list(LengthGroupedSampler(self._batch_size, lengths=self._lengths, generator=generator))
        return iter([self._epoch * self._examples + i for i in order])


class Collator:
    """Rows by index, encoded for the student and, where no kept outputs are there, for each teacher.

    Teachers that encode as the student does share its tensors.
    """

    def __init__(
        self,
        lesson: Lesson,
        student: Model,
        teachers: Sequence[Model],
        views: Views | None = None,
        cycle: int = 0,
        kept: Mapping[str, OutputCache] | None = None,
        lockstep: bool = False,
    ) -> None:
        """What to encode, and how.

        Args:
            lesson: whose examples are read.
            student: to encode for.
            teachers: to encode for.
            views: of the training examples.
            cycle: how many views there are of each example, which epochs take in turn; 0 for a new one each epoch.
            kept: teachers' outputs on disk for `train` and `held_out`; of view v, row i is row v · N + i.
            lockstep: encode for the teachers even where outputs are kept: they run when any process needs them.
        """
        self._parts = {"train": lesson.train, "held_out": lesson.held_out}
        self._student, self._teachers, self._views, self._cycle = student, teachers, views, cycle
        self._kept, self._lockstep = kept or {}, lockstep

    def __call__(self, items: list[tuple[str, int, int]]) -> dict[str, Any]:
        """One batch.

        Returns:
            `student`: tensors; `taught`: the teachers' outputs (R, C), or None where they are not kept; `teachers`: a
            list of tensors; `labels` (R,); `keep`: bool (R,) or None; `rows`: numbers of the rows in the kept
            outputs (R,); `part` and `items` (B,): which examples these are; `met`: of a student with a tokenizer of its
            own the rows of both, see `aligned.met`, else None. Its `labels` and `keep` are of its own tokens.
        """
        part, indices = items[0][0], [index for _, _, index in items]
        view = items[0][1] % self._cycle if self._cycle else items[0][1]
        examples = self._parts[part]
        rows = examples.rows(indices)
        if part == "train" and self._views:
            rows = self._views(rows, indices, view)
        cpu = torch.device("cpu")
        student = self._student.tensors(rows, cpu)
        places, taught = _places(examples, indices), None
        if part in self._kept:
            places = places + (view if part == "train" and self._cycle else 0) * len(examples.labels)
            taught = self._kept[part].read(places)
        teachers = []
        if taught is None or self._lockstep or examples.offsets is not None:  # which words one cut off is not kept
            teachers = [
                student if teacher.encode is self._student.encode else teacher.tensors(rows, cpu)
                for teacher in self._teachers
            ]
        labels = student["targets"] if "targets" in student else torch.from_numpy(examples.labels_of(indices))
        keep, both = _keep(examples, indices, [student, *teachers]), None
        if prefix := prefix_of(self._student.encode):
            labels = torch.from_numpy(np.concatenate(labels_in(rows, prefix)))
            keep, both = labels != IGNORED, tuple(map(torch.from_numpy, met(rows)))
        return {
            "student": student, "teachers": teachers, "taught": taught, "labels": labels, "keep": keep,
            "rows": places, "part": part, "items": np.asarray(indices), "met": both,
        }  # fmt: skip


def _places(examples: Examples, indices: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Numbers of the rows of some examples."""
    if examples.offsets is None:
        return np.asarray(indices, dtype=np.int64)
    return np.concatenate([np.arange(examples.offsets[i], examples.offsets[i + 1]) for i in indices])


def _keep(examples: Examples, indices: Sequence[int], encoded: Sequence[dict[str, Tensor]]) -> Tensor | None:
    """The words to learn from: not ignored by the labels, and cut off by none who reads them. None keeps all.

    A word is ignored when it has no label and its sentence has others; a sentence without any label is unlabelled.
    """
    if examples.offsets is None:
        return None
    keep = []
    for i in indices:
        labelled = examples.labels[examples.offsets[i] : examples.offsets[i + 1]] != IGNORED
        keep.append(labelled if labelled.any() else np.ones_like(labelled))
    kept = torch.from_numpy(np.concatenate(keep))
    for tensors in encoded:
        if "word_starts" in tensors:
            starts = tensors["word_starts"]
            kept &= starts[starts != -1] >= 0
    return kept
