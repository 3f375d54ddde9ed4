"""The ledger: the scorecards of a run in order, with size, cost and time, so that one reads which step lost what."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from potstill.compress.likeness import Likeness
from potstill.export.checked import Emulated, emulated_from
from potstill.export.package import Package
from potstill.pipeline.judging import Judged
from potstill.targets.measurement import Comparison, Measurement
from potstill.validate.calibration import Calibration
from potstill.validate.files import write_json
from potstill.validate.flips import Flips
from potstill.validate.gate import Gate
from potstill.validate.leaks import Leak, leaked_rows
from potstill.validate.metrics import Interval
from potstill.validate.scorecard import Scorecard
from potstill.validate.shift import Shift
from potstill.validate.slices import Slice
from potstill.validate.units import counted, signed
from potstill.validate.verdict import Verdict, in_recipe, nearest_in_words

OUTCOME_STYLE = {"pass": "green", "fail": "bold red", "undecided": "yellow"}


@checked_dataclass(frozen=True)
class Entry:
    """One step of a run.

    Attributes:
        name: the stage's word, or the target's name.
        kind: `teacher`; `start`, the student before any training, which no gate judges; `stage`; `package`.
        what: a few words on what it is, e.g. `3 of 6 layers` or the number formats.
        scorecard: on the evaluation set, against the teacher.
        verdict: the gate's; None where nothing is judged.
        parameters: number of weights.
        size_bytes: of the weights file, or of the package's model file.
        seconds: that the step took when it was made.
        folder: where it is, relative to the run's folder.
        log: the training log of a stage: dicts with `step` and `loss`, its parts by name, or `eval_loss`.
        measurement: of a package on this machine.
        note: for a package, whether the scorecard was made by the arithmetic of the target.
        as_target: the same as yes or no; None where it is not known or the entry is no package.
        emulated: the same package by its target's arithmetic, emulated; None where it was not.
        findings: sentences on what went wrong there: a crash, or outputs beyond rounding.
        likeness: of the layers of a stage's student and of the teacher; None where they cannot be read.
        flips: the examples that the teacher had right and this step has wrong, of a stage or a package; None where
            examples have no class.
        slices: the same step on each slice of the evaluation set, the largest loss first; as `flips`.
        calibration: how sure it is and how often it is right, beside the teacher; as `flips`.
        step: the scorecard against the step before, whose figures stand in the teacher's place: what this step cost.
            None of the teacher.
        shifts: the same model on the second set of examples, and on the evaluation set under each perturbation; None of
            the teacher and of a student before training.
        unjudged: perturbations that the model gave no usable answers to, a sentence each.
        unleaked: the scorecard on those evaluation examples that are in no other data, exactly or nearly; None where
            all or none are.
    """

    name: str
    kind: Literal["teacher", "start", "stage", "package"]
    what: str
    scorecard: Scorecard
    verdict: Verdict | None
    parameters: int
    size_bytes: int
    seconds: float
    folder: str
    log: list[dict[str, float]] | None = None
    measurement: Measurement | None = None
    note: str | None = None
    as_target: bool | None = None
    emulated: Emulated | None = None
    findings: list[str] = field(default_factory=list)
    likeness: Likeness | None = None
    flips: Flips | None = None
    slices: list[Slice] | None = None
    calibration: Calibration | None = None
    step: Scorecard | None = None
    shifts: list[Shift] | None = None
    unjudged: list[str] = field(default_factory=list)
    unleaked: Scorecard | None = None

    @property
    def stands_on_target(self) -> bool:
        """Whether a package's scorecard is by its target's arithmetic, or an emulator of that gave the same in part."""
        return bool(self.as_target) or (self.emulated is not None and not self.emulated.differs)


@dataclass
class Ledger:
    """All entries of a run, and what they were made with.

    Attributes:
        recipe: as plain data.
        entries: in order.
        machine: processor, cores and accelerator.
        versions: of the packages that matter.
        comparison: the teacher's own float32 ONNX (named `teacher`, first) and the packages (named by target), timed in
            turn on this machine; None where nothing was profiled.
        warnings: what a reader should know of the data, and what went wrong by a target's arithmetic.
        leaks: which evaluation examples are in other data of the recipe, one for each that there is.
        licences: the verdict on them, as plain data.
    """

    recipe: dict[str, Any]
    entries: list[Entry]
    machine: dict[str, str]
    versions: dict[str, str]
    comparison: Comparison | None = None
    warnings: list[str] = field(default_factory=list)
    leaks: list[Leak] = field(default_factory=list)
    licences: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The ledger as plain data, for `ledger.json` and `--json`."""
        plain: dict[str, Any] = TypeAdapter(Ledger).dump_python(self, mode="json")
        best = {"name": self.best.name, "folder": self.best.folder} if self.failed and self.best else None
        return {"format": "potstill-ledger/1"} | plain | {"best": best}

    def write(self, path: Path) -> None:
        """Write `ledger.json`."""
        write_json(path, self.to_json())

    def latency_ms(self, name: str) -> float | None:
        """Median latency of `teacher` or of a target's package, from the comparison."""
        timings = self.comparison.packages if self.comparison else []
        return next((timing.median_ms for timing in timings if timing.package == name), None)

    @property
    def failed(self) -> list[Entry]:
        """Entries whose gate did not let them pass."""
        return [entry for entry in self.entries if entry.verdict and not entry.verdict.passed]

    @property
    def best(self) -> Entry | None:
        """The student to go on with: the last stage that passed, else the one that lost least; None without a gate."""
        stages = [(entry, entry.verdict) for entry in self.entries if entry.kind == "stage" and entry.verdict]
        passed = [entry for entry, verdict in stages if verdict.passed]
        return (
            passed[-1]
            if passed
            else max((one for one, _ in stages), key=lambda one: one.scorecard.difference, default=None)
        )


