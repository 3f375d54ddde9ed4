"""Answers that end before they are over."""

import re

STOPPED_SHORT = ("length", "max_tokens")  # `finish_reason` of OpenAI's API, `stop_reason` of Anthropic's
FENCE = re.compile(r"^\s{0,3}(?:```|~~~)", flags=re.M)
FINISHED = re.compile(r"[.!?…:;。！？：；”\"'’»)\]}>*_`~|$%=]$|[^\w\s,–—-]$")
SENTENCE = re.compile(r"[.!?…][\"'”’»)\]*_]*(?:\s|$)|[。！？]")
PROSE = 6  # words
ITEM = re.compile(r"\s*(?:[-*+•#>|]|\d+[.)]|```|~~~)")  # of a list, a heading, a quotation, a table, code


def unfinished(text: str, finish_reason: str | None = None) -> str | None:
    """Why an answer is not whole, in words; None where nothing says so.

    A sentence without an end is looked for only where the writer did not say why it stopped, and only in a last line
    that is prose: it has the end of another sentence in it or 6 words, and is no heading, item, table or code.

    Args:
        text: reasoning and answer.
        finish_reason: as an API gives it.
    """
    if finish_reason in STOPPED_SHORT:
        return f"finish_reason is {finish_reason}"
    if text.count("<think>") > text.count("</think>"):
        return "<think> is not closed"
    if len(FENCE.findall(text)) % 2:
        return "a block of code is not closed"
    if finish_reason:
        return None
    last = text.rstrip().rpartition("\n")[2]
    prose = len(last.split()) >= PROSE or SENTENCE.search(last)
    if FINISHED.search(last) or ITEM.match(last) or not prose or not SENTENCE.search(text):
        return None
    return "ends in the middle of a sentence"
