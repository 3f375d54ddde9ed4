"""Pieces of an evaluation set in rows, against scikit-learn's counts of n-grams."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer

from potstill.compress.data_rows import Row, words
from potstill.compress.overlap import Overlap


def row_of(text: str, prompt: str = "", reasoning: str = "") -> Row:
    return Row(text, reasoning, prompt, None, {})


def by_scikit_learn(rows: list[str], examples: list[str], n: int) -> list[set[int]]:
    """For each row the examples with an n-gram in common."""
    counts = CountVectorizer(ngram_range=(n, n), analyzer="word", tokenizer=words, token_pattern=None, lowercase=False)
    both = counts.fit_transform([*rows, *examples])
    shared = (both[: len(rows)] @ both[len(rows) :].T).toarray()
    return [set(np.flatnonzero(row).tolist()) for row in shared]


@pytest.mark.parametrize("n", [5, 13])
def test_pieces_are_those_of_scikit_learn(n: int) -> None:
    rng = np.random.default_rng(n)
    vocabulary = np.array([f"w{i}" for i in range(200)])
    examples = [" ".join(rng.choice(vocabulary, size=rng.integers(n, 60))) for _ in range(60)]
    rows = [" ".join(rng.choice(vocabulary, size=80)) for _ in range(150)]
    for i in range(0, 150, 2):  # a piece of n − 1, n or n + 1 words, planted
        source = examples[int(rng.integers(60))].split()
        start = int(rng.integers(len(source)))
        rows[i] += ", " + " ".join(source[start : start + n + i % 3 - 1]).upper() + "."
    expected = by_scikit_learn(rows, examples, n)
    overlap = Overlap((("", text) for text in examples), n)
    assert [set(overlap.hits(row_of(text))) for text in rows] == expected
    assert 20 < sum(map(bool, expected)) < 150


def test_the_piece_is_told() -> None:
    overlap = Overlap([("", "one two three four five six seven")], 5)
    assert overlap.hits(row_of("Zero: two, three four FIVE six and one")) == {0: "two three four five six"}


def test_short_examples_are_looked_for_whole() -> None:
    eight, few = "a b c d e f g h", "a gripping film"
    overlap = Overlap([("", eight), ("", few), ("What is two and two?", "4"), ("", "eins zwei drei")], 13)
    assert set(overlap.hits(row_of(f"so {eight} then"))) == {0}
    assert set(overlap.hits(row_of("so a b c d e f g"))) == set()
    assert set(overlap.hits(row_of("A gripping film!"))) == {1}
    assert set(overlap.hits(row_of("A gripping film!", prompt="Praise it."))) == {1}
    assert set(overlap.hits(row_of("it is a gripping film"))) == set()
    assert set(overlap.hits(row_of("four", prompt="What is two and two"))) == {2}
    assert set(overlap.hits(row_of("4", prompt="What is two times two"))) == set()  # an answer alone is no piece
    assert overlap.hits(row_of("")) == {}


def test_reasoning_is_looked_at() -> None:
    overlap = Overlap([("", "one two three four five six")], 5)
    assert set(overlap.hits(row_of("No.", reasoning="I know: one two three four five six"))) == {0}


def test_the_wording_of_a_form_is_no_piece() -> None:
    form = "Answer the following question with one word and nothing else than that word please:"
    questions = [f"{form} what is the name of the thing that people call number {i} here" for i in range(40)]
    overlap = Overlap([(question, "x") for question in questions], 13)
    assert overlap.common > 0
    assert overlap.hits(row_of("no", prompt=f"{form} how old is the moon")) == {}
    assert set(overlap.hits(row_of("no", prompt=f"{form} {questions[7].removeprefix(form)}"))) == {7}
    assert set(Overlap([(question, "x") for question in questions[:10]], 13).hits(row_of(form))) == set(range(10))


def test_a_short_prompt_of_many_is_no_piece() -> None:
    examples = [("Go on:", f"this is text number {i} of all texts") for i in range(11)]
    assert (Overlap(examples, 13).common, Overlap(examples[:10], 13).common) == (1, 0)
    assert Overlap(examples, 13).hits(row_of("once", prompt="Go on:")) == {}
    assert len(Overlap(examples[:10], 13).hits(row_of("once", prompt="Go on:"))) == 10


@pytest.mark.data
def test_real_stories_share_what_scikit_learn_says(real_data: Path) -> None:
    folder = real_data / "stories260k"
    train, judging = (
        [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "eval")
    )
    overlap = Overlap((("", text) for text in judging), 13)
    assert min(len(words(text)) for text in judging) >= 13
    assert overlap.common == 0
    assert [set(overlap.hits(row_of(text))) for text in train] == by_scikit_learn(train, judging, 13)
