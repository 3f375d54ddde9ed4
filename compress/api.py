"""One OpenAI-compatible service as it is asked: paced, retried, paid for, and each request and answer written down.

httpx2 carries the requests. When to send again is decided here and not in a client library, because each try is held
against the budget, and a wait that the service asks for is a wait of all requests.
"""

import asyncio
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self
from weakref import WeakValueDictionary

import httpx2

from potstill.compress.api_budget import Budget
from potstill.compress.api_journal import Journal
from potstill.compress.api_replies import Reply, code_of, fault_of, read_reply
from potstill.compress.api_settings import Service
from potstill.validate.errors import InputError, Unreachable, told
from potstill.validate.files import sha256_json

CONNECT_S = 10.0
FIRST_WAIT_S, LONGEST_BACKOFF_S = 0.5, 60.0
LONGEST_WAIT_S = 900.0  # what a service may ask to wait; beyond that the job stops
GIVEN_UP = 3  # requests in a row without an answer, which end the job
SECRET = 12  # letters from which a key is looked for in answers, too
AGAIN = {408, 409, 425, 429}  # and all from 500
FATAL = {401, 402, 403, 404}  # of key, account and model
MAY_COST = {408, 502, 504, 524}  # a proxy gave up; what lies behind it may have answered
_RESET = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?")


class Refused(Exception):
    """The service refuses this one request, and has answered others."""


class Unanswered(Exception):
    """No answer to this one request after all tries, and the service has answered others."""


class Spent(Exception):
    """What may be spent leaves no room for this request."""


@dataclass
class _Try:
    """What came of a try: a body with its reply, or why not."""

    body: Any = None
    reply: Reply | None = None
    status: int = 0
    why: str = ""
    may_cost: bool = False
    wait: float = 0.0
    connected: bool = True
    refused: bool = False


