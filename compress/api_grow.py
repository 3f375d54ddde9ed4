"""New prompts from given ones: the teacher writes tasks after a few that it is shown (Self-Instruct, Wang 2022).

Each request shows eight tasks, up to two of them grown before (section 2.2 of the paper); of what is written, tasks
like a known one (ROUGE-L of 0.7 or more) are refused, and those too short, too long, or about pictures and the like,
which text cannot answer. What is shown is drawn from the seed and the request's number, so that a run that was stopped
asks the same again and finds it answered.
"""

import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

SHOWN, SHOWN_GROWN, WRITTEN = 8, 2, 8
AT_ONCE = 8  # requests of a round
DRY = 3  # rounds without a new task, after which it ends
LIKENESS = 0.7
SHORTEST, LONGEST = 4, 150  # words
BEYOND_TEXT = re.compile(r"\b(?:image|picture|graph|photo|video|audio|diagram)s?\b", re.IGNORECASE)
_WIDE = "぀-ヿ㐀-鿿"  # scripts without blanks: each sign is a word
_WORD = re.compile(rf"[{_WIDE}]|[^\W_{_WIDE}]+")
_NUMBERED = re.compile(r"^[ \t>*#-]*(?:task[ \t]*)?\d+[ \t]*[.:)][ \t*]*", re.IGNORECASE | re.MULTILINE)

AskAll = Callable[[Sequence[tuple[int, str]]], Awaitable[Sequence[tuple[str, bool] | None]]]
"""Asks the teacher for texts, given numbers and prompts; each with whether it was cut short, None where none came."""


@dataclass
class Grown:
    """What was grown.

    Attributes:
        tasks: the new ones, in the order of their growth.
        requests: answers that were read.
        refused: how many tasks each rule refused.
    """

    tasks: list[str] = field(default_factory=list)
    requests: int = 0
    refused: Counter[str] = field(default_factory=Counter)


async def grow(ask: AskAll, seeds: Sequence[str], wanted: int, seed: int, tell: Callable[[int], None]) -> Grown:
    """Grow so many tasks from seeds; fewer where the teacher writes nothing new, or nothing at all, round after round.

    `tell` is called with how many there are.
    """
    from rapidfuzz import process
    from rapidfuzz.distance import Indel

    grown, known, first, dry = Grown(), [words(text) for text in seeds], 0, 0
    while dry < DRY:
        prompts = [
            (number, shown_prompt(seeds, grown.tasks, random.Random(f"{seed}:{number}")))
            for number in range(first, first + AT_ONCE)
        ]
        first += AT_ONCE
        before = len(grown.tasks)
        for answer in await ask(prompts):
            if answer is None:
                continue
            grown.requests += 1
            for task in written_tasks(*answer):
                said = words(task)
                fault = _fault(task, said)
                if not fault and process.extractOne(
                    said, known, scorer=Indel.normalized_similarity, processor=None, score_cutoff=LIKENESS
                ):
                    fault = "like a known one"
                if fault:
                    grown.refused[fault] += 1
                    continue
                known.append(said)
                grown.tasks.append(task)
                if len(grown.tasks) == wanted:
                    return grown
        tell(len(grown.tasks))
        dry = dry + 1 if len(grown.tasks) == before else 0
    return grown


def words(text: str) -> list[str]:
    """What ROUGE-L compares (Lin 2004): words without case and stops; its F1, 2 LCS / (m + n), is Indel's."""
    return _WORD.findall(text.casefold())


def shown_prompt(seeds: Sequence[str], grown: Sequence[str], draw: random.Random) -> str:
    """What the teacher continues: eight tasks (fewer where there are fewer seeds), up to two of them grown before."""
    young = draw.sample(grown, min(SHOWN_GROWN, len(grown)))
    tasks = [*draw.sample(seeds, min(SHOWN - len(young), len(seeds))), *young]
    draw.shuffle(tasks)
    last = len(tasks) + WRITTEN
    lines = [f"Task {i}: {' '.join(task.split())}" for i, task in enumerate(tasks, 1)]
    head = f"A list of {last} tasks that differ in what they ask for and how, each on one line, without its answer."
    return "\n".join([head, "", *lines, f"Task {len(tasks) + 1}:"])


def written_tasks(text: str, truncated: bool) -> list[str]:
    """The tasks in an answer, numbered or not; the last one of an answer that was cut short is left out."""
    first, *rest = _NUMBERED.split(text)
    parts = rest if rest and not _continues(first) else [first, *rest]
    if truncated:
        parts = parts[:-1]
    return [" ".join(part.split()).strip("* ") for part in parts if part.strip("* \n\t")]


def _continues(first: str) -> bool:
    """Whether an answer begins with the task whose number it was given, and not with a word to the asker."""
    return bool(first.strip()) and not first.rstrip().endswith(":") and len(first.strip().splitlines()) == 1


def _fault(task: str, said: Sequence[str]) -> str | None:
    """Why a task is refused, whatever the others are."""
    if len(said) < SHORTEST:
        return "too short"
    if len(said) > LONGEST:
        return "too long"
    if BEYOND_TEXT.search(task):
        return "about pictures or sounds"
    return None
