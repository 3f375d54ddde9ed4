"""What a gate says of a model: each limit alone, and the worst of them."""

import math
import re
from dataclasses import field
from typing import Literal

from pydantic.dataclasses import dataclass

Outcome = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True)
class Check:
    """What one limit says of a model.

    Attributes:
        limit: its name in a recipe.
        outcome: `pass` when the whole 95 % interval holds the limit, `fail` when none of it does, `undecided` between.
        passed: whether it lets the model pass.
        reason: one sentence.
        more_examples: for an undecided outcome, about how many more evaluation examples (for a slice: of its kind)
            would decide it at this estimate; None when decided, or when no number would.
        nearest: where it does not let the model pass, the tightest round limit that would, as a recipe says it
            (`2.4pp`); None where it passes, and where none would.
    """

    limit: str
    outcome: Outcome
    passed: bool
    reason: str
    more_examples: int | None = None
    nearest: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What a gate says of a model: the worst of what its limits say.

    Attributes:
        outcome: `fail` if one limit is missed, else `undecided` if one is, else `pass`.
        passed: whether all limits let the model pass, and the run goes on.
        reason: one sentence or several: of the limits that stop the model, else of the drop.
        more_examples: the most that an undecided limit asks for; None when decided, or when no number decides one.
        checks: each limit alone.
    """

    outcome: Outcome
    passed: bool
    reason: str
    more_examples: int | None = None
    checks: list[Check] = field(default_factory=list)


def verdict_of(checks: list[Check]) -> Verdict:
    """The verdict that some checks make together; the first is that of the drop."""
    undecided = [check for check in checks if check.outcome == "undecided"]
    failed = any(check.outcome == "fail" for check in checks)
    asked = [check.more_examples for check in undecided]
    return Verdict(
        outcome="fail" if failed else "undecided" if undecided else "pass",
        passed=all(check.passed for check in checks),
        reason="; ".join([check.reason for check in checks if not check.passed] or [checks[0].reason]),
        more_examples=None if failed else max((n for n in asked if n), default=None) if all(asked) else None,
        checks=checks,
    )


def nearest_in_words(verdict: Verdict) -> str | None:
    """`max_drop: 2.4pp and max_size: 21MB`: what the missed limits would have to be; None without any."""
    near: dict[str, str] = {}
    for check in verdict.checks:
        name = in_recipe(check.limit)
        if check.nearest and (name not in near or _wider(name, check.nearest, near[name])):
            near[name] = check.nearest
    told = [f"{name}: {limit}" for name, limit in near.items()]
    return " and ".join(filter(None, (", ".join(told[:-1]), told[-1]))) if told else None


def in_recipe(limit: str) -> str:
    """A limit's name in a recipe, which is one for all sets of examples: `max_drop` of `shifted max_drop`."""
    return limit.rpartition(" ")[2]


def _wider(name: str, one: str, other: str) -> bool:
    """Whether the one limit lets more pass than the other, of the same unit."""
    a, b = (float(re.match(r"[\d.]+", text)[0]) for text in (one, other))  # type: ignore[index]
    return a < b if name.startswith("min") else a > b


def examples_to_decide(examples: int, gap: float, arm: float) -> int | None:
    """Examples to add until an interval's arm towards the limit is below the distance to it; it shrinks as 1/√N."""
    return None if gap < 1e-9 else max(1, math.ceil(examples * ((arm / gap) ** 2 - 1)))


def ask(more: int | None, kind: str = "examples") -> str:
    """That many more examples in words, for a sentence on what is undecided."""
    return f"about {more:,} more {kind} would decide it" if more else "no number of examples would decide it"
