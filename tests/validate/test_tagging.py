"""Tagging: words and their tokens, and entity F1 against seqeval and by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seqeval.metrics import f1_score

from potstill.validate.checkpoint import Checkpoint
from potstill.validate.data import IGNORED, Arrays, Examples
from potstill.validate.errors import InputError
from potstill.validate.predictor import TorchPredictor
from potstill.validate.scorecard import Scorecard
from potstill.validate.task import TASKS, Model
from tests.predicted import predicted

TAGGING = TASKS["token-classification"]
NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
CPU = torch.device("cpu")


@pytest.fixture
def model(tag_teacher: Path) -> Model:
    return TAGGING.load(Checkpoint(str(tag_teacher)))


def made(lengths: list[int], seed: int, classes: int = 5) -> tuple[Examples, np.ndarray, np.ndarray]:
    """Random labels, of which some are ignored, and the logits of a student and of a better teacher."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=sum(lengths))
    teacher = (np.eye(classes)[labels] * 3 + rng.normal(size=(len(labels), classes))).astype(np.float32)
    student = (teacher + 1.5 * rng.normal(size=teacher.shape)).astype(np.float32)
    labels[rng.random(len(labels)) < 0.1] = IGNORED
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    table = Arrays({"tokens": np.zeros(len(lengths))})
    return Examples("made", table, labels, NAMES[:classes], "d", offsets), student, teacher


def spelled(classes: np.ndarray, examples: Examples) -> list[list[str]]:
    """Class names of each text, ignored words left out."""
    assert examples.offsets is not None
    said, true = (np.split(one, examples.offsets[1:-1]) for one in (classes, examples.labels))
    return [[NAMES[c] for c in one[labels != IGNORED]] for one, labels in zip(said, true, strict=True)]


def test_f1_is_that_of_seqeval() -> None:
    examples, student, teacher = made([7, 1, 12, 30, 3] * 20, seed=0)
    card = TAGGING.judge(student, teacher, examples)
    truth = spelled(examples.labels, examples)
    assert card.metric == "entity F1"
    assert card.value == pytest.approx(f1_score(truth, spelled(student.argmax(1), examples)), abs=1e-12)
    assert card.teacher_value == pytest.approx(f1_score(truth, spelled(teacher.argmax(1), examples)), abs=1e-12)
    assert card.difference == pytest.approx(card.value - card.teacher_value)
    assert card.interval.low < card.value < card.interval.high
    assert card.difference_interval.low < card.difference < card.difference_interval.high


def test_agreement_and_flips_are_over_the_words_with_a_label() -> None:
    examples, student, teacher = made([7, 1, 12, 30, 3], seed=1)
    card = TAGGING.judge(student, teacher, examples)
    known = examples.labels != IGNORED
    mine, theirs, truth = student.argmax(1)[known], teacher.argmax(1)[known], examples.labels[known]
    assert card.unit == "words"
    assert card.agreement == pytest.approx((mine == theirs).mean())
    assert card.lost == ((theirs == truth) & (mine != truth)).sum()
    assert card.gained == ((theirs != truth) & (mine == truth)).sum()
    assert card.mcnemar_p is None


def test_classes_that_spell_no_entities_are_judged_word_by_word() -> None:
    examples, student, teacher = made([4, 9, 2], seed=2, classes=3)
    nouns = Examples("made", examples.table, examples.labels, ("NOUN", "VERB", "ADJ"), "d", examples.offsets)
    card = TAGGING.judge(student, teacher, nouns)
    known = examples.labels != IGNORED
    assert card.metric == "accuracy of words"
    assert card.value == pytest.approx((student.argmax(1) == examples.labels)[known].mean())


def test_each_word_is_read_at_its_first_token(model: Model) -> None:
    words = [["anna", "jonesian", "is", "new"], ["parisian"]]
    tensors = model.tensors({"tokens": words}, CPU)
    assert tensors["word_starts"].tolist() == [[1, 2, 4, 5], [1, -1, -1, -1]]
    tokens = model.encode.tokenizer.convert_ids_to_tokens(tensors["input_ids"][0])  # type: ignore[attr-defined]
    assert tokens == ["[CLS]", "anna", "jones", "##ian", "is", "new", "[SEP]"]
    outputs = model.module(*model.batch({"tokens": words}, CPU))
    assert torch.equal(model.answers(tensors), torch.stack([*outputs[0, [1, 2, 4, 5]], outputs[1, 1]]))


