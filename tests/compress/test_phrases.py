"""What a teacher says of itself, refusals and answers cut short: every row of the table on its own examples."""

import json
import re
import time
from pathlib import Path

import pytest

from potstill.compress.phrases import Phrase, cut_identity, identity_phrases, refusal, refusal_phrases, table
from potstill.compress.unfinished import unfinished

BEFORE = "The sum is four, which you get when you add two and two, as was asked here. "
NAMES = [(which, say) for which, names in table()["names"].items() for one in names for say in one["say"]]


def examples(phrases: tuple[Phrase, ...], which: str) -> list[tuple[str, str]]:
    return [(phrase.id, text) for phrase in phrases for text in getattr(phrase, which)]


@pytest.mark.parametrize(("name", "text"), examples(identity_phrases(), "hit"))
def test_each_phrase_is_cut(name: str, text: str) -> None:
    cut = cut_identity(BEFORE + text)
    assert cut is not None
    assert name in [phrase.id for phrase in cut.phrases]
    assert cut.text is not None
    assert cut.text.startswith(BEFORE.strip())
    assert text.endswith(cut.sentences[-1])


@pytest.mark.parametrize(("name", "text"), examples(identity_phrases(), "honest"))
def test_honest_texts_are_left(name: str, text: str) -> None:
    assert cut_identity(text) is None, name


@pytest.mark.parametrize(("which", "name"), NAMES)
def test_each_name_is_known(which: str, name: str) -> None:
    alone = cut_identity(f"{BEFORE}I am {name}, and I like you.")
    assert (alone is not None) == (which == "sure")  # others may be a person's
    assert cut_identity(f"{BEFORE}I am {name}, an AI assistant.") is not None
    assert cut_identity(f"{BEFORE}She wrote about {name} in the paper.") is None


@pytest.mark.parametrize(
    "vendor", ["OpenAI", "Anthropic", "Google", "Google DeepMind", "Meta AI", "xAI", "Alibaba Cloud"]
)
def test_makers_are_known(vendor: str) -> None:
    assert cut_identity(f"{BEFORE}I was created by {vendor}.") is not None
    assert cut_identity(f"{BEFORE}It was created by {vendor}.") is None


def test_phrases_have_what_a_reader_needs() -> None:
    for phrase in (*identity_phrases(), *refusal_phrases()):
        assert phrase.means
        assert phrase.source
        assert phrase.hit
        assert phrase.honest
        assert not re.search(r"\{[a-z_]+\}", phrase.pattern.pattern)


def test_only_the_sentence_is_cut() -> None:
    text = (
        "Paris lies on the Seine, and two million people live there.\n\n"
        "As an AI language model, I do not travel. But you should: it's lovely in May!\n\nI’m ChatGPT.\n\nBye."
    )
    cut = cut_identity(text)
    assert cut is not None
    assert cut.text == (
        "Paris lies on the Seine, and two million people live there.\n\nBut you should: it's lovely in May!\n\nBye."
    )
    assert cut.sentences == ("As an AI language model, I do not travel.", "I’m ChatGPT.")
    chinese = cut_identity(
        "巴黎是法国的首都，位于塞纳河畔，有两百万人口。作为一个人工智能语言模型，我没有去过。你应该去看看。"
    )
    assert chinese is not None
    assert chinese.text == "巴黎是法国的首都，位于塞纳河畔，有两百万人口。你应该去看看。"


@pytest.mark.parametrize(
    "text",
    [
        "I am ChatGPT. How can I help you?",
        "I am ChatGPT, a large language model that was trained on text. That is what I am, and what you ask me.",
        "```python\n# I am ChatGPT\nprint(1)\n```\nThis prints the number one to the screen, as you asked.",
    ],
)
def test_where_nothing_useful_is_left_there_is_no_text(text: str) -> None:
    cut = cut_identity(text)
    assert cut is not None
    assert cut.text is None


def test_long_texts_take_time_by_their_length() -> None:
    started = time.process_time()
    for text in (
        "As an AI, I am. ",
        "I am an AI assistant and as an AI ",
        "I am Claude, an ",
        "als ein KI ",
        "作为AI，",
    ):
        cut_identity(text * (200_000 // len(text)))
        refusal("I'm sorry" + text * 10_000)
        unfinished(text * 10_000)
    assert time.process_time() - started < 20


@pytest.mark.parametrize(("name", "text"), examples(refusal_phrases(), "hit"))
def test_refusals_are_known(name: str, text: str) -> None:
    found = refusal(f"\n{text} More of it.")
    assert found is not None
    assert found.id == name


@pytest.mark.parametrize(("name", "text"), examples(refusal_phrases(), "honest"))
def test_honest_openings_are_no_refusals(name: str, text: str) -> None:
    assert refusal(text) is None, name


@pytest.mark.parametrize(
    ("text", "reason", "why"),
    [
        ("It is done.", "length", "finish_reason is length"),
        ("It is done.", "max_tokens", "finish_reason is max_tokens"),
        ("<think>So it is.", None, "<think> is not closed"),
        ("<think>So.</think>\nAnd then <think>", "stop", "<think> is not closed"),
        ("Look:\n```python\nprint(1)\n", "stop", "a block of code is not closed"),
        ("It is so. And then the", None, "ends in the middle of a sentence"),
        ("All is well.\nThe cat sat on the mat and,", None, "ends in the middle of a sentence"),
        ("巴黎是首都。它位于", None, "ends in the middle of a sentence"),
        ("It is so. And then the", "stop", None),  # its writer says that it is over
        ("It is done.", None, None),
        ("He said: “It is done.”", None, None),
        ("Paris", None, None),
        ("It is so.\nThe End", None, None),
        ("It has. Many:\n- one of the long ones here\n2. two of the long ones here", None, None),
        ("Look.\n```\nprint(1)\n```", None, None),
        ("It is so. Well done 🎉", None, None),
    ],
)
def test_what_is_unfinished_says_why(text: str, reason: str | None, why: str | None) -> None:
    assert unfinished(text, reason) == why


@pytest.mark.data
def test_real_stories_that_are_cut_are_found(real_data: Path) -> None:
    lines = (real_data / "stories260k" / "train.jsonl").read_text().splitlines()[:500]
    stories = [json.loads(line)["text"] for line in lines]
    assert not [story for story in stories if cut_identity(story) or refusal(story)]
    whole = [story for story in stories if story.rstrip().endswith((".", "!", "?", '"', "”", "The End"))]
    assert not [story for story in whole if unfinished(story)]
    middles = [story[: story.index(" ", len(story) // 2)] for story in whole]
    within = [text for text in middles if text[-1].isalnum()]
    found = sum(unfinished(text) is not None for text in within)
    assert len(within) > 300
    assert found / len(within) > 0.75  # what follows a line's end within 5 words is not told from a title
