"""The nearest limit that a figure holds: in a recipe it lets the model pass, and one step tighter it does not."""

import math
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from potstill.pipeline.limits import GateSpec
from potstill.targets.coverage import Coverage, Left
from potstill.targets.fallback import judge_fallback
from potstill.validate.calibration import Bin, Calibration, Reliability
from potstill.validate.gate import Check, Verdict, nearest_in_words
from potstill.validate.metrics import Interval
from potstill.validate.scorecard import Perplexity, Scorecard, paired
from potstill.validate.slices import Slice, by_column, slices
from potstill.validate.units import BYTES, PARSERS, SECONDS, nearest, nearest_cost

TIGHT = {
    "max_drop": ("0pp", "0%"), "max_slice_drop": ("0pp", "0%"), "min_agreement": ("100%",), "max_flips": ("0.0001%",),
    "max_divergence": ("0.000001nats",), "max_calibration_error": ("0.0001%",), "max_size": ("0.001kB",),
    "max_latency": ("0.000001ms",), "max_memory": ("0.001kB",), "max_fallback": ("0%",),
    "max_perplexity_rise": ("0.0001%",),
}  # fmt: skip


def made(rng: np.random.Generator) -> tuple[Scorecard, list[Slice], Calibration, int, float, float]:
    """A random model: its scorecard, slices, calibration, bytes, ms and MB."""
    n = int(rng.integers(20, 2000))
    teacher = rng.random(n) < 0.9
    right = np.where(rng.random(n) < rng.choice([0.01, 0.05, 0.3]), ~teacher, teacher)
    ece, low, high = rng.choice([1e-3, 0.1]) * np.sort(rng.random(3))[rng.permutation(3)]
    side = Reliability(float(ece), Interval(*sorted((float(low), float(high)))), [Bin(n, 0.9, 0.8)])
    rise = float(rng.gamma(0.5, 0.2))
    perplexity = Perplexity(4.0, Interval(3, 5), 4.0, 1 + rise, Interval(1 + 0.9 * rise, 1 + 1.2 * rise), 100)
    kl, agree = float(rng.gamma(0.5, 0.2)), float(rng.uniform(0.5, 1))
    card = Scorecard(
        metric="accuracy", data="made", kl_nats=kl, kl_interval=Interval(0.9 * kl, 1.2 * kl), agreement=agree,
        agreement_interval=Interval(agree * 0.99, min(1, agree * 1.01)), perplexity=perplexity,
        **paired(right, teacher),
    )  # fmt: skip
    found = slices(right, teacher, [by_column("kind", rng.integers(0, rng.integers(1, 9), size=n).tolist())])
    cost = float(10 ** rng.uniform(-2, 4))
    return card, found, Calibration(side, side, 0, side.interval), int(10 ** rng.uniform(2, 10)), cost, cost / 7


def judged(limits: dict[str, str], undecided: str, model: Any) -> dict[str, Check]:
    card, found, calibration, size, ms, mb = model
    gate = GateSpec.model_validate(limits | {"undecided": undecided}).build()
    verdict = gate.with_costs(gate(card, size, slices=found, calibration=calibration), ms, mb, "a machine")
    left = (Left("", "Relu", ""),) * (size % 40 + 1)
    assert gate.max_fallback is not None
    fallback = judge_fallback(Coverage("estimated", "", "", 173, 1, left, 0.0), gate.max_fallback, strict=True)
    return {check.limit: check for check in [*verdict.checks, fallback]}


