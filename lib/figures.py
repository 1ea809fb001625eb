"""One look for every figure of the book: a picture for the light and one for the dark page, with alt text.

A chapter passes a function that draws on the axes it is given; :func:`show` puts both pictures on the page, of which the
theme shows one. A figure without alt text is an error.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import seaborn as sns
from cycler import cycler
from matplotlib.colors import ListedColormap

from lib import runtime
from lib.ledger.cards import text

# Okabe and Ito's palette, told apart with every common form of colour blindness; black is left to the axes.
PALETTE = {
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
    "grey": "#8C8C8C",
}
METHODS = {
    "GD": PALETTE["grey"],
    "BNGD": PALETTE["blue"],
    "BNGD, shared rate": PALETTE["sky"],
    "MBNGD": PALETTE["vermilion"],
    "as printed": PALETTE["vermilion"],
    "as corrected": PALETTE["green"],
    "SGD": PALETTE["grey"],
    "DBN": PALETTE["purple"],
    "BSUM": PALETTE["orange"],
    "DSGD": PALETTE["green"],
}
CLASSES = ("neither", "loss only", "step only", "step and loss")
CLASS_COLOURS = {
    "light": ("#ECECEC", PALETTE["blue"], PALETTE["orange"], PALETTE["green"]),
    "dark": ("#3A3F45", PALETTE["blue"], PALETTE["orange"], PALETTE["green"]),
}
_INKS = {"light": "#1c1c1c", "dark": "#dedede"}
_DISPLAY = {"light": "block", "dark": "none"}


def style(theme: str) -> dict[str, Any]:
    """The matplotlib settings of a theme, ``"light"`` or ``"dark"``; backgrounds are transparent."""
    if theme not in _INKS:
        raise ValueError(f"theme must be light or dark, got {theme!r}")
    ink = _INKS[theme]
    return {
        **sns.axes_style("ticks"),
        **sns.plotting_context("notebook", font_scale=0.95),
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "legend.facecolor": "none",
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "axes.titlecolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "grid.color": ink,
        "grid.alpha": 0.18,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.titlelocation": "left",
        "axes.titlesize": "medium",
        "axes.axisbelow": True,
        "lines.linewidth": 1.8,
        "axes.prop_cycle": cycler(color=list(PALETTE.values())),
        "font.family": "DejaVu Sans",
        "svg.fonttype": "path",
        "svg.hashsalt": "convergence-executed",
        "figure.dpi": 110,
        "savefig.dpi": 160,
    }


def colour(method: str) -> str:
    """The colour of a method, the same all through the book. Raises ``ValueError`` for a method without one."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]


def ink() -> str:
    """The colour of text and axes in the theme being drawn, for annotations and reference lines."""
    return matplotlib.rcParams["text.color"]


def class_colours() -> ListedColormap:
    """The four classes of the phase diagram (``CLASSES``) as a colour map in the theme being drawn, for a rasterized mesh."""
    theme = "dark" if ink() == _INKS["dark"] else "light"
    return ListedColormap(CLASS_COLOURS[theme], name="phase classes")


class Figure:
    """A drawn figure as the notebook shows it: a numbered-by-name ``<figure>`` with both pictures, alt text and caption."""

    def __init__(self, name: str, alt: str, caption: str, pictures: dict[str, bytes]):
        self.name, self.alt, self.caption, self.pictures = name, alt, caption, pictures

    def _repr_html_(self) -> str:
        images = "".join(
            f'<img class="only-{theme}" alt="{html.escape(self.alt, quote=True)}" style="display:{_DISPLAY[theme]};'
            f'max-width:100%;height:auto" src="data:image/svg+xml;base64,{base64.b64encode(picture).decode()}">'
            for theme, picture in self.pictures.items()
        )
        label = f'<a href="#fig-{self.name}" title="link to this figure">Figure <code>{self.name}</code></a>'
        return (
            f'<figure id="fig-{self.name}" class="tex2jax_process mathjax_process" style="margin:1em 0"><div>{images}</div>'
            f'<figcaption style="font-size:92%">{label}. {text(self.caption)} '
            f'<span style="opacity:.7">(code {runtime.code_version()})</span></figcaption></figure>'
        )


def show(
    draw: Callable[[Any], None],
    *,
    name: str,
    alt: str,
    caption: str,
    size: tuple[float, float] = (7.5, 4.2),
    rows: int = 1,
    columns: int = 1,
    **subplots: Any,
) -> Figure:
    """Draw a figure for both themes. Returns it; as the last expression of a cell it is shown.

    ``draw`` gets the axes (one, or an array of ``rows`` x ``columns``) and draws on them; it may run twice, so it must
    only draw. ``name`` becomes the anchor ``fig-<name>``. ``size`` is in inches. Raises ``ValueError`` if the alt
    text or the caption is missing or the name is not made of lower-case letters, digits and hyphens.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ValueError(f"name must be lower-case words joined by hyphens, got {name!r}")
    if len(alt.split()) < 4:
        raise ValueError(f"alt must describe the figure in words to a reader who cannot see it, got {alt!r}")
    if not caption.strip():
        raise ValueError("caption must say what the figure shows, got an empty one")

    def draw_in(theme: str) -> bytes:
        with plt.rc_context(style(theme)):
            figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **subplots)
            try:
                draw(axes)
                stream = io.BytesIO()
                figure.savefig(stream, format="svg", metadata={"Date": None})
            finally:
                plt.close(figure)
            return stream.getvalue()

    light = draw_in("light")
    # The themes differ in the colour of the ink alone, and in pixels, where a mesh is rasterized.
    dark = draw_in("dark") if b"<image" in light else light.replace(_INKS["light"].encode(), _INKS["dark"].encode())
    pictures = {"light": light, "dark": dark}
    return Figure(name, alt, caption, pictures)
