"""Which nodes to leave in floating point, so that a gate holds that all of them in integers miss.

The nodes are ranked by what their integers cost for each multiply-add. What a set in float brings is measured on
examples that neither judge nor calibrate: how far the output still is from the float model's. For an aim at that
distance, the shortest beginning of the ranking that reaches it is found by bisection, and what it can spare is given
back to the integers, the most multiply-adds first. Only that set is judged on the evaluation set, and at most
`MOST_JUDGED` are: a limit that is asked often of the same examples is held by luck at last. The next aim lies between
those that passed and those that failed. So a search costs log N quantised graphs for each aim, and few evaluations.

A static graph is repaired before that (`REPAIRS`). Where its integers are clearly nearer the float model then, it is
judged so; the search goes on from there if it fails.
"""

import tempfile
from pathlib import Path

from potstill.export.quantize import Quantized
from potstill.export.search_record import Ended, Search
from potstill.export.search_sets import Judging, Limits, OutOfTimeError, Sets, Start
from potstill.targets.target import Scheme
from potstill.validate.scorecard import Scorecard
from potstill.validate.verdict import Verdict

COSTS = ("max_size", "max_latency", "max_memory")  # more bits do not help these


def helps(verdict: Verdict | None) -> bool:
    """Whether more bits may help what a verdict misses: not where it is only a cost."""
    missed = [check.limit for check in verdict.checks if not check.passed] if verdict else []
    return any(limit not in COSTS for limit in missed)


def searchable(scheme: Scheme) -> bool:
    """Whether a scheme has integers that nodes can be left out of."""
    return scheme.method not in ("float16", "float32")


def search(start: Start, limits: Limits, judge: Judging) -> tuple[Search, Quantized | None, Scorecard, Verdict]:
    """Find which nodes to leave in float, and write the model so at `start.quantized`.

    Among the sets that passed, that with the most multiply-adds in integers is taken; where none did, that which holds
    the most limits and loses least, which may be the plain one.

    Args:
        start: what is to be quantised.
        limits: on the search.
        judge: of a model file and the names of the nodes in float in it, the scorecard and the gate's verdict.

    Returns:
        The record; what became of the graph, None where the plain one stays; its scorecard and verdict.
    """
    with tempfile.TemporaryDirectory(dir=start.quantized.parent, prefix=".search.") as work:
        plain = found = Sets(start, limits, judge, Path(work))
        ended: Ended = "through"
        try:
            plain.judge(frozenset())
            if (repaired := plain.repaired()) and not repaired.far():
                found = repaired
            found.look()
        except OutOfTimeError:
            ended = "out of time"
        searches = [plain, found] if found is not plain else [plain]
        sets = [(one, nodes) for one in searches for nodes in one.judged]
        best, nodes = max(sets, key=lambda one: one[0].merit(one[1]))
        record = best.record(nodes, ended)
        made = best.write(nodes, start.quantized) if nodes or best.added else None
        return record, made, *best.judged[nodes]
