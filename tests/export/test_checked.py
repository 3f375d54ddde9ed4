"""What a package's manifest says of where it was checked, and the scorecard of a file on its target."""

import numpy as np
import pytest

from potstill.export.checked import Emulated, as_on_target, checked, emulated_from, tolerance
from potstill.targets.host import runs_here
from potstill.targets.target import load_target
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


def test_of_some_examples_the_interval_holds_the_truth_in_95_of_100() -> None:
    held, trials = 0, 300
    for seed in range(trials):
        random = np.random.default_rng(seed)
        teacher = random.random(600) < 0.9
        here = np.where(random.random(600) < 0.04, ~teacher, teacher)
        there = np.where(random.random(600) < 0.08, False, here)  # the target's CPU spoils 8 of 100
        some = random.permutation(600)[:150]
        whole = as_on_target(card(here, teacher), emulated(there[some], here[some], teacher[some], 600))
        truth = (0.9 * 0.96 + 0.1 * 0.04) * 0.92 - 0.9
        held += whole.difference_interval.low <= truth <= whole.difference_interval.high
        assert whole.teacher_value == card(here, teacher).teacher_value
    assert held >= 0.93 * trials


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
    said = checked(BROWSER, None, "no emulator is known")
    assert said["where"] == "not checked"
    assert said["note"].endswith("It was not checked by its target's arithmetic: no emulator is known.")
    assert emulated_from(said) is None
    assert emulated_from({"as_target": True}) is None  # as older manifests are
    for name in ("laptop-x86-vnni", "laptop-x86-avx2", "phone-arm64"):
        target = load_target(name)
        assert (checked(target)["where"] == "this machine") is runs_here(target)[0]


def test_each_method_has_its_tolerance() -> None:
    assert {name: tolerance(name).sqnr_db for name in ("float32", "float16", "static", "dynamic")} == {
        "float32": 60, "float16": 40, "static": 30, "dynamic": 30,
    }  # fmt: skip
    assert tolerance("float32").largest < tolerance("float16").largest < tolerance("static").largest
