"""What requests to services cost: known from their usage, at most while they are under way, and what may be spent."""

import asyncio
import math
from collections.abc import Mapping
from typing import Any

from potstill.compress.api_journal import Journal
from potstill.compress.api_settings import ApiTeacher, Service
from potstill.validate.errors import InputError

PER = 1e6  # prices are for a million tokens
PER_REQUEST, PER_MESSAGE = 128, 16  # tokens that a chat template is taken to add, until a reply shows more


def bytes_of(body: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of UTF-8 in a request's prompt, and how many messages it has."""
    texts = [body["prompt"]] if "prompt" in body else [message["content"] for message in body["messages"]]
    return sum(len(text.encode(errors="replace")) for text in texts), len(texts)


def cost_of(service: Service, tokens: tuple[int, int] | list[int]) -> float:
    """Dollars for so many tokens in and out; 0 without prices."""
    return (tokens[0] * (service.price_in or 0) + tokens[1] * (service.price_out or 0)) / PER


class Budget:
    """What was spent, what is under way, and what may still be started.

    A token has at least one byte, so a prompt has at most as many tokens as bytes, and what its template adds.

    Raises:
        InputError: there are prices, and the journal holds what another model was asked, at other prices.
    """

    def __init__(self, teacher: ApiTeacher, journal: Journal) -> None:
        self.services: dict[str, Service] = {"teacher": teacher} | ({"judge": teacher.judge} if teacher.judge else {})
        for by, service in self.services.items():
            if service.price_in is not None and (others := journal.models[by] - {service.model}):
                raise InputError(
                    f"the journal of --out holds what {', '.join(sorted(others))} was asked, and the prices are those "
                    f"of {service.model}; give another --out, or no prices"
                )
        self.max_cost = math.inf if teacher.max_cost is None else teacher.max_cost
        self.max_tokens = math.inf if teacher.max_tokens_total is None else teacher.max_tokens_total
        self.reached = False
        self._journal = journal
        self._under_way = {by: [0, 0] for by in self.services}
        self._added = dict.fromkeys(self.services, PER_REQUEST)
        self._settled = asyncio.Event()

    def bound(self, by: str, body: Mapping[str, Any], max_tokens: int) -> tuple[int, int]:
        """Tokens in and out that a request takes at most."""
        size, messages = bytes_of(body)
        return size + messages * PER_MESSAGE + self._added[by], max_tokens

    async def reserve(self, by: str, bound: tuple[int, int]) -> bool:
        """Set a request's worst case aside, once what is under way leaves room for it; False where it never will."""
        while not self._has_room(by, bound):
            if not any(map(any, self._under_way.values())):
                self.reached = True
                return False
            self._settled.clear()
            await self._settled.wait()
        self._move(self._under_way[by], bound, 1)
        return True

    def settle(self, by: str, bound: tuple[int, int], tokens: tuple[int, int] | None, may_cost: bool = True) -> None:
        """A request is over: it took these tokens, or perhaps its worst case, or nothing."""
        self._move(self._under_way[by], bound, -1)
        if tokens:
            self._move(self._journal.spent[by], tokens, 1)
            self._added[by] = max(self._added[by], self._added[by] + tokens[0] - bound[0])
        elif may_cost:
            self._move(self._journal.possible[by], bound, 1)
        self._settled.set()

    def spent(self) -> tuple[float, int]:
        """Dollars and tokens of the answers, over all runs that the journal knows."""
        return self._total(self._journal.spent)

    def possible(self) -> tuple[float, int]:
        """Dollars and tokens, at most, of tries without an answer or without usage, over all such runs."""
        return self._total(self._journal.possible)

    def _total(self, of: Mapping[str, list[int]]) -> tuple[float, int]:
        return (
            sum(cost_of(service, of[by]) for by, service in self.services.items()),
            sum(sum(tokens) for tokens in of.values()),
        )

    def _has_room(self, by: str, bound: tuple[int, int]) -> bool:
        parts = [self.spent(), self.possible(), self._total(self._under_way)]
        dollars = sum(cost for cost, _ in parts) + cost_of(self.services[by], bound)
        tokens = sum(tokens for _, tokens in parts) + sum(bound)
        return dollars <= self.max_cost and tokens <= self.max_tokens

    @staticmethod
    def _move(total: list[int], tokens: tuple[int, int], sign: int) -> None:
        total[0] += sign * tokens[0]
        total[1] += sign * tokens[1]
