"""The report's pictures of a run: each step's metric, and the metric against size and latency."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from potstill.pipeline.drawing import (
    ACCENT,
    FAIL,
    FONT,
    INK,
    MUTED,
    PAPER,
    RULE,
    UNDECIDED,
    WIDE,
    axes_at,
    share_of,
    short,
    svg,
    write,
)
from potstill.pipeline.ledger import Entry, Ledger, size_in_words
from potstill.validate.units import counted, parse_limit, signed

_MARKS = {"pass": (ACCENT, "o"), "fail": (FAIL, "X"), "undecided": (UNDECIDED, "D")}

_Box = tuple[float, float, float, float]  # left, bottom, right, top in px


class Point(NamedTuple):
    """An entry at a place of a picture; `value`, `low` and `high` are of the metric, in percent."""

    entry: Entry
    x: float
    value: float
    low: float
    high: float

    @property
    def shown(self) -> str:
        """The value with its unit."""
        return self.entry.scorecard.shown(self.value / 100)


def limit_of(ledger: Ledger) -> float | None:
    """The largest drop that the recipe's gate allows, as a share of 1; None without a gate."""
    gate, teacher = ledger.recipe.get("gate"), ledger.entries[0].scorecard.teacher_value
    return parse_limit(gate["max_drop"]).of(teacher) if gate else None


def latency_of(ledger: Ledger, entry: Entry) -> float | None:
    """Median latency in ms of the teacher or of a package; None for a stage and where nothing was timed."""
    name = {"teacher": "teacher", "package": entry.name}.get(entry.kind)
    return ledger.latency_ms(name) if name else None


def forest(ledger: Ledger, key: str, width: int) -> str:
    """Step by step: the metric, and the difference to the teacher that the gate reads, with 95 % intervals."""
    rows, wide = ledger.entries, width >= WIDE
    row_px = 44 if wide else 50
    panel, head, foot = row_px * len(rows), 64, 44
    height = head + panel + foot if wide else 2 * (head + panel + foot) + 16

    def draw(figure: Figure) -> None:
        spans = [(252, 408), (706, width - 706 - 12)] if wide else [(12, width - 24)] * 2
        for i, (left, span) in enumerate(spans):
            bottom = foot if wide or i else 2 * foot + head + panel + 16
            axes = axes_at(figure, (left, bottom, span, panel))
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_yticks([])
            for y in range(len(rows) + 1):
                axes.axhline(y - 0.5, color=RULE, lw=0.7, zorder=0, clip_on=False)
            (_difference_panel if i else _metric_panel)(axes, ledger, wide)
        if wide:
            for y, entry in enumerate(rows):
                _row_label(figure, entry, (12.0, foot + panel - (y + 0.5) * row_px), 232)

    card = rows[0].scorecard
    verdicts = [f" ({entry.verdict.outcome})" if entry.verdict else "" for entry in rows]
    told = "; ".join(f"{e.name} {e.scorecard.shown(e.scorecard.value)}{v}" for e, v in zip(rows, verdicts, strict=True))
    return svg(
        draw, (width, height), key, f"{card.metric} of each step over {counted(card.examples, 'example')}: {told}"
    )


def _metric_panel(axes: Any, ledger: Ledger, wide: bool) -> None:
    card = ledger.entries[0].scorecard
    limit, teacher = limit_of(ledger), card.teacher_value * 100
    axes.set_xlim(*_metric_range(ledger))
    points = [_point(entry, y) for y, entry in enumerate(ledger.entries)]
    _panel(axes, points, [point.shown for point in points], wide)
    edge = None if limit is None else (teacher - limit * 100, f"gate’s limit {card.shown(teacher / 100 - limit)}")
    title = card.metric[0].upper() + card.metric[1:]
    _reference_lines(axes, title, (teacher, f"teacher {card.shown(teacher / 100)}"), edge)
    axes.set_xlabel(f"{card.metric}, {card.scale} of {counted(card.examples, 'example')}", color=MUTED)


