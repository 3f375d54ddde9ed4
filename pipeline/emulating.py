"""A package run by its target's arithmetic where this machine has another: what is run, kept, and asked of it."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from potstill.export.checked import Emulated, NotEmulated, as_on_target, tolerance
from potstill.pipeline.cache import Cache
from potstill.pipeline.judging import Judge, Subject
from potstill.pipeline.ledger import Entry
from potstill.targets.host import runs_here
from potstill.targets.qemu import Crashed, emulator_version
from potstill.targets.qnn import QnnSim
from potstill.targets.target import Target
from potstill.targets.wire import EmulatedPredictor
from potstill.validate.errors import InputError, PotstillError
from potstill.validate.files import read_json, sha256_file
from potstill.validate.gate import Gate
from potstill.validate.model import Read
from potstill.validate.predictor import LEAST, one_below_another, rounded
from potstill.validate.scorecard import Scorecard
from potstill.validate.units import counted
from potstill.validate.verdict import Verdict, verdict_of

FEWEST, MOST, BYTES = 5, 1000, 2**28  # examples that are enough, that are sent, and the memory that they may take
EMULATED = "emulated"  # starts the names of a gate's limits there


@dataclass(frozen=True)
class Emulation:
    """How packages are run by their targets' arithmetic.

    Attributes:
        cache: of the run.
        judge: of the run, with the teacher.
        seconds: for the examples of one package; the emulator's start of a few seconds comes on top. 0: not at all.
        seed: of the choice of examples, the same for every package.
    """

    cache: Cache
    judge: Judge
    seconds: float
    seed: int

    def __call__(
        self, subject: Subject, model: Path, target: Target, method: str, read: Read
    ) -> Emulated | NotEmulated | None:
        """What came of a package's file by its target's arithmetic; None where that is this machine's.

        Args:
            subject: the package, as it was judged on this machine.
            model: its file.
            target: whose arithmetic.
            method: of its scheme.
            read: what turns the graph's output into the rows that are judged.

        Raises:
            InputError: the file gives numbers there that are not finite.
        """
        if runs_here(target)[0]:
            return None
        if not self.seconds:
            return NotEmulated("the time for it is 0 (`emulate: {time: 10s}`)")
        examples = self.judge.material.eval
        try:
            version = QnnSim(target).version if target.model.compiler else emulator_version(target)
        except InputError:  # why not is said below
            version = "none"
        key = self.cache.key(
            "emulated",
            models=[subject.key, self.judge.teacher.key if self.judge.teacher else None],
            files=[sha256_file(path) for path in sorted(model.parent.glob(f"{model.name}*"))],
            emulate=[version, target.emulate.model_dump() if target.emulate else target.runtime.provider_options],
            eval=examples.digest,
            settings=[self.seconds, self.seed, tolerance(method).sqnr_db],
        )
        if not self.cache.done("emulated", key):
            try:
                predictor = EmulatedPredictor(
                    target,
                    model,
                    subject.encode,
                    f"the {target.id} package",
                    read=read,
                    timeout_s=60 + 10 * self.seconds,
                )
                started = time.monotonic()
                parts, index = self._run(predictor)
            except PotstillError as error:
                return NotEmulated(str(error), crashed=isinstance(error, Crashed))
            seconds = time.monotonic() - started
            found = self._compared(subject, predictor, parts, index, tolerance(method).sqnr_db, seconds)
            with self.cache.making("emulated", key) as (_, record):
                record["emulated"] = TypeAdapter(Emulated).dump_python(found, mode="json")
        record = read_json(self.cache.place("emulated", key) / "record.json")
        return TypeAdapter(Emulated).validate_python(record["emulated"])

    def _run(self, predictor: EmulatedPredictor) -> tuple[list[NDArray[np.float32]], NDArray[np.int64]]:
        """The rows of the examples that were run in time, and which these are, in their order."""
        examples = self.judge.material.eval
        drawn = np.random.default_rng(self.seed).permutation(len(examples))
        one = sum(array.nbytes for array in predictor.encode(examples.rows(drawn[:1].tolist())).values())
        drawn = drawn[: max(1, min(MOST, BYTES // max(one, 1)))]
        found = predictor.first(examples.rows(drawn.tolist()), self.seconds)
        if len(found) < min(FEWEST, len(drawn)):
            raise InputError(
                f"only {counted(len(found), 'example')} ran in {self.seconds:g} s, and {FEWEST} are the fewest; "
                "give it more time (`emulate: {time: 5min}`)"
            )
        order = np.argsort(drawn[: len(found)])
        return [found[i] for i in order], drawn[order]

    def _compared(
        self,
        subject: Subject,
        predictor: EmulatedPredictor,
        parts: list[NDArray[np.float32]],
        index: NDArray[np.int64],
        least_db: float,
        seconds: float,
    ) -> Emulated:
        """Emulated rows of some examples beside this machine's."""
        rows = rounded(one_below_another(parts))
        if not np.isfinite(rows).all():
            raise InputError(
                f"{predictor.name} gave logits that are not finite as {predictor.chip}, on "
                f"{int((~np.isfinite(rows)).any(axis=1).sum())} of {counted(len(rows), 'row')}; its number formats "
                "break there"
            )
        mine, card, apart = self.judge.beside(subject, rows, index)
        return Emulated(
            cpu=predictor.chip,
            emulator=predictor.emulator,
            examples=len(index),
            of=len(self.judge.material.eval),
            scorecard=card,
            apart=apart,
            sqnr_db=sqnr_db(mine, rows),
            least_db=least_db,
            seconds=seconds,
        )


def sqnr_db(mine: NDArray[np.floating], theirs: NDArray[np.floating]) -> float | None:
    """10 log₁₀ of the power of rows (R, C) over that of their differences to others; None where there are none.

    What is masked in one of them is passed over. Rows are kept in float16, whose rounding leaves about 70 dB.
    """
    width = min(mine.shape[1], theirs.shape[1])
    own, other = (rows[:, :width].astype(np.float64) for rows in (mine, theirs))
    there = (own > LEAST) & (other > LEAST)
    noise = float(np.square(own - other)[there].sum())
    return 10 * math.log10(max(float(np.square(own)[there].sum()), math.ulp(0.0)) / noise) if noise else None


def to_warn_of(entries: Sequence[Entry]) -> list[str]:
    """A sentence for each package that was not run by its target's arithmetic; what was found so is in the ledger."""
    packages = [entry for entry in entries if entry.kind == "package" and entry.as_target is False]
    return [f"{one.name}: {one.note}" for one in packages if one.emulated is None and one.note not in one.findings]


def verdict_there(
    verdict: Verdict | None, card: Scorecard, gate: Gate | None, emulated: Emulated | NotEmulated | None
) -> Verdict | None:
    """A gate's verdict on a package, where it computes otherwise on its target also by the target's arithmetic.

    Within rounding the scorecard of this machine is also the target's. Else the file is judged as on its target, by the
    gate's limits against the teacher: the other ones are of what was not emulated.
    """
    if gate is None or verdict is None or not isinstance(emulated, Emulated) or not emulated.differs:
        return verdict
    alone = replace(gate, max_slice_drop=None, max_calibration_error=None, max_size=None)
    told = f"as {emulated.cpu}, {emulated.examples:,} of {counted(emulated.of, 'example')} emulated"
    checks = [
        replace(one, limit=f"{EMULATED} {one.limit}", reason=f"{told}: {one.reason}")
        for one in alone(as_on_target(card, emulated)).checks
    ]
    return verdict_of([*verdict.checks, *checks])
