"""A scorecard against scikit-learn and counting by hand."""

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.metrics import accuracy_score, confusion_matrix

from potstill.validate.errors import InputError
from potstill.validate.scorecard import judge, scorecard_from_json

rng = np.random.default_rng(0)
LABELS = rng.integers(3, size=500)
TEACHER = (np.eye(3)[LABELS] * 2 + rng.normal(size=(500, 3))).astype(np.float32)
STUDENT = (TEACHER + rng.normal(size=(500, 3))).astype(np.float32)


def test_figures_are_those_of_scikit_learn() -> None:
    card = judge(STUDENT, TEACHER, LABELS, "made")
    mine, theirs = STUDENT.argmax(1), TEACHER.argmax(1)
    assert card.value == accuracy_score(LABELS, mine)
    assert card.teacher_value == accuracy_score(LABELS, theirs)
    assert card.difference == pytest.approx(card.value - card.teacher_value)
    flips = confusion_matrix(theirs == LABELS, mine == LABELS)
    assert (card.lost, card.gained) == (flips[1, 0], flips[0, 1])
    assert card.agreement == accuracy_score(theirs, mine)
    assert card.kl_nats == pytest.approx(entropy(softmax(TEACHER, axis=1), softmax(STUDENT, axis=1), axis=1).mean())
    assert card.interval.low < card.value < card.interval.high
    assert card.difference_interval.low < card.difference < card.difference_interval.high


def test_a_teacher_agrees_with_itself() -> None:
    card = judge(TEACHER, TEACHER, LABELS, "made")
    assert (card.difference, card.agreement, card.lost, card.gained, card.kl_nats) == (0, 1, 0, 0, 0)


def test_json_and_back() -> None:
    card = judge(STUDENT, TEACHER, LABELS, "made", truncated=3)
    assert scorecard_from_json(card.to_json()) == card


def test_other_classes_are_refused() -> None:
    with pytest.raises(InputError, match=r"outputs are \(500, 2\).*same examples and classes"):
        judge(STUDENT[:, :2], TEACHER, LABELS, "made")


def test_examples_without_a_label_are_left_out() -> None:
    known = np.arange(500) % 3 > 0
    card = judge(STUDENT, TEACHER, np.where(known, LABELS, -100), "made")
    assert card == judge(STUDENT[known], TEACHER[known], LABELS[known], "made")
