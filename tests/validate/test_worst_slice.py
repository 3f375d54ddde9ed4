"""The limit on the worst slice: the union of many tests, by counts and by simulation."""

import re

import numpy as np
import pytest

from potstill.validate.gate import Gate, Verdict, parse_limit
from potstill.validate.metrics import mcnemar_p, paired_difference
from potstill.validate.scorecard import Scorecard, paired
from potstill.validate.slices import LEAST_TESTED, Slice, by_column, slices
from potstill.validate.verdict import Check
from potstill.validate.worst_slice import judge_slices

LIMIT = parse_limit("3pp")


def piece(value: str, n: int, lost: int, gained: int = 0, teacher: float = 0.9) -> Slice:
    """A slice by its counts."""
    apart = (gained - lost) / n
    p = mcnemar_p(lost, gained) if n >= LEAST_TESTED else None
    return Slice(
        "class", value, n, lost, gained, teacher + apart, teacher, apart, paired_difference(lost, gained, n), p, p
    )


def judged(*made: Slice, limit: str = "3pp", strict: bool = False) -> Check:
    return judge_slices(list(made), parse_limit(limit), strict=strict)


def test_it_passes_where_every_slice_holds_the_limit() -> None:
    found = judged(piece("cat", 4000, 40, 20), piece("dog", 4000, 60, 20), piece("owl", 9, 9), strict=True)
    assert (found.limit, found.outcome, found.passed) == ("max_slice_drop", "pass", True)
    assert found.reason.startswith(
        "worst of 2 slices: class ‘dog’, 89.00% against the teacher's 90.00% on 4,000 exampl"
    )
    assert re.search(r"−1\.00 points, 95 % interval −1\.4\d to −0\.5\d, limit −3\.00; 1 of fewer than 10", found.reason)


def test_one_slice_surely_below_fails() -> None:
    found = judged(piece("cat", 4000, 40, 20), piece("dog", 1000, 150, 20))
    assert (found.outcome, found.passed, found.more_examples) == ("fail", False, None)
    assert "class ‘dog’" in found.reason
    level = paired_difference(150, 20, 1000, 0.975)
    assert f"corrected for 2 slices {level.low * 100:+.2f} to {level.high * 100:+.2f}".replace("-", "−") in found.reason
    assert found.nearest == "13pp"


def test_a_slice_fails_by_the_interval_corrected_for_their_number() -> None:
    low = piece("cat", 500, 42, 12)  # 6 points; alone surely below 3, among 20 not
    others = [piece(str(i), 5000, 50, 50) for i in range(19)]
    assert paired_difference(42, 12, 500).high < -0.03 < paired_difference(42, 12, 500, 1 - 0.05 / 20).high
    assert judged(low).outcome == "fail"
    found = judged(low, *others)
    assert (found.outcome, found.passed) == ("undecided", False)  # it surely lost, and the estimate decides
    assert "worst of 20 slices: class ‘cat’" in found.reason
    assert "so the estimates decide (about " in found.reason
    assert found.nearest == "6pp"


def test_what_may_be_chance_among_many_does_not_stop_an_undecided_gate_but_a_strict_one() -> None:
    made = [piece("cat", 30, 2), *(piece(str(i), 5000, 50, 50) for i in range(13))]
    found = judged(*made)
    assert (found.outcome, found.passed, found.nearest) == ("undecided", True, None)
    assert "class ‘cat’, 83.33% against" in found.reason
    assert "no more than chance explains among as many slices, so it passes" in found.reason
    assert re.search(r"about [\d,]+ more examples of class ‘cat’ would decide it", found.reason)
    strict = judged(*made, strict=True)
    assert (strict.outcome, strict.passed) == ("undecided", False)
    assert "the gate is strict" in strict.reason
    assert strict.nearest
    assert judged(*made, limit=strict.nearest, strict=True).passed


def test_the_least_sure_slice_keeps_it_undecided() -> None:
    found = judged(piece("cat", 2000, 40, 20), piece("owl", 40, 0))
    assert (found.outcome, found.passed) == ("undecided", True)
    assert found.reason.startswith("least sure of 2 slices: class ‘owl’")
    assert found.more_examples
    assert judged(piece("cat", 2000, 40, 20), piece("owl", 40 + found.more_examples, 0)).outcome == "pass"


