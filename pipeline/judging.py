"""Each model of a run judged: predicted once on each set of examples, and asked from what was kept.

In the run's cache:
    predicted-…   a model's rows on one set of examples: `logits.npy`
    judged-…      what these say of the model beside its teacher's: a `Judged`
Another question (other slices, another second set) so predicts nothing again that was predicted before.

Shapes: N examples, R rows that are judged (N where each example has one class), C classes.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache as once
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from potstill.pipeline.cache import Cache
from potstill.pipeline.material import Material
from potstill.validate.aligned import between, judged_rows, read_by
from potstill.validate.calibration import Calibration, calibration, confidence
from potstill.validate.encoder import Encoder
from potstill.validate.errors import InputError
from potstill.validate.examples import IGNORED, Examples
from potstill.validate.files import read_json
from potstill.validate.flips import Flips, flips
from potstill.validate.gate import Gate
from potstill.validate.leaks import leaked_rows
from potstill.validate.metrics import most_likely
from potstill.validate.perturb import in_words
from potstill.validate.predictor import LEAST, Predictor, predict
from potstill.validate.scorecard import Scorecard
from potstill.validate.shift import SHIFTED, Shift, fragility
from potstill.validate.slices import Cut, Slice, in_thirds, slices
from potstill.validate.verdict import Verdict, verdict_of

LOGITS = "logits.npy"


@checked_dataclass(frozen=True)
class Judged:
    """What is known of a model that was judged; the fields are those of a ledger's `Entry`."""

    scorecard: Scorecard
    step: Scorecard | None = None
    unleaked: Scorecard | None = None
    flips: Flips | None = None
    slices: list[Slice] | None = None
    calibration: Calibration | None = None
    shifts: list[Shift] | None = None
    unjudged: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Subject:
    """A model to be judged.

    Attributes:
        key: a hash of all that made it.
        encode: what turns raw examples into its inputs.
        open: gives what predicts; called only where something is to be predicted.
    """

    key: str
    encode: Encoder
    open: Callable[[], Predictor]


