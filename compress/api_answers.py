"""Which of a teacher's answers stay: those that are right, those of the majority, or those a judge says yes to."""

import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

NUMBER = re.compile(r"(?<![\w.])[-+−]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?")
FRACTION = re.compile(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}")
SAID = re.compile(r"(?:####|\banswer\s*(?:is\b|:|=)\s*:?)[ \t*]*(\S.*)", re.IGNORECASE)
_TEX = re.compile(r"\\text\s*\{([^{}]*)\}|\\[,;! ]|\\(?:left|right)\b")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_RATIONAL = re.compile(r"[-+]?(?:\d{1,100}(?:\.\d{0,100})?|\.\d{1,100}|\d{1,100}/\d{1,100})")
JUDGE = """\
Here is a task and an answer to it.

[Task]
{task}

[Answer]
{answer}
{reference}
Is the answer correct, complete and to the point? Say yes or no, and nothing else."""


def normal(text: str) -> str:
    """An answer without case, outer quotes, brackets and stops; numbers shortened: `1,200.0` is `1200`."""
    plain = _TEX.sub(r"\1", FRACTION.sub(r"\1/\2", text))
    plain = " ".join(plain.casefold().split()).lstrip(" \"'`*$([{:").rstrip(" \"'`*$)]}.,;:!?")
    number = _THOUSANDS.sub("", plain).replace("$", "").replace("−", "-").removesuffix("%").removesuffix("\\").strip()
    if not _RATIONAL.fullmatch(number) or re.search(r"/0+$", number):
        return plain
    return str(Fraction(number))


def final_answer(text: str) -> str:
    """What a text ends up with, normalised.

    Its last `\\boxed{…}`; else what follows its last `####` or `answer is`, and of that the number it begins with; else
    its last number; else all of it.
    """
    if (boxed := _boxed(text)) is not None:
        return normal(boxed)
    if said := SAID.findall(text):
        number = NUMBER.match(said[-1])
        return normal(number[0] if number else said[-1])
    numbers = NUMBER.findall(text)
    return normal(numbers[-1] if numbers else text)


def is_right(text: str, answer: str) -> bool:
    """Whether an answer is the right one: all of it, or what it ends up with."""
    said = SAID.findall(text) if _boxed(text) is None else []
    return normal(answer) in {normal(text), final_answer(text), *map(normal, said[-1:])}


def majority(texts: Sequence[str | None], samples: int) -> str | None:
    """The final answer of more than half of a prompt's samples, those without an answer included; None if none is."""
    counts = Counter(final_answer(text) for text in texts if text)
    best = counts.most_common(1)
    return best[0][0] if best and 2 * best[0][1] > samples else None


def judge_prompt(task: str, answer: str, reference: str | None) -> str:
    """What a judge is asked."""
    known = f"\n[Reference answer]\n{reference}\n" if reference is not None else ""
    return JUDGE.format(task=task, answer=answer, reference=known)


def verdict(text: str) -> bool | None:
    """A judge's yes or no: its first word, or the only one of the two in its text; else None."""
    first = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
    said = {first[1].casefold()} if first else set(re.findall(r"\b(?:yes|no)\b", text.casefold()))
    return said == {"yes"} if len(said) == 1 else None


def _boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{…}` whose braces close."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for i in range(begin, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[begin + 1 : i]
    return None
