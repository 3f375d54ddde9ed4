"""Sets of nodes in floating point: made, measured on held-out examples and judged, each once and kept on the disk."""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from potstill.export.calibrate import calibration_indices
from potstill.export.graph import model_bytes
from potstill.export.quantize import Quantized, prepare, quantize
from potstill.export.repairs import repaired_graph, repairs_beside
from potstill.export.search_record import Ended, Search, Try
from potstill.export.sensitivity import Graph, Sensitivity, apart, sensitivities
from potstill.targets.target import Repair, Scheme
from potstill.validate.data import Examples
from potstill.validate.encoder import Encoder
from potstill.validate.files import read_json, sha256_file, sha256_json, write_json
from potstill.validate.model import Model
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
REPAIRS: tuple[Repair, ...] = ("equalize", "bias")  # of a static scheme, tried before nodes are left in float
Judging = Callable[[Path, tuple[str, ...]], tuple[Scorecard, Verdict]]


@dataclass(frozen=True)
class Limits:
    """How a search may go.

    Attributes:
        seconds: after which no further set is tried; what runs then is allowed to finish.
        folder: where tries are kept, so that a search that was killed goes on.
        asked: a hash of the gate and of what it is asked on.
    """

    seconds: float
    folder: Path
    asked: str


@dataclass(frozen=True)
class Start:
    """What a search is about.

    Attributes:
        graph: the float graph, as `quantize` takes it.
        quantized: the same in the scheme, nothing left in float.
        plain: what the gate said of that.
        scheme: the number formats.
        model: whose graph it is.
        encode: of the package.
        calibrate: examples for the ranges; those that do not go into these rank and measure.
        seed: of their choice.
        session_options: of the target's runtime.
    """

    graph: Path
    quantized: Path
    plain: tuple[Scorecard, Verdict]
    scheme: Scheme
    model: Model
    encode: Encoder
    calibrate: Examples
    seed: int
    session_options: dict[str, str]


class OutOfTimeError(Exception):
    """The search has had its time."""


