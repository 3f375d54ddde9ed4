"""Prompts that a teacher grows from others."""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from potstill.compress.api_grow import BEYOND_TEXT, shown_prompt, words, written_tasks
from tests.service import Ask, Says, Seen, Service, completion, rows

SEEDS = [
    "Write a poem about the sea at night",
    "Explain how a bicycle keeps its balance",
    "List five uses of an old jar",
]


def rouge_l(one: Sequence[str], other: Sequence[str]) -> float:
    """ROUGE-L's F1 by its definition (Lin 2004): the longest common subsequence against both lengths."""
    best = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            best[i + 1][j + 1] = best[i][j] + 1 if a == b else max(best[i][j + 1], best[i + 1][j])
    precision, recall = best[-1][-1] / len(other), best[-1][-1] / len(one)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_likeness_is_rouge_l() -> None:
    from rapidfuzz.distance import Indel

    draw = random.Random(0)
    for _ in range(300):
        one, other = ([draw.choice("abcdef") for _ in range(draw.randint(1, 12))] for _ in range(2))
        assert Indel.normalized_similarity(one, other) == pytest.approx(rouge_l(one, other))


def test_words_are_without_case_and_stops() -> None:
    assert words("Don't stop, Größe_2!") == ["don", "t", "stop", "grösse", "2"]
    assert words("東京 is big") == ["東", "京", "is", "big"]


@pytest.mark.parametrize(
    ("text", "truncated", "tasks"),
    [
        (" Sing a song\nTask 10: Bake\n a cake\nTask 11: Run", False, ["Sing a song", "Bake a cake", "Run"]),
        ("Sing a song\nTask 10: Bake a", True, ["Sing a song"]),
        ("Here are some tasks:\n\n9. Sing\n10) Bake\n- 11: Run", False, ["Sing", "Bake", "Run"]),
        ("**Task 9:** Sing\n**Task 10:** Bake", False, ["Sing", "Bake"]),
        ("Sure!\nHere they are\n9. Sing", False, ["Sing"]),
        ("Sing a song", False, ["Sing a song"]),
        ("", False, []),
    ],
)
def test_tasks_are_read_however_they_are_numbered(text: str, truncated: bool, tasks: list[str]) -> None:
    assert written_tasks(text, truncated) == tasks


def test_eight_tasks_are_shown_two_of_them_grown() -> None:
    asked = shown_prompt([f"seed {i}" for i in range(20)], [f"grown {i}" for i in range(20)], random.Random(1))
    shown = re.findall(r"^Task \d+: (\w+)", asked, re.MULTILINE)
    assert (shown.count("seed"), shown.count("grown")) == (6, 2)
    assert asked.startswith("A list of 16 tasks")
    assert asked.endswith("\nTask 9:")
    assert re.findall(r"^Task", shown_prompt(SEEDS, [], random.Random(1)), re.MULTILINE) == ["Task"] * 4


def test_pictures_are_beyond_text() -> None:
    assert BEYOND_TEXT.search("Describe the images below")
    assert not BEYOND_TEXT.search("Write a paragraph about imagination")


VERBS = ["Describe", "Compare", "Translate", "Summarise", "Invent", "Question", "Defend", "Rank"]
THINGS = ["volcano", "harbour", "orchestra", "kitchen", "glacier", "market", "library", "desert"]


def grower(taught: list[str]) -> Any:
    """A teacher that writes what it is taught, eight at a time, and answers everything else."""
    waiting = iter(taught)

    def answer(seen: Seen) -> Says:
        if not seen.prompt.startswith("A list of"):
            return Says(completion(f"about {seen.prompt}"))
        tasks = [task for _, task in zip(range(8), waiting, strict=False)]
        return Says(completion("\n".join(f"{9 + i}. {task}" for i, task in enumerate(tasks)) or "none"))

    return answer


def test_prompts_are_grown_answered_and_told(service: Service, ask: Ask, tmp_path: Path) -> None:
    new = [
        f"{verb} one {thing} of {i} kinds in detail" for i, (verb, thing) in enumerate(zip(VERBS, THINGS, strict=True))
    ]
    known = "Explain how a bicycle keeps balance"  # 6 words of 7: 0.92
    service.answer = grower([known, "Sing", *new, f"{new[0]} please", "Describe the picture of a cat", "word " * 151])
    record = ask(*SEEDS, grow=8, concurrency=1)
    assert record.prompts["grown"]["count"] == 8
    assert record.prompts["grown"]["refused"] == {"like a known one": 1, "too short": 1}
    found = rows(tmp_path)
    assert [row["prompt"] for row in found] == SEEDS + new
    assert [row["grown"] for row in found] == [False] * 3 + [True] * 8
    asked = len(service.seen)
    assert ask(*SEEDS, grow=8, concurrency=1).kept == 11
    assert len(service.seen) == asked  # the same again, from the journal


def test_growing_ends_where_nothing_new_comes(service: Service, ask: Ask) -> None:
    beyond = ["Describe the picture of a cat", "word " * 151]
    service.answer = grower([*beyond, "Ask one thing that nobody has asked before"])
    record = ask(*SEEDS, grow=50)
    assert record.prompts["grown"]["count"] == 1
    assert record.prompts["grown"]["refused"]["about pictures or sounds"] == 1
    assert record.prompts["grown"]["refused"]["too long"] == 1
    assert record.kept == 4


def test_growing_keeps_to_the_ceiling(service: Service, ask: Ask) -> None:
    service.answer = grower([f"{verb} one {thing} in detail" for verb in VERBS for thing in THINGS])
    record = ask(*SEEDS, grow=500, max_tokens=50, max_tokens_total=900)
    assert record.ceiling_reached
    assert sum(record.tokens["teacher"]) <= 900
