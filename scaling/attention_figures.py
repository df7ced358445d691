"""Attention maps as a picture: a panel a layer and head, a cell a pair of tokens."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.drawing import NEUTRAL, Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from llm_jax.generation.maps import Map

LABELLED_CELL = 0.1
"""Inches, of a cell whose token is written beside it."""
MOST_WIDTH = 13.0
"""Inches of panels with labels, side by side; wider grids have positions in place of tokens."""
GAP, TITLE, LETTER = 0.1, 0.2, 0.055
"""Inches between panels, above a row of them, and of a letter of a label."""
MASKED = "#e3e3e3"
TEXT_FONT, TOKEN_FONT = ["STIXGeneral", "DejaVu Sans"], ["DejaVu Sans Mono", "DejaVu Sans"]
"""All ship with matplotlib and have Latin, Greek and Cyrillic letters."""


def attention_plot(maps: Sequence[Map], text: str) -> Plot:
    """Layers below each other and heads side by side, one kind of attention below the other; a row of a panel adds up to 1.

    Tokens stand at the left of the first head and below the last layer where they fit; else their positions do. Panels are placed by
    hand, in inches: solving the layout of twelve layers of sixteen heads takes longer than all else.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    heads = max(one.weights_LxNxTxS.shape[1] for one in maps)
    most = max(max(one.visible_TxS.shape) for one in maps)
    labelled = heads * most * LABELLED_CELL <= MOST_WIDTH and all(one.queries for one in maps)
    cell = LABELLED_CELL if labelled else max(0.62, min(2.2, 7.2 / heads)) / most
    cell = max(cell, 0.9 / most)  # few tokens want no smaller panels
    longest = {"queries": 3, "keys": 3}
    if labelled:
        longest = {side: max(len(token) for one in maps for token in getattr(one, side)) for side in longest}
    left, below = 0.32 + LETTER * longest["queries"], 0.12 + LETTER * longest["keys"]
    grid_width = max(one.weights_LxNxTxS.shape[1] * (cell * one.visible_TxS.shape[1] + GAP) - GAP for one in maps)
    width = max(left + grid_width + 0.75, 3.4)
    lines = textwrap.wrap(text, int((width - 0.2) / 0.07), max_lines=4, placeholder=" …")
    top = 0.2 + 0.17 * len(lines)
    heights = [_height(one, cell) + TITLE + below for one in maps]
    height = top + sum(heights)
    figure = Figure(figsize=(width, height))
    norm, colors = PowerNorm(0.5, 0, 1), colormaps["Blues"].with_extremes(bad=MASKED)
    scale = ScalarMappable(norm, colors)

    def panel(x: float, y: float, wide: float, high: float) -> Axes:
        """Inches from the left and from the top."""
        return figure.add_axes((x / width, 1 - (y + high) / height, wide / width, high / height))

    look: Any = {"va": "top", "fontsize": 9, "family": TEXT_FONT, "parse_math": False}
    figure.text(0.1 / width, 1 - 0.1 / height, "\n".join(lines), **look)
    start = top
    for one, block in zip(maps, heights, strict=True):
        layers, number, queries, keys = one.weights_LxNxTxS.shape
        for layer, head in np.ndindex(layers, number):
            x = left + head * (cell * keys + GAP)
            y = start + TITLE + layer * (cell * queries + GAP)
            axes = panel(x, y, cell * keys, cell * queries)
            shown = np.ma.masked_array(one.weights_LxNxTxS[layer, head], ~one.visible_TxS)
            axes.imshow(shown, cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
            _frame(axes, one, labelled, at_left=head == 0, at_bottom=layer == layers - 1)
            if head == 0:
                name = "layer" if one.name == "self" else one.name
                axes.text(
                    (0.1 - left) / (cell * keys), 0.5, f"{name} {layer + 1}", transform=axes.transAxes, rotation=90,
                    va="center", ha="center", fontsize=8,
                )  # fmt: skip
            if layer == 0:
                axes.set_title(f"head {head + 1}", fontsize=8, pad=3)
        start += block
    bar_height = min(1.6, heights[0] - TITLE - below)
    bar = figure.colorbar(scale, cax=panel(left + grid_width + 0.2, top + TITLE, 0.08, bar_height))
    bar.outline.set_visible(False)
    bar.set_ticks([0, 0.1, 0.5, 1] if bar_height < 1.2 else [0, 0.01, 0.1, 0.25, 0.5, 1])
    bar.ax.set_yticklabels([f"{tick:g}" for tick in bar.get_ticks()])
    bar.ax.grid(False)
    bar.ax.tick_params(length=2, labelsize=7)
    caption = (
        "Share of the attention of each token read (a row, which adds up to 1) that goes to each token it looks at (a column); "
        "colours follow its square root, and grey is masked."
    )
    return Plot("attention", "Attention maps", caption, figure, [], wide=True)


def _height(one: Map, cell: float) -> float:
    layers, _, queries, _ = one.weights_LxNxTxS.shape
    return layers * (cell * queries + GAP) - GAP


def _frame(axes: Axes, one: Map, labelled: bool, at_left: bool, at_bottom: bool) -> None:
    """The edge of a panel, and its labels where it is at the edge of the grid."""
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, linewidth=0.4, color=NEUTRAL)
    axes.tick_params(length=0 if labelled else 1.5, width=0.4, pad=1.5, labelsize=6.5)
    for axis, tokens, wanted in ((axes.yaxis, one.queries, at_left), (axes.xaxis, one.keys, at_bottom)):
        count = one.visible_TxS.shape[0 if axis is axes.yaxis else 1]
        if not wanted:
            axis.set_ticks([])
        elif labelled:
            axis.set_ticks(range(count), tokens, fontsize=6, family=TOKEN_FONT, parse_math=False)
            for label in axis.get_ticklabels() if axis is axes.xaxis else ():
                label.set_rotation(90 if len(label.get_text()) > 1 else 0)
        else:
            every = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256) if count / step <= 5)
            axis.set_ticks(range(0, count, every))
