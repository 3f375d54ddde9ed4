"""Sets of nodes in floating point: made, measured on held-out examples and judged, each once and kept on the disk."""

import math
import shutil
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from potstill.export.calibrate import calibration_indices
from potstill.export.graph import model_bytes
from potstill.export.net import Net
from potstill.export.quantize import Quantized, prepare
from potstill.export.repairs import repaired_graph, repairs_beside
from potstill.export.search_files import Files, Judging, Limits, Nodes, Start, digest
from potstill.export.search_record import Search, Try
from potstill.export.search_time import Clock
from potstill.export.sensitivity import Sensitivity, apart, nodes_between, sensitivities
from potstill.targets.target import Repair
from potstill.validate.data import Examples
from potstill.validate.predictor import OnnxPredictor, one_below_another
from potstill.validate.progress import track
from potstill.validate.scorecard import Scorecard
from potstill.validate.verdict import Verdict, nearest_in_words

MOST_JUDGED = 6  # sets on the evaluation set, beside the plain one
CLOSE = 1.1  # distances whose ratio is below this are not told apart
LEAST = 1e-12  # of a distance, so that the next aim is not zero
GIVEN_BACK = 12  # nodes that are tried to be given back for one aim
RANKED_BY = 32  # examples for the ranking
HELD_OUT = 256  # examples for the distance to the float model
ROWS = 4096  # of them at most, where an example has several
REPAIRS: tuple[Repair, ...] = ("equalize", "bias")  # of a static scheme, tried before nodes are left in float
NOTHING = Nodes()


