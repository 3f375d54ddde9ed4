"""Why a package whose gate is missed was not searched for."""

from pathlib import Path
from typing import Any

import pytest

from potstill.export.search_files import Limits
from potstill.pipeline.searching import not_searched
from potstill.targets.target import Scheme
from potstill.validate.verdict import Check, Verdict, verdict_of

DYNAMIC = Scheme(method="dynamic", weight="int8", per_channel=True, why="test")
LIMITS = Limits(600, Path("tries"), "a")


def verdict(limit: str, passed: bool) -> Verdict:
    return verdict_of([Check(limit, "pass" if passed else "fail", passed, "because")])


MISSED, HELD, SLOW = verdict("max_drop", False), verdict("max_drop", True), verdict("max_latency", False)


class Made:
    """A package that was not searched."""

    search: Any = None


def why(
    here: Verdict | None = MISSED,
    there: Verdict | None = None,
    limits: Limits | None = LIMITS,
    scheme: Scheme = DYNAMIC,
    trained: bool = False,
    calibrated: bool = True,
) -> str | None:
    made: Any = Made()
    return not_searched(made, here, there or here, limits, scheme, trained, calibrated)


@pytest.mark.parametrize(
    ("of", "reason"),
    [
        ({"limits": None}, "it has no time; give --search-time (search.time)"),
        ({"trained": True}, "it keeps the integers that it was trained in"),
        ({"calibrated": False}, "no examples are left to measure on that do not judge; give others to --calibrate"),
        ({"scheme": Scheme(method="float16", why="test")}, "float16 has no integers that nodes could be left out of"),
        ({"here": HELD, "there": MISSED}, "more bits do not help what it misses on this machine, where a search"),
        ({"here": SLOW, "there": MISSED}, "more bits do not help what it misses on this machine, where a search"),
        ({}, "the gate was held when this package was made; remove its folder and run again"),
    ],
)
def test_a_missed_gate_says_why_it_was_not_searched(of: dict[str, Any], reason: str) -> None:
    found = why(**of)
    assert found
    assert found.startswith(f"The gate is missed and nothing was searched for: {reason}")


@pytest.mark.parametrize("here", [None, HELD, SLOW])
def test_nothing_is_said_where_a_search_has_no_place(here: Verdict | None) -> None:
    assert why(here, limits=None) is None


def test_nothing_is_said_of_a_package_that_was_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Made, "search", object())
    assert why() is None
