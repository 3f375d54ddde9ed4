import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from potstill.pipeline.ledger import Entry
from potstill.pipeline.pictures import signed
from potstill.pipeline.pictures_reliability import reliability
from potstill.pipeline.report import slice_places
from potstill.pipeline.slice_words import examined, gaps_in_words, named, p_in_words
from potstill.validate.slices import Slice, by_class, slices
from tests.pipeline.test_pictures_training import WIDTHS, words
from tests.pipeline.test_report import Page, distill, ledger, passing, render, start, teacher

LABELS = np.repeat([0, 1, 2], [200, 800, 4])


def sliced(*lost: int) -> list[Slice]:
    """Slices of three classes (200, 800 and 4 examples), of which so many are lost that the teacher has right."""
    right = np.ones(len(LABELS), dtype=bool)
    for label, count in enumerate(lost):
        right[np.flatnonzero(label == LABELS)[:count]] = False
    return slices(right, np.ones_like(right), [by_class(LABELS, ["owl", "cat", "fox cub"])])


def test_gaps_that_widened_are_named() -> None:
    told = gaps_in_words(sliced(60, 8))
    assert told.startswith("The gap to the rest widened by more than chance explains for 2 of 2 slices: class owl (in")
    assert "class owl (in the teacher 0.00 points, here −29.00; p < 0.001)" in told
    assert told.endswith(" 1 slice has fewer than 10 examples: shown, not tested.")


def test_that_none_widened_is_said() -> None:
    told = gaps_in_words(sliced(3, 8))
    assert told.startswith("No slice’s gap to the rest widened by more than chance explains, of 2 tested.")
    small = [one for one in sliced(3, 8) if one.p is None]
    assert gaps_in_words(small).startswith("No slice and its rest are large enough to compare their gap. 1 slice has")


def test_words_of_a_slice() -> None:
    owl = sliced(60, 8)[0]
    assert named(owl) == "class owl"
    assert named(replace(owl, value="fox cub")) == "class: fox cub"
    assert (p_in_words(0.0004), p_in_words(0.0123), p_in_words(1.0)) == ("< 0.001", "0.012", "1.000")


def test_intervals_are_drawn_on_one_scale() -> None:
    found = sliced(60, 8, 1)
    places = slice_places(found)
    most = max(abs(end) for one in found for end in (one.interval.low, one.interval.high) if one.p is not None)
    assert max(abs(end) for place in places[:2] for end in place) == 1
    for one, place in zip(found, places, strict=True):
        drawn = (one.interval.low, one.difference, one.interval.high) if one.p is not None else (0, 0, 0)
        assert [end * most for end in place] == pytest.approx(drawn)


def test_the_last_stage_and_the_packages_are_shown() -> None:
    run = passing()
    assert [entry.name for entry in examined(run)] == [
        "distill", "laptop-x86-vnni", "laptop-x86-avx2", "browser-wasm",
    ]  # fmt: skip
    two = ledger([teacher(), start(), distill(), replace(distill(), name="qat")])
    assert [entry.name for entry in examined(two)] == ["qat"]


def test_the_report_shows_slices_and_calibration(tmp_path: Path) -> None:
    one = distill()
    assert one.slices
    assert one.calibration
    shown = Page(render(ledger([teacher(), one]), tmp_path)).text
    assert gaps_in_words(one.slices) in shown
    first = one.slices[0]
    assert (first.by, first.value, first.worse) == ("class", "negative", True)
    assert f"negative class, {first.examples} examples {signed(first.difference * 100)} [" in shown
    assert f"< 0.001 {first.teacher_accuracy:.1%} {first.accuracy:.1%}" in shown
    assert "not tested" in shown
    assert f"distill {one.calibration.model.ece:.1%} [" in shown
    assert f"teacher {one.calibration.teacher.ece:.1%} [" in shown


def test_many_slices_are_cut_and_counted(tmp_path: Path) -> None:
    labels = np.arange(600) % 30
    right = np.ones(600, dtype=bool)
    many = slices(right, right, [by_class(labels, [f"kind{i}" for i in range(30)])])
    shown = Page(render(ledger([teacher(), distill(slices=many)]), tmp_path)).text
    assert "kind23" in shown
    assert "kind24" not in shown
    assert "6 more slices are in ledger.json." in shown


@pytest.mark.parametrize("width", WIDTHS)
def test_a_reliability_diagram_names_both_errors(width: int) -> None:
    one = distill()
    assert one.calibration
    shown = words(reliability(one, "k", width))
    assert f"distill, error {one.calibration.model.ece:.1%}" in shown
    assert f"teacher, error {one.calibration.teacher.ece:.1%}" in shown
    assert reliability(distill(calibration=None), "k", width) is None


def test_an_entry_of_before_has_neither() -> None:
    kind: TypeAdapter[Entry] = TypeAdapter(Entry)
    plain: dict[str, Any] = kind.dump_python(distill(), mode="json")
    assert kind.validate_python(json.loads(json.dumps(plain))) == distill()
    del plain["slices"], plain["calibration"]
    assert kind.validate_python(plain).slices is kind.validate_python(plain).calibration is None