def package_entry(
    package: Package, folder: Path, parameters: int, measurement: Measurement, found: Judged, gate: Gate | None
) -> Entry:
    """The entry for a package; `folder` relative to the run's.

    Its verdict is the package's own, with the gate's limits on what was measured.
    """
    verdict = package.verdict
    if gate and verdict:
        verdict = gate.with_costs(verdict, measurement.median_ms, measurement.peak_memory_mb, measurement.where.cpu)
    return Entry(
        name=package.target,
        kind="package",
        what=package.formats(),
        verdict=verdict,
        parameters=parameters,
        size_bytes=package.model_bytes,
        seconds=package.seconds,
        folder=str(folder),
        measurement=measurement,
        note=package.checked["note"],
        as_target=package.checked["as_target"],
        emulated=emulated_from(package.checked),
        findings=package.findings(),
        **vars(found),
    )


def failure_in_words(entry: Entry, out: Path) -> str:
    """One sentence on a gate that failed, with the nearest limits that it holds and what to try."""
    assert entry.verdict
    missed = " and ".join(dict.fromkeys(in_recipe(one.limit) for one in entry.verdict.checks if not one.passed))
    if entry.kind == "package":
        hint = f"a target with more bits, more or other calibration examples, or a wider {missed}"
    else:
        hint = f"more epochs, more training examples, a larger student, or a wider {missed}"
    near = nearest_in_words(entry.verdict)
    return (
        f"{entry.name} missed its gate: {entry.verdict.reason}. It is kept in {out / entry.folder}. "
        f"{f'It holds {near}. ' if near else ''}Try {hint}"
    )


def candidate_in_words(ledger: Ledger) -> str | None:
    """After a missed gate: the best candidate, where it is, and the nearest limits that what missed it holds."""
    if not ledger.failed:
        return None
    told, best = [], ledger.best
    if best and best in ledger.failed:
        told.append(f"The best candidate is {best.name} itself, in {best.folder}.")
    elif best:
        stand = [entry.name for entry in ledger.entries if entry.kind == "package" and entry not in ledger.failed]
        told.append(f"The best candidate is {best.name}, which passed, in student.")
        told += [f"Packages that stand: {', '.join(stand)}."] if stand else []
    for entry in ledger.failed:
        near = nearest_in_words(entry.verdict) if entry.verdict else None
        if near:
            told.append(f"{entry.name} holds {near}.")
    return " ".join(told)


