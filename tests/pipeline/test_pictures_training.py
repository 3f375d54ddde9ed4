import re
from html.parser import HTMLParser

import pytest

from potstill.compress.likeness import Likeness
from potstill.pipeline.pictures_training import likeness, losses
from tests.pipeline.test_report import alike, distill, training_log

WIDTHS = [1036, 344]


def words(svg: str | None) -> list[str]:
    """The texts of a drawing, in order."""
    assert svg
    found: list[str] = []
    parser = HTMLParser()
    parser.handle_data = lambda data: found.append(data.strip())  # type: ignore[method-assign]
    parser.feed(svg)
    return [word for word in found if word]


def log_of(**parts: list[float]) -> list[dict[str, float]]:
    steps = range(len(next(iter(parts.values()))))
    return [{"step": 10.0 * i, "loss": 1.0, **{name: values[i] for name, values in parts.items()}} for i in steps]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_each_part_has_a_panel_with_its_name_and_last_value(count: int, width: int) -> None:
    parts = {f"part{i}": [1.0, 0.5, 10.0**-i] for i in range(count)}
    shown = words(losses(distill(log=log_of(**parts)), "k", width))
    assert [word for word in shown if word.startswith("part")] == list(parts)
    assert {word.removesuffix(", log scale") for word in shown} >= {f"{10.0**-i:.3g}" for i in range(count)}


def test_a_single_part_is_the_loss_itself() -> None:
    assert "kl" not in words(losses(distill(log=log_of(kl=[1.0, 0.5])), "k", 1036))


@pytest.mark.parametrize(
    ("values", "log"), [([1.0, 0.5], False), ([40.0, 1.0], True), ([40.0, 0.0], False), ([40.0, -1.0], False)]
)
def test_parts_that_fall_far_have_a_log_scale(values: list[float], log: bool) -> None:
    shown = words(losses(distill(log=log_of(a=values, b=[1.0, 1.0])), "k", 1036))
    assert (f"{values[-1]:.3g}, log scale" in shown) == log


def test_the_best_checkpoint_is_named() -> None:
    best = min((one["eval_loss"], one["step"]) for one in training_log() if "eval_loss" in one)
    assert f"best: {best[0]:.3f} at step {best[1]:,.0f}" in words(losses(distill(), "k", 1036))


def test_no_losses_no_picture() -> None:
    assert losses(distill(log=[{"step": 1.0, "parameters": 3.0}]), "k", 1036) is None
    assert losses(distill(log=None), "k", 1036) is None


def test_every_pair_of_layers_is_a_box_with_its_number() -> None:
    found = alike()
    picture = likeness(distill(), "k", 1036)
    shown = words(picture)
    numbers = ["–" if value is None else f"{value:.2f}".removeprefix("0") for row in found.cka for value in row]
    assert [word for word in shown if re.fullmatch(r"1?\.\d\d|–|1\.00", word)] == numbers
    assert picture
    assert picture.count("stroke: var(--ink); stroke-width: 2") == len(found.matched)
    assert [word for word in shown if word.isdigit()] == [*"012", *"012345"]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("layers", [1, 24])
def test_boxes_stay_inside_the_picture(width: int, layers: int) -> None:
    names = [f"encoder.layer.{i}" for i in range(layers)]
    found = Likeness(names, names, [[0.5] * layers] * layers, [], 9, "x")
    picture = likeness(distill(likeness=found), "k", width)
    assert picture
    ends = [float(x) for path in re.findall(r' d="([^"]+)"', picture) for x in re.findall(r"[ML] ([\d.-]+) ", path)]
    assert len(ends) >= 4 * layers**2
    assert 0 <= min(ends) <= max(ends) <= width


def test_names_of_modules_are_told_apart() -> None:
    names = ["net.stem.relu", "net.stage1.2.conv_of_many_letters", "net.stage1"]
    found = Likeness(names, names[:2], [[0.5, 0.5]] * 3, [], 9, "x")
    shown = words(likeness(distill(likeness=found), "k", 1036))
    assert {"stem.relu", "stage1", "f_many_letters"} & set(shown) == {"stem.relu", "stage1"}
    assert "…_many_letters" in shown


def test_no_likeness_no_picture() -> None:
    assert likeness(distill(likeness=None), "k", 1036) is None
