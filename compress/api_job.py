"""The requests of a job, many at once: prompts grown, prompts answered, answers judged."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from itertools import chain
from typing import Any

from potstill.compress.api import Endpoint, Refused, Spent, Unanswered, key_of, request_body
from potstill.compress.api_answers import judge_prompt
from potstill.compress.api_budget import Budget
from potstill.compress.api_grow import Grown, grow
from potstill.compress.api_journal import Journal
from potstill.compress.api_prompts import Prompt
from potstill.compress.api_replies import Reply, read_reply
from potstill.compress.api_settings import ApiTeacher
from potstill.validate.progress import Advance, track


class Job:
    """What is asked of a teacher, and of a judge; how it went stands in the journal.

    Attributes:
        budget: what it costs.
        grown: the prompts that were grown; None where none were wished for.
        unanswered: keys of requests that were given up.
    """

    def __init__(self, teacher: ApiTeacher, journal: Journal) -> None:
        self.budget = Budget(teacher, journal)
        self.grown: Grown | None = None
        self.unanswered: set[str] = set()
        self.endpoints = {
            by: Endpoint(service, by, journal, self.budget) for by, service in self.budget.services.items()
        }
        self._teacher = teacher

    def run(self, prompts: Iterable[Prompt], count: int) -> None:
        """Ask everything that the journal has no answer to.

        Args:
            prompts: to answer, and to grow from.
            count: how many they are.

        Raises:
            Unreachable: a service is not there.
            InputError: a service refuses the key, the model, or the first request.
        """
        try:
            asyncio.run(self._run(prompts, count))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    def prompts(self, given: Iterable[Prompt]) -> Iterable[Prompt]:
        """The given prompts and the grown ones."""
        return chain(given, (Prompt(task, grown=True) for task in (self.grown.tasks if self.grown else ())))

    async def _run(self, prompts: Iterable[Prompt], count: int) -> None:
        async with AsyncExitStack() as stack:
            for endpoint in self.endpoints.values():
                await stack.enter_async_context(endpoint)
            if wanted := self._teacher.grow:
                with track("new prompts", wanted) as advance:
                    self.grown = await self._grow([prompt.text for prompt in prompts], wanted, advance)
            total = count + (len(self.grown.tasks) if self.grown else 0)
            with track("answers", total * self._teacher.samples) as advance:
                await self._each(
                    lambda one: self._answer(one[0], one[1], advance),
                    ((prompt, sample) for prompt in self.prompts(prompts) for sample in range(self._teacher.samples)),
                )

    async def _each(self, act: Callable[[Any], Any], items: Iterable[Any]) -> None:
        """Act on all items, as many at once as the teacher may be asked, until what may be spent is spent."""
        waiting = iter(items)

        async def work() -> None:
            for item in waiting:
                if self.budget.reached:
                    return
                await act(item)

        async with asyncio.TaskGroup() as group:
            for _ in range(self._teacher.concurrency):
                group.create_task(work())

    async def _answer(self, prompt: Prompt, sample: int, advance: Advance) -> None:
        reply = await self._ask(
            "teacher", teacher_body(self._teacher, prompt, sample), sample, self._teacher.max_tokens
        )
        judge = self._teacher.judge
        if judge and reply and not fault_of_reply(self._teacher, reply):
            await self._ask("judge", judge_body(self._teacher, prompt, reply), 0, judge.max_tokens)
        advance(1, self._so_far())

    async def _ask(self, by: str, body: dict[str, Any], sample: int, max_tokens: int) -> Reply | None:
        path = "completions" if "prompt" in body else "chat/completions"
        try:
            return await self.endpoints[by].ask(path, body, sample, max_tokens)
        except Unanswered:
            self.unanswered.add(key_of(body, sample))
        except (Refused, Spent):
            pass  # both are counted: by the journal, and by the budget
        return None

    async def _grow(self, seeds: Sequence[str], wanted: int, advance: Advance) -> Grown:
        done = 0

        async def ask(numbered: Sequence[tuple[int, str]]) -> list[tuple[str, bool] | None]:
            found: dict[int, tuple[str, bool]] = {}

            async def one(item: tuple[int, str]) -> None:
                body = teacher_body(self._teacher, Prompt(item[1]), item[0], system=None)
                if reply := await self._ask("teacher", body, item[0], self._teacher.max_tokens):
                    found[item[0]] = (reply.text, reply.truncated)

            await self._each(one, numbered)
            return [found.get(number) for number, _ in numbered]

        def tell(tasks: int) -> None:
            nonlocal done
            advance(tasks - done, self._so_far())
            done = tasks

        return await grow(ask, seeds, wanted, self._teacher.seed or 0, tell)

    def _so_far(self) -> str:
        cost, tokens = self.budget.spent()
        priced = any(service.price_in is not None for service in self.budget.services.values())
        return f"{tokens:,} tokens" + (f", ${cost:.2f}" if priced else "")


def teacher_body(teacher: ApiTeacher, prompt: Prompt, sample: int, system: str | None = "") -> dict[str, Any]:
    """The request for one sample; `system` None leaves the teacher's system message out."""
    given: Any = prompt.given
    if not teacher.completions:
        given = [{"role": "user", "content": given}] if isinstance(given, str) else given
        if system is not None and teacher.system and given[0]["role"] != "system":
            given = [{"role": "system", "content": teacher.system}, *given]
    seed = None if teacher.seed is None else teacher.seed + sample
    return request_body(
        teacher, given, teacher.max_tokens, temperature=teacher.temperature, top_p=teacher.top_p, seed=seed
    )


def judge_body(teacher: ApiTeacher, prompt: Prompt, reply: Reply) -> dict[str, Any]:
    """The request that has an answer judged."""
    assert teacher.judge
    task = (
        prompt.given
        if isinstance(prompt.given, str)
        else "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt.given)
    )
    asked = [{"role": "user", "content": judge_prompt(task, reply.text, prompt.answer)}]
    return request_body(teacher.judge, asked, teacher.judge.max_tokens, temperature=0)


def replies_of(teacher: ApiTeacher, prompt: Prompt, journal: Journal) -> list[tuple[str, Reply | None]]:
    """Of each sample its key, and the answer where there is one."""
    keys = [key_of(teacher_body(teacher, prompt, sample), sample) for sample in range(teacher.samples)]
    return [(key, read_reply(journal.answer(key)) if key in journal else None) for key in keys]


def fault_of_reply(teacher: ApiTeacher, reply: Reply) -> str | None:
    """Why an answer cannot stay, whatever it says; None where it can."""
    if reply.refused:
        return "refusal"
    if reply.truncated and not teacher.keep_truncated:
        return "truncated"
    return None if reply.text.strip() else "empty"