def print_ledger(ledger: Ledger, console: Console) -> None:
    """The ledger as a table of two lines a step; agreement and flips where the terminal is wide enough."""
    first = ledger.entries[0].scorecard
    caption = f"{first.metric} on {counted(first.examples, 'example')} of {first.data}; [ ]: 95 % intervals; pp: points"
    if ledger.comparison:
        caption += f"; latency: median on {ledger.comparison.where.cpu}, all timed in turn"
    table = Table(title="Ledger", caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    headings = ["step", f"{first.metric} {first.scale}", "to teacher, pp", "size\nlatency", "gate", "agree\nflips −/+"]
    same = first.agreement is not None or first.lost is not None
    shown = len(headings) if same and console.width >= 100 else len(headings) - 1
    for heading in headings[:shown]:
        table.add_column(heading, justify="left" if heading in ("step", "gate") else "right", no_wrap=heading != "step")
    for entry in ledger.entries:
        table.add_row(*_row(entry, ledger)[:shown])
    console.print(table)


def without_leaks(ledger: Ledger) -> str | None:
    """What each step has on the evaluation examples that are in no other data, in one sentence, if some are."""
    cards = [(entry, entry.unleaked) for entry in ledger.entries if entry.unleaked]
    if not cards:
        return None
    told = [
        f"{entry.name} {card.shown(card.value)}"
        + (f" ({_points(card.difference, card.difference_interval)})" if entry.kind != "teacher" else "")
        for entry, card in cards
    ]
    first, leaked = cards[0][1], len(leaked_rows(ledger.leaks))
    where = ", ".join(f"data.{one.source}" for one in ledger.leaks if one.rows)
    kind = "exact or near duplicate" if any(one.near is not None for one in ledger.leaks) else "exact duplicate"
    are = f"is an {kind}" if leaked == 1 else f"are {kind}s"
    return (
        f"Without the {counted(leaked, 'evaluation example')} that {are} of {where}, {first.metric} on the other "
        f"{first.examples:,}: {', '.join(told)}."
    )


def _points(difference: float, interval: Interval) -> str:
    """`−1.2 pp [−2.0, −0.4]`."""
    low, middle, high = (signed(one * 100, 1) for one in (interval.low, difference, interval.high))
    return f"{middle} pp [{low}, {high}]"


def _row(entry: Entry, ledger: Ledger) -> list[str]:
    card, verdict, latency = entry.scorecard, entry.verdict, ledger.latency_ms(entry.name)
    also = "".join(f"\n[dim]{escape(words.partition(' (')[0])}[/]" for words in card.also())
    apart, judged = card.difference_interval, entry.kind != "teacher"
    return [
        f"{escape(entry.name)}\n[dim]{escape(entry.what)}[/]",
        f"{card.value * 100:.1f}\n[dim]\\[{card.interval.low * 100:.1f}, {card.interval.high * 100:.1f}][/]{also}",
        f"{card.difference * 100:+.1f}\n[dim]\\[{apart.low * 100:+.1f}, {apart.high * 100:+.1f}][/]" if judged else "",
        size_in_words(entry.size_bytes) + (f"\n[dim]{latency:.3g} ms[/]" if latency else ""),
        _gate_cell(verdict) if verdict else "",
        f"{_share(card.agreement)}\n[dim]{_flips(card)}[/]" if judged else "",
    ]


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _flips(card: Scorecard) -> str:
    return "–" if card.lost is None else f"{card.lost}/{card.gained}"


def _gate_cell(verdict: Verdict) -> str:
    words = gate_in_words(verdict).replace(" (", "\n(")
    return f"[{OUTCOME_STYLE[verdict.outcome]}]{words}[/]"


def gate_in_words(verdict: Verdict) -> str:
    """`pass`, `fail`, or `undecided (pass)` when the estimate decided."""
    if verdict.outcome == "undecided":
        return f"undecided ({'pass' if verdict.passed else 'fail'})"
    return verdict.outcome


def size_in_words(size: int) -> str:
    """Bytes in the unit that reads best: kB, MB or GB, powers of ten."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