def tighter(name: str, text: str) -> str:
    """One step of the last of two digits; of a share to be reached, of what is missing to 100 %."""
    number = text.rstrip("%abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    whole = Decimal(100 if name == "min_agreement" else 0)
    gap = abs(whole - Decimal(number))
    return f"{abs(whole - (gap - Decimal(10) ** min(0, math.floor(gap.log10()) - 1))):f}{text.removeprefix(number)}"


@pytest.mark.parametrize("undecided", ["point", "strict"])
@pytest.mark.parametrize("seed", range(25))
def test_it_passes_and_one_step_tighter_does_not(undecided: str, seed: int) -> None:
    model, missed = made(np.random.default_rng(seed)), 0
    for i in range(2):
        limits = {name: texts[i % len(texts)] for name, texts in TIGHT.items()}
        for name, check in judged(limits, undecided, model).items():
            assert check.passed or check.nearest or name in ("max_drop", "max_slice_drop")
            if check.passed:
                assert check.nearest is None
            elif check.nearest is None:
                assert not judged(limits | {name: limits[name].replace("0", "100", 1)}, undecided, model)[name].passed
            else:
                missed += 1
                assert judged(limits | {name: check.nearest}, undecided, model)[name].passed
                assert not judged(limits | {name: tighter(name, check.nearest)}, undecided, model)[name].passed
    assert missed >= 10


@pytest.mark.parametrize(
    ("name", "at", "unit", "text"),
    [
        ("max_drop", 2.31, "pp", "2.4pp"),
        ("max_drop", 2.0, "pp", "2pp"),
        ("max_flips", 7.000000000000001, "%", "7%"),
        ("max_divergence", 0.0601, "nats", "0.061nats"),
        ("min_agreement", 96.34, "%", "96.3%"),
        ("min_agreement", 99.9871, "%", "99.987%"),
        ("min_agreement", 45.9, "%", "45%"),
        ("max_size", 102.4, "MB", "103MB"),
        ("max_drop", math.inf, "%", None),
        ("max_drop", 100.5, "pp", None),
    ],
)
def test_it_has_two_digits(name: str, at: float, unit: str, text: str | None) -> None:
    scale = {"%": 0.01, "pp": 1, "nats": 1, "MB": 1e6}[unit]
    better = 1 if name.startswith("min") else -1

    def holds(limit: Any) -> bool:
        return better * round(at * scale, 14) >= better * (limit.amount if name == "max_drop" else round(limit, 14))

    assert nearest(name, at, unit, holds) == text


def test_costs_are_in_the_unit_that_reads_best() -> None:
    assert nearest_cost("max_size", 20_345_678, BYTES) == "21MB"
    assert nearest_cost("max_size", 900, BYTES) == "0.9kB"
    assert nearest_cost("max_memory", 2.31e9, BYTES) == "2.4GB"
    assert nearest_cost("max_latency", 0.0331, SECONDS) == "34ms"
    assert nearest_cost("max_latency", 1.21, SECONDS) == "1.3s"


def test_a_drop_of_a_correlation_may_be_more_than_any_limit() -> None:
    card = made(np.random.default_rng(0))[0]
    worse = replace(
        card, value=-0.5, teacher_value=0.9, difference=-1.4, difference_interval=Interval(-1.5, -1.3), correlation=True
    )
    for limit in ("1pp", "1%"):
        (check,) = GateSpec(max_drop=limit).build()(worse).checks
        assert (check.outcome, check.nearest) == ("fail", None)


def test_the_nearest_limits_in_words() -> None:
    checks = [
        Check("max_drop", "fail", False, "", nearest="2.4pp"),
        Check("max_memory", "undecided", False, ""),
        Check("min_agreement", "pass", True, ""),
        Check("max_flips", "fail", False, "", nearest="3%"),
        Check("max_size", "fail", False, "", nearest="21MB"),
    ]
    for kept, told in (
        (checks, "max_drop: 2.4pp, max_flips: 3% and max_size: 21MB"),
        (checks[:4:3], "max_drop: 2.4pp and max_flips: 3%"),
        (checks[:1], "max_drop: 2.4pp"),
        (checks[1:3], None),
    ):
        assert nearest_in_words(Verdict("fail", False, "", checks=kept)) == told


def test_each_limit_has_its_units_and_its_place_in_a_recipe() -> None:
    assert set(PARSERS) == set(TIGHT) == set(GateSpec.model_fields) - {"undecided"}
