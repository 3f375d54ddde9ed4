"""Pictures of profiles: packages against each other, the modules and nodes of one, and one under load."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from pydantic import TypeAdapter

from potstill.pipeline.drawing import ACCENT, FAIL, INK, MUTED, PAPER, RULE, axes_at, short, svg, write
from potstill.pipeline.pictures import log_axis
from potstill.targets.modules import Module, folded

MOST_MODULES = 48  # that are drawn; more are drawn by the modules that hold them
MOST_NODES = 24  # that are drawn; the rest is one row
Profile = dict[str, Any]


def scatter(profiles: Sequence[Profile], key: str, width: int) -> str | None:
    """The metric against the measured median latency, with the size as area; None where nothing can be placed."""
    points = []
    for one in profiles:
        card = one["accuracy"]["scorecard"] if one["accuracy"] else one["made_by"]
        if card and one["measurement"]["kind"] == "measured":
            points.append((one, card))
    if not points:
        return None
    largest = max(one["measurement"]["file_mb"] for one, _ in points)

    def draw(figure: Figure) -> None:
        axes = axes_at(figure, (56, 52, width - 330, max(300, 32 * len(points))))
        axes.grid(axis="y", color=RULE, lw=0.7)
        for number, (one, card) in enumerate(points, start=1):
            measurement = one["measurement"]
            x, y = measurement["median_ms"], card["value"] * 100
            face = ACCENT if one["accuracy"] else PAPER
            area = 160 + 500 * measurement["file_mb"] / largest
            axes.plot([x, x], [card["interval"]["low"] * 100, card["interval"]["high"] * 100], color=MUTED, lw=1.2)
            axes.scatter([x], [y], s=area, facecolor=face, edgecolor=ACCENT, linewidth=1.6, zorder=3)
            write(axes, (x, y), str(number), (0, 0), ha="center", va="center", size=10, zorder=5,
                  color=PAPER if one["accuracy"] else ACCENT)  # fmt: skip
            at = (1.02, 0.96 - (number - 1) * 32 / max(300, 32 * len(points)))
            word = short(f"{number}  {one['package']}, {measurement['device']}", 40)
            said = f"{x:.3f} ms, {card['value']:.1%}, {measurement['file_mb']:.2f} MB"
            write(axes, at, word, (0, 0), coords="axes fraction", size=11)
            write(axes, at, said, (14, -13), coords="axes fraction", size=10, color=MUTED)
        log_axis(axes, [one["measurement"]["median_ms"] for one, _ in points], lambda ms: f"{ms:g} ms")
        axes.set_xlabel("median latency, measured, log scale", color=MUTED)
        write(axes, (0, 1), f"{points[0][1]['metric']}, %", (-44, 16), coords="axes fraction", size=11, color=MUTED)

    told = [
        f"{one['package']} on {one['measurement']['device']} {one['measurement']['median_ms']:.3f} ms, "
        f"{card['value']:.1%}"
        for one, card in points
    ]
    height = 80 + max(300, 32 * len(points))
    return svg(draw, (width, height), key, f"accuracy against latency: {'; '.join(told)}")


def in_turns(comparison: dict[str, Any], key: str, width: int) -> str:
    """The ratio of each package's time to the first one's, with its interval."""
    rows = comparison["packages"]
    ends = [end for one in rows for end in (one["ratio_low"], one["ratio"], one["ratio_high"]) if end is not None]

    def draw(figure: Figure) -> None:
        axes = axes_at(figure, (260, 30, width - 420, 30 * len(rows)))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks([])
        axes.axvline(1, color=INK, lw=1, ls=(0, (5, 4)))
        for y, one in enumerate(rows):
            if one["ratio_low"] is not None:
                axes.plot([one["ratio_low"], one["ratio_high"]], [y, y], color=MUTED, lw=1.6)
            axes.scatter([one["ratio"]], [y], s=44, color=ACCENT, zorder=3)
            write(axes, (0, y), short(one["package"], 34), (-8, 0), coords=("axes fraction", "data"), ha="right",
                  va="center", size=11)  # fmt: skip
            said = f"{one['ratio']:.3f}  {one['median_ms']:.3f} ms"
            write(axes, (1, y), said, (8, 0), coords=("axes fraction", "data"), va="center", size=11, color=MUTED)
        log_axis(axes, [*ends, 1.0], lambda ratio: f"{ratio:g}")
        axes.set_xlabel(f"time over that of {rows[0]['package']}, log scale", color=MUTED)

    told = "; ".join(f"{one['package']} {one['ratio']:.3f}" for one in rows)
    return svg(draw, (width, 70 + 30 * len(rows)), key, f"time over that of {rows[0]['package']}: {told}")


def modules(profile: Profile, key: str, width: int) -> str:
    """The share of each module in the order of the run, and what belongs to none."""
    found = TypeAdapter(list[Module]).validate_python(profile["measurement"]["modules"])
    rows = [(one.in_words(), one.share, MUTED if one.module is None else ACCENT)
            for one in folded(found, MOST_MODULES)]  # fmt: skip
    return _bars([*rows, ("between nodes", profile["measurement"]["unattributed_share"], MUTED)], "module", key, width)


def nodes(profile: Profile, key: str, width: int) -> str:
    """The nodes with the largest shares in the order of the run, and all others as one row."""
    every = profile["measurement"]["nodes"]
    top = sorted(range(len(every)), key=lambda i: -every[i]["share"])[:MOST_NODES]
    rows = [(f"{every[i]['operator']}  {every[i]['name']}", every[i]["share"], ACCENT) for i in sorted(top)]
    rest = [one["share"] for i, one in enumerate(every) if i not in set(top)]
    rows += [(f"{len(rest)} other nodes", sum(rest), MUTED)] if rest else []
    return _bars(rows, "node", key, width)


def _bars(rows: Sequence[tuple[str, float, str]], of: str, key: str, width: int) -> str:
    """Shares of a run's time, each with its name and its colour."""

    def draw(figure: Figure) -> None:
        axes = axes_at(figure, (340, 34, width - 400, 17 * len(rows)))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks([])
        axes.set_xlim(0, max(share for _, share, _ in rows) * 100)
        for y, (name, share, color) in enumerate(rows):
            axes.barh([y], [share * 100], height=0.7, color=color)
            write(axes, (0, y), short(name, 46), (-8, 0), ha="right", va="center", size=11)
            write(axes, (share * 100, y), f"{share:.1%}", (5, 0), va="center", size=11, color=MUTED)
        axes.set_xlabel("share of a run’s time, %", color=MUTED)

    told = "; ".join(f"{name} {share:.1%}" for name, share, _ in rows)
    return svg(draw, (width, 44 + 17 * len(rows)), key, f"time by {of}: {told}")