def _difference_panel(axes: Any, ledger: Ledger, wide: bool) -> None:
    limit, points, words = limit_of(ledger), [], []
    for y, entry in enumerate(ledger.entries):
        card = entry.scorecard
        interval, unit = card.difference_interval, 100 * (entry.kind != "teacher")
        points.append(Point(entry, y, card.difference * 100, interval.low * unit, interval.high * unit))
        words.append(signed(card.difference * 100) if unit else "")
    axes.set_xlim(*_range(points, [0.0] if limit is None else [0.0, -limit * 100]))
    _panel(axes, points, words, wide)
    edge = None if limit is None else (-limit * 100, f"gate’s limit {signed(-limit * 100)}")
    _reference_lines(axes, "Difference to the teacher", (0.0, "teacher"), edge)
    axes.set_xlabel(f"points, paired over the same {counted(card.examples, 'example')}", color=MUTED)


def _panel(axes: Any, points: Sequence[Point], words: Sequence[str], wide: bool) -> None:
    """One row a point: interval, mark and value; where there is no column for it, the label stands above."""
    low, high = axes.get_xlim()
    for point, word in zip(points, words, strict=True):
        y = point.x if wide else point.x + 0.2
        x = min(max(point.value, low), high)
        if x != point.value:
            side, marker, offset = ("left", "<", 12) if x == low else ("right", ">", -12)
            axes.plot([x], [y], marker=marker, color=_style(point.entry)[0], ms=8, ls="none", clip_on=False)
            told = f"{word}, off the scale" if wide else "off the scale"
            write(axes, (x, y), told, (offset, 0), ha=side, va="center", size=11, color=MUTED)
        else:
            _mark(axes, point.entry, x, y, (point.low - x, point.high - x), across=True)
        if wide and x == point.value and point.entry.kind != "teacher":
            write(axes, (x, y), word, (0, 8), ha="center", va="bottom", size=11)
        if not wide:
            name = short(point.entry.name, int((axes.bbox.width - 60) / (0.62 * FONT)))
            write(axes, (low, y), name, (0, 18), va="center", weight="bold")
            write(axes, (high, y), word, (0, 18), ha="right", va="center")


def _reference_lines(axes: Any, title: str, teacher: tuple[float, str], limit: tuple[float, str] | None) -> None:
    axes.axvline(teacher[0], color=INK, lw=1.1, zorder=1)
    low, high = axes.get_xlim()
    write(axes, (0, 1), title, (0, 46), coords="axes fraction", weight="bold", size=13, va="center")
    for at, word, style, up, color in [(*teacher, "-", 25, INK), *([(*limit, "--", 9, FAIL)] if limit else [])]:
        if style == "--":
            axes.axvline(at, color=color, lw=1.2, ls=(0, (5, 4)), zorder=1)
        half = 0.29 * 11 * len(word) / axes.bbox.width
        share = min(max((at - low) / (high - low), half), 1 - half)
        write(axes, (share, 1), word, (0, up), coords="axes fraction", ha="center", va="center", size=11, color=color)


def _row_label(figure: Figure, entry: Entry, at: tuple[float, float], width: float) -> None:
    name, what = short(entry.name, int(width / (0.66 * 13))), short(entry.what, int(width / (0.53 * 11)))
    figure.text(*share_of(figure, at[0], at[1] + 8), name, va="center", size=13, weight="bold", color=INK)
    figure.text(*share_of(figure, at[0], at[1] - 9), what, va="center", size=11, color=MUTED)


def against_size(ledger: Ledger, key: str, width: int) -> str:
    """Metric against the size of each entry on disk, in the order of the run."""
    points = [_point(entry, max(entry.size_bytes, 1) / 1e6) for entry in ledger.entries]
    told = "; ".join(f"{p.entry.name} {size_in_words(p.entry.size_bytes)}, {p.shown}" for p in points)
    words = ("size on disk", lambda mb: size_in_words(round(mb * 1e6)).replace(".0 ", " "), told)
    return _scatter(ledger, points, True, words, key, width)


def against_latency(ledger: Ledger, key: str, width: int) -> str | None:
    """Metric against median latency on this machine; None where nothing was timed."""
    timed = [(entry, latency_of(ledger, entry)) for entry in ledger.entries]
    points = [_point(entry, ms) for entry, ms in timed if ms is not None]
    if not points:
        return None
    told = "; ".join(f"{p.entry.name} {p.x:.2f} ms, {p.shown}" for p in points)
    return _scatter(
        ledger, points, False, ("median latency on this machine", lambda ms: f"{ms:g} ms", told), key, width
    )


