"""What the calibration does not cover: by hand, and how often chance alone would be told."""

from typing import Any

import datasets
import numpy as np
import pytest
from scipy import stats

from potstill.validate.coverage import _improbable, outside
from potstill.validate.examples import Arrays, Examples, Pairs


def of(table: Any, n: int) -> Examples:
    return Examples("e", table, np.zeros(n, dtype=int), None, "e")


def arrays(x: np.ndarray) -> Examples:
    return of(Arrays({"x": x}), len(x))


def texts(lengths: list[int], column: str = "text") -> Examples:
    values = [["a"] * n if column == "tokens" else "a" * n for n in lengths]
    return of(datasets.Dataset.from_dict({column: values}), len(lengths))


def test_values_outside_are_counted_by_channel() -> None:
    x = np.tile(np.array([0, 100], dtype=np.uint8), 32 * 3 * 8).reshape(32, 8, 2, 3)
    y = x.copy()
    y[:, :4, :, 1] = 101
    told = outside(arrays(x), arrays(y), None)
    assert told is not None
    assert told.startswith("16.7% of the evaluation values are outside the range of the 32 calibration examples; ")
    assert "of channel 2 of 3 50.0% are outside 0 to 100." in told
    planes = [arrays(np.moveaxis(one, 3, 1).astype(np.float32)) for one in (x, y)]
    assert outside(*planes, None) == told
    assert outside(arrays(x), arrays(x), None) is None


def test_gray_pictures_are_one_channel_and_columns_of_numbers_are_many() -> None:
    x = np.zeros((50, 6, 4), dtype=np.float32)
    told = outside(arrays(x), arrays(x + 1), None)
    assert "of channel 1 of 1 100.0%" in (told or "")
    table = np.random.default_rng(0).normal(size=(300, 7))
    moved = table + np.array([0, 0, 5, 0, 0, 0, 0])
    assert "of channel 3 of 7 9" in (outside(arrays(table), arrays(moved), None) or "")


def test_longer_texts_and_lists_of_words() -> None:
    told = outside(texts([3, 9, 4] * 20), texts([12, 5] * 20), "text")
    assert told is not None
    assert told.startswith(
        "20 of the 40 evaluation examples are longer than the longest of the 60 calibration examples "
        "(9 letters; the longest evaluation example has 12)."
    )
    assert "(9 words;" in (outside(texts([9] * 60, "tokens"), texts([12] * 9, "tokens"), "tokens") or "")
    assert outside(texts([9] * 60), texts([9] * 60), "text") is None
    two = datasets.Dataset.from_dict({"text": ["a"] * 30, "text2": ["a" * 70] * 30})
    assert "30 of the 30" in (outside(texts([9] * 60), of(Pairs(two), 30), "text") or "")


@pytest.mark.parametrize("x", [np.zeros((4, 3), dtype=np.int64), np.zeros((4, 3), dtype=bool)])
def test_indices_have_no_range(x: np.ndarray) -> None:
    assert outside(arrays(x), arrays(x + 1), None) is None


def test_sounds_and_several_columns_are_not_looked_at() -> None:
    two = of(Arrays({"x": np.zeros((4, 2)), "z": np.ones((4, 2))}), 4)
    assert outside(two, two, None) is None
    assert outside(texts([1] * 9), texts([5] * 9), None) is None


@pytest.mark.parametrize("channels", [1, 20])
@pytest.mark.parametrize(("n", "judged"), [(32, 400), (256, 60)])
def test_chance_is_seldom_told(channels: int, n: int, judged: int) -> None:
    """Both sets drawn alike, 100 times: one in a thousand may be told; a shift by three deviations always is."""
    rng = np.random.default_rng(channels + n)
    draws = [(rng.normal(size=(n, channels)), rng.normal(size=(judged, channels))) for _ in range(100)]
    assert sum(outside(arrays(a), arrays(b), None) is not None for a, b in draws) <= 2
    assert all(outside(arrays(a), arrays(b + 3), None) for a, b in draws[:20])
    lengths = [(rng.integers(1, 10**6, size=n).tolist(), rng.integers(1, 10**6, size=judged).tolist())]
    assert outside(*(arrays_of_lengths(one) for one in lengths[0]), "text") is None


def arrays_of_lengths(lengths: list[int]) -> Examples:
    """Texts of many lengths, without their letters."""

    class Sized(list[Any]):
        def __init__(self, n: int) -> None:
            self.n = n

        def __len__(self) -> int:
            return self.n

    class Table:
        def __getitem__(self, indices: Any) -> dict[str, Any]:
            return {"text": [Sized(lengths[i]) for i in indices]}

    return of(Table(), len(lengths))


@pytest.mark.parametrize(
    ("count", "n", "judged", "sides"), [(9, 32, 40, 2), (20, 32, 40, 2), (3, 20, 90, 1), (60, 20, 90, 1)]
)
def test_the_chance_is_the_beta_binomial(count: int, n: int, judged: int, sides: int) -> None:
    by_scipy = stats.betabinom.sf(count - 1, judged, sides, n + 1 - sides)
    assert _improbable(count, n, judged, sides) == (by_scipy < 0.001)
    assert stats.hypergeom.cdf(sides - 1, n + judged, n, count + sides - 1) == pytest.approx(by_scipy)