def under_load(found: Profile, key: str, width: int) -> str:
    """The median of each second of a series under load, where throttling begins, and where it broke off."""
    at = [one["at_s"] for one in found["seconds"]]
    medians = [one["median_ms"] for one in found["seconds"]]

    def draw(figure: Figure) -> None:
        axes = axes_at(figure, (64, 44, width - 90, 200))
        axes.plot(at, medians, color=ACCENT, lw=1.6)
        axes.axhline(found["start_ms"], color=INK, lw=1, ls=(0, (5, 4)))
        if found["throttles_at_s"] is not None:
            axes.axvline(found["throttles_at_s"], color=FAIL, lw=1.2)
        axes.set_ylim(0, max(medians) * 1.15)
        axes.set_xlim(0, max(at))
        if found.get("broken_off"):
            axes.plot(at[-1:], medians[-1:], "x", color=FAIL, ms=9, mew=2, clip_on=False)
            write(axes, (at[-1], medians[-1]), "broken off", (-10, 8), ha="right", size=11, color=FAIL)
        axes.set_xlabel("seconds under load", color=MUTED)
        write(axes, (0, 1), "median, ms", (-50, 12), coords="axes fraction", size=11, color=MUTED)

    told = f"{medians[0]:.3f} ms in the first second, {medians[-1]:.3f} ms in the last"
    told += f", broken off after {at[-1]:.0f} s" if found.get("broken_off") else ""
    return svg(draw, (width, 264), key, f"latency under load: {told}")