def test_a_share_is_of_the_teachers_value_on_that_slice() -> None:
    made = [piece("cat", 9000, 225, teacher=0.9), piece("owl", 9000, 135, teacher=0.3)]  # 2.8 and 5 hundredths
    assert judged(*made, limit="3pp").reason.startswith("worst of 2 slices: class ‘cat’")
    found = judged(*made, limit="4%")
    assert "class ‘owl’" in found.reason
    assert "limit −1.20" in found.reason
    assert (found.passed, found.nearest) == (False, "5%")


def test_no_slice_of_ten_examples_is_told() -> None:
    found = judged(piece("cat", 9, 9), piece("dog", 9, 0))
    assert (found.outcome, found.passed, found.nearest) == ("undecided", True, None)
    assert found.reason == "none of 2 slices has 10 examples, so max_slice_drop was not checked"
    assert not judged(piece("cat", 9, 0), strict=True).passed


def test_a_gate_judges_the_slices_beside_the_scorecard() -> None:
    right, teacher = np.ones(400, dtype=bool), np.ones(400, dtype=bool)
    right[:60] = False
    found = slices(right, teacher, [by_column("kind", ["a"] * 100 + ["b"] * 300)])
    assert [(one.value, one.lost, one.gained) for one in found] == [("a", 60, 0), ("b", 0, 0)]
    card = Scorecard(metric="accuracy", data="made", **paired(right, teacher))
    verdict: Verdict = Gate(parse_limit("20pp"), max_slice_drop=LIMIT)(card, slices=found)
    assert [(check.limit, check.outcome) for check in verdict.checks] == [
        ("max_drop", "pass"),
        ("max_slice_drop", "fail"),
    ]
    assert "worst of 2 slices: kind ‘a’" in verdict.reason


def drawn(sizes: list[int], drops: list[float], gain: float, sets: int = 400, strict: bool = False) -> list[Check]:
    """Verdicts on simulated sets of slices with these true drops."""
    rng = np.random.default_rng(0)
    counts = [
        rng.multinomial(n, [gain + drop, gain, 1 - 2 * gain - drop], size=sets)
        for n, drop in zip(sizes, drops, strict=True)
    ]
    made = [
        [piece(str(i), n, int(one[s][0]), int(one[s][1])) for i, (n, one) in enumerate(zip(sizes, counts, strict=True))]
        for s in range(sets)
    ]
    return [judge_slices(one, LIMIT, strict=strict) for one in made]


@pytest.mark.parametrize(("n", "gain"), [(65, 0.0), (300, 0.01), (1000, 0.03)])
def test_a_slice_right_at_the_limit_passes_a_strict_gate_at_most_once_in_twenty(n: int, gain: float) -> None:
    found = drawn([n, 20_000, 20_000], [0.03, 0.0, 0.0], gain, sets=1000, strict=True)
    assert np.mean([one.passed for one in found]) <= 0.05  # of 65, by Agresti and Min's interval alone, 14 %
    assert np.mean([one.passed for one in drawn([2000] * 3, [0.0] * 3, 0.03, sets=100, strict=True)]) >= 0.95


def test_without_a_true_drop_few_gates_stop() -> None:
    found = drawn([120] * 14, [0.0] * 14, 0.03)
    assert np.mean([one.outcome == "fail" for one in found]) <= 0.02
    assert np.mean([not one.passed for one in found]) <= 0.05  # the worst estimate is beyond the limit in 74 %


def test_with_all_slices_right_at_the_limit_few_fail() -> None:
    found = drawn([200] * 20, [0.03] * 20, 0.03)
    assert np.mean([one.outcome == "fail" for one in found]) <= 0.05  # without a correction in 30 %


def test_a_slice_that_lost_much_stops_the_gate() -> None:
    found = drawn([500] * 10, [0.12] + [0.0] * 9, 0.03, sets=200)
    assert np.mean([one.outcome == "fail" for one in found]) >= 0.95
