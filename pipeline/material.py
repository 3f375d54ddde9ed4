"""What a recipe names, loaded when first needed and checked against each other: teacher, data, student."""

import copy
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from potstill.compress.lesson import Lesson
from potstill.compress.student import Student
from potstill.compress.teacher import order_of
from potstill.compress.vocabulary import Vocabulary, cut_vocabulary, unknown_tokens
from potstill.export.calibrate import CALIBRATION_EXAMPLES, calibration_indices
from potstill.pipeline.cache import Cache
from potstill.pipeline.recipe import Recipe
from potstill.validate.aligned import OWN
from potstill.validate.checkpoint import WEIGHTS, Checkpoint, some
from potstill.validate.coverage import outside
from potstill.validate.data import IGNORED, Examples, check_not_empty, join, load_columns
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.errors import InputError
from potstill.validate.files import read_json
from potstill.validate.language import TextGeneration
from potstill.validate.leaks import Leak, leak, leaks_from_json, leaks_to_json, shared
from potstill.validate.perturb import perturbed
from potstill.validate.predictor import TorchPredictor
from potstill.validate.shift import SHIFTED
from potstill.validate.slices import Cut, by_class, by_column, in_thirds
from potstill.validate.task import TASKS, Model
from potstill.validate.units import counted

FEW_TO_CALIBRATE = 32  # below that a range is a matter of luck, and it is told
HELD_OUT = (0.05, 50, 2000)  # share of the training examples, at least, at most


