"""What a service's answer says: the text apart from its reasoning, why it ended, its tokens; or what went wrong."""

import re
from dataclasses import dataclass
from typing import Any

THOUGHT = re.compile(r"\s*(?:<think>)?(?P<reasoning>.*?)</think>\s*(?P<text>.*)", re.DOTALL)
OPENED = "<think>"


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        text: the answer itself; of `/completions` with the blanks around it, which join it to the prompt.
        reasoning: what was thought before it; empty where nothing was.
        finish_reason: as the service says it: `stop`, `length`, `content_filter`.
        refused: whether the service itself marks it as a refusal.
        model: as the service names what answered.
        tokens: of prompt and answer, by the service's own usage; None where it tells none.
    """

    text: str
    reasoning: str
    finish_reason: str
    refused: bool
    model: str
    tokens: tuple[int, int] | None

    @property
    def truncated(self) -> bool:
        """Whether it ended because it was as long as it may be."""
        return self.finish_reason == "length"


def read_reply(body: Any) -> Reply:
    """An answer of `/chat/completions` or `/completions`.

    Raises:
        ValueError: it is none.
    """
    try:
        choice = body["choices"][0]
        is_chat = "message" in choice
        message = choice["message"] if is_chat else {"content": choice["text"]}
        content, refusal = _text(message["content"]), message.get("refusal")
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        if not isinstance(reasoning, str):
            raise TypeError
        finish = str(choice.get("finish_reason") or "")
        tokens = _usage(body.get("usage"))
    except (LookupError, TypeError, AttributeError):
        raise ValueError(f"no completion but {_short(body)}") from None
    if not reasoning:
        reasoning, content = split_thought(content)
    return Reply(
        text=_whole(content.strip() if is_chat else content),
        reasoning=_whole(reasoning.strip()),
        finish_reason=finish,
        refused=bool(refusal) or finish == "content_filter",
        model=str(body.get("model") or ""),
        tokens=tokens,
    )


def split_thought(text: str) -> tuple[str, str]:
    """Reasoning and answer of a text that begins with `<think>…</think>`.

    The opening tag may be missing, as where a chat template ends with it; a thought without an end is all reasoning.
    """
    start = text.lstrip()
    thought = THOUGHT.match(text)
    if thought and (start.startswith(OPENED) or OPENED not in thought["reasoning"]):
        return thought["reasoning"], thought["text"]
    return (start.removeprefix(OPENED), "") if start.startswith(OPENED) else ("", text)


def fault_of(body: Any) -> str:
    """What a service's error says, at most 300 characters."""
    for _ in range(2):
        if isinstance(body, dict):
            body = next((body[word] for word in ("error", "message", "detail") if body.get(word)), body)
    return _short(body)


def code_of(body: Any) -> str:
    """The code of a service's error, such as `insufficient_quota`; empty where it has none."""
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("code") or error.get("type") or "") if isinstance(error, dict) else ""


def _whole(text: str) -> str:
    """A text with a question mark for half a sign, as of one that was cut at the longest answer."""
    return text.encode(errors="replace").decode()


def _text(content: Any) -> str:
    """Text, or the text among parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _usage(usage: Any) -> tuple[int, int] | None:
    if not isinstance(usage, dict):
        return None
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    if not all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts):
        return None
    return counts[0], counts[1]  # type: ignore[return-value]


def _short(body: Any) -> str:
    plain = " ".join(str(body).split())
    return (plain if len(plain) <= 300 else plain[:299] + "…") or "nothing"
