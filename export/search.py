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
from potstill.export.search_files import Judging, Limits, Start
from potstill.export.search_record import Search
from potstill.export.search_sets import Sets
from potstill.export.search_time import OutOfTimeError
from potstill.targets.target import Scheme
from potstill.validate.scorecard import Scorecard
from potstill.validate.verdict import Verdict

COSTS = ("max_size", "max_latency", "max_memory", "max_fallback")  # more bits do not help these


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
        judge: of a model file, the names of what was searched in it and what feeds it, the scorecard and the gate's
            verdict. What feeds it raises `OutOfTimeError` when the time is up, which is to be passed on.

    Returns:
        The record; what became of the graph, None where the plain one stays; its scorecard and verdict. The file is
        the one that was judged.

    Raises:
        PotstillError: the best file was judged by an earlier search, and came out as another one when made again.
    """
    with tempfile.TemporaryDirectory(dir=start.quantized.parent, prefix=".search.") as work:
        plain = found = Sets(start, limits, judge, Path(work))
        plain.begin()
        ended_in = None
        try:
            if repaired := plain.repaired():
                if repaired.far():
                    repaired.close()
                else:
                    found = repaired
            found.look()
        except OutOfTimeError as error:
            ended_in = str(error)
        plain.clock.stop()
        searches = [plain, found] if found is not plain else [plain]
        sets = [(one, nodes) for one in searches for nodes in one.judged]
        best, nodes = max(sets, key=lambda one: one[0].merit(one[1]))
        record = best.record(nodes, ended_in)
        made = best.ship(nodes)
        card, verdict, _ = best.judged[nodes]
        return record, made, card, verdict
