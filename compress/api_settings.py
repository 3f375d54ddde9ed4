"""What a recipe says of a teacher that answers over HTTP. It needs no torch and no network."""

import os
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from potstill.validate.errors import InputError

Count = Annotated[int, Field(ge=1)]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_NAME = re.compile(r"[A-Z][A-Z0-9_]*")
_STRICT = ConfigDict(extra="forbid")


def _address(value: Any) -> Any:
    """An http address without a secret in it; `/v1` where it has no path. What is refused is not repeated."""
    if not isinstance(value, str):
        return value  # a wrong type, which the field itself reports
    try:
        parts = urlsplit(value.strip())
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError("expected the address of a service, such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "expected an address without user, password, query or fragment; a key comes from the "
            "environment: give the name of its variable as key_env"
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions").removesuffix("/completions")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def _variable(value: Any) -> Any:
    """The name of an environment variable. What is refused may be a key, so it is not repeated."""
    if isinstance(value, str) and not _NAME.fullmatch(value):
        raise ValueError("expected the name of an environment variable in capitals, such as OPENAI_API_KEY, and no key")
    return value


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Service:
    """A model behind an OpenAI-compatible endpoint.

    Attributes:
        api: address, up to `/v1`.
        model: as the service names it.
        key_env: name of the environment variable that holds the key; without it no key is sent.
        price_in: dollars for a million tokens of prompts.
        price_out: dollars for a million tokens of answers.
        concurrency: requests at once.
        timeout: seconds for one answer.
        retries: further tries of a request that was not answered.
    """

    api: Annotated[str, BeforeValidator(_address)]
    model: Annotated[str, Field(min_length=1)]
    key_env: Annotated[str | None, BeforeValidator(_variable)] = None
    price_in: Price | None = None
    price_out: Price | None = None
    concurrency: Count = 8
    timeout: Annotated[float, Field(gt=0)] = 600.0
    retries: Annotated[int, Field(ge=0)] = 6

    def __post_init__(self) -> None:
        """Refuse half a price."""
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("price_in and price_out go together, in dollars per million tokens; one of them is given")

    @property
    def host(self) -> str:
        """Host and port."""
        return urlsplit(self.api).netloc

    def key(self) -> str | None:
        """The key, from the environment.

        Raises:
            InputError: the variable is not set, or holds no key.
        """
        if self.key_env is None:
            return None
        found = os.environ.get(self.key_env, "").strip()
        if not found:
            raise InputError(
                f"the environment variable {self.key_env} is not set; expected the key for {self.host} in it"
            )
        if not re.fullmatch(r"[!-~]+", found):
            raise InputError(
                f"the environment variable {self.key_env} holds no key: expected letters, digits and signs, no blanks"
            )
        return found


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Judge(Service):
    """A model that says yes or no to answers; `max_tokens` is its longest reply, reasoning included."""

    max_tokens: Count = 512


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ApiTeacher(Service):
    """A teacher that writes data: how it is asked, which answers stay, and what may be spent.

    Attributes:
        completions: ask `/completions` with the bare prompt (a base model) instead of `/chat/completions`.
        system: the first message to a chat model, where a prompt has none of its own.
        samples: answers to each prompt.
        temperature: of the sampling; by default the service's own.
        top_p: share of the probability that is sampled from; by default the service's own.
        max_tokens: the longest answer, reasoning included.
        keep_truncated: whether answers that were cut at `max_tokens` stay.
        seed: of what is drawn here, and sent with sample i as seed + i; without it none is sent.
        grow: new prompts to grow from the given ones (Wang 2022, arXiv:2212.10560).
        check: which answers stay: `exact`, those that agree with the prompt's `answer`; `vote`, those of more than half
            of a prompt's samples (Wang 2022, arXiv:2203.11171); `judge`, those another model says yes to.
        judge: that model.
        max_cost: dollars that may be spent, teacher and judge together.
        max_tokens_total: tokens that may be spent, prompts and answers, teacher and judge together.
    """

    completions: bool = False
    system: Annotated[str, Field(min_length=1)] | None = None
    samples: Count = 1
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Count = 1024
    keep_truncated: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    grow: Count | None = None
    check: Literal["exact", "vote", "judge"] | None = None
    judge: Judge | None = None
    max_cost: Price | None = None
    max_tokens_total: Count | None = None

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        super().__post_init__()
        if self.completions and self.system:
            raise ValueError("system goes with chat; completions sends the bare prompt")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"{self.samples} samples at temperature 0 are the same answer; give a temperature above 0")
        if self.check == "vote" and self.samples < 3:
            raise ValueError(f"a vote needs 3 samples or more; given {self.samples}")
        if self.check == "exact" and self.grow:
            raise ValueError("check: exact needs the answer of each prompt, and prompts that are grown have none")
        if (self.check == "judge") != (self.judge is not None):
            raise ValueError("check: judge and the judge (its api and model) go together; one of them is given")
        if self.max_cost is not None and any(one.price_in is None for one in (self, self.judge) if one):
            raise ValueError("max_cost needs price_in and price_out, of the teacher and of a judge")
