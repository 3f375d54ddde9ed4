"""A student of half its teacher's size or less, distilled and trained alone with the same budget, over 3 seeds."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from potstill.compress.distill import Distill
from potstill.compress.lesson import Lesson
from potstill.compress.student import Student
from potstill.pipeline.material import split
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.examples import Examples
from potstill.validate.language import TextGeneration
from potstill.validate.next_tokens import surprisals
from potstill.validate.predictor import TorchPredictor, predict
from potstill.validate.task import TASKS, Model

SEEDS, DRAWS = (0, 1, 2), 10_000
ARMS: dict[str, dict[str, Any]] = {"alone": {"losses": {"hard": 1.0}}, "distilled": {}}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A teacher with its texts, and the cut and the budget of its students.

    Attributes:
        name: as in the table.
        teacher: the folder of its checkpoint.
        train, test: JSON lines with `text`.
        cut: settings of `Student`.
        budget: settings of `Distill` in every arm.
        learned, texts: how many to learn from, and to judge on; None for all.
    """

    name: str
    teacher: Path
    train: Path
    test: Path
    cut: dict[str, Any]
    budget: dict[str, Any]
    learned: int | None = None
    texts: int | None = None


def students(case: Case) -> dict[str, Any]:
    """Perplexities of both arms for each seed, and the ratio with its interval."""
    task = TASKS[TextGeneration.word]
    teacher = task.load(Checkpoint(str(case.teacher)), max_length=256)
    train, test = (
        task.checked(task.examples(str(source), {}, judging=judging), (), encode=teacher.encode, judging=judging)
        for source, judging in ((case.train, False), (case.test, True))
    )
    train = train.take(range(min(case.learned or len(train), len(train))), "learned")
    test = test.take(range(min(case.texts or len(test), len(test))), "judged")
    lost: dict[str, list[NDArray[np.float64]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            for arm, settings in ARMS.items():
                student = Student(**case.cut)(teacher, task, {}, 0, train)
                parts, work = split(train, seed), Path(folder, f"{arm}-{seed}")
                outputs = Path(folder, "outputs") if arm == "distilled" else None
                Distill(**case.budget, **settings)(student, Lesson(task, teacher, *parts, seed, work, outputs=outputs))
                lost[arm].append(of_texts(student, test))
        theirs, start = of_texts(teacher, test), Student(**case.cut)(teacher, task, {}, 0, train)
    tokens = theirs[:, 1].sum()
    alone, distilled = (np.stack([one[:, 0] for one in lost[arm]]) for arm in ARMS)
    low, high = interval(distilled - alone, theirs[:, 1])
    return {
        "teacher": float(np.exp(theirs[:, 0].sum() / tokens)),
        "alone": [float(np.exp(one.sum() / tokens)) for one in alone],
        "distilled": [float(np.exp(one.sum() / tokens)) for one in distilled],
        "ratio": float(np.exp((distilled - alone).mean(axis=0).sum() / tokens)),
        "interval": [low, high],
        "size_ratio": start.parameters / teacher.parameters,
        "weights": [start.parameters, teacher.parameters],
        "train_tokens": len(train.labels),
        "test_tokens": int(tokens),
        "test_texts": len(theirs),
        "cut": str(case.cut),
        "budget": str(case.budget),
    }


def of_texts(model: Model, test: Examples) -> NDArray[np.float64]:
    """−log p and tokens of each text (D, 2)."""
    assert test.offsets is not None
    with tempfile.TemporaryDirectory() as folder:
        rows = predict(TorchPredictor(model, "the model", CPU), test, None, Path(folder, "logits.npy"))
        found = surprisals(rows, test.labels)
    of = np.asarray(test.rows(range(len(test)))["document"])
    text = np.unique(of, return_inverse=True)[1][np.repeat(np.arange(len(test)), np.diff(test.offsets))]
    return np.stack([np.bincount(text, found), np.bincount(text)], axis=1)


def interval(difference: NDArray[np.float64], tokens: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of a ratio of perplexities, from differences of −log p (seeds, texts): a bootstrap over both."""
    rng = np.random.default_rng(0)
    seeds, texts = difference.shape
    found = np.empty(DRAWS)
    for i in range(DRAWS):
        drawn = rng.integers(texts, size=texts)
        found[i] = difference[rng.integers(seeds, size=seeds)].mean(axis=0)[drawn].sum() / tokens[drawn].sum()
    low, high = np.exp(np.percentile(found, [2.5, 97.5]))
    return float(low), float(high)
