"""Limits with units, and verdicts that say how sure they are."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from potstill.pipeline.limits import GateSpec
from potstill.validate.calibration import Bin, Calibration, Reliability
from potstill.validate.errors import InputError
from potstill.validate.gate import BYTES, NATS, SECONDS, SHARE, Gate, Limit, parse_limit, parse_quantity
from potstill.validate.metrics import Interval
from potstill.validate.scorecard import Scorecard, judge, paired
from potstill.validate.units import PARSERS


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


@pytest.mark.parametrize(
    ("text", "units", "value"),
    [
        ("97%", SHARE, 0.97),
        ("0.05nats", NATS, 0.05),
        ("20 MB", BYTES, 20e6),
        ("1.5GB", BYTES, 1.5e9),
        ("30ms", SECONDS, 0.03),
    ],
)
def test_quantities_carry_their_unit(text: str, units: Mapping[str, float], value: float) -> None:
    assert parse_quantity(text, units) == pytest.approx(value)


def test_nothing_may_fall_back() -> None:
    assert PARSERS["max_fallback"]("0%") == 0
    with pytest.raises(InputError, match="'0' is not a limit here; write a number from 0 on with its unit, like 20%"):
        PARSERS["max_fallback"]("0")


@pytest.mark.parametrize(
    ("text", "units", "said"),
    [
        ("0.97", SHARE, "write a number above 0 with its unit, like 20%"),
        ("97", SHARE, "with its unit"),
        ("1pp", SHARE, "is not a limit here"),
        ("120%", SHARE, "more than all"),
        ("20", BYTES, "like 20kB or 20MB or 20GB"),
        ("20ms", BYTES, "is not a limit here"),
        ("0ms", SECONDS, "above 0"),
    ],
)
def test_a_quantity_without_its_unit_is_an_error(text: str, units: Mapping[str, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_quantity(text, units)


@pytest.mark.parametrize("lost", [8, 16])
def test_a_strict_gate_lets_nothing_undecided_pass(lost: int) -> None:
    verdict = Gate(parse_limit("2pp"), undecided="strict")(card(lost, 0, 600, 560))
    assert (verdict.outcome, verdict.passed) == ("undecided", False)
    assert "the gate is strict" in verdict.reason
    assert Gate(parse_limit("5pp"), undecided="strict")(card(10, 5, 2000, 1800)).passed


def test_a_model_right_at_the_limit_passes_a_strict_gate_at_most_once_in_twenty() -> None:
    rng, n, lose, gain = np.random.default_rng(0), 1000, 0.04, 0.02
    gate = Gate(parse_limit("2pp"), undecided="strict")  # the true drop
    made = []
    for lost, gained, same in rng.multinomial(n, [lose, gain, 1 - lose - gain], size=2000):
        right, teacher = (np.repeat(one, [lost, gained, same]) for one in ([False, True, True], [True, False, True]))
        made.append(Scorecard(metric="accuracy", data="made", **paired(right, teacher)))
    passed = sum(gate(one).passed for one in made) / len(made)
    assert 0.01 < passed <= 0.05


@pytest.mark.parametrize(
    ("limits", "outcome", "passed", "said"),
    [
        ({"min_agreement": 0.95}, "pass", True, "accuracy"),
        ({"min_agreement": 0.989}, "undecided", True, "accuracy"),
        ({"min_agreement": 0.995}, "fail", False, "agreement 99.00%, 95 % interval"),
        ({"max_flips": 0.02}, "pass", True, "accuracy"),
        ({"max_flips": 0.001}, "fail", False, "flips to wrong 0.75%"),
        ({"max_divergence": 0.02}, "pass", True, "accuracy"),
        ({"max_divergence": 0.001}, "fail", False, "KL 0.0046 nats"),
        ({"max_flips": 0.001, "min_agreement": 0.995}, "fail", False, "agreement .*; flips to wrong"),
    ],
)
def test_each_limit_is_judged_by_its_interval(limits: dict[str, float], outcome: str, passed: bool, said: str) -> None:
    verdict = Gate(parse_limit("5pp"), **limits)(card(30, 10, 4000, 3600))  # type: ignore[arg-type]
    assert (verdict.outcome, verdict.passed) == (outcome, passed)
    assert re.search(said, verdict.reason)
    assert [check.limit for check in verdict.checks] == ["max_drop", *sorted(limits, reverse=True)]


def test_one_missed_limit_outweighs_an_undecided_one() -> None:
    verdict = Gate(parse_limit("2pp"), max_flips=0.001)(card(9, 1, 600, 560))
    assert [check.outcome for check in verdict.checks] == ["undecided", "fail"]
    assert (verdict.outcome, verdict.passed, verdict.more_examples) == ("fail", False, None)


def test_costs_are_limits_of_packages() -> None:
    gate = Gate(parse_limit("5pp"), max_size=2e6, max_latency=0.03, max_memory=100e6)
    judged = card(10, 5, 2000, 1800)
    assert len(gate(judged).checks) == 1
    assert not gate(judged, 2_000_001).passed
    small = gate(judged, 2_000_000)
    good = gate.with_costs(small, median_ms=30.0, peak_mb=99.0, where="a machine")
    assert (good.outcome, [check.limit for check in good.checks]) == (
        "pass",
        ["max_drop", "max_size", "max_latency", "max_memory"],
    )
    slow = gate.with_costs(small, median_ms=30.1, peak_mb=None, where="a machine")
    assert (slow.outcome, slow.passed) == ("fail", False)
    assert slow.reason == "the median run on a machine takes 30.1 ms, limit 30 ms"
    assert "cannot be measured on a machine" in slow.checks[3].reason


@pytest.mark.parametrize("name", ["min_agreement", "max_flips", "max_divergence"])
def test_a_limit_on_what_a_metric_has_not_is_an_error_before_any_training(name: str) -> None:
    none = {"agreement": None, "lost_share": None, "kl_nats": None}
    with pytest.raises(InputError, match=rf"gate\.{name}: accuracy has none"):
        Gate(parse_limit("5pp"), **{name: 0.5}).check(  # type: ignore[arg-type]
            replace(card(1, 1, 100, 90), **none), has_classes=True
        )


def test_the_interval_of_the_divergence_is_that_of_its_mean() -> None:
    made = card(30, 10, 4000, 3600)
    assert made.kl_interval is not None
    half = 1.96 * float(np.std([np.tanh(0.5)] * 40 + [0.0] * 3960)) / np.sqrt(4000)  # KL of a flip: tanh(1/2)
    assert made.kl_nats == pytest.approx(40 * np.tanh(0.5) / 4000)
    assert isinstance(made.kl_interval, Interval)
    assert made.kl_interval.half == pytest.approx(half, rel=0.08)


def calibrated(ece: float, low: float, high: float) -> Calibration:
    """A model with this calibration error."""
    side = Reliability(ece, Interval(low, high), [Bin(600, 0.9, 0.8)])
    return Calibration(side, side, 0, Interval(0, 0))


@pytest.mark.parametrize(
    ("limit", "outcome", "point", "strict"),
    [(0.05, "pass", True, True), (0.04, "undecided", True, False), (0.03, "undecided", False, False),
     (0.02, "fail", False, False)],
)  # fmt: skip
def test_the_calibration_error_is_judged_by_its_interval(limit: float, outcome: str, point: bool, strict: bool) -> None:
    for undecided, passed in (("point", point), ("strict", strict)):
        gate = Gate(parse_limit("5pp"), undecided=undecided, max_calibration_error=limit)  # type: ignore[arg-type]
        check = gate(card(1, 1, 600, 560), calibration=calibrated(0.035, 0.025, 0.045)).checks[1]
        assert (check.limit, check.outcome, check.passed) == ("max_calibration_error", outcome, passed)
        assert check.reason.startswith("expected calibration error 3.50%, 95 % interval 2.50 to 4.50, limit")


def test_a_calibration_error_above_its_interval_must_hold_the_limit_too() -> None:
    found, plain = calibrated(0.05, 0.02, 0.04), card(1, 1, 600, 560)
    for undecided in ("point", "strict"):
        gate = Gate(parse_limit("5pp"), undecided, max_calibration_error=0.045)  # type: ignore[arg-type]
        check = gate(plain, calibration=found).checks[1]
        assert (check.outcome, check.passed, check.nearest) == ("undecided", False, "5%")
        assert replace(gate, max_calibration_error=0.051)(plain, calibration=found).checks[1].outcome == "pass"
        assert replace(gate, max_calibration_error=0.019)(plain, calibration=found).checks[1].outcome == "fail"


@pytest.mark.parametrize(
    ("limit", "given"),
    [({"max_slice_drop": parse_limit("3pp")}, "slices"), ({"max_calibration_error": 0.05}, "calibr")],
)
def test_a_limit_on_slices_or_calibration_is_never_skipped(limit: dict[str, Any], given: str) -> None:
    gate = Gate(parse_limit("5pp"), **limit)
    with pytest.raises(TypeError, match=rf"is set, and no {given}"):
        gate(card(1, 1, 600, 560))
    gate.check(card(1, 1, 600, 560), has_classes=True)
    with pytest.raises(InputError, match=rf"gate\.{next(iter(limit))}: .*one class for each example.*leave it out"):
        gate.check(card(1, 1, 600, 560), has_classes=False)


def test_limits_of_a_recipe_keep_their_unit() -> None:
    spec = GateSpec.model_validate({"max_drop": "1pp", "max_slice_drop": " 3% ", "max_calibration_error": "5%"})
    assert spec.max_slice_drop == "3%"
    built = spec.build()
    assert (built.max_slice_drop, built.max_calibration_error) == (Limit(3, "%"), 0.05)
    with pytest.raises(ValueError, match=r"max_slice_drop\n.*'0\.01' has no unit: is it a point or a share"):
        GateSpec.model_validate({"max_drop": "1pp", "max_slice_drop": 0.01})
    with pytest.raises(ValueError, match=r"max_calibration_error\n.*'1pp' is not a limit here"):
        GateSpec.model_validate({"max_drop": "1pp", "max_calibration_error": "1pp"})
