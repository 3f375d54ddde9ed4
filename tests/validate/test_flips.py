import numpy as np
import pytest

from potstill.validate.flips import Flips, flips, flips_from_json
from potstill.validate.scorecard import judge

NAMES = ("cat", "dog", "owl")
RNG = np.random.default_rng(3)
LABELS = RNG.integers(3, size=400)
TEACHER = (RNG.normal(size=(400, 3)) + 3 * np.eye(3)[LABELS]).astype(np.float32)
MINE = (TEACHER + 2 * RNG.normal(size=(400, 3))).astype(np.float32)


def probability(logits: np.ndarray, of: int) -> float:
    shares = np.exp(logits.astype(np.float64) - logits.max())
    return float(shares[of] / shares.sum())


@pytest.fixture(scope="module")
def found() -> Flips:
    return flips(MINE, TEACHER, LABELS, NAMES)


def test_counts_are_the_scorecards(found: Flips) -> None:
    card = judge(MINE, TEACHER, LABELS, "made")
    assert (found.lost, found.gained) == (card.lost, card.gained)
    assert min(found.lost, found.gained) > 0
    assert sum(one.lost for one in found.classes) == card.lost
    assert sum(one.gained for one in found.classes) == card.gained
    nets = [one.lost - one.gained for one in found.classes]
    assert nets == sorted(nets, reverse=True)


@pytest.mark.parametrize("name", NAMES)
def test_counts_of_a_class(found: Flips, name: str) -> None:
    one = next(one for one in found.classes if one.name == name)
    mine = [i for i in range(400) if NAMES[LABELS[i]] == name]
    lost = [i for i in mine if TEACHER[i].argmax() == LABELS[i] != MINE[i].argmax()]
    gained = [i for i in mine if MINE[i].argmax() == LABELS[i] != TEACHER[i].argmax()]
    assert (one.examples, one.lost, one.gained) == (len(mine), len(lost), len(gained))


def test_the_surest_errors_come_first(found: Flips) -> None:
    lost = [i for i in range(400) if TEACHER[i].argmax() == LABELS[i] != MINE[i].argmax()]
    lost.sort(key=lambda i: -probability(MINE[i], int(MINE[i].argmax())))
    assert len(lost) > 12
    assert [flip.row for flip in found.worst] == [i + 1 for i in lost[:12]]
    flip, i = found.worst[3], lost[3]
    assert (flip.label, flip.said) == (NAMES[LABELS[i]], NAMES[MINE[i].argmax()])
    assert flip.probability == pytest.approx(probability(MINE[i], int(MINE[i].argmax())))
    assert flip.teacher_probability == pytest.approx(probability(TEACHER[i], int(LABELS[i])))


def test_a_model_that_is_its_teacher_lost_nothing() -> None:
    assert flips(TEACHER, TEACHER, LABELS, NAMES) == Flips([], 0, 0, [])


def test_examples_without_a_label_do_not_count(found: Flips) -> None:
    labels, more = np.append(LABELS, [-100, -100]), np.zeros((2, 3), dtype=np.float32)
    assert flips(np.append(MINE, more, axis=0), np.append(TEACHER, more, axis=0), labels, NAMES) == found


def test_flips_come_back_from_json(found: Flips) -> None:
    assert flips_from_json(found.to_json()) == found
    assert flips_from_json(None) is None