class Endpoint:
    """A service, open for requests within `async with`.

    Attributes:
        asked: tries of this process.
        answered: answers to this process.
    """

    def __init__(self, service: Service, by: str, journal: Journal, budget: Budget) -> None:
        self.service, self.by = service, by
        self.asked = self.answered = 0
        self._journal, self._budget = journal, budget
        self._key = service.key()
        self._slots = asyncio.Semaphore(service.concurrency)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._given_up = 0  # requests since the last answer
        self._resume_at = 0.0  # by time.monotonic
        self._client: httpx2.AsyncClient

    async def __aenter__(self) -> Self:
        headers = {"User-Agent": "potstill"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        self._client = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(self.service.timeout, connect=CONNECT_S),
            limits=httpx2.Limits(max_connections=self.service.concurrency),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def ask(self, path: str, body: Mapping[str, Any], sample: int, max_tokens: int) -> Reply:
        """The answer to a request, from the journal where it is there.

        Raises:
            Refused: the service refuses it, and has answered others.
            Unanswered: it did not answer it, and has answered others.
            Spent: the budget leaves no room for it.
            Unreachable: the service is not there, or answers nothing.
            InputError: the service refuses the key, the model, or the first request.
        """
        key = key_of(body, sample)
        async with self._locks.setdefault(key, asyncio.Lock()):  # a judge may be asked of two samples that are the same
            if key in self._journal:
                return read_reply(self._journal.answer(key))
            if self._journal.is_refused(key):
                raise Refused
            return await self._until_answered(key, path, body, max_tokens)

    async def _until_answered(self, key: str, path: str, body: Mapping[str, Any], max_tokens: int) -> Reply:
        failures, answered = 0, self.answered
        while True:
            async with self._slots:
                await self._pace()
                bound = self._budget.bound(self.by, body, max_tokens)
                if not await self._budget.reserve(self.by, bound):
                    raise Spent
                one = await self._try(key, path, body, bound)
            if one.reply:
                return one.reply
            if one.refused:
                raise Refused
            self._check_fatal(one)
            # a service that is only busy, and answers others meanwhile, is waited for without end
            failures = 1 if one.status == 429 and self.answered > answered else failures + 1
            answered = self.answered
            if failures > self.service.retries:
                self._given_up += 1
                if answered and self._given_up < GIVEN_UP:
                    raise Unanswered
                raise Unreachable(
                    f"{self.service.host} gave no answer in {failures} tries, the last one: {one.why}; what was "
                    "answered is kept: the same command goes on where it was"
                )
            backoff = min(LONGEST_BACKOFF_S, FIRST_WAIT_S * 2 ** (failures - 1)) * random.uniform(0.5, 1)
            if not one.wait:
                await asyncio.sleep(backoff)

    async def _try(self, key: str, path: str, body: Mapping[str, Any], bound: tuple[int, int]) -> _Try:
        """Send a request once; its cost is settled and its outcome written down, whatever it is."""
        self._journal.asked(key, self.by, bound, body)
        self.asked += 1
        one = _Try(may_cost=True)
        try:
            one = await self._post(path, body)
        finally:
            self._budget.settle(self.by, bound, one.reply.tokens if one.reply else None, one.may_cost)
        if one.reply:
            self.answered += 1
            self._given_up = 0
            self._journal.answered(key, self.by, one.reply.tokens, one.body)
        else:
            one.refused = self.answered > 0 and 400 <= one.status < 500 and one.status not in AGAIN | FATAL
            self._journal.failed(key, self.by, one.why, one.may_cost, one.refused)
        return one

    async def _post(self, path: str, body: Mapping[str, Any]) -> _Try:
        try:
            async with asyncio.timeout(self.service.timeout):
                response = await self._client.post(f"{self.service.api}/{path}", json=body)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            return _Try(why=f"no connection: {self._hide(told(error))}", connected=False)
        except (TimeoutError, httpx2.TimeoutException):
            return _Try(why=f"no answer in {self.service.timeout:g} s", may_cost=True)
        except httpx2.HTTPError as error:
            return _Try(why=f"the connection broke: {type(error).__name__}", may_cost=True)
        wait = self._heed(response)
        try:
            content = self._clean(response.json())
        except ValueError:
            content = None
        if response.status_code != 200:
            status = 402 if code_of(content) == "insufficient_quota" else response.status_code
            said = fault_of(response.text if content is None else content)
            why = self._hide(f"{response.status_code} {response.reason_phrase}: {said}")
            return _Try(None, None, status, why, status in MAY_COST, wait)
        try:
            return _Try(content, read_reply(content), 200, may_cost=True)
        except ValueError as error:
            shown = str(error) if content is not None else f"no JSON but {response.text[:80]!r}"
            return _Try(None, None, 200, self._hide(f"the answer is {shown}"), may_cost=True)

    def _check_fatal(self, one: _Try) -> None:
        """Raise where another try is no use."""
        service = self.service
        if not one.connected and not self.answered:
            raise Unreachable(
                f"{service.host} cannot be reached: {one.why}; start the service, or correct its address {service.api}"
            )
        if one.status in (0, 200) or one.status in AGAIN or one.status >= 500:
            return
        if one.status in (401, 403):
            key = f"the key in {service.key_env}" if service.key_env else "a request without a key (key_env names one)"
            raise InputError(f"{service.host} refuses {key}: {one.why}")
        if one.status == 402:
            raise InputError(f"{service.host} refuses to go on until the account is paid for: {one.why}")
        if one.status == 404:
            raise InputError(f"{service.api} has no model {service.model!r}, or is no such service: {one.why}")
        if one.status < 400:
            raise InputError(f"{service.api} redirects ({one.status}) and is not followed; give the final address")
        raise InputError(f"{service.host} refuses the request: {one.why}")

    def _heed(self, response: httpx2.Response) -> float:
        """Hold all requests back for as long as an answer's headers ask; gives these seconds."""
        headers = response.headers
        wait = retry_after(headers) if response.status_code != 200 else 0.0
        for of in ("requests", "tokens"):
            if headers.get(f"x-ratelimit-remaining-{of}") == "0":
                wait = max(wait, reset_s(headers.get(f"x-ratelimit-reset-{of}", "")))
        if headers.get("ratelimit-remaining") == "0":
            wait = max(wait, reset_s(headers.get("ratelimit-reset", "")))
        self._resume_at = max(self._resume_at, time.monotonic() + wait)
        return wait

    async def _pace(self) -> None:
        """Wait as long as the service asked for; a little longer by chance, so that not all come back at once."""
        while (wait := self._resume_at - time.monotonic()) > 0:
            if wait > LONGEST_WAIT_S:
                raise Unreachable(
                    f"{self.service.host} asks to come back in {wait / 60:.0f} min; what was answered is kept: the "
                    "same command goes on then"
                )
            await asyncio.sleep(wait + random.uniform(0, min(1.0, wait / 4)))

    def _hide(self, text: str) -> str:
        """A text without the key."""
        return text.replace(self._key, "***") if self._key else text

    def _clean(self, value: Any) -> Any:
        """Plain data without the key; a word too short for a secret, such as EMPTY, is left where it stands."""
        if not self._key or len(self._key) < SECRET:
            return value
        if isinstance(value, dict):
            return {self._hide(name): self._clean(part) for name, part in value.items()}
        if isinstance(value, list):
            return [self._clean(part) for part in value]
        return self._hide(value) if isinstance(value, str) else value


def key_of(body: Mapping[str, Any], sample: int) -> str:
    """What a request is known by: a hash of its model, prompt, settings, and the number of the sample."""
    return sha256_json([body, sample])


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that `Retry-After` (RFC 9110, 10.2.3) or `retry-after-ms` asks for; 0 where neither does."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        said = headers.get("retry-after", "0")
        if re.fullmatch(r"\d+(\.\d+)?", said.strip()):
            return float(said)
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def reset_s(text: str) -> float:
    """Seconds until a limit is reset: `6m0s`, `20ms`, `1h2m3.5s` or a bare number of seconds; 0 for anything else."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    found = _RESET.fullmatch(text)
    if not found:
        return 0.0
    hours, minutes, seconds, millis = (float(part or 0) for part in found.groups())
    return hours * 3600 + minutes * 60 + seconds + millis / 1000


def request_body(service: Service, messages: Any, max_tokens: int, **more: Any) -> dict[str, Any]:
    """The body of a request: messages, or the bare text of a prompt; settings that are None are left out.

    OpenAI's own hosts name the longest answer `max_completion_tokens`, all others `max_tokens`.
    """
    asked = {"prompt": messages} if isinstance(messages, str) else {"messages": messages}
    of_openai = re.search(r"(^|\.)(openai\.com|openai\.azure\.com)(:\d+)?$", service.host)
    limit = "max_completion_tokens" if of_openai and "messages" in asked else "max_tokens"
    return {"model": service.model} | asked | {limit: max_tokens} | {k: v for k, v in more.items() if v is not None}