class Sets:
    """Sets of nodes made, measured and judged, each once.

    `before`: the search whose scheme has no repairs, where this one has `added` some.
    """

    def __init__(self, start: Start, limits: Limits, judge: Judging, work: Path, before: "Sets | None" = None) -> None:
        self.start, self.limits, self._judge, self._work, self.before = start, limits, judge, work, before
        self.began: float = before.began if before else time.monotonic()
        self.added = [one for one in start.scheme.repairs if before and one not in before.start.scheme.repairs]
        self.key = self._key()
        used = calibration_indices(start.calibrate, start.seed)
        rest = np.setdiff1d(np.random.default_rng(start.seed).permutation(len(start.calibrate)), used)
        self.calibrated_too = len(rest) < RANKED_BY
        self.held = self._drawn(used if self.calibrated_too else rest, HELD_OUT)
        self.ranked_by = self._drawn(used, RANKED_BY)
        self.tries: dict[frozenset[str], Try] = {}
        self.judged: dict[frozenset[str], tuple[Scorecard, Verdict]] = {}
        self.log: dict[tuple[str, frozenset[str]], Try] = before.log if before else {}  # all tries, in order
        self.missed = 0  # sets judged with `more_bits`, where these do not hold the gate

    def _key(self) -> str:
        start = self.start
        of = [sha256_file(start.graph), start.scheme.model_dump(), start.calibrate.digest, start.seed]
        return sha256_json([*of, start.session_options])

    def _drawn(self, indices: NDArray[np.int64], most: int) -> Examples:
        some = np.random.default_rng(self.start.seed).permutation(indices)[:most]
        return self.start.calibrate.take(some.tolist(), "search")

    def repaired(self) -> "Sets | None":
        """The same search on the repaired graph; None where there is nothing to add.

        Raises:
            OutOfTimeError: there is no time left.
        """
        scheme, folder = self.start.scheme, self._work / "repaired"
        added = [one for one in REPAIRS if one not in scheme.repairs] if scheme.method == "static" else []
        if not added:
            return None
        self._in_time()
        folder.mkdir()
        repaired = scheme.model_copy(update={"repairs": [*scheme.repairs, *added]})
        return Sets(replace(self.start, scheme=repaired), self.limits, self._judge, folder, self)

    def far(self) -> bool:
        """Whether this is not clearly nearer the float model than the search before it, all nodes in integers."""
        nothing = frozenset[str]()
        return self.before is not None and (
            self.measured(nothing).distance * CLOSE > self.before.measured(nothing).distance
        )

    def _in_time(self) -> None:
        if time.monotonic() - self.began > self.limits.seconds:
            raise OutOfTimeError

    @cached_property
    def prepared(self) -> Path:
        """The float graph that is quantised."""
        path = self._work / "prepared.onnx"
        if self.start.scheme.repairs:
            repaired_graph(repairs_beside(self.ranges), path)
        else:
            prepare(self.start.graph, path)
        return path

    @cached_property
    def graph(self) -> Graph:
        """Its names and ties."""
        return Graph(self.prepared)

    # What is kept on the disk.

    def _kept(self, name: str, what: Any, kind: Any, make: Callable[[], Any]) -> Any:
        """A value made now, or read from where an earlier search left it."""
        path = self.limits.folder / f"{name}-{sha256_json([self.key, what])[:16]}.json"
        if not path.is_file():
            write_json(path, TypeAdapter(kind).dump_python(make(), mode="json"))
        return TypeAdapter(kind).validate_python(read_json(path))

    @cached_property
    def ranking(self) -> list[Sensitivity]:
        """The nodes in integers, the dearest for its multiply-adds first."""
        start = self.start
        plain = self._made(frozenset()) if self.added else start.quantized
        return list(
            self._kept(
                "ranking",
                self.ranked_by.digest,
                list[Sensitivity],
                lambda: sensitivities(
                    self.prepared,
                    plain,
                    replace(start.model, encode=start.encode),
                    self.ranked_by,
                    start.session_options,
                ),
            )
        )

    @cached_property
    def ranges(self) -> Path:
        """The activation ranges, measured once; repairs are kept beside them."""
        path, start = self.limits.folder / f"ranges-{self.key[:16]}.json", self.start
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            new, out = self._work / "ranges.json", self._work / "ranges.onnx"
            quantize(start.graph, out, start.scheme, start.calibrate, start.encode, start.seed, ranges=new)
            if repairs_beside(new).is_dir():
                shutil.rmtree(repairs_beside(path), ignore_errors=True)  # of a search that was killed right here
                repairs_beside(new).replace(repairs_beside(path))
            if new.is_file():  # dynamic schemes have none
                new.replace(path)
        return path

    # One set of nodes.

    def names(self, nodes: frozenset[str]) -> tuple[str, ...]:
        """All that stays in float with some weighted nodes: what lies between them too, and all if they are all."""
        if not nodes:
            return ()
        if len(nodes) == len(self.ranking):
            return tuple(node.name for node in self.graph.model.graph.node)
        return (*sorted(nodes), *self.graph.between(nodes))

    def share(self, nodes: frozenset[str]) -> float:
        """Share of the multiply-adds that are in integers with some nodes in float; of embeddings alone, of these."""
        weights = {one.node: one.macs for one in self.ranking}
        if not any(weights.values()):
            weights = dict.fromkeys(weights, 1)
        return 1 - sum(weights[node] for node in nodes) / max(sum(weights.values()), 1)

    def kept_more_bits(self, nodes: frozenset[str]) -> str | None:
        """What the nodes that are kept out of the integers have, where that is not float."""
        return self.start.scheme.more_bits if nodes else None

    def write(self, nodes: frozenset[str], out: Path) -> Quantized:
        """Write the model with some nodes in float."""
        start, left = self.start, self.names(nodes)
        return quantize(
            start.graph, out, start.scheme, start.calibrate, start.encode, start.seed,
            keep_float=left, ranges=self.ranges,
        )  # fmt: skip

    def _made(self, nodes: frozenset[str]) -> Path:
        """The model file with some nodes in float."""
        out = self._work / f"{sha256_json(sorted(nodes))[:16]}.onnx"
        if not out.is_file():
            self.write(nodes, out)
        return out

    def _rows(self, path: Path, label: str) -> NDArray[np.float32]:
        """What a model file says of the held-out examples, (R, C)."""
        start = self.start
        predictor = OnnxPredictor(
            path, start.encode, path.name, read=start.model.read, session_options=start.session_options
        )
        with track(label, len(self.held)) as advance:
            found = []
            for i in range(len(self.held)):
                found.append(predictor(self.held.rows([i])))
                advance(1)
        return one_below_another(found)

    @cached_property
    def _float_rows(self) -> NDArray[np.float32]:
        return self._rows(self.start.graph, "the float model")

    def measured(self, nodes: frozenset[str]) -> Try:
        """A set with its distance to the float model.

        Raises:
            OutOfTimeError: it would be made, and there is no time left.
        """

        def make() -> Try:
            if nodes or self.added:
                self._in_time()
            started, path = time.monotonic(), self._made(nodes)
            rows = self._rows(path, f"search: {len(nodes)} of {len(self.ranking)} nodes in float")
            return Try(
                left_float=sorted(nodes),
                int8_share=self.share(nodes),
                distance=float(apart(self._float_rows, rows, self.start.model).mean()),
                size_bytes=model_bytes(path),
                seconds=time.monotonic() - started,
                repairs=list(self.added),
            )

        if nodes not in self.tries:
            self._note(nodes, self._kept("try", [sorted(nodes), self.held.digest], Try, make))
        return self.tries[nodes]

    def _note(self, nodes: frozenset[str], tried: Try) -> None:
        self.tries[nodes] = self.log[self.key, nodes] = tried

    def judge(self, nodes: frozenset[str]) -> bool:
        """Whether the gate lets a set pass on the evaluation set.

        Raises:
            OutOfTimeError: it would have to be made or asked, and there is no time left.
        """
        known = self.measured(nodes)

        def make() -> tuple[Scorecard, Verdict]:
            if not nodes and not self.added:
                return self.start.plain
            self._in_time()
            more = self.kept_more_bits(nodes)
            return self._judge(self._made(nodes), (*self.added, *([more] if more else []), *self.names(nodes)))

        asked = [sorted(nodes), self.limits.asked]
        card, verdict = self._kept("judged", asked, tuple[Scorecard, Verdict], make)
        self.judged[nodes] = card, verdict
        apart_ = card.difference_interval
        asked_too = replace(
            known,
            difference=card.difference,
            low=apart_.low,
            high=apart_.high,
            outcome=verdict.outcome,
            passed=verdict.passed,
        )
        self._note(nodes, asked_too)
        return bool(verdict.passed)

    # The way through the sets.

    def look(self) -> None:
        """Judge sets until no better one is in sight.

        Raises:
            OutOfTimeError: before that.
        """
        if self.judge(frozenset()):
            return
        failed, passed, count = self.measured(frozenset()).distance, 0.0, 0
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
                passed = max(self.measured(nodes).distance, LEAST)
            else:
                failed = self.measured(nodes).distance

    def _by_more_bits(self) -> float:
        """The distance with `more_bits` for all nodes if that holds the gate; else 0, and from now on float32.

        Raises:
            OutOfTimeError: before that is known.
        """
        every = frozenset(one.node for one in self.ranking)
        if self.judge(every):
            return max(self.measured(every).distance, LEAST)
        self.missed += 1
        del self.tries[every], self.judged[every]
        self.start = replace(self.start, scheme=self.start.scheme.model_copy(update={"more_bits": None}))
        self.key = self._key()
        for left in self._work.glob("*.onnx"):
            if left != self.prepared:
                left.unlink()
        return 0.0

    def _least(self, aim: float) -> frozenset[str]:
        """A small set whose distance is at most `aim`; all nodes if no other is."""
        names = [one.node for one in self.ranking]
        low, high = 0, len(names)  # of the beginnings, this one is too far and this one is near enough
        while high - low > 1:
            middle = (low + high) // 2
            if self.measured(frozenset(names[:middle])).distance <= aim:
                high = middle
            else:
                low = middle
        nodes = frozenset(names[:high])
        spare = sorted((one for one in self.ranking if one.node in nodes), key=lambda one: -one.macs)
        for one in spare[:GIVEN_BACK]:
            if time.monotonic() - self.began > self.limits.seconds / 2:  # the other half is for judging
                break
            fewer = nodes - {one.node}
            nodes = fewer if self.measured(fewer).distance <= aim else nodes
        return nodes

    def merit(self, nodes: frozenset[str]) -> tuple[float, ...]:
        """By what judged sets are compared, the larger the better.

        One that does not pass is below the plain one if it misses a limit that the plain one holds.
        """
        (card, verdict), tried = self.judged[nodes], self.tries[nodes]
        held = sum(check.passed for check in verdict.checks)
        mine, plain = (
            {check.limit for check in one.checks if not check.passed} for one in (verdict, self.start.plain[1])
        )
        return (verdict.passed, mine <= plain, tried.int8_share if verdict.passed else held, card.difference)

    def record(self, nodes: frozenset[str], ended: Ended) -> Search:
        """What is kept, and how it was found, with all tries and how many were judged."""
        _, verdict = self.judged[nodes]
        return Search(
            ended=ended,
            passed=verdict.passed,
            asked=self.limits.asked,
            keep_float=list(self.names(nodes)),
            left=[one for one in self.ranking if one.node in nodes],
            weighted=len(self.ranking),
            int8_share=self.share(nodes),
            nearest=nearest_in_words(verdict),
            judged=sum(one.passed is not None for one in self.log.values()),
            held_out=len(self.held),
            calibrated_too=self.calibrated_too,
            seconds=time.monotonic() - self.began,
            tries=list(self.log.values()),
            repairs=list(self.added),
            more_bits=self.kept_more_bits(nodes),
        )