def test_a_word_that_is_cut_off_is_outside_and_counted(tag_teacher: Path) -> None:
    model = TAGGING.load(Checkpoint(str(tag_teacher)), max_length=5)
    tensors = model.tensors({"tokens": [["anna", "smith", "in", "new", "oslo"]]}, CPU)
    assert tensors["word_starts"].tolist() == [[1, 2, 3, -2, -2]]
    rows = model.answers(tensors).detach().numpy()
    assert model.encode.truncated == 1
    assert not rows[3:].any()
    names = ("I-LOC", "B-PER", "O", "B-LOC", "I-PER")  # outside is not the first class
    table, labels = Arrays({"tokens": np.zeros(1)}), np.array([1, 4, 2, 2, 2])
    examples = Examples("made", table, labels, names, "d", np.array([0, 5]))
    said = np.zeros((5, 5), dtype=np.float32)
    said[0, 1] = said[1, 4] = said[2, 2] = 1
    card = TAGGING.judge(said, said, examples)
    assert (card.value, card.agreement) == (1.0, 1.0)


def test_a_trained_tagger_is_right(model: Model, tag_files: dict[str, Path]) -> None:
    examples = TAGGING.checked(TAGGING.examples(str(tag_files["eval"]), {}, judging=True), model.labels, judging=True)
    rows = predicted(TorchPredictor(model, "teacher", CPU, batch_size=7), examples, "tokens")
    one_by_one = predicted(TorchPredictor(model, "teacher", CPU, batch_size=1), examples)
    np.testing.assert_allclose(rows, one_by_one, rtol=2**-10, atol=1e-5)  # a float16 step
    card: Scorecard = TAGGING.judge(rows, rows, examples)
    assert card.value > 0.95
    assert (card.difference, card.agreement, card.kl_nats) == (0, 1, 0)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"tokens": ["a", "b"], "tags": [0]}], "2 words and 1 tags in row 1"),
        ([{"tokens": ["a"], "tags": [0]}, {"tokens": [], "tags": []}], "no words in row 2"),
        ([{"tokens": ["a"], "tags": 1}], "one tag for a row"),
        ([{"tokens": "a b", "tags": [0, 1]}], "expected tokens"),
        ([{"tokens": ["a"]}], "no column 'tags'"),
        ([{"tokens": ["a"], "tags": [None]}, {"tokens": ["a"], "tags": [1]}], "1 missing values within its lists"),
    ],
)
def test_bad_rows(tmp_path: Path, rows: list[dict[str, Any]], match: str) -> None:
    with pytest.raises(InputError, match=match):
        TAGGING.examples(write(tmp_path / "a.jsonl", rows), {})


def test_tags_by_number_and_by_name(tmp_path: Path) -> None:
    by_name = TAGGING.examples(write(tmp_path / "a.jsonl", [{"tokens": ["a", "b"], "tags": ["B-LOC", "O"]}]), {})
    numbers = [{"tokens": ["a", "b"], "tags": [3, -100]}, {"tokens": ["c"], "tags": [7]}]
    by_number = TAGGING.examples(write(tmp_path / "b.jsonl", numbers), {})
    assert TAGGING.checked(by_name, NAMES).labels.tolist() == [3, 0]
    assert TAGGING.checked(by_number.take([0], "one"), NAMES).labels.tolist() == [3, IGNORED]
    with pytest.raises(InputError, match="has the label 7 in row 2"):
        TAGGING.checked(by_number, NAMES)


def test_unlabelled_words_are_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"tokens": ["a", "b"]}, {"tokens": ["c"]}])
    examples = TAGGING.examples(path, {}, labelled=False)
    assert examples.labels.tolist() == [IGNORED] * 3
    assert examples.labels_of([1, 0]).tolist() == [IGNORED] * 3
    assert len(examples.take([1, 0, 1], "some")) == 3
    assert examples.take([1, 0], "two").offsets.tolist() == [0, 1, 3]  # type: ignore[union-attr]
