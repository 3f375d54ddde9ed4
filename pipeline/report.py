"""The report: one self-contained HTML page of a run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from potstill.pipeline import pictures, pictures_reliability, pictures_training, slice_words, step_words
from potstill.pipeline.exhibits import Exhibit
from potstill.pipeline.ledger import Entry, Ledger, candidate_in_words, gate_in_words, size_in_words, without_leaks
from potstill.pipeline.pictures import latency_of, limit_of
from potstill.pipeline.step_words import ends_of, interval_places
from potstill.pipeline.yaml_lines import dump
from potstill.targets.measurement import Measurement, Timing
from potstill.validate.errors import InputError
from potstill.validate.files import write_text
from potstill.validate.scorecard import Scorecard
from potstill.validate.shift import SHIFTED
from potstill.validate.slices import Slice
from potstill.validate.units import counted, parse_limit, signed

_WIDE, _NARROW, _HALF = 1036, 344, 506
MOST_SLICES = 24  # in a table


@dataclass(frozen=True)
class Figure:
    """One large figure: what it is of, the number, and its interval or what it is compared with."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Picture:
    """A drawing for wide pages and one for narrow pages; the same where one serves both."""

    wide: Markup
    narrow: Markup | None = None


def write_report(ledger: Ledger, path: Path, *, title: str, examples: Mapping[int, Exhibit] | None = None) -> None:
    """Write the report of a run as one HTML file that needs no network.

    Args:
        ledger: of the run.
        path: of the file.
        title: of the page.
        examples: the raw examples that the entries' flips name, by row from 1; others are named by their row alone.

    Raises:
        InputError: the ledger has no entries, or its gate's limit cannot be read.
    """
    if not ledger.entries:
        raise InputError("the ledger has no entries; a report needs at least the teacher's scorecard")
    page = environment()
    page.filters |= {
        "percent": percent, "range": _range, "points": lambda share: signed(share * 100), "size": size_in_words,
        "span": _span, "gate": gate_in_words, "weights": _weights, "speed": _speed, "duration": _duration, "id": id,
        "named": slice_words.named, "p": slice_words.p_in_words,
    }  # fmt: skip
    write_text(
        path,
        page.get_template("report.html").render(
            title=title,
            headline=headline(ledger),
            ledger=ledger,
            first=ledger.entries[0].scorecard,
            figures=key_figures(ledger),
            timings={id(entry): timing_of(ledger, entry) for entry in ledger.entries},
            packages=[entry for entry in ledger.entries if entry.kind == "package"],
            unchecked=unchecked(ledger),
            unleaked=without_leaks(ledger),
            candidate=candidate_in_words(ledger),
            operators=operator_shares,
            examples=examples or {},
            taught=taught,
            gaps_in_words=slice_words.gaps_in_words,
            slice_places=slice_places,
            alone_in_words=step_words.alone_in_words,
            fragile_in_words=step_words.fragile_in_words,
            split=split(ledger),
            shifted=[(entry, shift_places(entry)) for entry in step_words.shifted_entries(ledger)],
            most_slices=MOST_SLICES,
            recipe=dump(ledger.recipe),
            **_pictures(ledger),
        ),
    )


