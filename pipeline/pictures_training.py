"""The report's pictures of a training: its losses over time, and the student's layers beside the teacher's."""

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from potstill.compress.likeness import Likeness
from potstill.pipeline.drawing import ACCENT, INK, MUTED, PAPER, RULE, UNDECIDED, WIDE, axes_at, short, svg, write
from potstill.pipeline.ledger import Entry

_Series = list[tuple[float, float]]  # training steps, and a value at each
_MAIN, _SMALL = 218, 92  # px, height of the panel of the whole loss and of one for a part
_LOG_FROM = 30.0  # largest value over smallest, from which a loss has a log scale
_LETTERS = 14  # of a layer's name


def losses(entry: Entry, key: str, width: int) -> str | None:
    """Training loss, held-out loss and the best checkpoint, and a panel for each part of several; None without a log.

    The parts stand apart, each on its own scale: a cross-entropy and a squared difference of hidden states may be a
    thousandfold apart.
    """
    log = entry.log or []
    loss, held_out = _series(log, "loss"), _series(log, "eval_loss")
    if not (loss or held_out):
        return None
    found = {name: _series(log, name) for name in _parts(log)}
    parts = found if len(found) > 1 else {}
    columns = 2 if width < WIDE else 3 if len(parts) > 4 else max(1, len(parts))
    rows = -(-len(parts) // columns)
    pitch = _SMALL + (62 if width >= WIDE else 78)
    height = _MAIN + 100 + rows * pitch
    best = min(held_out, key=lambda pair: pair[1], default=None)

    def draw(figure: Figure) -> None:
        _whole(axes_at(figure, (50, height - _MAIN - 54, width - 64, _MAIN)), loss, held_out, best, width)
        span = (width - 14) / columns
        for i, (name, series) in enumerate(parts.items()):
            bottom = 28 + (rows - 1 - i // columns) * pitch
            _part(axes_at(figure, (50 + (i % columns) * span, bottom, span - 50, _SMALL)), name, series, width >= WIDE)

    said = f"; lowest held-out loss {best[1]:.3f} at step {best[0]:.0f}" if best else ""
    ends = "; ".join(f"{name} from {series[0][1]:.3g} to {series[-1][1]:.3g}" for name, series in parts.items())
    return svg(draw, (width, height), key, f"Losses of {entry.name} over training steps{said}{'; ' * bool(ends)}{ends}")


def _whole(axes: Any, loss: _Series, held_out: _Series, best: tuple[float, float] | None, width: int) -> None:
    axes.grid(axis="y", color=RULE, lw=0.7)
    if loss:
        axes.plot(*zip(*loss, strict=True), color=ACCENT, lw=1.8, label="training loss")
    if best:
        axes.plot(*zip(*held_out, strict=True), ls="none", marker="o", ms=5.5, color=INK, mfc=PAPER, mew=1.4,
                  label="held-out loss")  # fmt: skip
        axes.plot(*best, ls="none", marker="*", ms=14, color=UNDECIDED, mec=INK, mew=0.7, zorder=5,
                  label=f"best: {best[1]:.3f} at step {best[0]:,.0f}")  # fmt: skip
    axes.margins(x=0.03)
    log = _scale(axes, [value for _, value in (*loss, *held_out)], 7)
    axes.set_xlabel("training step" + ", losses on a log scale" * log, color=MUTED)
    axes.legend(frameon=False, ncols=5 if width >= WIDE else 2, loc="lower left", bbox_to_anchor=(-0.02, 1.0),
                labelcolor=INK, fontsize=11, handlelength=1.8, columnspacing=1.6, borderpad=0.2)  # fmt: skip


def _part(axes: Any, name: str, series: _Series, wide: bool) -> None:
    """One part of the loss: its name and last value above, side by side or one over the other."""
    axes.plot(*zip(*series, strict=True), color=ACCENT, lw=1.5)
    axes.plot(*series[-1], ls="none", marker="o", ms=4.5, color=ACCENT)
    axes.margins(x=0.03)
    log = _scale(axes, [value for _, value in series], 4)
    axes.locator_params(axis="x", nbins=3)
    axes.grid(axis="y", color=RULE, lw=0.7)
    name = short(name, int((axes.bbox.width - 40 if wide else axes.bbox.width + 40) / 8))
    write(axes, (0, 1), name, (0, 14) if wide else (-34, 30), coords="axes fraction", weight="bold", va="center")
    last = f"{series[-1][1]:.3g}" + ", log scale" * log
    write(axes, (1, 1), last, (0, 14), coords="axes fraction", ha="right", va="center", size=11, color=MUTED)


def _scale(axes: Any, values: Sequence[float], most: int) -> bool:
    """From zero, or on a log scale (True) where the values are far apart; at most so many ticks."""
    low, high = min(values), max(values)
    if low <= 0 or high <= _LOG_FROM * low:
        axes.set_ylim(min(0.0, low * 1.08), max(0.0, high * 1.08) or 1.0)
        axes.locator_params(axis="y", nbins=most)
        return False
    axes.set_yscale("log")
    axes.set_ylim(low / 1.3, high * 1.3)
    ticks = [m * 10.0**e for e in range(-12, 13) for m in (1, 3) if low / 1.3 <= m * 10.0**e <= high * 1.3]
    ticks = ticks[:: -(-len(ticks) // most)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    return True


def _parts(log: Sequence[dict[str, float]]) -> list[str]:
    """Names of the parts of the loss that a log holds."""
    found = dict.fromkeys(name for one in log if "loss" in one for name in one)
    return [name for name in found if name not in {"loss", "grad_norm", "learning_rate", "epoch", "step"}]


def _series(log: Sequence[dict[str, float]], name: str) -> _Series:
    return [(one["step"], one[name]) for one in log if "step" in one and math.isfinite(one.get(name, math.nan))]


def likeness(entry: Entry, key: str, width: int) -> str | None:
    """A heat map of the CKA between each layer of the student (rows) and of the teacher (columns); None without one."""
    found = entry.likeness
    if found is None:
        return None
    rows, columns = _told_apart(found.student), _told_apart(found.teacher)
    left = 16 + 7 * max(map(len, rows))
    cell = min(56.0, (width - left - 12) / len(columns))
    high, across = min(cell, 34.0), 7 * max(map(len, columns))
    tilted = len(columns) > 1 and across > cell and not all(name.isdigit() for name in columns)
    top = 32 + (14 + round(0.75 * across) if tilted else 22)
    height = round(top + len(rows) * high + 8)

    def draw(figure: Figure) -> None:
        axes = axes_at(figure, (left, 8, len(columns) * cell, len(rows) * high))
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines["bottom"].set_visible(False)
        _cells(axes, found, cell)
        write(axes, (0, 0), "↓ student’s layers, → teacher’s layers", (8 - left, top - 16), weight="bold", va="center")
        for i, name in enumerate(rows):
            write(axes, (0, i + 0.5), name, (-7, 0), ha="right", va="center", size=11, color=MUTED)
        every = 1 if tilted else max(1, math.ceil(across / cell))
        turn: dict[str, Any] = {"rotation": 45, "rotation_mode": "anchor"} if tilted else {"ha": "center"}
        for j, name in list(enumerate(columns))[::every]:
            write(axes, (j + 0.5, 0), name, (0, 8), size=11, color=MUTED, **turn)

    best = [max(range(len(columns)), key=lambda j: row[j] or 0.0) for row in found.cka]
    told = "; ".join(f"{name}: {found.teacher[j]}" for name, j in zip(found.student, best, strict=True))
    return svg(draw, (width, height), key, f"Likeness of layers after {entry.name}; most like in the teacher: {told}")


def _cells(axes: Any, found: Likeness, cell: float) -> None:
    """One box for each pair of layers: the more alike, the darker; a frame where a loss matched them."""
    for i, row in enumerate(found.cka):
        for j, value in enumerate(row):
            box = (j + 0.03, i + 0.03), 0.94, 0.94
            axes.add_patch(Rectangle(*box, facecolor=ACCENT, alpha=0.04 + 0.96 * (value or 0.0) ** 2, lw=0))
            if (i, j) in found.matched:
                axes.add_patch(Rectangle(*box, facecolor="none", edgecolor=INK, lw=2, zorder=3))
            if cell >= 30 or value is None:
                word = "–" if value is None else f"{value:.2f}".removeprefix("0")
                ink = PAPER if (value or 0.0) ** 2 > 0.6 else INK
                axes.text(j + 0.5, i + 0.5, word, ha="center", va="center", size=11, color=ink, gid=f"cell-{i}-{j}")


def _told_apart(names: Sequence[str]) -> list[str]:
    """The names without the parts that all begin with, and of long ones the end."""
    split = [name.split(".") for name in names]
    same = sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False)))
    rest = [".".join(parts[min(same, len(parts) - 1) :]) for parts in split]
    return [name if len(name) <= _LETTERS else f"…{name[1 - _LETTERS :]}" for name in rest]
