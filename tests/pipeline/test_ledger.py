"""What a ledger says after a missed gate."""

from dataclasses import replace
from pathlib import Path

from potstill.pipeline.ledger import candidate_in_words, failure_in_words
from potstill.validate.verdict import nearest_in_words, verdict_of
from tests.pipeline.test_report import Page, card, distill, judged, ledger, mixed, passing, refused, render, teacher


def test_a_first_stage_that_missed_is_the_best_candidate(tmp_path: Path) -> None:
    run = refused()
    told = "The best candidate is distill itself, in distill. distill holds max_drop: 5.2pp."
    assert candidate_in_words(run) == told
    assert run.to_json()["best"] == {"name": "distill", "folder": "distill"}
    assert told in Page(render(run, tmp_path)).text
    assert "It holds max_drop: 5.2pp. Try more epochs" in failure_in_words(run.entries[-1], tmp_path)
    assert judged(run.entries[-1].scorecard, "5.2pp").passed
    assert not judged(run.entries[-1].scorecard, "5.1pp").passed


def test_after_a_stage_that_passed_that_one_is(tmp_path: Path) -> None:
    missed = replace(distill(), name="prune", scorecard=card(58, 13), verdict=judged(card(58, 13)))
    told = candidate_in_words(ledger([teacher(), distill(), missed]))
    assert told == "The best candidate is distill, which passed, in student. prune holds max_drop: 5.2pp."


def test_a_package_that_missed_says_what_it_holds() -> None:
    told = candidate_in_words(mixed())
    assert told == (
        "The best candidate is distill, which passed, in student. Packages that stand: laptop-x86-vnni, "
        "phone-arm64-dotprod. phone-iphone-coreml-neural-engine-16 holds max_drop: 9.1pp."
    )
    assert mixed().to_json()["best"] == {"name": "distill", "folder": "distill"}


def test_both_sets_share_a_limit_in_the_recipe() -> None:
    """The nearest limit is the wider one of both sets."""
    on_eval, there = judged(card(58, 13)).checks[0], judged(card(90, 10)).checks[0]
    verdict = verdict_of([on_eval, replace(there, limit="shifted max_drop", reason="on yelp.tsv: …")])
    assert nearest_in_words(verdict) == "max_drop: 9.2pp"
    agreed = [replace(on_eval, limit=name, nearest=near) for name, near in
              (("min_agreement", "96%"), ("shifted min_agreement", "93%"))]  # fmt: skip
    assert nearest_in_words(verdict_of(agreed)) == "min_agreement: 93%"


def test_nothing_is_said_where_all_passed() -> None:
    assert candidate_in_words(passing()) is None
    assert passing().to_json()["best"] is None
