"""What a job would take, told before anything is asked."""

import random
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from potstill.compress.api import key_of
from potstill.compress.api_answers import judge_prompt
from potstill.compress.api_budget import PER_MESSAGE, PER_REQUEST, bytes_of, cost_of
from potstill.compress.api_grow import WRITTEN, shown_prompt
from potstill.compress.api_job import teacher_body
from potstill.compress.api_journal import open_journal
from potstill.compress.api_prompts import Prompt, Prompts
from potstill.compress.api_settings import ApiTeacher
from potstill.compress.generate import check_output, journal_of

BYTES_PER_TOKEN = 4  # about, in English and in code
USABLE = 0.5  # of the tasks that a teacher writes, taken to be new


@dataclass(frozen=True)
class Estimate:
    """What is still to be asked, and what it may take.

    Attributes:
        prompts: in the file, each once.
        requests: still to be made, without further tries; those to grow prompts, and to answer them, are assumed.
        answered: answers that are there from runs before.
        tokens_in: of the prompts, about: 4 bytes each.
        tokens_in_most: of the prompts, at most: 1 byte each, and what a chat template adds.
        tokens_out_most: of the answers, at most.
        cost: dollars, by `tokens_in` and the longest answers; None without prices.
        cost_most: dollars, by `tokens_in_most`; None without prices.
    """

    prompts: int
    requests: int
    answered: int
    tokens_in: int
    tokens_in_most: int
    tokens_out_most: int
    cost: float | None
    cost_most: float | None


class _Sum:
    """Requests to one service, summed."""

    def __init__(self) -> None:
        self.requests = self.about = self.most = self.out = 0

    def add(self, size: int, messages: int, max_tokens: int, times: int = 1) -> None:
        """Requests with so many bytes of prompt."""
        self.requests += times
        self.about += times * ceil(size / BYTES_PER_TOKEN)
        self.most += times * (size + messages * PER_MESSAGE + PER_REQUEST)
        self.out += times * max_tokens


def estimate(teacher: ApiTeacher, prompts: Path, out: Path) -> Estimate:
    """What `generate` would ask; nothing is asked, and nothing is written.

    Raises:
        InputError: prompts or an output that cannot be used.
    """
    check_output(out, prompts)
    given, answered, size = Prompts(prompts, teacher), 0, 0
    asked, judged = _Sum(), _Sum()
    path = journal_of(out)
    with open_journal(path) if path.exists() else nullcontext() as journal:
        for prompt in given:
            for sample in range(teacher.samples):
                body = teacher_body(teacher, prompt, sample)
                size += bytes_of(body)[0]
                if journal is not None and key_of(body, sample) in journal:
                    answered += 1
                    continue
                asked.add(*bytes_of(body), teacher.max_tokens)
                _add_judge(judged, teacher, prompt)
    if teacher.grow:
        _add_grown(asked, judged, teacher, given, size // (len(given) * teacher.samples))
    services = [(teacher, asked), *([(teacher.judge, judged)] if teacher.judge else [])]
    priced = teacher.price_in is not None
    return Estimate(
        prompts=len(given),
        requests=asked.requests + judged.requests,
        answered=answered,
        tokens_in=asked.about + judged.about,
        tokens_in_most=asked.most + judged.most,
        tokens_out_most=asked.out + judged.out,
        cost=sum(cost_of(service, (one.about, one.out)) for service, one in services) if priced else None,
        cost_most=sum(cost_of(service, (one.most, one.out)) for service, one in services) if priced else None,
    )


def _add_judge(judged: _Sum, teacher: ApiTeacher, prompt: Prompt) -> None:
    """One answer of the greatest length, judged."""
    if teacher.judge:
        answer = "x" * (teacher.max_tokens * BYTES_PER_TOKEN)
        size = len(judge_prompt(prompt.text, answer, prompt.answer).encode(errors="replace"))
        judged.add(size, 1, teacher.judge.max_tokens)


def _add_grown(asked: _Sum, judged: _Sum, teacher: ApiTeacher, given: Prompts, size: int) -> None:
    """Prompts that are still to be grown: half of those that the teacher writes are taken to be usable."""
    assert teacher.grow
    seeds = [prompt.text for prompt in given]
    shown = len(shown_prompt(seeds, [], random.Random(0)).encode(errors="replace"))
    asked.add(shown, 1, teacher.max_tokens, ceil(teacher.grow / (WRITTEN * USABLE)))
    asked.add(size, 2 if teacher.system else 1, teacher.max_tokens, teacher.grow * teacher.samples)
    for _ in range(teacher.grow * teacher.samples):
        _add_judge(judged, teacher, Prompt("x" * size))