@dataclass(frozen=True)
class Answers:
    """What a model and another one, mostly its teacher, say of the same examples.

    Attributes:
        examples: N of them.
        mine, theirs: the rows (R, C) of both, on the disk.
        truncated: how many of the model's inputs were cut.
    """

    examples: Examples
    mine: NDArray[Any]
    theirs: NDArray[Any]
    truncated: int

    def right(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Whether each of them has each labelled example right (N,), where each example has one class."""
        labels = self.examples.labels
        known = labels != IGNORED
        return (most_likely(self.mine) == labels)[known], (most_likely(self.theirs) == labels)[known]


class Judge:
    """Judges the models of one run against its teacher, who comes first."""

    def __init__(self, cache: Cache, material: Material) -> None:
        self.cache, self.material, self.task = cache, material, material.task
        self.teacher: Subject | None = None

    def __call__(self, subject: Subject, after: Subject | None = None, whole: bool = True) -> Judged:
        """What is known of a model, found out now or before.

        Args:
            subject: the model.
            after: the model of the step before, which it is compared with too.
            whole: whether to look beyond scorecards: flips, slices, calibration and other sets of examples.
        """
        self.teacher = self.teacher or subject
        subject, material = replace(subject, open=once(subject.open)), self.material
        also = {name: examples.digest for name, examples in material.elsewhere.items()}
        key = self.cache.key(
            "judged",
            models=[one.key for one in (subject, self.teacher, after) if one],
            eval=material.eval.digest,
            leaked=sorted(leaked_rows(material.leaks)),
            beyond=[material.recipe.data.slices, also, material.recipe.seed] if whole else None,
        )
        if not self.cache.done("judged", key):
            found = self._judged(subject, after, whole)
            with self.cache.making("judged", key) as (_, record):
                record["model"] = subject.key
                record["judged"] = TypeAdapter(Judged).dump_python(found, mode="json")
        record = read_json(self.cache.place("judged", key) / "record.json")
        return TypeAdapter(Judged).validate_python(record["judged"])

    def _judged(self, subject: Subject, after: Subject | None, whole: bool) -> Judged:
        answers = self._answers(subject, self.material.eval)
        card = self._card(answers, subject)
        step = None
        if after:
            step = self._card(self._answers(subject, self.material.eval, after), subject)
        found = Judged(card, step, self._unleaked(answers, subject))
        if not whole:
            return found
        shifts, unjudged = self._shifts(subject, answers)
        return replace(found, **self._looked_into(answers), shifts=shifts, unjudged=unjudged)

    def check_teacher(self, gate: Gate | None) -> None:
        """Ask the teacher of all other sets, before anything is trained, and refuse a second set that cannot judge.

        Raises:
            InputError: the teacher's answers there are broken, the metric is another one than on the evaluation set,
                or a limit cannot be judged there.
        """
        assert self.teacher
        for by, examples in self.material.elsewhere.items():
            answers = self._answers(self.teacher, examples)
            if by == SHIFTED:
                card = self._card(answers, self.teacher)
                metric = self._card(self._answers(self.teacher, self.material.eval), self.teacher).metric
                if card.metric != metric:
                    raise InputError(
                        f"data.shifted ({examples.name}) is judged by {card.metric} and data.eval by {metric}; give "
                        "both the same kind of labels"
                    )
                if gate:
                    gate.check(card, has_classes=self.task.gives == "class")

    def predicted(self, key: str, whole: bool = True) -> bool:
        """Whether all that a model says of the sets that it is judged on was kept; `whole` as above."""
        sets = [self.material.eval, *(self.material.elsewhere.values() if whole else ())]
        return all(self.cache.done("predicted", self._rows_key(key, examples)) for examples in sets)

    def rows(self, subject: Subject) -> NDArray[Any]:
        """A model's rows (R, C) on the evaluation set, from the disk."""
        return self._predicted(subject, self.material.eval)[0]

    def forget(self, subject: Subject) -> None:
        """Drop what was kept of a model's predictions and of what they say."""
        for examples in (self.material.eval, *self.material.elsewhere.values()):
            shutil.rmtree(self.cache.place("predicted", self._rows_key(subject.key, examples)), ignore_errors=True)
        for record in self.cache.folder.glob("judged-*/record.json"):
            if read_json(record).get("model") == subject.key:
                shutil.rmtree(record.parent)

    def _rows_key(self, key: str, examples: Examples) -> str:
        return self.cache.key("predicted", model=key, examples=examples.digest)

    def _predicted(self, subject: Subject, examples: Examples) -> tuple[NDArray[Any], int]:
        """A model's rows (R, C) on some examples, from the disk, and how many of its inputs were cut."""
        key = self._rows_key(subject.key, examples)
        if not self.cache.done("predicted", key):
            predictor = subject.open()
            before = predictor.encode.truncated
            with self.cache.making("predicted", key) as (folder, record):
                predict(predictor, read_by(examples, subject.encode), self.task.length_of, folder / LOGITS)
                record["truncated"] = predictor.encode.truncated - before
        place = self.cache.place("predicted", key)
        return np.load(place / LOGITS, mmap_mode="r"), read_json(place / "record.json")["truncated"]

    def _answers(self, subject: Subject, examples: Examples, other: Subject | None = None) -> Answers:
        """What a model and another one, its teacher if none is given, say of some examples."""
        other = other or self.teacher
        assert other
        (mine, truncated), (theirs, _) = (self._predicted(one, examples) for one in (subject, other))
        return Answers(between(examples, subject.encode, other.encode), mine, theirs, truncated)

    def beside(
        self, subject: Subject, rows: NDArray[Any], index: NDArray[np.int64]
    ) -> tuple[NDArray[Any], Scorecard, Scorecard]:
        """Rows (R, C) that a model gave elsewhere of some evaluation examples, beside those that it gave here.

        Args:
            subject: the model.
            rows: what it gave elsewhere; narrower ones are filled as where a batch is.
            index: of the examples (N,), ascending.

        Returns:
            Its rows here, and the scorecards of those elsewhere: against the teacher, and against itself here.
        """
        assert self.teacher
        answers, examples = self._answers(subject, self.material.eval), self.material.eval
        own, others = judged_rows(answers.examples, np.isin(np.arange(len(examples)), index), len(answers.mine))
        mine, theirs = np.asarray(answers.mine[own]), np.asarray(answers.theirs[others])
        rows = np.pad(rows, ((0, 0), (0, mine.shape[1] - rows.shape[1])), constant_values=LEAST)
        some = examples.take(index.tolist(), f"{len(index)} of {examples.name}")
        against = (
            self._card(Answers(between(some, subject.encode, encode), rows, other, 0), subject)
            for other, encode in ((theirs, self.teacher.encode), (mine, subject.encode))
        )
        return mine, next(against), next(against)

    def _card(self, answers: Answers, subject: Subject) -> Scorecard:
        return self.task.judge(answers.mine, answers.theirs, answers.examples, subject.encode, answers.truncated)

    def _unleaked(self, answers: Answers, subject: Subject) -> Scorecard | None:
        """The scorecard without the evaluation examples that are in other data; see `Entry`."""
        examples, leaked = answers.examples, leaked_rows(self.material.leaks)
        if not leaked or len(leaked) == len(examples):
            return None
        kept = ~np.isin(np.arange(len(examples)) + 1, list(leaked))
        if self.task.gives == "class":
            rest = replace(examples, labels=np.where(kept, examples.labels, IGNORED))
            return None if (rest.labels == IGNORED).all() else self._card(replace(answers, examples=rest), subject)
        ours, theirs = judged_rows(examples, kept, len(answers.mine))
        rest = examples.take(np.flatnonzero(kept).tolist(), f"without {len(leaked)} that leaked")
        return self._card(Answers(rest, answers.mine[ours], answers.theirs[theirs], answers.truncated), subject)

    def _looked_into(self, answers: Answers) -> dict[str, Any]:
        """The fields `flips`, `slices` and `calibration`; none of a task without classes."""
        if self.task.gives != "class":
            return {}
        found = flips(answers.mine, answers.theirs, answers.examples.labels, self.material.teacher.labels)
        return {"flips": found, **self._sliced(answers, self.material.cuts)}

    def _sliced(self, answers: Answers, cuts: tuple[Cut, ...]) -> dict[str, Any]:
        """The fields `slices` and `calibration`, by some cuts and the teacher's confidence."""
        labels = answers.examples.labels
        known = labels != IGNORED
        sure = in_thirds("teacher’s confidence", confidence(answers.theirs)[known], "%")
        return {
            "slices": slices(*answers.right(), [*(cut.take(known) for cut in cuts), sure]),
            "calibration": calibration(answers.mine, answers.theirs, labels, self.material.recipe.seed),
        }

    def _shifts(self, subject: Subject, as_is: Answers) -> tuple[list[Shift], list[str]]:
        """The model on the second set and on the evaluation set under each perturbation; and what it failed on."""
        found, unjudged, of_classes = [], [], self.task.gives == "class"
        for by, examples in self.material.elsewhere.items():
            try:
                answers = self._answers(subject, examples)
            except InputError as error:
                if by == SHIFTED:
                    raise
                unjudged.append(f"not judged under {by}: {error}")  # no gate judges it, so it stops nothing
                continue
            card = self._card(answers, subject)
            if by == SHIFTED:
                more = self._sliced(answers, self.material.cuts_of(examples)) if of_classes else {}
                found.append(Shift(by, examples.name, card, **more))
            else:
                change, interval, p = fragility(as_is.right(), answers.right()) if of_classes else (None, None, None)
                what = in_words(self.material.eval, by, self.material.recipe.task)
                found.append(Shift(by, what, card, change=change, interval=interval, p=p))
        return found, unjudged


def verdict_on(found: Judged, gate: Gate | None, size_bytes: int | None = None) -> Verdict | None:
    """A gate's verdict on a model, on the second set too where there is one; `size_bytes` of a package's model file."""
    if gate is None:
        return None
    checks = list(gate(found.scorecard, size_bytes, slices=found.slices, calibration=found.calibration).checks)
    for shift in found.shifts or []:
        if shift.by == SHIFTED:
            checks += [
                replace(one, limit=f"{SHIFTED} {one.limit}", reason=f"on {shift.what}: {one.reason}")
                for one in gate(shift.scorecard, slices=shift.slices, calibration=shift.calibration).checks
            ]
    return verdict_of(checks)