def environment() -> Environment:
    """What renders the templates."""
    return Environment(
        loader=PackageLoader("potstill.pipeline"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _pictures(ledger: Ledger) -> dict[str, object]:
    def both(draw: Callable[[Any, str, int], str | None], key: str, wide: int, of: Ledger | Entry) -> Picture | None:
        drawings = [draw(of, f"{key}-{w}", w) for w in (wide, _NARROW)]
        return Picture(*(Markup(drawing) for drawing in drawings)) if drawings[0] else None

    def each(draw: Callable[[Any, str, int], str | None], key: str) -> list[tuple[Entry, Picture]]:
        drawn = [(entry, both(draw, f"{key}-{i}", _WIDE, entry)) for i, entry in enumerate(ledger.entries)]
        return [(entry, picture) for entry, picture in drawn if picture]

    return {
        "forest": both(pictures.forest, "forest", _WIDE, ledger),
        "by_size": both(pictures.against_size, "size", _HALF, ledger),
        "by_latency": both(pictures.against_latency, "latency", _HALF, ledger),
        "curves": each(pictures_training.losses, "loss"),
        "layers": each(pictures_training.likeness, "likeness"),
        "examined": [
            (entry, both(pictures_reliability.reliability, f"reliability-{i}", _HALF, entry))
            for i, entry in enumerate(slice_words.examined(ledger))
        ],
    }


def split(ledger: Ledger) -> list[tuple[Entry, tuple[float, float, float]]]:
    """The entries with a step of their own, and where its interval is drawn."""
    entries = [entry for entry in ledger.entries if entry.step]
    ends = [ends_of(one.step.difference, one.step.difference_interval) for one in entries if one.step]
    return list(zip(entries, interval_places(ends), strict=True))


def slice_places(slices: Sequence[Slice]) -> list[tuple[float, float, float]]:
    """Where the intervals of slices are drawn; those that are too small to be tested are not."""
    return interval_places(
        [ends_of(one.difference, one.interval) if one.p is not None else (0, 0, 0) for one in slices]
    )


def shift_places(entry: Entry) -> list[tuple[float, float, float]]:
    """Where the intervals of an entry's differences to the teacher are drawn: as it is, then on each other set."""
    cards = [entry.scorecard, *(one.scorecard for one in entry.shifts or [])]
    return interval_places([ends_of(card.difference, card.difference_interval) for card in cards])


def taught(entry: Entry) -> tuple[int, int] | None:
    """For how many examples of a stage's training the teachers ran, and for how many their outputs came from disk.

    Over all epochs and evaluations; None where the log does not say, or no loss reads the teachers' outputs.
    """
    logged = [one for one in entry.log or [] if "taught_rows" in one and "kept_rows" in one]
    ran, kept = (int(sum(one[name] for one in logged)) for name in ("taught_rows", "kept_rows"))
    return (ran, kept) if ran + kept else None


def headline(ledger: Ledger) -> str:
    """The run in one sentence, from the ledger's numbers only."""
    stages = [entry for entry in ledger.entries if entry.kind == "stage"]
    packages = [entry for entry in ledger.entries if entry.kind == "package"]
    stopped = next((entry for entry in stages if entry in ledger.failed), None)
    if stopped:
        return f"Stopped: {_missed(ledger, stopped)}."
    if packages:
        return _of_packages(ledger, packages)
    teacher = ledger.entries[0].scorecard
    if not stages:
        return (
            "No stage has finished: only the starting point was judged; the teacher has "
            f"{teacher.shown(teacher.teacher_value)} {teacher.metric} on {counted(teacher.examples, 'example')}."
        )
    last = stages[-1]
    judged = "passed" if last.verdict else "was judged by no gate"
    costs = [_below([last]), *_smaller(ledger, [last])]
    return f"{last.name} {judged}: {', '.join(costs)}{_undecided([last])}. No package was made."


def _of_packages(ledger: Ledger, packages: Sequence[Entry]) -> str:
    failed = [entry for entry in packages if entry in ledger.failed]
    judged = [entry for entry in packages if entry.verdict]
    if failed:
        passed = len(judged) - len(failed)
        most = min(failed, key=lambda entry: entry.scorecard.difference)
        rest = f"{passed} of {len(packages)} passed" if len(packages) > 1 else "the only package failed"
        return f"{rest[0].upper()}{rest[1:]}: {_missed(ledger, most)}."
    many = len(packages) > 1
    if len(judged) == len(packages):
        start = f"All {len(packages)} packages passed" if many else "The package passed"
    elif judged:
        start = f"{len(judged)} of {len(packages)} packages passed, no gate judged the others"
    else:
        start = f"{len(packages)} packages, judged by no gate" if many else "One package, judged by no gate"
    costs = [_below(packages), *_smaller(ledger, packages), *_faster(ledger, packages)]
    return f"{start}: {', '.join(costs)}{_undecided(packages)}."


def _missed(ledger: Ledger, entry: Entry) -> str:
    """What stopped a step: the drop, else the first limit that did."""
    missed = [check for check in (entry.verdict.checks if entry.verdict else []) if not check.passed]
    if missed and missed[0].limit != "max_drop":
        return f"{entry.name} missed {missed[0].limit}: {missed[0].reason}"
    return _loss_against_limit(ledger, entry)


def _loss_against_limit(ledger: Ledger, entry: Entry) -> str:
    """`distill lost 5.2 points, the limit is 3`, with as many digits as tell the two apart."""
    lost, limit = -entry.scorecard.difference * 100, limit_of(ledger)
    if limit is None:
        return f"{entry.name} lost {lost:.1f} points and its gate did not let it pass"
    digits = next((d for d in (1, 2, 3) if f"{lost:.{d}f}" != f"{limit * 100:.{d}f}"), 3)
    text = f"{limit * 100:.{digits}f}".rstrip("0").rstrip(".")
    given = parse_limit(ledger.recipe["gate"]["max_drop"])
    share = f" ({given.amount:g}% of the teacher’s value)" if given.unit == "%" else ""
    strict = ledger.recipe["gate"].get("undecided") == "strict"
    told = " (undecided; the gate is strict)" if strict and _undecided([entry]) else _undecided([entry])
    return f"{entry.name} lost {lost:.{digits}f} points, the limit is {text}{share}{told}"


def _undecided(entries: Sequence[Entry]) -> str:
    count = sum(entry.verdict is not None and entry.verdict.outcome == "undecided" for entry in entries)
    which = "" if len(entries) == 1 else f"{count} of {len(entries)} "
    return f" ({which}undecided; decided by the estimate)" if count else ""


def _below(entries: Sequence[Entry]) -> str:
    drop = round(max(-entry.scorecard.difference for entry in entries) * 100, 1)
    there = _below_elsewhere(entries)
    if drop <= 0:
        level = "level with" if drop == 0 else "above"
        return f"{'none below' if len(entries) > 1 else level} the teacher{there}"
    return f"{'at most ' if len(entries) > 1 else ''}{drop:.1f} points below the teacher{there}"


def _below_elsewhere(entries: Sequence[Entry]) -> str:
    """` (4.2 below on reviews.tsv)`, where there is a second set."""
    there = [one for entry in entries for one in entry.shifts or [] if one.by == SHIFTED]
    if not there:
        return ""
    drop = round(max(-one.scorecard.difference for one in there) * 100, 1)
    told = f"{drop:.1f} below" if drop > 0 else "none below" if len(there) > 1 else "not below"
    return f" ({told} on {there[0].what})"


def _smaller(ledger: Ledger, entries: Sequence[Entry]) -> list[str]:
    teacher = ledger.entries[0]
    if teacher.kind != "teacher" or not all(entry.size_bytes for entry in entries):
        return []
    return [_times([teacher.size_bytes / entry.size_bytes for entry in entries], "smaller", "larger", "the size")]


def _faster(ledger: Ledger, packages: Sequence[Entry]) -> list[str]:
    timings = [timing for timing in (timing_of(ledger, entry) for entry in packages) if timing]
    if not timings or not ledger.comparison or ledger.comparison.packages[0].package != "teacher":
        return []
    some = f" ({len(timings)} of {len(packages)} timed)" if len(timings) < len(packages) else ""
    speed = _times([1 / timing.ratio for timing in timings], "faster", "slower", "the speed")
    link = "of" if speed.endswith("speed") else "than"
    return [f"{speed} {link} the teacher’s own ONNX on this machine{some}"]


def _times(ratios: Sequence[float], more: str, less: str, of: str) -> str:
    """`3.9× smaller`, `3.9× to 4.2× smaller`, `1.3× larger`; `0.8× to 2.0× the size` where both occur."""
    low, high = min(ratios), max(ratios)
    if low < 1 < high:
        if of == "the size":
            low, high = 1 / high, 1 / low
        return f"{low:.1f}× to {high:.1f}× {of}"
    word, ends = (more, [low, high]) if low >= 1 else (less, [1 / high, 1 / low])
    texts = list(dict.fromkeys(f"{end:.1f}×" for end in ends))
    return f"{' to '.join(texts)} {word}"


def key_figures(ledger: Ledger) -> list[Figure]:
    """The teacher's metric, the student's, the size and the latency."""
    first, last = ledger.entries[0], _student(ledger)
    packages = [entry for entry in ledger.entries if entry.kind == "package"]
    card = first.scorecard
    over = counted(card.examples, "example")
    figures = [Figure(f"Teacher, {card.metric}", card.shown(card.value), f"{_range(card)}, {over}")]
    if last:
        mine = last.scorecard
        figures.append(
            Figure(f"Student after {last.name}, {mine.metric}", mine.shown(mine.value), f"{_range(mine)}, {over}")
        )
    small = packages or ([last] if last else [])
    if small:
        sizes = sorted(entry.size_bytes for entry in small)
        of = f"{len(packages)} package{'s' * (len(packages) > 1)}" if packages else "student’s weights"
        figures.append(Figure(f"Size, {of}", _ends(sizes), f"teacher {size_in_words(first.size_bytes)}"))
    times = [ms for ms in (latency_of(ledger, entry) for entry in packages) if ms is not None]
    if times and ledger.comparison:
        text = "–".join(dict.fromkeys(f"{ms:.2f}" for ms in (min(times), max(times)))) + " ms"
        teacher = latency_of(ledger, first)
        against = f"teacher {teacher:.2f} ms; " if teacher is not None else ""
        figures.append(Figure("Median latency", text, f"{against}{ledger.comparison.runs} rounds, this machine"))
    else:
        figures.append(Figure("Median latency", "–", "not measured"))
    return figures


def _student(ledger: Ledger) -> Entry | None:
    return next((entry for entry in reversed(ledger.entries) if entry.kind in ("stage", "start")), None)


def _ends(sizes: Sequence[int]) -> str:
    texts = list(dict.fromkeys(size_in_words(size) for size in (sizes[0], sizes[-1])))
    if len(texts) == 2 and texts[0][-2:] == texts[1][-2:]:
        texts[0] = texts[0][:-3]
    return "–".join(texts)


def timing_of(ledger: Ledger, entry: Entry) -> Timing | None:
    """The timing of the teacher or of a package in the comparison."""
    if not ledger.comparison or entry.kind not in ("teacher", "package"):
        return None
    name = "teacher" if entry.kind == "teacher" else entry.name
    return next((timing for timing in ledger.comparison.packages if timing.package == name), None)


def unchecked(ledger: Ledger) -> list[str]:
    """What this run did not check, one sentence each."""
    packages = [entry for entry in ledger.entries if entry.kind == "package"]
    told = []
    for entry in packages:
        said = any(one in (entry.note or "") for one in entry.findings)  # among the ledger's warnings
        note = f" {entry.note}" if entry.note and not said else ""
        if entry.as_target is None:
            told.append(f"{entry.name}: it was not recorded whether this machine computes as the target does.{note}")
        elif not entry.stands_on_target:
            told.append(f"{entry.name}: judged on this machine, which does not compute as the target does.{note}")
        timed = entry.measurement or timing_of(ledger, entry)
        if timed and timed.missing_providers:
            told.append(f"{entry.name}: {', '.join(timed.missing_providers)} was asked for and is missing here.")
        if timed is None:
            told.append(f"{entry.name}: neither its latency nor its memory was measured.")
        elif not entry.as_target:
            told.append(f"{entry.name}: no time or memory on a device of the target; they are of this machine.")
    named = {entry.name for entry in packages}
    wanted = [Path(name).stem if name.endswith(".yaml") else name for name in ledger.recipe.get("targets", ())]
    told += [f"{name}: no package was made." for name in wanted if name not in named]
    told += ledger.warnings
    blind = [f"data.{one.source}" for one in ledger.leaks if one.near is None]
    if blind:
        told.append(
            f"Near duplicates of evaluation examples in {', '.join(blind)} were not looked for, only exact ones; they "
            "are found among texts and pictures."
        )
    cut = [(entry.name, entry.scorecard) for entry in ledger.entries if entry.scorecard.truncated]
    told += [
        f"{name}: {card.truncated:,} of {counted(card.examples, 'example')} {'was' if card.truncated == 1 else 'were'} "
        "cut to the longest input."
        for name, card in cut
    ]
    told += [f"{entry.name}: {sentence}" for entry in ledger.entries for sentence in entry.unjudged]
    for entry in ledger.entries:
        if entry.verdict and entry.verdict.outcome == "undecided":
            told += [f"{entry.name}: {one.reason}." for one in entry.verdict.checks if one.outcome == "undecided"]
        elif entry.kind in ("stage", "package") and not entry.verdict:
            told.append(f"{entry.name}: no gate judged it.")
    return told


def operator_shares(measurement: Measurement) -> list[tuple[str, float, str]]:
    """Shares of a run's time: the eight largest operators, the others, and what no operator accounts for.

    Each with its label and `one`, `others` or `unattributed`; empty where no operators were measured.
    """
    ranked = sorted(measurement.operators, key=lambda one: -one.share)
    many = len({one.provider for one in ranked}) > 1
    rows = []
    for one in ranked[:8]:
        provider = f" ({one.provider.removesuffix('ExecutionProvider')})" if many else ""
        rows.append((f"{one.operator}{provider} ×{one.count}", one.share, "one"))
    if ranked[8:]:
        rows.append((counted(len(ranked) - 8, "other type"), sum(one.share for one in ranked[8:]), "others"))
    if ranked and measurement.unattributed_share is not None:
        rows.append(("unattributed", measurement.unattributed_share, "unattributed"))
    return rows


def percent(share: float) -> str:
    """A share of 1 as `91.2%`."""
    return f"{share:.1%}"


def _span(interval: object, unit: str = "percent") -> str:
    """`[90.1%, 92.3%]`, or `[−1.20, +0.30]` in points."""
    low, high = (float(getattr(interval, end)) for end in ("low", "high"))
    texts = (percent(low), percent(high)) if unit == "percent" else (signed(low * 100), signed(high * 100))
    return f"[{texts[0]}, {texts[1]}]"


def _range(card: Scorecard) -> str:
    """The metric's interval: `[90.1%, 92.3%]`."""
    return f"[{card.shown(card.interval.low)}, {card.shown(card.interval.high)}]"


def _weights(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}"


def _speed(timing: Timing) -> str:
    """`3.94× faster than the teacher` with the interval of that ratio."""
    if timing.ratio_low is None or timing.ratio_high is None:
        return f"{1 / timing.ratio:.1f}× the teacher’s speed"
    return f"{1 / timing.ratio:.1f}× speed [{1 / timing.ratio_high:.1f}, {1 / timing.ratio_low:.1f}]"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
