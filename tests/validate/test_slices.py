import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from potstill.validate.errors import InputError
from potstill.validate.metrics import change_of_gap, holm, mcnemar_p, paired_difference
from potstill.validate.slices import Slice, by_class, by_column, in_thirds, slices

RNG = np.random.default_rng(5)
N = 600
LABELS = RNG.integers(3, size=N)
SEX = [("f", "m", None)[i] for i in RNG.choice(3, p=[0.5, 0.49, 0.01], size=N)]
TEACHER = RNG.random(N) < 0.9
RIGHT = np.where(RNG.random(N) < np.where(LABELS == 2, 0.3, 0.03), False, TEACHER)  # the third class is lost


@pytest.fixture(scope="module")
def found() -> list[Slice]:
    return slices(RIGHT, TEACHER, [by_class(LABELS, ["cat", "dog", "owl"]), by_column("sex", SEX)])


def test_holm_is_the_worked_example() -> None:
    # by hand: 4 × 0.005, 3 × 0.01, 2 × 0.03 = 0.06, and 1 × 0.04, which is no less than the one before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    p = np.random.default_rng(0).random(40) ** 4
    assert holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1])


def test_a_slice_is_its_examples(found: list[Slice]) -> None:
    assert {(one.by, one.value) for one in found} == {
        ("class", "cat"), ("class", "dog"), ("class", "owl"), ("sex", "f"), ("sex", "m"), ("sex", "missing"),
    }  # fmt: skip
    owl = next(one for one in found if one.value == "owl")
    rows = [i for i in range(N) if LABELS[i] == 2]
    lost = sum(bool(TEACHER[i] and not RIGHT[i]) for i in rows)
    assert owl.examples == len(rows)
    assert owl.accuracy == pytest.approx(np.mean([RIGHT[i] for i in rows]))
    assert owl.teacher_accuracy == pytest.approx(np.mean([TEACHER[i] for i in rows]))
    assert owl.difference == pytest.approx(owl.accuracy - owl.teacher_accuracy)
    assert owl.interval == paired_difference(lost, 0, len(rows))
    assert owl.p == mcnemar_p(lost, 0)
    rest = [i for i in range(N) if LABELS[i] != 2]
    assert owl.gap
    assert owl.gap.model == pytest.approx(owl.accuracy - np.mean([RIGHT[i] for i in rest]))
    assert owl.gap.teacher == pytest.approx(owl.teacher_accuracy - np.mean([TEACHER[i] for i in rest]))
    assert owl.worse
    assert owl.gap.widened


def test_p_values_are_corrected_over_all_tested_slices(found: list[Slice]) -> None:
    tested = [one for one in found if one.p is not None]
    assert len(tested) == 5
    assert [one.p_holm for one in tested] == pytest.approx(holm([one.p for one in tested if one.p is not None]))
    gaps = [one.gap for one in found if one.gap]
    assert [gap.p_holm for gap in gaps] == pytest.approx(holm([gap.p for gap in gaps]))


def test_the_largest_loss_comes_first_and_small_slices_last(found: list[Slice]) -> None:
    assert [one.value for one in found][::5] == ["owl", "missing"]
    differences = [one.difference for one in found[:-1]]
    assert differences == sorted(differences)
    small = found[-1]
    assert 0 < small.examples < 10
    assert small.p is small.p_holm is small.gap is None
    assert not small.worse


def test_a_slice_of_all_has_no_rest() -> None:
    (one,) = slices(RIGHT, TEACHER, [by_column("kind", ["a"] * N)])
    assert one.p is not None
    assert one.gap is None


def test_thirds_hold_equal_values_together() -> None:
    cut = in_thirds("length", np.array([1, 2, 2, 2, 5, 6, 7, 8, 9]), " characters")
    assert cut.values == (
        "lowest third, 1 to 2 characters", "middle third, 5 to 6 characters", "highest third, 7 to 9 characters",
    )  # fmt: skip
    assert cut.of.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert in_thirds("length", np.array([0.5, 0.5]), "%").values[0] == "lowest third, 50.0 to 50.0%"


def test_a_column_of_many_numbers_is_cut_in_thirds() -> None:
    cut = by_column("age", [*range(30), None, float("nan")])
    assert [value.partition(",")[0] for value in cut.values] == [
        "lowest third", "middle third", "highest third", "missing",
    ]  # fmt: skip
    assert np.bincount(cut.of).tolist() == [10, 10, 10, 2]
    assert by_column("age", [3, 1, True, 3]).values == ("1", "3", "missing")


def test_a_column_of_many_words_is_refused() -> None:
    message = "column 'who' has 21 different values.* group them into at most 20 in a column of its own"
    with pytest.raises(InputError, match=message):
        by_column("who", [f"user {i}" for i in range(21)])


@pytest.mark.parametrize("n", [10, 40, 300])
def test_the_change_of_a_gap_covers_the_truth_and_seldom_errs(n: int) -> None:
    rng = np.random.default_rng(n)
    lose, gain, rest, covered, alarms = 0.06, 0.02, 800, 0, 0
    ones = rng.multinomial(n, [lose, gain, 1 - lose - gain], size=4000)
    others = rng.multinomial(rest, [lose, gain, 1 - lose - gain], size=4000)
    for one, other in zip(ones, others, strict=True):
        interval, p = change_of_gap((int(one[0]), int(one[1]), n), (int(other[0]), int(other[1]), rest))
        covered += interval.low <= 0 <= interval.high
        alarms += p < 0.05
        assert (p < 0.05) == (not interval.low <= 0 <= interval.high)
    assert covered / 4000 >= 0.94
    assert alarms / 4000 <= 0.06


def test_the_change_of_a_gap_finds_one() -> None:
    interval, p = change_of_gap((40, 2, 200), (16, 16, 800))
    assert interval.high < -0.1
    assert p < 1e-6
