"""Who taught a writer, by its words and phrases."""

from functools import cache

import numpy as np
import pytest

from potstill.validate.errors import InputError
from potstill.validate.kinship import Kinship
from potstill.validate.phrasing import PRIOR, _gram, phrasing

WORDS = 300


def written(rng: np.random.Generator, style: np.ndarray, texts: int = 60, length: int = 100) -> list[str]:
    """Texts of words whose rates fall as Zipf says, and as a style changes them."""
    p = np.exp(style - np.log(np.arange(WORDS) + 3))
    return [" ".join(f"w{i}" for i in rng.choice(WORDS, length, p=p / p.sum())) for _ in range(texts)]


@cache
def asked(seed: int, share: float) -> Kinship:
    """A writer who has so much of the style of `b`, among three suspects and four references."""
    rng = np.random.default_rng(seed)
    styles = rng.normal(0, 0.5, size=(8, WORDS))
    mine = share * styles[1] + np.sqrt(1 - share**2) * styles[7]
    suspects = {name: written(rng, style) for name, style in zip("abc", styles, strict=False)}
    return phrasing(written(rng, mine), suspects, [written(rng, style) for style in styles[3:7]])


def test_a_pupil_is_named_and_nobody_else() -> None:
    found = [asked(seed, 0.9) for seed in range(4)]
    assert [one.named for one in found] == ["b"] * 4
    assert not any(one.also for one in found)
    assert found[0].closeness[1].value > found[0].closeness[1].stranger[1]
    assert (found[0].examples, found[0].strangers, found[0].closeness[0].measure) == (60, 7, "phrases")


def test_a_writer_of_its_own_is_seldom_given_a_teacher() -> None:
    assert sum(asked(seed, 0.0).named is not None for seed in range(8)) <= 2


def test_features_are_the_log_rates_of_monroe() -> None:
    counts = np.random.default_rng(0).integers(1, 50, size=(3, 10)).astype(float)
    shares = [[count / sum(row) for count in row] for row in counts]
    rate = [sum(one[w] for one in shares) / 3 for w in range(10)]
    mean = sum(sum(row) for row in counts) / 3
    rows = []
    for row in counts:
        logs = [np.log((row[w] + PRIOR * rate[w]) / (sum(row) + PRIOR)) * np.sqrt(rate[w] * mean) for w in range(10)]
        rows.append(np.array(logs) - np.mean(logs))
    assert _gram(counts) == pytest.approx(np.array([[a @ b for b in rows] for a in rows]))


def test_too_few_words_are_refused() -> None:
    texts = ["one two three"] * 400
    with pytest.raises(InputError, match="writer 2 of 6 .* wrote 3 words, expected 1000 or more; let it write more"):
        phrasing(texts, {"a": texts, "b": ["one two three"]}, [texts] * 3)
    with pytest.raises(InputError, match="1 suspects and 1 references, expected 1 suspect or more, and 5 models"):
        phrasing(texts, {"a": texts}, [texts])
