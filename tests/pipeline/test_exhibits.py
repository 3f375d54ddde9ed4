import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from potstill.pipeline.exhibits import Exhibit, exhibits
from potstill.validate.data import Arrays, Examples
from potstill.validate.flips import Flip, Flips
from tests.pipeline.test_report import distill

RNG = np.random.default_rng(0)


def shown(column: Any, rows: tuple[int, ...] = (2, 3), name: str = "x") -> dict[int, Exhibit]:
    """The exhibits of rows of a table with one column."""
    table = Arrays({name: column})
    worst = [Flip(row, "a", 0.9, "b", 0.8) for row in rows]
    examples = Examples("made", table, np.zeros(len(column), np.int64), None, "")
    return exhibits(examples, [distill(flips=Flips(worst, len(rows), 0, [])), distill(flips=None)])


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_texts_are_shown_as_they_are_and_cut_where_they_are_long() -> None:
    found = shown(np.array(["a", "<b> & c", "d" * 700], dtype=object), name="text")
    assert found == {2: Exhibit(("<b> & c",), ()), 3: Exhibit(("d" * 600 + "…",), ())}


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 1), (9, 7, 3)])
def test_bytes_are_shown_to_the_pixel(shape: tuple[int, ...]) -> None:
    x = RNG.integers(256, size=(4, *shape)).astype(np.uint8)
    found = shown(x)
    assert list(found) == [2, 3]
    assert found[3].pictures[0].startswith("data:image/png;base64,")
    np.testing.assert_array_equal(np.asarray(opened(found[3].pictures[0])), x[2].reshape(9, 7, *shape[2:]).squeeze())


def test_other_numbers_are_scaled_by_all_that_are_shown() -> None:
    x = np.stack([np.full((3, 3, 1), 99.0), np.zeros((3, 3, 1)), np.full((3, 3, 1), 8.0), np.full((3, 3, 1), 16.0)])
    found = shown(x, rows=(2, 3, 4))  # row 1 is not shown
    assert [int(np.asarray(opened(found[row].pictures[0]))[0, 0]) for row in (2, 3, 4)] == [0, 128, 255]


def test_a_flat_picture_is_a_picture() -> None:
    found = shown(np.full((3, 4, 4), 5.0))
    assert not np.asarray(opened(found[2].pictures[0])).any()


def test_large_pictures_are_made_small() -> None:
    column = np.empty(3, dtype=object)
    column[:] = [Image.fromarray(RNG.integers(256, size=(300, 600, 3)).astype(np.uint8)) for _ in range(3)]
    found = shown(column, name="image")
    assert found[2].pictures[0].startswith("data:image/jpeg;base64,")
    assert opened(found[2].pictures[0]).size == (128, 64)
    assert len(found[2].pictures[0]) < 12_000


@pytest.mark.parametrize("shape", [(5,), (3, 9, 9), (1, 9), (2, 3, 4, 5)])
def test_what_is_no_picture_is_known_by_its_row_alone(shape: tuple[int, ...]) -> None:
    assert shown(RNG.normal(size=(3, *shape))) == {2: Exhibit((), ()), 3: Exhibit((), ())}


def test_nothing_is_read_where_nothing_was_lost() -> None:
    assert shown(np.zeros((3, 2, 2)), rows=()) == {}
