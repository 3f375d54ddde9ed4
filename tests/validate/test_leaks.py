"""Near duplicates against brute force, planted ones, and what must not pass for one."""

import io
import string
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from potstill.validate.data import load_examples
from potstill.validate.examples import Arrays, Examples, Pairs
from potstill.validate.leaks import Leak, leak, leaked_rows, leaks_from_json, leaks_to_json, near
from potstill.validate.near_pictures import _areas, cells
from potstill.validate.near_texts import plain, shingles


def of_texts(texts: list[str]) -> Examples:
    return Examples("t", datasets.Dataset.from_dict({"text": texts}), np.zeros(len(texts), dtype=int), None, "t")


def of_arrays(x: np.ndarray) -> Examples:
    return Examples("a", Arrays({"x": x}), np.zeros(len(x), dtype=int), None, "a")


def pairs_of(one: Examples, other: Examples) -> list[list[int]]:
    found = near(one, other)
    assert found is not None
    return found[1].tolist()


def jaccard(a: str, b: str) -> float:
    """By Python's own sets."""
    one, other = ({plain(text)[i : i + 5] for i in range(len(plain(text)) - 4)} for text in (a, b))
    return len(one & other) / len(one | other)


def garbled(text: str, edits: int, rng: np.random.Generator) -> str:
    letters = list(text)
    for at in rng.choice(len(letters), size=edits, replace=False):
        letters[at] = str(rng.choice(list(string.ascii_lowercase)))
    return "".join(letters)


def random_text(words: int, rng: np.random.Generator) -> str:
    return " ".join("".join(rng.choice(list(string.ascii_lowercase), size=6)) for _ in range(words))


def test_planted_texts_are_found_and_others_are_not() -> None:
    rng = np.random.default_rng(0)
    others = [random_text(20, rng) for _ in range(6000)]
    judging = [random_text(20, rng) for _ in range(50)]
    judging[7], judging[30] = garbled(others[5123], 2, rng), f"  {others[17].upper()}!! "
    assert pairs_of(of_texts(judging), of_texts(others)) == [[7, 5123], [30, 17]]


def test_every_near_text_is_found_at_the_threshold() -> None:
    """Near the threshold, where banding could miss; each pair against the sets themselves."""
    rng = np.random.default_rng(1)
    judging = [random_text(12, rng) for _ in range(800)]
    others = [garbled(text, int(rng.integers(1, 5)), rng) for text in judging]
    exact = np.array([jaccard(a, b) for a, b in zip(judging, others, strict=True)])
    wanted, found = set(np.flatnonzero(exact >= 0.8).tolist()), pairs_of(of_texts(judging), of_texts(others))
    assert 100 < len(wanted) < 700
    assert all(i == j for i, j in found)
    assert {i for i, _ in found} <= wanted
    assert len(found) >= len(wanted) - 1  # 0.9996 of those at the threshold itself are expected


def test_candidates_that_are_not_alike_enough_are_dropped() -> None:
    rng = np.random.default_rng(2)
    judging = [random_text(12, rng) for _ in range(200)]
    others = [" ".join([*text.split()[:9], *random_text(3, rng).split()]) for text in judging]  # 0.6, often candidates
    assert pairs_of(of_texts(judging), of_texts(others)) == []


def test_many_equal_texts_are_compared_once() -> None:
    judging, others = (
        of_texts(["the same text again and again"] * 20_000),
        of_texts(["The same text, again and again!"] * 5000),
    )
    started = time.process_time()
    assert len(pairs_of(judging, others)) == 20_000
    assert time.process_time() - started < 5  # pair by pair it is 100 million


def test_sets_of_shingles_are_those_of_python() -> None:
    texts = ["The film, the FILM", "ok", "!!", "?!", ""]
    assert np.diff(shingles([plain(text) for text in texts]).indptr).tolist() == [9, 1, 1, 1, 1]
    assert pairs_of(of_texts(["!!", "ok"]), of_texts(["?!", "OK."])) == [[1, 1]]


def test_templates_do_not_fill_the_memory_or_take_for_ever() -> None:
    same = [f"please play the song number {i} by the band of my friends in the kitchen now" for i in range(3000)]
    assert len(pairs_of(of_texts(same[:300]), of_texts(same[300:]))) == 300


def test_a_pair_is_near_when_both_of_its_texts_are() -> None:
    table = datasets.Dataset.from_dict({"text": ["one long text here", "other"], "text2": ["two long texts", "three"]})
    judging = Examples("p", Pairs(table), np.zeros(2), None, "p")
    assert pairs_of(judging, of_texts(["x", "Two long texts.", "one long text, here", "other"])) == [[0, 2]]


