"""Limits with units, and verdicts that say how sure they are."""

import numpy as np
import pytest

from potstill.validate.errors import InputError
from potstill.validate.gate import Gate, Limit, parse_limit
from potstill.validate.scorecard import Scorecard, judge


def card(lost: int, gained: int, n: int, teacher_right: int) -> Scorecard:
    """A scorecard with these flips: the teacher is right on the first examples."""
    labels = np.zeros(n, dtype=np.int64)
    teacher = np.where(np.arange(n)[:, None] < teacher_right, [[1.0, 0.0]], [[0.0, 1.0]])
    student = teacher.copy()
    student[:lost] = [0.0, 1.0]
    student[n - gained :] = [1.0, 0.0]
    return judge(student.astype(np.float32), teacher.astype(np.float32), labels, "made")


@pytest.mark.parametrize(
    ("text", "limit"), [("2pp", Limit(2, "pp")), ("1%", Limit(1, "%")), (" 0.5 pp ", Limit(0.5, "pp"))]
)
def test_limits_carry_their_unit(text: str, limit: Limit) -> None:
    assert parse_limit(text) == limit


@pytest.mark.parametrize("text", ["0.01", "1", "2.5"])
def test_a_bare_number_is_an_error_that_says_why(text: str) -> None:
    with pytest.raises(InputError, match=r"has no unit: is it a point or a share\? Write 1pp .* or 1%"):
        parse_limit(text)


@pytest.mark.parametrize("text", ["-1pp", "pp", "one", "", "1 ppm"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a limit|has no unit"):
        parse_limit(text)


def test_more_than_all_is_refused() -> None:
    with pytest.raises(InputError, match="more than all there is to lose"):
        parse_limit("101pp")


def test_a_share_is_of_the_teachers_value() -> None:
    assert parse_limit("1%").of(0.8) == pytest.approx(0.008)
    assert parse_limit("1pp").of(0.8) == pytest.approx(0.01)


def test_the_whole_interval_above_the_limit_passes() -> None:
    verdict = Gate(parse_limit("5pp"))(card(10, 5, 2000, 1800))
    assert (verdict.outcome, verdict.passed, verdict.more_examples) == ("pass", True, None)


def test_the_whole_interval_below_the_limit_fails() -> None:
    verdict = Gate(parse_limit("1pp"))(card(200, 5, 2000, 1800))
    assert (verdict.outcome, verdict.passed) == ("fail", False)
    assert "limit −1.00" in verdict.reason


@pytest.mark.parametrize(("lost", "passed"), [(8, True), (16, False)])
def test_between_the_estimate_decides_and_says_so(lost: int, passed: bool) -> None:
    verdict = Gate(parse_limit("2pp"))(card(lost, 0, 600, 560))
    assert (verdict.outcome, verdict.passed) == ("undecided", passed)
    assert "the estimate decides" in verdict.reason


def test_as_many_more_examples_as_it_says_do_decide() -> None:
    gate = Gate(parse_limit("2pp"))
    verdict = gate(card(9, 1, 600, 560))
    assert verdict.outcome == "undecided"
    assert verdict.more_examples
    times = (600 + verdict.more_examples) / 600
    more = gate(card(round(9 * times), round(times), round(600 * times), round(560 * times)))
    assert more.outcome == "pass"
    assert verdict.more_examples > 50


def test_a_drop_right_at_the_limit_cannot_be_decided() -> None:
    verdict = Gate(parse_limit("2pp"))(card(12, 0, 600, 560))
    assert verdict.outcome == "undecided"
    assert verdict.more_examples is None
    assert "no number of examples" in verdict.reason
