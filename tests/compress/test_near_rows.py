"""Near duplicates in one file, against Python's own sets of shingles, pair by pair."""

import time
import tracemalloc
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest

from potstill.compress.near_rows import Sketches, jaccard
from potstill.validate.near_texts import hashed, plain

VOCABULARY = [
    "".join(word) for word in np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), size=(3000, 6))
]


@cache
def shingles(text: str) -> set[str]:
    """By Python."""
    folded = plain(text)
    return {folded[i : i + 5] for i in range(len(folded) - 4)}


def alike(a: Sequence[str], b: Sequence[str]) -> float:
    """The least Jaccard similarity of the parts of two rows."""
    pairs = [(shingles(one), shingles(other)) for one, other in zip(a, b, strict=True)]
    return min(len(one & other) / len(one | other) for one, other in pairs)


def near_of(rows: list[tuple[str, ...]]) -> list[int]:
    sketches = Sketches(len(rows[0]))
    for row in rows:
        sketches.add(row)
    lengths = np.array([sum(map(len, row)) for row in rows])
    return sketches.search(lengths, rows.__getitem__).tolist()


def made(rng: np.random.Generator, count: int, words: int = 60) -> list[str]:
    """Texts of which half are another with some words exchanged: similarities from 0 to 1."""
    texts: list[str] = []
    for _ in range(count):
        if texts and rng.random() < 0.6:
            changed = texts[int(rng.integers(len(texts)))].split()
            for at in rng.integers(len(changed), size=rng.integers(1, 8)):
                changed[at] = str(rng.choice(VOCABULARY))
            texts.append(" ".join(changed[: int(rng.integers(words - 4, words + 1))]))
        else:
            texts.append(" ".join(rng.choice(VOCABULARY, size=words)))
    return texts


def check_against_all_pairs(rows: list[tuple[str, ...]]) -> int:
    """What leaves has a partner that stays and is near; what stays has none. How many leave."""
    partner = near_of(rows)
    stay = [i for i, other in enumerate(partner) if other < 0]
    assert all(other in stay and alike(rows[i], rows[other]) >= 0.8 for i, other in enumerate(partner) if other >= 0)
    assert not [(i, j) for i in stay for j in stay if i < j and alike(rows[i], rows[j]) >= 0.8]
    length = [sum(map(len, row)) for row in rows]
    assert all(length[other] >= length[i] for i, other in enumerate(partner) if other >= 0)
    return len(rows) - len(stay)


def test_texts_are_found_as_pair_by_pair() -> None:
    left = check_against_all_pairs([(text,) for text in made(np.random.default_rng(1), 150)])
    assert 30 < left < 120


def test_a_row_is_near_when_prompt_and_answer_are() -> None:
    rng = np.random.default_rng(2)
    prompts, answers = made(rng, 200, 15), made(rng, 200, 30)
    for i in range(0, 200, 4):  # the same prompt, another answer; the same answer, another prompt; both nearly
        prompts[i + 1] = prompts[i]
        answers[i + 2] = answers[i]
        prompts[i + 3], answers[i + 3] = f"{prompts[i]} so", f"{answers[i]} then"
    left = check_against_all_pairs(list(zip(prompts, answers, strict=True)))
    assert 50 <= left < 120


def test_the_longest_stays_and_of_equals_the_first() -> None:
    text = " ".join(VOCABULARY[:80])
    assert near_of([(text[:-9],), (f"{text}!",), (text.upper(),), ("other words",), (f"{text}?",)]) == [1, -1, 1, -1, 1]
    assert near_of([("ok",)]) == [-1]


def test_nothing_is_near_in_nothing() -> None:
    assert Sketches(1).search(np.zeros(0, np.int64), lambda i: ()).tolist() == []


def test_many_that_are_alike_and_a_prompt_of_all_are_no_quadratic_work() -> None:
    text = " ".join(VOCABULARY[:80])
    started = time.process_time()
    assert near_of([(f"{text} {i}",) for i in range(2000)]).count(-1) == 1
    rng = np.random.default_rng(3)
    rows = [(text, " ".join(rng.choice(VOCABULARY, size=20))) for _ in range(2000)]
    assert near_of(rows) == [-1] * 2000
    assert time.process_time() - started < 20  # pair by pair they are 4 million


def test_jaccard_is_that_of_sets() -> None:
    texts = made(np.random.default_rng(4), 30)
    sets = [np.unique(hashed([plain(text)])[0]) for text in texts]
    for i in range(29):
        assert jaccard(sets[i], sets[i + 1]) == pytest.approx(alike([texts[i]], [texts[i + 1]]))


def test_memory_is_that_of_signatures() -> None:
    def peak(count: int) -> int:
        sketches = Sketches(1)
        tracemalloc.start()
        for i in range(count):
            sketches.add((" ".join(VOCABULARY[i : i + 150]),))
        sketches.search(np.zeros(count, np.int64), lambda i: ("",))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)
    few, many = peak(500), peak(2000)
    assert (many - few) / 1500 < 800  # bytes a row; a row's text has 1,000 letters
