"""What a package's manifest says of where it was checked, and the scorecard of a file on its target."""

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from potstill.export import checked as module
from potstill.export.checked import Emulated, NotEmulated, as_on_target, checked, emulated_from, tolerance
from potstill.targets import host
from potstill.targets.target import Scheme, load_target
from potstill.validate.metrics import Interval
from potstill.validate.scorecard import Scorecard, paired

BROWSER = load_target("browser-wasm")


def card(right: np.ndarray, other: np.ndarray) -> Scorecard:
    return Scorecard(metric="accuracy", data="made up", **paired(right, other))


def emulated(right: np.ndarray, here: np.ndarray, teacher: np.ndarray, of: int, db: float | None = 16.0) -> Emulated:
    return Emulated("Haswell", "qemu-x86_64", len(right), of, card(right, teacher), card(right, here), db, 30.0, 4.0)


def answers(n: int, share: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(n) < share


def test_of_all_examples_it_is_the_emulated_one() -> None:
    here, teacher, there = (answers(200, share, seed) for seed, share in enumerate((0.9, 0.95, 0.7)))
    found = emulated(there, here, teacher, 200)
    assert as_on_target(card(here, teacher), found) == card(there, teacher)


def test_of_some_examples_the_interval_holds_the_truth_and_is_no_wider_than_its_two_parts() -> None:
    """Its width is that of two normal intervals of the population's variances, which are added."""
    held, widths, trials = 0, [], 300
    for seed in range(trials):
        random = np.random.default_rng(seed)
        teacher = random.random(600) < 0.9
        here = np.where(random.random(600) < 0.04, ~teacher, teacher)
        there = np.where(random.random(600) < 0.08, False, here)  # the target's CPU spoils 8 of 100
        some = random.permutation(600)[:150]
        whole = as_on_target(card(here, teacher), emulated(there[some], here[some], teacher[some], 600))
        truth = (0.9 * 0.96 + 0.1 * 0.04) * 0.92 - 0.9
        held += whole.difference_interval.low <= truth <= whole.difference_interval.high
        widths.append(whole.difference_interval.high - whole.difference_interval.low)
        assert whole.teacher_value == card(here, teacher).teacher_value
    assert held >= 0.95 * trials
    right_here = 0.9 * 0.96 + 0.1 * 0.04
    variances = (0.04 - (0.1 * 0.04 - 0.9 * 0.04) ** 2) / 600, (p := 0.08 * right_here) * (1 - p) / 150
    assert 1 <= np.mean(widths) / (2 * 1.96 * sum(map(np.sqrt, variances))) <= 1.2


@pytest.mark.parametrize("correlation", [False, True])
def test_a_metric_and_its_intervals_stay_in_its_range(correlation: bool) -> None:
    """What emulation lost is more than there was, or what it gained more than there is to gain."""
    least = -1.0 if correlation else 0.0
    for value, moved in ((least + 0.02, -0.1), (0.99, 0.1)):
        near = Interval(value - 0.01, value + 0.005)
        one = Scorecard("any", 600, "made up", value, near, 0.5, value - 0.5, Interval(value - 0.51, value - 0.495),
                        correlation=correlation)  # fmt: skip
        apart = Scorecard("any", 150, "made up", 0.5, near, 0.5, moved, Interval(moved - 0.9, moved + 0.9))
        found = as_on_target(one, Emulated("Haswell", "qemu", 150, 600, one, apart, 16.0, 30.0, 4.0))
        span = 1 - least
        assert found.value == (least if moved < 0 else 1.0)
        assert least <= found.interval.low <= found.value <= found.interval.high <= 1
        assert found.difference == found.value - found.teacher_value
        assert -span <= found.difference_interval.low <= found.difference <= found.difference_interval.high <= span
        ends = max(least, value - 0.91 + moved), min(1, value + 0.905 + moved)
        assert (found.interval.low, found.interval.high) == pytest.approx(ends)


@pytest.mark.parametrize(
    ("db", "spoiled", "differs"), [(None, 0, False), (45.0, 0, False), (16.0, 0, True), (45.0, 40, True)]
)
def test_it_differs_by_outputs_or_by_the_metric(db: float | None, spoiled: int, differs: bool) -> None:
    here = np.ones(200, dtype=bool)
    there = here.copy()
    there[:spoiled] = False
    found = emulated(there, here, here, 1000, db)
    assert found.differs is differs
    assert ("computes otherwise on its target" in found.in_words()) is differs
    assert found.in_words().startswith("200 of 1,000 evaluation examples were run as Haswell by qemu-x86_64: ")


def test_a_manifest_says_where_it_was_checked() -> None:
    here = np.ones(50, dtype=bool)
    found = emulated(here, here, here, 50, None)
    said = checked(BROWSER, found)
    assert (said["where"], said["as_target"]) == ("emulated", False)
    assert said["note"].endswith(found.in_words())
    assert emulated_from(said) == found
    said = checked(BROWSER, NotEmulated("no emulator is known"))
    assert said["where"] == "not checked"
    assert said["note"].endswith("It was not checked by its target's arithmetic: no emulator is known.")
    assert emulated_from(said) is None
    assert emulated_from({"as_target": True}) is None  # as older manifests are
    assert checked(BROWSER)["note"].endswith("by its target's arithmetic: that is done in a run.")


def test_a_crash_is_not_the_same_as_no_emulator() -> None:
    said = checked(BROWSER, NotEmulated("the package crashed as Haswell: signal 4", crashed=True))
    assert (said["where"], said["as_target"], said["emulated"]) == ("crashed", False, None)
    assert said["note"].endswith(
        "By its target's arithmetic it does not run: the package crashed as Haswell: signal 4; run its golden samples "
        "on a device, whose CPU may have what its emulator lacks."
    )


@pytest.mark.parametrize(
    ("arch", "isa", "alike"),
    [
        ("x86_64", ("avx2", "avx512_vnni"), {"laptop-x86-vnni"}),
        ("x86_64", ("avx2", "avx_vnni"), {"laptop-x86-vnni"}),
        ("x86_64", ("avx2",), {"laptop-x86-avx2"}),
        ("arm64", ("asimd", "asimddp"), {"phone-arm64", "phone-arm64-dotprod"}),
        ("arm64", ("asimd",), {"phone-arm64"}),
    ],
)
def test_the_cpu_decides_where_it_was_checked(
    arch: str, isa: tuple[str, ...], alike: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the instruction sets whose int8 kernels differ: without VNNI sums overflow; dot products of ARM are exact."""
    machine = host.Host("Linux", arch, isa, "a CPU", 2)
    for place in (host, module):
        monkeypatch.setattr(place, "here", lambda: machine)
    known = ("laptop-x86-vnni", "laptop-x86-avx2", "phone-arm64", "phone-arm64-dotprod", "phone-iphone")
    said = {name: checked(load_target(name)) for name in known}
    assert {name for name in known if said[name]["where"] == "this machine"} == alike
    assert {name for name in known if said[name]["where"] == "not checked"} == {*known} - alike


RANDOM = np.random.default_rng(0)
X, W = RANDOM.uniform(size=(200, 256)), RANDOM.uniform(-1, 1, size=(256, 10))  # x as a ReLU gives it
Matrix = NDArray[np.floating]


def steps(values: Matrix, most: int, axis: int | None = None) -> tuple[Matrix, Matrix]:
    """Integers up to `most`, and the scale that they have."""
    scale = np.abs(values).max(axis=axis, keepdims=True) / most
    return np.round(values / scale), scale


def quantised(axis: int | None, most: int = 127) -> list[Matrix]:
    """x · w in uint8 × int8, weights up to `most`; and with one activation in twenty a step off, as kernels may be."""
    (x, x_scale), (w, w_scale) = steps(X, 255, axis), steps(W, most, axis=0)
    moved = np.clip(x + RANDOM.choice([-1, 0, 1], size=x.shape, p=[0.025, 0.95, 0.025]), 0, 255)
    return [one @ w * x_scale * w_scale for one in (x, moved)]


def saturated() -> Matrix:
    """The same product by VPMADDUBSW: two neighbours' products are added in 16 bits, and stay at the ends."""
    (x, x_scale), (w, w_scale) = steps(X, 255), steps(W, 127, axis=0)
    products = x[:, :, None] * w[None]
    found: Matrix = np.clip(products[:, ::2] + products[:, 1::2], -(2**15), 2**15 - 1).sum(axis=1) * x_scale * w_scale
    return found


def blocks() -> list[Matrix]:
    """x · w with int8 weights in blocks, and the same with activations in int8 by block, as accuracy level 4 has it."""
    w, w_scale = steps(W.reshape(8, 32, 10), 127, axis=1)
    x, x_scale = steps(X.reshape(200, 8, 32), 127, axis=2)
    weights = w * w_scale
    return [X @ weights.reshape(256, 10), np.einsum("nbi,bio->no", x * x_scale, weights)]


def reordered(kind: type[np.floating]) -> list[Matrix]:
    """x · w, its numbers and sums rounded to a floating-point type, in two orders."""
    products = X.astype(kind)[:, :, None] * W.astype(kind)[None]
    return [np.add.accumulate(one, axis=1, dtype=kind)[:, -1] for one in (products, products[:, ::-1])]


def decibels(one: Matrix, other: Matrix) -> float:
    """Of the power of the one over that of the difference."""
    return float(10 * np.log10(np.square(one).sum(dtype=float) / np.square(one - other, dtype=float).sum()))


ROUNDING: dict[str, Callable[[], list[Matrix]]] = {
    "float32": lambda: reordered(np.float32),
    "float16": lambda: reordered(np.float16),
    "static": lambda: quantised(None),
    "dynamic": lambda: quantised(1),
    "weights": blocks,
}


def test_each_method_has_its_tolerance() -> None:
    assert set(ROUNDING) == set(get_args(Scheme.model_fields["method"].annotation))


@pytest.mark.parametrize("method", ROUNDING)
def test_a_tolerance_lets_rounding_pass_and_no_fault(method: str) -> None:
    """Both made in numpy; a fault is the overflow of a CPU without VNNI, and for floats to compute in int8 or int4."""
    allowed = tolerance(method)
    one, other = ROUNDING[method]()
    assert (np.abs(one - other).max(axis=1) <= allowed.largest * np.abs(one).max(axis=1)).all()
    assert decibels(one, other) > allowed.sqnr_db
    coarse = {"float32": 127, "float16": 7}
    fault = quantised(None, coarse[method])[0] if method in coarse else saturated()
    assert decibels(X @ W, fault) < allowed.sqnr_db


def test_one_example_is_told_as_one() -> None:
    one = np.ones(1, dtype=bool)
    told = emulated(one, one, one, 1, None).in_words()
    assert told.startswith("1 of 1 evaluation example was run as Haswell by qemu-x86_64: the same outputs as here")