def _scatter(ledger: Ledger, points: list[Point], linked: bool,
             words: tuple[str, Callable[[float], str], str], key: str, width: int) -> str:  # fmt: skip
    (quantity, tick, told), card = words, ledger.entries[0].scorecard

    def draw(figure: Figure) -> None:
        axes = axes_at(figure, (46, 48, width - 58, 290))
        low, high = _metric_range(ledger)
        axes.set_ylim(low, high)
        log_axis(axes, [point.x for point in points], tick)
        axes.grid(axis="y", color=RULE, lw=0.7)
        teacher, limit = card.teacher_value * 100, limit_of(ledger)
        axes.axhline(teacher, color=INK, lw=1.1, zorder=1)
        if limit is not None:
            axes.axhline(teacher - limit * 100, color=FAIL, lw=1.2, ls=(0, (5, 4)), zorder=1)
        shown = [point for point in points if low <= point.value <= high]
        if linked:
            _link(axes, shown)
        for point in shown:
            _mark(axes, point.entry, point.x, point.value, (point.low - point.value, point.high - point.value))
        for point in points:
            if point not in shown:
                _beyond(axes, point, low if point.value < low else high)
        _label(axes, shown, [teacher, teacher if limit is None else teacher - limit * 100])
        word = f"{card.metric}, {card.scale}"
        write(axes, (0, 1), word, (-40, 20), coords="axes fraction", size=11, color=MUTED, va="center")
        axes.set_xlabel(f"{quantity}, log scale", color=MUTED)

    return svg(draw, (width, 374), key, f"{card.metric} against {quantity}: {told}")


def _link(axes: Any, points: Sequence[Point]) -> None:
    """Arrows from step to step, and a line from the last of them to each package."""
    chain = [point for point in points if point.entry.kind != "package"]
    leaves = [(chain[-1], point) for point in points if point.entry.kind == "package"] if chain else []
    for (a, b), style, alpha in [(p, "-|>", 0.8) for p in pairwise(chain)] + [(p, "-", 0.35) for p in leaves]:
        arrow = {"arrowstyle": style, "color": MUTED, "lw": 1, "shrinkA": 7, "shrinkB": 8, "alpha": alpha}
        axes.annotate("", (b.x, b.value), (a.x, a.value), arrowprops=arrow, zorder=2)


def _beyond(axes: Any, point: Point, edge: float) -> None:
    """A point off the scale, at the edge of the picture with its value."""
    low, up = edge == axes.get_ylim()[0], axes.transData.transform((point.x, edge))[0] < axes.bbox.width / 2 + 46
    axes.plot([point.x], [edge], marker="v" if low else "^", color=MUTED, ms=9, ls="none", clip_on=False, zorder=4)
    word, offset = f"{point.entry.name} {point.shown}, off the scale", (9 if up else -9, 10 if low else -10)
    write(axes, (point.x, edge), word, offset, ha="left" if up else "right", va="center", size=11, color=MUTED)


def _label(axes: Any, points: Sequence[Point], lines: Sequence[float]) -> None:
    """Write the points' names in columns, one beside each group of points, near and where they cover least."""
    at = [tuple(float(v) for v in axes.transData.transform((p.x, p.value))) for p in points]
    frame, taken = axes.bbox.extents, [(x - 8, y - 8, x + 8, y + 8) for x, y in at]
    for point, (x, _) in zip(points, at, strict=True):
        ends = axes.transData.transform([(point.x, point.low), (point.x, point.high)])[:, 1]
        taken.append((x - 4, ends[0], x + 4, ends[1]))
    for y in axes.transData.transform([(points[0].x, line) for line in lines])[:, 1]:
        taken.append((frame[0], y - 4, frame[2], y + 4))
    groups: list[list[int]] = []
    for i in sorted(range(len(points)), key=lambda i: at[i][0]):
        near = bool(groups) and at[i][0] - at[groups[-1][-1]][0] < 40
        groups[-1].append(i) if near else groups.append([i])
    for group in groups:
        group.sort(key=lambda i: at[i][1])
        words = [short(points[i].entry.name, int(axes.bbox.width / 14)) for i in group]
        boxes = _column(frame, [at[i] for i in group], words, taken)
        taken += boxes
        for i, word, box in zip(group, words, boxes, strict=True):
            right = box[0] > at[i][0]
            edge, middle, side = box[0] if right else box[2], (box[1] + box[3]) / 2, "left" if right else "right"
            if len(group) > 1 or abs(middle - at[i][1]) > 20:
                ends = (at[i][0], edge + (-3 if right else 3)), (at[i][1], middle)
                axes.plot(*ends, transform=None, color=MUTED, lw=0.7, zorder=2.5)
            axes.text(edge, middle, word, transform=None, va="center", ha=side, size=11, color=INK, zorder=6)


