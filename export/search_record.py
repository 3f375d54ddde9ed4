"""What a search for nodes to leave in floating point tried, found and gave up."""

from dataclasses import field
from typing import Literal

from pydantic.dataclasses import dataclass

from potstill.export.sensitivity import Sensitivity
from potstill.validate.verdict import Outcome

Ended = Literal["through", "out of time"]


@dataclass(frozen=True)
class Try:
    """One set of nodes in float.

    Attributes:
        left_float: names of the weighted nodes in float, or with what else `quantize` gives those it is told to keep.
        int8_share: share of the weighted nodes' multiply-adds that are in the scheme's integers.
        distance: mean over held-out examples of how far the output is from the float model's; see `apart`. None where
            time ended before it was measured.
        size_bytes: of the model file.
        seconds: that it took to make and measure.
        difference: of the metric to the teacher's on the evaluation set; None where that was not asked.
        low, high: its 95 % interval.
        outcome: the gate's.
        passed: whether the gate let it pass.
        repairs: what was added to the scheme's own.
    """

    left_float: list[str]
    int8_share: float
    distance: float | None
    size_bytes: int
    seconds: float
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    outcome: Outcome | None = None
    passed: bool | None = None
    repairs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Search:
    """What a search found, what it gave up for it, and how.

    Attributes:
        ended: `through`, or `out of time` before that.
        passed: whether what was kept holds the gate.
        asked: a hash of the gate and of what it was asked on.
        keep_float: names of all nodes in float, as `quantize` takes them; those without weights that lie between too.
        left: the nodes with weights (embeddings too) in float of what was kept, the dearest first.
        weighted: how many there are in all; 0 where they were not ranked.
        int8_share: share of their multiply-adds that are in the scheme's integers.
        nearest: the nearest limits that what was kept holds, where it misses the gate.
        judged: how many sets the evaluation set was asked about, the plain one included.
        held_out: how many examples measured the distance.
        calibrated_too: whether these also gave the ranges, because there were no others.
        seconds: that it took.
        tries: in order, the plain one first.
        repairs: what was added to the scheme's own in what was kept.
        more_bits: what `keep_float` has instead of float, where it has.
        ended_in: what it did when its time was up.
    """

    ended: Ended
    passed: bool
    asked: str
    keep_float: list[str]
    left: list[Sensitivity]
    weighted: int
    int8_share: float
    nearest: str | None
    judged: int
    held_out: int
    calibrated_too: bool
    seconds: float
    tries: list[Try]
    repairs: list[str] = field(default_factory=list)
    more_bits: str | None = None
    ended_in: str | None = None

    def in_words(self) -> str:
        """One clause for a table."""
        tries = "1 try" if len(self.tries) == 1 else f"{len(self.tries)} tries"
        told = f"a search of {tries}, {self.judged} of them judged"
        late = f"; it was out of time in {self.ended_in}" if self.ended_in else ""
        share = f"{self.int8_share:.0%} of multiply-adds in the target's integers"
        if self.passed:
            return f"{share}, found by {told}{late}"
        holds = f"; this holds {self.nearest}" if self.nearest else ""
        return f"{share}, the best of {told}, none of which holds the gate{holds}{late}"