class Material:
    """The models and examples of one recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.task = recipe, TASKS[recipe.task]
        self.warnings: list[str] = []
        self.leaks: list[Leak] = []
        self.covered = False  # whether the calibration examples were compared with the evaluation set
        self.exact: dict[str, NDArray[np.int64]] = {}  # evaluation examples that are in other data, to the byte

    @cached_property
    def options(self) -> dict[str, Any]:
        """The task's own options for loading a model."""
        if self.recipe.task == "module":
            check_not_empty(self.raw_eval)
            return {"example": self.raw_eval.rows([0])}
        limits = {name: getattr(self.recipe.data, name) for name in ("max_length", "max_seconds")}
        return {name: limit for name, limit in limits.items() if limit}

    @cached_property
    def raw_eval(self) -> Examples:
        """The evaluation set before its labels are checked against the teacher's classes."""
        return self.task.examples(self.recipe.data.eval, self.recipe.data.columns, judging=True)

    @cached_property
    def teacher(self) -> Model:
        """The teacher."""
        spec = self.recipe.teacher
        torch.manual_seed(self.recipe.seed)  # for a factory without weights
        return self.task.load(Checkpoint(spec.checkpoint, spec.weights, spec.preprocessing), **self.options)

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """What is left of a language model's vocabulary where the student's is cut; of other models the cut sees to it.

        The training texts decide it, all of them, before they are cut into pieces by what is left.
        """
        spec, source = self.recipe.student, self.recipe.data.train
        if self.task.gives != "tokens" or not (spec and spec.vocabulary and source):
            return None
        texts = self.task.examples(source, self.recipe.data.columns)
        found = cut_vocabulary(self.teacher, self.task.checked(texts, (), encode=self.teacher.encode), spec.vocabulary)
        return replace(found, encode=replace(found.encode, prefix=OWN))  # type: ignore[type-var]

    @cached_property
    def own_encoder(self) -> Any:
        """The encoder of a language model as a student whose tokens are not the teacher's; None where they are."""
        spec = self.recipe.student
        if not isinstance(self.task, TextGeneration) or spec is None:
            return None
        if self.vocabulary:
            return self.vocabulary.encode
        if spec.checkpoint is None:
            return None
        return self.task.own_encoder(Checkpoint(spec.checkpoint, spec.weights), self.teacher, **self.options)

    @cached_property
    def other_teachers(self) -> tuple[Model, ...]:
        """Further teachers; one that cannot be loaded, or has other classes, is an error."""
        torch.manual_seed(self.recipe.seed)
        found = []
        for spec in self.recipe.other_teachers:
            model = self.task.load(Checkpoint(spec.checkpoint, spec.weights), **self.options)
            order_of(self.teacher, model)
            found.append(self._encoding_once(model))
        return tuple(found)

    @cached_property
    def eval(self) -> Examples:
        """The evaluation set."""
        check_not_empty(self.raw_eval)
        return self._checked(self.raw_eval, judging=True)

    @cached_property
    def elsewhere(self) -> dict[str, Examples]:
        """What models are judged on beside the evaluation set: `shifted`, then it under each perturbation, by name.

        Raises:
            InputError: the second set cannot judge, is the evaluation set, or a perturbation does not fit the task.
        """
        data, found = self.recipe.data, {}
        if data.shifted:
            raw = self.task.examples(data.shifted, data.columns, judging=True)
            check_not_empty(raw)
            found[SHIFTED] = self._checked(raw, judging=True)
            self._check_form(SHIFTED, found[SHIFTED])
            both = len(shared(found[SHIFTED], self.eval))
            if both == len(found[SHIFTED]):
                raise InputError("all examples of data.shifted are in data.eval too; give examples of another kind")
            if both:
                self.warn(_both(both, found[SHIFTED], "example", " of data.shifted", "eval"))
        return found | {name: perturbed(self.eval, name, self.recipe.task) for name in data.perturb}

    @cached_property
    def cuts(self) -> tuple[Cut, ...]:
        """How the evaluation set is cut into slices, but for the teacher's confidence; none without classes.

        Raises:
            InputError: a column to slice by is not there, or has too many values.
        """
        if self.task.gives != "class":
            return ()
        data = self.recipe.data
        beside = load_columns(data.eval, data.slices, "audio" in self.task.features)
        own = self.cuts_of(self.eval)
        return (own[0], *(by_column(name, values) for name, values in beside.items()), *own[1:])

    def cuts_of(self, examples: Examples) -> tuple[Cut, ...]:
        """Slices by class, and by length where there are texts."""
        column, classes = self.task.length_of, by_class(examples.labels, self.teacher.labels)
        return (classes, *([in_thirds("length", examples.lengths(column), " characters")] if column else []))

    @cached_property
    def train(self) -> Examples | None:
        """The training examples."""
        return self._other("train")

    @cached_property
    def calibrate(self) -> Examples | None:
        """The examples for activation ranges: `data.calibrate`, else the training examples."""
        return self._other("calibrate") or self.train

    @cached_property
    def measured(self) -> Examples | None:
        """The examples that activation ranges are measured on: those of `calibrate` that do not judge, to the byte."""
        examples = self.calibrate
        if examples is None or not len(self.exact["calibrate" if "calibrate" in self.exact else "train"]):
            return examples
        others = np.setdiff1d(np.arange(len(examples)), shared(examples, self.eval))
        return examples.take(others.tolist(), "not in data.eval")

    @property
    def samples(self) -> Examples:
        """Real examples to trace and try a graph with: those that calibrate, else those that judge."""
        return self.calibrate or self.eval

    @cached_property
    def unlabelled(self) -> Examples | None:
        """Examples to learn from by the teacher's word alone."""
        return self._other("unlabelled", labelled=False)

    def _other(self, key: str, labelled: bool = True) -> Examples | None:
        """Examples that must not be the evaluation set; labels of those that count as unlabelled are not looked at."""
        source = getattr(self.recipe.data, key)
        if source is None:
            return None
        examples = self.task.examples(source, self.recipe.data.columns, labelled=labelled)
        if not labelled:
            examples = replace(examples, labels=np.full(len(examples.labels), IGNORED), label_names=None)
        examples = self._checked(examples)
        self.exact[key] = shared(self.eval, examples)
        both = len(self.exact[key])
        if both == len(self.eval):
            raise InputError(
                f"all of data.eval ({counted(both, 'example')}) is in data.{key} ({examples.name}) too; a model is "
                "judged on examples that neither trained nor calibrated it"
            )
        if both:
            self.warn(_both(both, self.eval, "evaluation example", "", key))
        self._check_form(key, examples)
        if len(examples) < 2:
            raise InputError(
                f"data.{key} ({examples.name}) holds {counted(len(examples), 'example')}, expected 2 or more; give "
                f"{f'some {CALIBRATION_EXAMPLES} of the training set' if key == 'calibrate' else 'more of them'}"
            )
        return examples

    def _checked(self, examples: Examples, judging: bool = False) -> Examples:
        encode: Any = self.teacher.encode
        if self.own_encoder:
            encode = replace(encode, beside=self.own_encoder)
        return self.task.checked(examples, self.teacher.labels, encode=encode, judging=judging)

    def _check_form(self, key: str, examples: Examples) -> None:
        """Refuse arrays of another shape or type than those that judge: a graph is made for one."""
        encode = self.teacher.encode
        if not isinstance(encode, ArrayEncoder) or not len(examples):
            return
        (mine,), (judging,) = (encode(one.rows([0])).values() for one in (examples, self.eval))
        if (mine.shape[1:], mine.dtype) != (judging.shape[1:], judging.dtype):
            raise InputError(
                f"data.{key} ({examples.name}) holds x as {mine.dtype} {mine.shape[1:]} for each example, and "
                f"data.eval ({self.eval.name}) as {judging.dtype} {judging.shape[1:]}; give both alike"
            )

    def sources(self) -> dict[str, dict[str, Any]]:
        """What each set of examples is: its name, hash, length and licence (None: unknown)."""
        sets = {key: getattr(self, key) for key in ("train", "unlabelled", "eval", "calibrate")}
        sets[SHIFTED] = self.elsewhere.get(SHIFTED)
        return {
            key: {"name": examples.name, "sha256": examples.digest, "examples": len(examples), "licence": None}
            for key, examples in sets.items()
            if examples
        }

    def find_leaks(self, cache: Cache) -> None:
        """Look for evaluation examples in other data, exactly or nearly; or take what was found from the cache."""
        others = {key: getattr(self, key) for key in ("train", "unlabelled", "calibrate")}
        others = {key: examples for key, examples in others.items() if key in self.exact}
        digests, second = {key: examples.digest for key, examples in others.items()}, self.elsewhere.get(SHIFTED)
        key = cache.key("leaks", eval=self.eval.digest, others=digests, shifted=second.digest if second else None)
        if not cache.done("leaks", key):
            with cache.making("leaks", key) as (_folder, record):
                found = [leak(name, self.eval, examples, self.exact[name]) for name, examples in others.items()]
                record["leaks"] = leaks_to_json(found)
                record["shifted"] = {name: len(shared(second, one)) for name, one in others.items()} if second else {}
        record = read_json(cache.place("leaks", key) / "record.json")
        self.leaks = leaks_from_json(record["leaks"])
        for name, count in record["shifted"].items():
            if count and second:
                self.warn(_both(count, second, "example", " of data.shifted", name))
        for sentence in filter(None, (one.in_words() for one in self.leaks)):
            self.warn(sentence)

    def check_calibration(self, used: int) -> None:
        """Warn where the examples that gave a package its ranges do not cover the evaluation set; 0 were used: none."""
        examples = self.measured
        if used and examples is not None and not self.covered:
            self.covered = True
            if used < FEW_TO_CALIBRATE:
                self.warn(
                    f"The activation ranges come from {counted(used, 'example')} only; give {CALIBRATION_EXAMPLES} or "
                    "more of the training set to --calibrate."
                )
            drawn = calibration_indices(examples, self.recipe.seed)
            sentence = outside(examples.take(drawn.tolist(), "calibration"), self.eval, self.task.length_of)
            if sentence:
                self.warn(sentence)

    def new_student(self) -> Model:
        """The student before any training: a cut, a checkpoint, or a copy of the teacher."""
        spec = self.recipe.student
        if spec is None:
            return self._encoding_once(copy.deepcopy(self.teacher))
        student = Student(**asdict(spec))(
            self.teacher, self.task, self.options, self.recipe.seed, self.student_examples, self.vocabulary
        )
        try:
            TorchPredictor(student, "the student", torch.device("cpu"))(self.eval.rows([0]))
        except RuntimeError as error:
            raise InputError(f"the student cannot run ({error}); give --student CHECKPOINT, or another cut") from error
        if student.fresh:
            self.warn(f"The student's checkpoint does not hold {some([*student.fresh])}: these started untrained.")
        if self.own_encoder:
            self.warn(
                "The student has a tokenizer of its own: it is judged by the probability of bytes and the perplexity "
                "for each of the teacher's tokens; agreement, flips and KL are of tokens, and not defined."
            )
        if spec.vocabulary or self.own_encoder:
            ours, theirs = (unknown_tokens(model, self.eval) for model in (student, self.teacher))
            if ours > theirs:
                self.warn(
                    f"The student's vocabulary lacks {counted(ours, 'token')} of the evaluation set, the teacher's "
                    f"{theirs}."
                )
        return self._encoding_once(student)

    def warn(self, sentence: str) -> None:
        """Add to what a reader should know, once."""
        if sentence not in self.warnings:
            self.warnings.append(sentence)

    def load(self, folder: Path) -> Model:
        """A checkpoint that a run made. A factory is named by the recipe, never by a file in the folder."""
        checkpoint = Checkpoint(str(folder))
        student = self.recipe.student.checkpoint if self.recipe.student else None
        own = Checkpoint(student or self.recipe.teacher.checkpoint)
        if own.is_factory:
            checkpoint = Checkpoint(own.source, folder / WEIGHTS)
        return self._encoding_once(self.task.load(checkpoint, self.teacher.labels, like=self.teacher, **self.options))

    def _encoding_once(self, model: Model) -> Model:
        """The model with the teacher's own encoder where both encode alike."""
        if model.encode.same_as(self.teacher.encode):
            model.encode = self.teacher.encode
        return model

    def lesson(self, work: Path, outputs: Path | None) -> Lesson:
        """What a training stage works with; see `Lesson`."""
        train, held_out = self.lesson_examples
        others, weights = self.other_teachers, (1.0, *(one.weight for one in self.recipe.other_teachers))
        lesson = Lesson(self.task, self.teacher, train, held_out, self.recipe.seed, work)
        return replace(lesson, others=others, weights=weights, outputs=outputs)

    @property
    def student_examples(self) -> Examples | None:
        """The training examples that the student's cut depends on, if it does and there are any."""
        spec = self.recipe.student
        return self.lesson_examples[0] if spec and spec.reads_examples and self.train is not None else None

    @cached_property
    def lesson_examples(self) -> tuple[Examples, Examples]:
        """Training examples, and those held out of the labelled ones (5 %, 50 to 2,000) to choose the best checkpoint.

        Raises:
            InputError: there are no training examples.
        """
        if self.train is None:
            raise InputError("the stages need training examples: data.train")
        train, held_out = split(self.train, self.recipe.seed)
        return join(train, self.unlabelled) if self.unlabelled else train, held_out


def _both(count: int, of: Examples, noun: str, source: str, other: str) -> str:
    """`1 of the 200 evaluation examples is in data.train too.`"""
    are = "is" if count == 1 else "are"
    return f"{count:,} of the {counted(len(of), noun)}{source} {are} in data.{other} too."


def split(train: Examples, seed: int) -> tuple[Examples, Examples]:
    """Training examples, and those held out of them to choose the best checkpoint (5 %, 50 to 2,000)."""
    share, least, most = HELD_OUT
    count = min(most, max(least, round(len(train) * share)), max(1, len(train) // 5))
    order = np.random.default_rng(seed).permutation(len(train))
    return train.take(np.sort(order[count:]).tolist(), "train"), train.take(np.sort(order[:count]).tolist(), "held out")