class Sets:
    """Sets of nodes made, measured and judged, each once.

    `before`: the search whose scheme has no repairs, where this one has `added` some.
    """

    def __init__(self, start: Start, limits: Limits, judge: Judging, work: Path, before: "Sets | None" = None) -> None:
        self.limits, self._judge, self._work, self.before = limits, judge, work, before
        self.clock: Clock = before.clock if before else Clock(limits.seconds)
        self.files = Files(start, limits, self.clock, work)
        self.added = [one for one in start.scheme.repairs if before and one not in before.start.scheme.repairs]
        used = calibration_indices(start.calibrate, start.seed)
        rest = np.setdiff1d(np.random.default_rng(start.seed).permutation(len(start.calibrate)), used)
        self.calibrated_too = len(rest) < RANKED_BY
        self.held = self._drawn(used if self.calibrated_too else rest, HELD_OUT)
        self.ranked_by = self._drawn(used, RANKED_BY)
        self.ranked: list[Sensitivity] = []  # once they are
        self.tries: dict[Nodes, Try] = {}
        self.judged: dict[Nodes, tuple[Scorecard, Verdict, str]] = {}  # the last is the `digest` of the file
        self.log: dict[tuple[str, Nodes], Try] = before.log if before else {}  # all tries, in order
        self.missed = 0  # sets judged with `more_bits`, where these do not hold the gate
        self._near: Nodes | None = None  # the last set that reached the aim

    @property
    def start(self) -> Start:
        """What the search is about."""
        return self.files.start

    def _drawn(self, indices: NDArray[np.int64], most: int) -> Examples:
        some = np.random.default_rng(self.start.seed).permutation(indices)[:most]
        drawn = self.start.calibrate.take(some.tolist(), "search")
        if drawn.offsets is None:
            return drawn
        fit = max(1, int(np.searchsorted(drawn.offsets, ROWS, side="right")) - 1)
        return drawn.take(list(range(min(fit, len(drawn)))), "search")

    def repaired(self) -> "Sets | None":
        """The same search on the repaired graph; None where there is nothing to add.

        Raises:
            OutOfTimeError: there is no time left.
        """
        scheme, folder = self.start.scheme, self._work / "repaired"
        added = [one for one in REPAIRS if one not in scheme.repairs] if scheme.method == "static" else []
        if not added:
            return None
        self.clock.doing = "the repairs"
        self.clock.check()
        folder.mkdir()
        repaired = scheme.model_copy(update={"repairs": [*scheme.repairs, *added]})
        return Sets(replace(self.start, scheme=repaired), self.limits, self._judge, folder, self)

    def far(self) -> bool:
        """Whether this is not clearly nearer the float model than the search before it, all nodes in integers.

        Raises:
            OutOfTimeError: before that is known.
        """
        return self.before is not None and self.before.distance(NOTHING) < CLOSE * self.distance(NOTHING)

    def close(self) -> None:
        """Remove its model files."""
        shutil.rmtree(self._work)

    @cached_property
    def prepared(self) -> Path:
        """The float graph that is quantised."""
        path = self._work / "prepared.onnx"
        if self.start.scheme.repairs:
            repaired_graph(repairs_beside(self.files.ranges), path)
        else:
            prepare(self.start.graph, path)
        return path

    @cached_property
    def graph(self) -> Net:
        """Its names and ties."""
        return Net.read(self.prepared)

    @property
    def ranking(self) -> list[Sensitivity]:
        """The nodes in integers, the dearest for its multiply-adds first.

        Raises:
            OutOfTimeError: before that is known.
        """
        if not self.ranked:
            self.ranked = self.files.kept("ranking", self.ranked_by.digest, list[Sensitivity], self._rank)
        return self.ranked

    def _rank(self) -> list[Sensitivity]:
        self.clock.doing, start = "the ranking", self.start
        self.clock.check()
        model = replace(start.model, encode=self.files.encode)
        plain = self._file(NOTHING)
        return sensitivities(
            self.prepared, plain, model, self.ranked_by, start.session_options, before_run=self.clock.check
        )

    # One set of nodes.

    def names(self, nodes: Nodes) -> tuple[str, ...]:
        """All that stays in float with some weighted nodes: what lies between them too, and all if they are all."""
        if not nodes:
            return ()
        if len(nodes) == len(self.ranking):
            return tuple(node.name for node in self.graph.model.graph.node)
        return (*sorted(nodes), *nodes_between(self.graph, nodes))

    def share(self, nodes: Nodes) -> float:
        """Share of the multiply-adds that are in integers with some nodes in float; of embeddings alone, of these."""
        if not nodes:
            return 1.0
        weights = {one.node: one.macs for one in self.ranking}
        if not any(weights.values()):
            weights = dict.fromkeys(weights, 1)
        return 1 - sum(weights[node] for node in nodes) / max(sum(weights.values()), 1)

    def kept_more_bits(self, nodes: Nodes) -> str | None:
        """What the nodes that are kept out of the integers have, where that is not float."""
        return self.start.scheme.more_bits if nodes else None

    def _file(self, nodes: Nodes) -> Path:
        """The model file with some nodes in float."""
        plain = not nodes and not self.added
        return self.start.quantized if plain else self.files.made(nodes, self.names(nodes))

    def _rows(self, path: Path, label: str) -> NDArray[np.float32]:
        """What a model file says of the held-out examples, (R, C)."""
        start = self.start
        predictor = OnnxPredictor(
            path, self.files.encode, path.name, read=start.model.read, session_options=start.session_options
        )
        with track(label, len(self.held)) as advance:
            found = []
            for i in range(len(self.held)):
                found.append(predictor(self.held.rows([i])))
                advance(1)
        return one_below_another(found)

    @cached_property
    def _float_rows(self) -> NDArray[np.float32]:
        return self.before._float_rows if self.before else self._rows(self.start.graph, "the float model")

    def distance(self, nodes: Nodes) -> float:
        """How far a set is from the float model; it is noted among the tries.

        Raises:
            OutOfTimeError: it would be measured, and there is no time left.
        """

        def make() -> Try:
            self.clock.doing = "the measuring" if nodes or not self.added else "the repairs"
            self.clock.check()
            started, path = time.monotonic(), self._file(nodes)
            rows = self._rows(path, f"search: {len(nodes)} of {len(self.ranked)} nodes in float" if nodes else "search")
            return Try(
                left_float=sorted(nodes),
                int8_share=self.share(nodes),
                distance=float(apart(self._float_rows, rows, self.start.model).mean()),
                size_bytes=model_bytes(path),
                seconds=time.monotonic() - started,
                repairs=list(self.added),
            )

        known = self.tries.get(nodes)
        if known is None or known.distance is None:
            known = self.files.kept("try", [sorted(nodes), self.held.digest], Try, make)
            self._note(nodes, known)
        assert known.distance is not None
        return known.distance

    def _note(self, nodes: Nodes, tried: Try) -> None:
        """Put a try down, with what the gate said of it where it was asked."""
        if nodes in self.judged:
            card, verdict, _ = self.judged[nodes]
            apart_ = card.difference_interval
            tried = replace(
                tried,
                difference=card.difference,
                low=apart_.low,
                high=apart_.high,
                outcome=verdict.outcome,
                passed=verdict.passed,
            )
        self.tries[nodes] = self.log[self.files.key, nodes] = tried

    def begin(self) -> None:
        """Put the plain file down, which is judged already."""
        path = self.start.quantized
        self.judged[NOTHING] = *self.start.plain, digest(path)
        self._note(NOTHING, Try([], 1.0, None, model_bytes(path), 0.0))

    def judge(self, nodes: Nodes) -> bool:
        """Whether the gate lets a set pass on the evaluation set.

        Raises:
            OutOfTimeError: it would have to be made or asked, and there is no time left.
        """
        self.distance(nodes)

        def make() -> tuple[Scorecard, Verdict, str]:
            path, more = self._file(nodes), self.kept_more_bits(nodes)
            self.clock.doing = "the judging"
            self.clock.check()
            names = (*self.added, *([more] if more else []), *self.names(nodes))
            return *self._judge(path, names, self.files.encode), digest(path)

        if nodes not in self.judged:
            asked = [sorted(nodes), self.limits.asked]
            self.judged[nodes] = self.files.kept("judged", asked, tuple[Scorecard, Verdict, str], make)
            self._note(nodes, self.tries[nodes])
            self._drop()
        return bool(self.judged[nodes][1].passed)

    def _drop(self) -> None:
        """Keep no model file but the best of those that were judged and the last that reached the aim."""
        best = max(self.judged, key=self.merit, default=NOTHING)
        self.files.drop({best, best if self._near is None else self._near})

    # The way through the sets.

    def look(self) -> None:
        """Judge sets until no better one is in sight.

        Raises:
            OutOfTimeError: before that.
        """
        if self.judge(NOTHING):
            return
        failed, passed, count = self.distance(NOTHING), 0.0, 0
        if self.start.scheme.more_bits:
            passed = self._by_more_bits()
        while len(self.judged) + bool(self.added) + self.missed <= MOST_JUDGED and (
            not passed or failed > CLOSE * passed
        ):
            count += 1
            aim = math.sqrt(passed * failed) if passed else failed / 4**count
            nodes = self._least(aim)
            if nodes in self.judged and not passed:
                return  # all nodes are in float
            if nodes in self.judged:
                passed = aim
            elif self.judge(nodes):
                passed = max(self.distance(nodes), LEAST)
            else:
                failed = self.distance(nodes)

    def _by_more_bits(self) -> float:
        """The distance with `more_bits` for all nodes if that holds the gate; else 0, and from now on float32.

        Raises:
            OutOfTimeError: before that is known.
        """
        every = Nodes(one.node for one in self.ranking)
        if self.judge(every):
            return max(self.distance(every), LEAST)
        self.missed += 1
        del self.tries[every], self.judged[every]
        self.files.drop(set())
        start = replace(self.start, scheme=self.start.scheme.model_copy(update={"more_bits": None}))
        self.files = Files(start, self.limits, self.clock, self._work)
        return 0.0

    def _least(self, aim: float) -> Nodes:
        """A small set whose distance is at most `aim`; all nodes if no other is."""
        names, self._near = [one.node for one in self.ranking], None
        low, high = 0, len(names)  # of the beginnings, this one is too far and this one is near enough
        while high - low > 1:
            middle = (low + high) // 2
            if self._reaches(Nodes(names[:middle]), aim):
                high = middle
            else:
                low = middle
        nodes = Nodes(names[:high])
        spare = sorted((one for one in self.ranking if one.node in nodes), key=lambda one: -one.macs)
        for one in spare[:GIVEN_BACK]:
            if self.clock.spent > self.limits.seconds / 2:  # the other half is for judging
                break
            fewer = nodes - {one.node}
            nodes = fewer if self._reaches(fewer, aim) else nodes
        return nodes

    def _reaches(self, nodes: Nodes, aim: float) -> bool:
        """Whether a set's distance is at most `aim`; its model file goes where it is not."""
        near = self.distance(nodes) <= aim
        self._near = nodes if near else self._near
        self._drop()
        return near

    def merit(self, nodes: Nodes) -> tuple[float, ...]:
        """By what judged sets are compared, the larger the better.

        One that does not pass is below the plain one if it misses a limit that the plain one holds.
        """
        (card, verdict, _), tried = self.judged[nodes], self.tries[nodes]
        held = sum(check.passed for check in verdict.checks)
        mine, plain = (
            {check.limit for check in one.checks if not check.passed} for one in (verdict, self.start.plain[1])
        )
        return (verdict.passed, mine <= plain, tried.int8_share if verdict.passed else held, card.difference)

    def ship(self, nodes: Nodes) -> Quantized | None:
        """Put the file of a judged set in the plain one's place; None where that is the plain one.

        Raises:
            PotstillError: it had to be made again, and is another file than the one that was judged.
        """
        return self.files.ship(nodes, self.names(nodes), self.judged[nodes][2]) if nodes or self.added else None

    def record(self, nodes: Nodes, ended_in: str | None) -> Search:
        """What is kept, and how it was found, with all tries and how many were judged."""
        _, verdict, _ = self.judged[nodes]
        return Search(
            ended="out of time" if ended_in else "through",
            passed=verdict.passed,
            asked=self.limits.asked,
            keep_float=list(self.names(nodes)),
            left=[one for one in self.ranked if one.node in nodes],
            weighted=len(self.ranked),
            int8_share=self.share(nodes),
            nearest=nearest_in_words(verdict),
            judged=sum(one.passed is not None for one in self.log.values()),
            held_out=len(self.held),
            calibrated_too=self.calibrated_too,
            seconds=self.clock.spent,
            tries=list(self.log.values()),
            repairs=list(self.added),
            more_bits=self.kept_more_bits(nodes),
            ended_in=ended_in,
        )
