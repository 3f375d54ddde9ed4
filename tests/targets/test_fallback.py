"""The limit on what leaves a target's accelerator."""

import pytest

from potstill.targets.coverage import Coverage, Left, by_work
from potstill.targets.fallback import judge_fallback, with_fallback
from potstill.targets.target import Target, load_target
from potstill.validate.gate import Gate, parse_limit
from potstill.validate.verdict import Check, verdict_of

EP = "CoreMLExecutionProvider"
LEFT = (Left("look_up", "Gather", "not in the list of operators"), Left("conv", "Conv", "its bias is not constant"))
SOME = Coverage("estimated", EP, "a list", 40, 2, LEFT, 0.25)
NONE = Coverage("estimated", EP, "a list", 40, 1)
UNKNOWN = Coverage("unknown", EP, "there is no list")
HELD = verdict_of([Check("max_drop", "pass", True, "it holds")])


def limited(limit: str | None) -> Target:
    target = load_target("phone-iphone")
    return target.model_copy(update={"model": target.model.model_copy(update={"max_fallback": limit})})


def test_the_larger_of_the_two_shares_decides() -> None:
    assert judge_fallback(SOME, 0.25, strict=True).outcome == "pass"
    check = judge_fallback(SOME, 0.2, strict=False)
    assert (check.limit, check.outcome, check.passed, check.nearest) == ("max_fallback", "fail", False, "25%")
    assert check.reason == (
        f"estimated: 5.0% of the nodes and 25.0% of the multiply-adds leave {EP}, limit 20%; they are conv (its bias "
        "is not constant), look_up (not in the list of operators); choose a format or operators that the provider "
        "takes, or widen max_fallback"
    )
    nodes = Coverage("compiled", EP, "a trace", 8, 2, LEFT, 0.0)
    assert judge_fallback(nodes, 0.2, strict=True).reason.startswith("compiled: 25.0% of the nodes and 0.0%")


def test_what_no_fixed_shape_keeps_away_is_told_how() -> None:
    left = tuple(Left(f"n{i}", "Relu", "an input of no fixed shape or over 5-D") for i in range(7))
    reason = judge_fallback(Coverage("estimated", EP, "a list", 7, 0, left, 1.0), 0.0, strict=True).reason
    assert "and 2 more; export with model.shapes: static, or widen max_fallback" in reason


def test_nothing_leaves() -> None:
    assert judge_fallback(None, 0.0, strict=True).passed
    check = judge_fallback(NONE, 0.0, strict=True)
    assert (check.outcome, check.reason) == (
        "pass", f"estimated: 0.0% of the nodes and 0.0% of the multiply-adds leave {EP}, limit 0%"
    )  # fmt: skip


@pytest.mark.parametrize("strict", [True, False])
def test_what_cannot_be_known_stops_only_a_strict_gate(strict: bool) -> None:
    check = judge_fallback(UNKNOWN, 0.0, strict=strict)
    assert (check.outcome, check.passed) == ("undecided", not strict)
    assert check.reason == f"Which nodes {EP} takes is unknown: there is no list, so max_fallback was not checked"
    weightless = Coverage("estimated", EP, "a list", 40, 2, LEFT)
    check = judge_fallback(weightless, 0.1, strict=strict)
    assert (check.outcome, check.passed) == ("undecided", not strict)
    assert check.reason.endswith("the share of the work is unknown, because the file does not run here")
    assert judge_fallback(weightless, 0.01, strict=strict).outcome == "fail"


def test_a_gate_and_a_target_each_have_a_limit_and_the_tighter_one_holds() -> None:
    wide, tight = (Gate(parse_limit("5pp"), max_fallback=share) for share in (0.5, 0.1))
    assert with_fallback(HELD, SOME, limited(None), Gate(parse_limit("5pp"))) == HELD
    assert with_fallback(None, SOME, limited(None), None) is None
    for target, gate, passed in (
        (limited(None), wide, True),
        (limited(None), tight, False),
        (limited("0%"), wide, False),
        (limited("30%"), wide, True),
    ):
        verdict = with_fallback(HELD, SOME, target, gate)
        assert verdict
        assert [one.limit for one in verdict.checks] == ["max_drop", "max_fallback"]
        assert verdict.passed is passed


def test_a_target_has_its_limit_without_a_gate() -> None:
    verdict = with_fallback(None, SOME, limited("0%"), None)
    assert verdict
    assert (verdict.outcome, [one.limit for one in verdict.checks]) == ("fail", ["max_fallback"])
    unknown = with_fallback(None, UNKNOWN, limited("0%"), None)
    assert unknown
    assert (unknown.outcome, unknown.passed) == ("undecided", True)
    strict = with_fallback(HELD, UNKNOWN, limited("0%"), Gate(parse_limit("5pp"), undecided="strict"))
    assert strict
    assert not strict.passed


def test_the_work_of_what_leaves() -> None:
    bare = Coverage("estimated", EP, "a list", 40, 2, LEFT)
    assert by_work(bare, {"conv": 30, "other": 90}).work_left == 0.25
    assert by_work(bare, {"other": 90}).work_left is None  # a Conv that the file has by another name
    assert "go 1 Gather, 1 Conv, with 25.0% of the multiply-adds (a list)" in SOME.in_words()
