"""Drawing by matplotlib, given as inline SVG that takes its colours and fonts from the page."""

import io
import re
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Placeholders that no drawing needs otherwise; `_to_page` puts the page's CSS variables in their place.
_NAMES = ("ink", "muted", "rule", "paper", "accent", "fail", "maybe")
_VARIABLES = {f"#010a0{i}": f"var(--{name})" for i, name in enumerate(_NAMES)}
INK, MUTED, RULE, PAPER, ACCENT, FAIL, UNDECIDED = _VARIABLES
FONT = 12.0
WIDE = 800  # px from which a picture has a column for its labels


def axes_at(figure: Figure, box: tuple[float, float, float, float]) -> Any:
    """Axes at a place given in px, with nothing but a thin line below."""
    left, bottom, width, height = box
    axes = figure.add_axes((*share_of(figure, left, bottom), *share_of(figure, width, height)))
    axes.patch.set_visible(False)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, length=3, labelsize=11)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(nbins=7)
    return axes


def share_of(figure: Figure, x: float, y: float) -> tuple[float, float]:
    """A place in px, from the left and from below, as shares of the figure."""
    width, height = figure.get_size_inches() * 72
    return x / width, y / height


def write(
    axes: Any, at: tuple[float, float], word: str, offset: tuple[float, float], *,
    coords: str | tuple[str, str] = "data", ha: str = "left", va: str = "baseline", size: float = FONT, **more: Any,
) -> None:  # fmt: skip
    """A word at a place of the axes, `offset` px from it."""
    axes.annotate(word, at, offset, xycoords=coords, textcoords="offset points", ha=ha, va=va, size=size,
                  annotation_clip=False, **({"color": INK} | more))  # fmt: skip


def short(text: str, most: int) -> str:
    """A text of at most `most` characters, cut with an ellipsis."""
    return text if len(text) <= most else text[: max(1, most - 1)].rstrip() + "…"


def svg(draw: Callable[[Figure], None], size: tuple[int, int], key: str, label: str) -> str:
    """Draw on a figure of this size in px; the same drawing and key give the same text."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": key, "text.parse_math": False, "font.size": FONT}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72)
        figure.patch.set_visible(False)
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return _to_page(out.getvalue(), size, key, label)


def _to_page(drawn: str, size: tuple[int, int], key: str, label: str) -> str:
    """The drawing as a part of the page: its own ids, the page's colours and fonts, nothing from outside."""
    body = drawn[drawn.index(">", drawn.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', body)
    body = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{key}-\1"', body)
    body = body.replace("url(#", f"url(#{key}-")
    body = re.sub(r'font: (\w+) ([\d.]+px) [^;"]*', r"font-size: \2; font-weight: \1", body)
    body = re.sub(r'font: ([\d.]+px) [^;"]*', r"font-size: \1", body)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, variable)
    view = f'viewBox="0 0 {size[0]} {size[1]}" style="max-width: {size[0]}px"'
    return f'<svg role="img" aria-label="{escape(label)}" {view}>{body}'
