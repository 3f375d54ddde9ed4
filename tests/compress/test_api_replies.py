"""What an answer says, apart from its reasoning."""

from typing import Any

import pytest

from potstill.compress.api_replies import code_of, fault_of, read_reply, split_thought
from tests.service import completion


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>\nI add.\n</think>\n\n4", "I add.", "4"),
        ("  <think>I add.</think>4", "I add.", "4"),
        ("I add.\n</think>\n4", "I add.", "4"),  # the chat template ends with the opening tag
        ("<think>I add and", "I add and", ""),
        ("<think></think>4", "", "4"),
        ("4", "", "4"),
        ("Write <think>this</think> first.", "", "Write <think>this</think> first."),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
    ],
)
def test_a_thought_before_the_answer_is_kept_apart(text: str, reasoning: str, answer: str) -> None:
    assert tuple(part.strip() for part in split_thought(text)) == (reasoning, answer)
    reply = read_reply(completion(text))
    assert (reply.reasoning, reply.text) == (reasoning, answer.strip())


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_a_field_of_reasoning_is_taken_as_it_is(field: str) -> None:
    reply = read_reply(completion("<think> is a tag", message={field: "I add."}))
    assert (reply.reasoning, reply.text) == ("I add.", "<think> is a tag")


def test_the_other_things_that_an_answer_says() -> None:
    reply = read_reply(completion("cut", finish_reason="length", model="big-2"))
    assert (reply.truncated, reply.refused, reply.model, reply.tokens) == (True, False, "big-2", (10, 5))
    assert read_reply(completion(None, message={"refusal": "I will not."})).refused
    assert read_reply(completion("", finish_reason="content_filter")).refused
    assert read_reply({"choices": [{"message": {"content": "so \ud83d"}}]}).text == "so ?"  # half of an emoji
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert read_reply(completion(None, message={"content": parts})).text == "ab"


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": 3}, {"prompt_tokens": 3, "completion_tokens": -1}, 7])
def test_usage_that_is_not_told_is_not_known(usage: Any) -> None:
    assert read_reply(completion("x", usage=usage)).tokens is None


@pytest.mark.parametrize("body", [None, [], {"choices": []}, {"choices": [{"message": {"content": 7}}]}, "no"])
def test_what_is_no_answer(body: Any) -> None:
    with pytest.raises(ValueError, match="^no completion but "):
        read_reply(body)


def test_what_an_error_says() -> None:
    assert fault_of({"error": {"message": "too\nlong", "code": "context"}}) == "too long"
    assert fault_of({"error": "no"}) == fault_of({"detail": "no"}) == fault_of({"message": "no"}) == "no"
    assert fault_of("x" * 999) == "x" * 299 + "…"
    assert fault_of("") == "nothing"
    assert code_of({"error": {"code": "insufficient_quota"}}) == "insufficient_quota"
    assert (code_of({"error": "no"}), code_of(None)) == ("", "")
