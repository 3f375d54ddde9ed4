"""A limit on what leaves a target's accelerator, and what a coverage says of it."""

from potstill.targets.coverage import Coverage
from potstill.targets.target import Target
from potstill.targets.work import COUNTED
from potstill.validate.gate import Gate
from potstill.validate.units import PARSERS, nearest
from potstill.validate.verdict import Check, Verdict, verdict_of

LIMIT = "max_fallback"
NAMED = 5  # nodes in a sentence


def with_fallback(
    verdict: Verdict | None, coverage: Coverage | None, target: Target, gate: Gate | None
) -> Verdict | None:
    """A package's verdict with the limit on what leaves: the gate's or the target's own, whichever is tighter.

    None where there is no verdict and no limit. Where the coverage is unknown, it is undecided, and by the gate's
    `undecided` that lets pass or not.
    """
    own = target.model.max_fallback
    limits = [PARSERS[LIMIT](own)] if own else []
    limits += [gate.max_fallback] if gate and gate.max_fallback is not None else []
    if not limits:
        return verdict
    check = judge_fallback(coverage, min(limits), strict=gate is not None and gate.undecided == "strict")
    return verdict_of([*(verdict.checks if verdict else []), check])


def judge_fallback(coverage: Coverage | None, limit: float, *, strict: bool) -> Check:
    """Whether no more than a share of the nodes, and of the multiply-adds, leaves the target's first provider.

    Args:
        coverage: None where the CPU provider is the first, which nothing leaves.
        limit: a share of 1.
        strict: whether what cannot be known stops the package.
    """
    if coverage is None:
        return Check(LIMIT, "pass", True, "the target's first provider is that of the CPU: nothing leaves it")
    if coverage.nodes_left is None:
        return Check(
            LIMIT, "undecided", not strict, f"{coverage.in_words().removesuffix('.')}, so {LIMIT} was not checked"
        )
    work = coverage.work_left if coverage.left else 0.0
    share = max(coverage.nodes_left, work or 0.0)
    told = f"{coverage.kind}: {in_words(coverage)} {coverage.provider}, limit {limit * 100:g}%"
    if share > limit:
        near = nearest(LIMIT, share * 100, "%", lambda tried: share <= tried)
        return Check(LIMIT, "fail", False, f"{told}; {_what_to_do(coverage)}", nearest=near)
    if work is None:
        told = f"{told}; the share of the work is unknown, because the file does not run here"
        return Check(LIMIT, "undecided", not strict, told)
    return Check(LIMIT, "pass", True, told)


def in_words(coverage: Coverage) -> str:
    """`1.2% of the nodes and 0.0% of the multiply-adds leave`."""
    nodes = 0.0 if coverage.nodes_left is None else coverage.nodes_left
    work = coverage.work_left if coverage.left else 0.0
    told = "an unknown share" if work is None else f"{work:.1%}"
    return f"{nodes:.1%} of the nodes and {told} of the multiply-adds leave"


def _what_to_do(coverage: Coverage) -> str:
    """The nodes that leave, by name, why, and what helps."""
    dearest = sorted(coverage.left, key=lambda one: one.operator not in COUNTED)
    names = ", ".join(f"{one.name} ({one.reason})" for one in dearest[:NAMED])
    more = f" and {len(coverage.left) - NAMED} more" if len(coverage.left) > NAMED else ""
    fixed = any("no fixed shape" in one.reason for one in coverage.left)
    hint = "export with model.shapes: static" if fixed else "choose a format or operators that the provider takes"
    return f"they are {names}{more}; {hint}, or widen {LIMIT}"
