"""The report's reliability diagram: how often a model is right where it is so sure, beside its teacher."""

from typing import Any

from matplotlib.figure import Figure

from potstill.pipeline.drawing import ACCENT, INK, MUTED, PAPER, RULE, axes_at, svg, write
from potstill.pipeline.ledger import Entry
from potstill.validate.calibration import BINS, Reliability
from potstill.validate.metrics import proportion

_MAIN, _SMALL = 250, 54  # px, height of the diagram and of the shares below it
_LEFT, _RIGHT, _TOP, _BOTTOM, _BETWEEN = 46, 14, 46, 42, 26


def reliability(entry: Entry, key: str, width: int) -> str | None:
    """Accuracy over confidence in 15 bins, and how many examples are in each; None without a calibration.

    DeGroot and Fienberg 1983, with Wilson's intervals of each bin's accuracy.
    """
    found = entry.calibration
    if found is None:
        return None
    sides = ((found.teacher, "teacher", INK, "s", -1), (found.model, entry.name, ACCENT, "o", 1))
    span, height = width - _LEFT - _RIGHT, _BOTTOM + _SMALL + _BETWEEN + _MAIN + _TOP

    def draw(figure: Figure) -> None:
        axes = axes_at(figure, (_LEFT, _BOTTOM + _SMALL + _BETWEEN, span, _MAIN))
        shares = axes_at(figure, (_LEFT, _BOTTOM, span, _SMALL))
        axes.set_ylim(-2, 102)
        axes.grid(axis="y", color=RULE, lw=0.7)
        axes.plot([0, 100], [0, 100], color=MUTED, lw=1.1, ls=(0, (5, 4)), zorder=1)
        for side, name, color, marker, step in sides:
            _points(axes, side, name, color, marker, 0.5 * step)
            _shares(shares, side, color, step)
        least = min(one.confidence for side, *_ in sides for one in side.bins) * 100
        for one in (axes, shares):
            one.set_xlim(max(0.0, least - 8), 102)
        axes.tick_params(labelbottom=False)
        axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(-0.03, 1.0), labelcolor=INK, fontsize=11,
                    handlelength=1.4, columnspacing=1.4, borderpad=0.2)  # fmt: skip
        write(axes, (0, 1), "right, % of a bin", (-_LEFT + 6, 36), coords="axes fraction", size=11, color=MUTED)
        write(shares, (0, 1), "examples, %", (-_LEFT + 6, 8), coords="axes fraction", size=11, color=MUTED)
        shares.set_xlabel("probability of what was said, %", color=MUTED)

    told = f"calibration error {found.model.ece:.1%} of {entry.name}, {found.teacher.ece:.1%} of the teacher"
    return svg(draw, (width, height), key, f"Accuracy against confidence in {BINS} bins: {told}")


def _points(axes: Any, side: Reliability, name: str, color: str, marker: str, aside: float) -> None:
    x, y = ([value * 100 for value in values] for values in zip(*((o.confidence, o.accuracy) for o in side.bins),
                                                                strict=True))  # fmt: skip
    for at, one in zip(x, side.bins, strict=True):
        ends = proportion(round(one.accuracy * one.examples), one.examples)
        axes.plot([at + aside] * 2, [ends.low * 100, ends.high * 100], color=color, lw=1.2, alpha=0.6, zorder=2)
    axes.plot([at + aside for at in x], y, color=color, lw=1.2, marker=marker, ms=6, mfc=PAPER, mew=1.5, zorder=3,
              label=f"{name}, error {side.ece:.1%}")  # fmt: skip


def _shares(axes: Any, side: Reliability, color: str, step: int) -> None:
    """Bars of the share of examples, the teacher's and the model's side by side."""
    total, wide = sum(one.examples for one in side.bins), 100 / BINS * 0.36
    x = [one.confidence * 100 + step * wide / 2 for one in side.bins]
    axes.bar(x, [one.examples / total * 100 for one in side.bins], width=wide, color=color, alpha=0.75, lw=0)
    axes.locator_params(axis="y", nbins=3)