def _column(frame: _Box, at: Sequence[tuple[float, ...]], words: Sequence[str], taken: Sequence[_Box]) -> list[_Box]:
    """The best place of a stack of words, the lowest first: right or left of its points, higher or lower."""
    wide, step, gap = 0.6 * 11 * max(map(len, words)), 15.0, 12 if len(words) == 1 else 26
    middle, ways = sum(y for _, y in at) / len(at), []
    for left in (max(x for x, _ in at) + gap, min(x for x, _ in at) - gap - wide):
        for shift in range(-120, 121, 5):
            low = min(max(middle + shift - step * len(words) / 2, frame[1] + 2), frame[3] - step * len(words))
            boxes = [(left, low + i * step, left + wide, low + (i + 1) * step) for i in range(len(words))]
            cost = 6 * abs(shift) + 3 * sum(wide * step - _common(box, frame) for box in boxes)
            ways.append((cost + sum(_common(a, b) for a in boxes for b in taken), boxes))
    return min(ways)[1]


def _point(entry: Entry, x: float) -> Point:
    card = entry.scorecard
    return Point(entry, x, card.value * 100, card.interval.low * 100, card.interval.high * 100)


def _metric_range(ledger: Ledger) -> tuple[float, float]:
    teacher = ledger.entries[0].scorecard.teacher_value * 100
    lines = [teacher, teacher - (limit_of(ledger) or 0.0) * 100]
    return _range([_point(entry, 0) for entry in ledger.entries], lines)


def _range(points: Sequence[Point], lines: Sequence[float]) -> tuple[float, float]:
    """What holds all intervals and lines; the untrained student only where it would not crush the rest."""

    def ends(of: Sequence[Point]) -> tuple[float, float]:
        return min([*lines, *(p.low for p in of)]), max([*lines, *(p.high for p in of)])

    low, high = ends([p for p in points if p.entry.kind != "start"])
    all_low, all_high = ends(points)
    if len(points) <= 2 or all_high - all_low <= 2 * (high - low):
        low, high = all_low, all_high
    pad = 0.1 * (high - low) or 1.0
    return low - pad, high + pad


def _style(entry: Entry) -> tuple[str, str]:
    if entry.verdict:
        return _MARKS[entry.verdict.outcome]
    return (INK, "s") if entry.kind == "teacher" else (MUTED, "o")


def _mark(axes: Any, entry: Entry, x: float, y: float, reach: tuple[float, float], across: bool = False) -> None:
    """An interval and its mark, hollow where the scorecard was neither made nor checked by the target's arithmetic."""
    color, marker = _style(entry)
    ends = [(x + reach[0], x + reach[1]), (y, y)] if across else [(x, x), (y + reach[0], y + reach[1])]
    axes.plot(*ends, color=color, lw=2.2, solid_capstyle="round", zorder=3)
    face = PAPER if entry.kind == "package" and not entry.stands_on_target else color
    axes.plot(
        [x], [y], ls="none", marker=marker, ms=10 if marker == "X" else 8, color=color, mfc=face, mew=1.6, zorder=4
    )


def log_axis(axes: Any, values: Sequence[float], word: Callable[[float], str]) -> None:
    """A logarithmic axis that holds the values, its ticks in words."""
    spread = max(max(values) / min(values), 2.0)
    middle, reach = math.sqrt(min(values) * max(values)), spread**0.66
    axes.set_xscale("log")
    axes.set_xlim(middle / reach, middle * reach)
    steps = (1, 1.5, 2, 3, 5, 7) if spread < 4 else (1, 2, 5) if spread < 60 else (1, 3) if spread < 600 else (1,)
    ticks = [m * 10.0**e for e in range(-9, 10) for m in steps if middle / reach <= m * 10.0**e <= middle * reach]
    axes.set_xticks(ticks, [word(tick) for tick in ticks])
    axes.set_xticks([], minor=True)


def _common(a: _Box, b: _Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