def test_words_and_columns_are_one_text() -> None:
    words = datasets.Dataset.from_dict({"tokens": [["a", "fine", "film"], ["no", "such"]]})
    one = Examples("w", words, np.zeros(2), None, "w")
    assert pairs_of(one, of_texts(["A fine film."])) == [[0, 0]]


def jpeg(picture: np.ndarray, quality: int = 75) -> Image.Image:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "jpeg", quality=quality)
    return Image.open(file)


def pictures(n: int, seed: int, side: int = 32) -> np.ndarray:
    """Smooth random pictures: (n, side, side, 3) bytes."""
    rng, out = np.random.default_rng(seed), []
    for _ in range(n):
        small = Image.fromarray(rng.integers(0, 256, size=(6, 6, 3), dtype=np.uint8))
        out.append(np.asarray(small.resize((side, side), Image.Resampling.BICUBIC)))
    return np.stack(out)


def test_pictures_through_jpeg_are_found_whatever_their_form() -> None:
    x = pictures(600, 0)
    judging, planted = pictures(40, 1), [3, 9, 39]
    for at in planted:
        judging[at] = np.asarray(jpeg(x[at * 15]))
    wanted = [[at, at * 15] for at in planted]
    assert pairs_of(of_arrays(judging), of_arrays(x)) == wanted
    planes = np.moveaxis(judging, 3, 1).astype(np.float32) / 255 - 0.5
    assert pairs_of(of_arrays(planes), of_arrays(x)) == wanted
    assert pairs_of(of_arrays(judging[..., :1]), of_arrays(x[..., 0])) == wanted


def test_files_of_pictures_are_found(tmp_path: Path) -> None:
    for folder, x in (
        ("eval", pictures(4, 0, 40)),
        ("train", np.concatenate([pictures(6, 5, 40), pictures(2, 0, 40)])),
    ):
        for i, one in enumerate(x):
            (tmp_path / folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            jpeg(one, 95 if folder == "eval" else 60).save(tmp_path / folder / "ab"[i % 2] / f"{i}.png")
    judging, others = (load_examples(str(tmp_path / name), ("image",), {}) for name in ("eval", "train"))
    found = pairs_of(judging, others)
    assert [i for i, _ in found] == [0, 2]  # the first of each class


def test_cells_are_mean_colours() -> None:
    for side in (16, 28, 37, 8):
        assert np.allclose(_areas(side).sum(axis=1), 1)
        ours = cells(pictures(2, 0, side)) if side >= 16 else cells(pictures(2, 0, 16)[:, ::2, ::2])
        assert [part.shape for part in ours] == [(2, 192), (2, 768)]
    by_hand = pictures(3, 0).reshape(3, 8, 4, 8, 4, 3).mean(axis=(2, 4)).reshape(3, -1)
    by_hand = by_hand - by_hand.mean(axis=1, keepdims=True)
    assert np.allclose(cells(pictures(3, 0))[0], by_hand / np.linalg.norm(by_hand, axis=1, keepdims=True), atol=1e-5)


def test_pictures_of_one_colour_are_no_near_duplicates() -> None:
    plain = np.full((3, 16, 16, 3), 7, dtype=np.uint8)
    assert pairs_of(of_arrays(plain), of_arrays(plain)) == []


@pytest.mark.parametrize(
    "x", [np.zeros((2, 30)), np.zeros((2, 40, 40)), np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 9, 9, 3), np.int64)]
)
def test_other_arrays_are_not_looked_at(x: Any) -> None:
    assert near(of_arrays(x), of_arrays(x)) is None
    found = leak("train", of_arrays(x), of_arrays(x), np.array([1]))
    assert (found.exact, found.near, found.rows, found.in_words()) == ([2], None, {2}, None)


def test_in_words() -> None:
    found = Leak("train", 872, [3], [(3, 8), (17, 5233)], "so alike")
    assert found.in_words() == (
        "1 more of the 872 evaluation examples has a near duplicate in data.train (so alike), "
        "e.g. row 17 and row 5,233 there."
    )
    assert leaks_from_json(leaks_to_json([found])) == [found]
    assert leaked_rows([found, Leak("unlabelled", 872, [4], None)]) == {3, 4, 17}
    assert Leak("train", 872, [3], [(3, 8)]).in_words() is None


@pytest.mark.data
def test_pictures_that_went_through_jpeg(real_data: Path) -> None:
    """1,564 of 4,000 lossless training images are among the 20,000 of JPEG, all under one label."""
    one, other = (load_examples(str(real_data / f"cifar10/train_{n}.npz"), ("x",), {}) for n in ("lossless", "jpeg"))
    found = near(one, other)
    assert found is not None
    i, j = found[1].T
    assert 1500 < len(i) < 1650
    assert (one.labels[i] == other.labels[j]).mean() > 0.998
