"""What the report and the terminal say of each step alone, and of other examples."""

from dataclasses import replace
from pathlib import Path

import pytest

from potstill.pipeline.report import headline
from potstill.pipeline.step_words import alone_in_words, fragile_in_words, interval_places, split_in_words
from potstill.validate.gate import Gate, parse_limit
from potstill.validate.metrics import Interval, detectable
from potstill.validate.shift import Shift
from tests.pipeline.test_report import Page, card, distill, examined, ledger, package, render, start, teacher

SHIFTED = Shift("shifted", "yelp.tsv", card(30, 12), **examined())
JPEG = Shift("jpeg", "JPEG quality 15", card(40, 10), change=-0.03, interval=Interval(-0.05, -0.01), p=0.003)
NOISE = Shift("noise", "Gaussian noise", card(20, 15), change=-0.002, interval=Interval(-0.012, 0.008), p=0.7)


def test_a_step_alone() -> None:
    assert alone_in_words(distill(step=card(60, 10))) == "lost 5.73 points"
    assert alone_in_words(distill(step=card(10, 60))) == "gained 5.73 points"
    seen = detectable(card(12, 10).difference_interval) * 100
    assert alone_in_words(distill(step=card(12, 10))) == (
        f"lost nothing measurable; a loss of {seen:.2f} points would have shown four times in five"
    )


def test_the_split_in_one_sentence() -> None:
    gained = replace(card(20, 60), difference=0.448, difference_interval=Interval(0.41, 0.48))
    run = ledger([teacher(), replace(start(), step=card(420, 24)), distill(step=gained), package("a", 21, 15, 9)])
    assert split_in_words(run) == "Each step alone, in points of accuracy: start −45.41, distill +44.80"
    still = ledger([teacher(), distill(step=card(60, 10)), package("a", 21, 15, 9, step=card(2, 2))])
    assert split_in_words(still) == "Each step alone, in points of accuracy: distill −5.73, a 0.00 (not measurable)"
    assert split_in_words(ledger([teacher(), distill(step=card(60, 10))])) is None


def test_fragility() -> None:
    assert fragile_in_words([SHIFTED]) is None
    assert fragile_in_words([SHIFTED, JPEG, NOISE]) == (
        "More fragile than the teacher under JPEG quality 15 (−3.00 points, 95 % interval −5.00 to −1.00)."
    )
    assert fragile_in_words([NOISE]) == (
        f"Not measurably more fragile than the teacher under Gaussian noise; a further "
        f"{detectable(Interval(-0.012, 0.008)) * 100:.2f} points would have shown four times in five."
    )


def test_intervals_share_a_scale() -> None:
    first, second = interval_places([(-0.4, -0.2, 0.0), (0.1, 0.15, 0.2)])
    assert (*first, *second) == pytest.approx((-1, -0.5, 0, 0.25, 0.375, 0.5))
    assert interval_places([(0.0, 0.0, 0.0)]) == [(0, 0, 0)]


def test_the_report_shows_both(tmp_path: Path) -> None:
    one = distill(step=card(60, 10), shifts=[SHIFTED, JPEG, NOISE])
    two = package("a", 21, 15, 9, step=card(2, 2), shifts=[SHIFTED])
    shown = Page(render(ledger([teacher(), one, two]), tmp_path)).text
    for words in (
        "What each step cost alone", alone_in_words(one), alone_in_words(two), "Beyond the evaluation set",
        f"jpeg JPEG quality 15, {JPEG.scorecard.examples} examples", "−3.00 [−5.00, −1.00]",
        "More fragile than the teacher under JPEG", "shifted: worst slice class negative",
    ):  # fmt: skip
        assert words in shown


def test_without_them_nothing_is_said(tmp_path: Path) -> None:
    shown = Page(render(ledger([teacher(), distill()]), tmp_path)).text
    assert "What each step cost alone" not in shown
    assert "Beyond the evaluation set" not in shown


def test_the_headline_tells_of_the_second_set() -> None:
    run = ledger([teacher(), distill(), package("a", 21, 15, 26.78, shifts=[SHIFTED, JPEG])])
    assert headline(run) == "The package passed: 0.7 points below the teacher (2.1 below on yelp.tsv), 10.0× smaller."


def test_the_headline_tells_of_a_loss_on_the_second_set_alone() -> None:
    run = ledger([teacher(), distill(15, 15, shifts=[SHIFTED])])
    assert headline(run).startswith("distill passed: level with the teacher (2.1 below on yelp.tsv)")


def test_several_perturbations_are_corrected_for() -> None:
    """Each alone is below 5 %, of three none is."""
    each = [replace(JPEG, by=by, what=by, p=0.03) for by in ("jpeg", "blur", "noise")]
    assert (fragile_in_words(each[:1]) or "").startswith("More fragile than the teacher under jpeg (")
    assert (fragile_in_words(each) or "").startswith("Not measurably more fragile")


def test_all_limits_of_a_verdict_are_listed(tmp_path: Path) -> None:
    verdict = Gate(parse_limit("3pp"), min_agreement=0.9)(card(21, 15))
    shown = Page(render(ledger([teacher(), distill(verdict=verdict)]), tmp_path)).text
    for check in verdict.checks:
        assert f"{check.limit} {check.outcome}: {check.reason}" in shown
    assert "all 2 limits" in shown
