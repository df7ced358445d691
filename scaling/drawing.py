"""How the figures of a report look: style, colours, marks, axes, and a Plot as SVG and PNG.

Panels are 3.4 inches wide, the column of a two-column paper; figures with more panels are 7. Colours are perceptually
even and safe for colour-blind readers: viridis for budgets, plasma for N, cividis for D. Matplotlib is imported inside
functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling import interactive

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

FORECAST, TRUTH, LAW, NEUTRAL = "#d55e00", "#0072b2", "#222222", "#888888"
"""Vermilion and blue of Okabe and Ito (2008), which stand out from viridis; near-black; grey for keys."""
DASHED, DOTTED, TIGHT = (0, (5, 2)), (0, (1, 1.2)), (0, (2, 1.5))
STYLE: Any = {
    "font.family": "STIXGeneral",  # ships with matplotlib, so a figure is the same on every machine
    "mathtext.fontset": "stix",
    "font.size": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.1,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.handlelength": 1.5,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.3,
    "legend.borderpad": 0.1,
    "svg.fonttype": "path",
    "figure.facecolor": "white",
}


def style() -> Any:
    """The context in which figures are drawn."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


@dataclass(frozen=True)
class Plot:
    """A figure, what to see in it, and its numbers: one dict a CSV line, of which `series` says what the line is."""

    name: str
    title: str
    caption: str
    figure: Figure
    rows: list[Row]
    wide: bool = False
    """Two columns of the page."""


def eng(value: float) -> str:
    """4254208 -> "4.25M": three digits and a suffix; B is 1e9 and T is 1e12, as the field writes them; 1e15 and more as they are."""
    rounded = float(f"{value:.3g}")
    if abs(rounded) >= 1e15:
        return f"{rounded:.3g}"
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(rounded) >= size:
            shown = rounded / size
            return (f"{shown:.3g}" if abs(shown) < 1000 else f"{shown:.0f}") + suffix
    return f"{rounded:.3g}"


def power(value: float) -> str:
    """3e15 -> "3×10^15" in mathtext, the mantissa to two digits."""
    mantissa, exponent = f"{value:.1e}".split("e")
    mantissa = mantissa.removesuffix(".0")
    return f"$10^{{{int(exponent)}}}$" if mantissa == "1" else rf"${mantissa}\times 10^{{{int(exponent)}}}$"


GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "eta": "η", "kappa": "κ", "lambda": "λ",
    "sigma": "σ",
}  # fmt: skip
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def plain_power(value: float) -> str:
    """3e15 -> "3×10¹⁵", the mantissa to three digits; for text that knows no markup."""
    mantissa, exponent = f"{value:.2e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    raised = "10" + str(int(exponent)).translate(SUPERSCRIPT)
    return raised if mantissa == "1" else f"{mantissa}×{raised}"


def is_number(value: Any) -> bool:
    """True for an int or a float that is finite."""
    return isinstance(value, int | float) and math.isfinite(value)


def column(rows: Iterable[Row], name: str) -> np.ndarray:
    """float64, with nan where a value is missing."""
    return np.array([r[name] if is_number(r.get(name)) else math.nan for r in rows], dtype=np.float64)


def series(name: str, **columns: Any) -> list[Row]:
    """Columns as CSV rows; a scalar is repeated."""
    full = {k: list(c) if isinstance(c, list | tuple | np.ndarray) else None for k, c in columns.items()}
    length = max((len(c) for c in full.values() if c is not None), default=1)
    return [{"series": name, **{k: columns[k] if c is None else c[i] for k, c in full.items()}} for i in range(length)]


# Colours


def shades(values: Iterable[float]) -> dict[float, Any]:
    """One colour a value, evenly spaced in rank; the pale end of the map is left out, for it fades on paper."""
    from matplotlib import colormaps

    ordered = sorted(set(values))
    return {v: colormaps["viridis"](0.86 * i / max(1, len(ordered) - 1)) for i, v in enumerate(ordered)}


def log_scale(values: Iterable[float], colormap: str) -> Any:
    """A ScalarMappable that colours by the logarithm of the values."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm

    values = list(values)
    low, high = min(values), max(values)
    if low == high:
        low, high = low / 1.5, high * 1.5
    return ScalarMappable(LogNorm(low, high), ListedColormap(colormaps[colormap](np.linspace(0, 0.88, 256))))


def color_bar(figure: Figure, axes: Axes, scale: Any, label: str) -> None:
    """The key of a `log_scale`, with round places labelled as by `eng`."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    bar = figure.colorbar(scale, ax=axes, pad=0.02, aspect=28)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(FixedLocator(log_ticks(*scale.get_clim())))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: eng(value)))
    bar.ax.tick_params(length=2, labelsize=8)
    bar.set_label(label)


def budget_bar(figure: Figure, axes: Axes, color: Mapping[float, Any]) -> None:
    """The key of the budgets: a step of colour each."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    edges = [i - 0.5 for i in range(len(color) + 1)]
    scale = ScalarMappable(BoundaryNorm(edges, len(color)), ListedColormap(list(color.values())))
    bar = figure.colorbar(scale, ax=axes, pad=0.02, aspect=28, ticks=range(len(color)))
    bar.outline.set_visible(False)
    bar.ax.set_yticklabels([power(budget) for budget in color])
    bar.ax.tick_params(length=0, labelsize=8)
    bar.ax.minorticks_off()
    bar.ax.set_title("budget $C$", fontsize=8, loc="left", pad=5)


# Axes


COLUMN, PAGE = 3.4, 7.0
"""Widths in inches."""


def new_figure(panels: int = 1, height: float = 2.9, ratios: Any = None) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side; the height is in inches, `ratios` are of their widths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(COLUMN if panels == 1 else PAGE, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False, width_ratios=ratios)[0])


def log_ticks(low: float, high: float) -> list[float]:
    """Round places in [low, high]: 1 2 5 a decade over short ranges, then 1 3, then decades, or every other of them."""
    decades = math.log10(high / low)
    mantissas: tuple[int, ...] = (1, 3) if decades < 2.8 else (1,)
    if decades < 1.6:
        mantissas = (1, 2, 5)
    if decades < 0.7:
        mantissas = (1, 2, 3, 4, 6, 8)
    every = max(1, math.ceil(decades / 7))
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    places = [m * 10.0**e for e in exponents if e % every == 0 for m in mantissas]
    ticks = [t for t in places if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
    if len(ticks) < 2:  # a single trial: no round place is near
        ticks = sorted({float(f"{low * (high / low) ** share:.3g}") for share in (0.2, 0.8)})
    return ticks


def set_log_axis(axis: Any, values: Iterable[float], text: Callable[[float], str], pad: float = 0.05) -> None:
    """A logarithmic axis over the values and a margin, labelled at round places alone."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    values = [v for v in values if 0 < v < math.inf]
    low, high = min(values), max(values)
    margin = max((high / low) ** pad, 1.06)
    low, high = low / margin, high * margin
    set_scale, set_limits = (
        (axis.axes.set_xscale, axis.axes.set_xlim)
        if axis.axis_name == "x"
        else (axis.axes.set_yscale, axis.axes.set_ylim)
    )
    set_scale("log")
    set_limits(low, high)
    ticks = log_ticks(low, high)
    decades = [t for t in ticks if abs(math.log10(t) % 1 - 0.5) > 0.5 - 1e-9]
    major = decades if text is power and len(decades) >= 2 else ticks  # 10^15 reads better than 3x10^15
    axis.set_major_locator(FixedLocator(major))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_locator(FixedLocator([t for t in ticks if t not in major]))
    axis.set_minor_formatter(NullFormatter())


def set_loss_axis(axes: Axes, values: Iterable[float]) -> None:
    """A linear axis over the values and a margin."""
    from matplotlib.ticker import MaxNLocator

    values = [v for v in values if is_number(v)]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.01 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))


def legend(figure: Figure, entries: Mapping[str, Any], columns: int) -> None:
    """Above the panels, where it can hide nothing; for one kind of mark the caption will do."""
    if len(entries) > 1:
        figure.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=columns)


# Marks. Each has a key_ beside it, its entry in the legend.


def key(color: Any, shape: str, size: float = 4, face: Any = None) -> Any:
    """A mark of any shape; the face has the colour of the edge unless given."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, marker=shape, ls="", ms=size, mew=0.7, mfc=color if face is None else face)


def key_line(color: Any, dash: Any = "-") -> Any:
    """A line."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linestyle=dash)


def key_star() -> Any:
    """Of `star`."""
    return key(FORECAST, "*", 8, face="white")


def key_diamond() -> Any:
    """Of `diamond`."""
    return key("black", "D", 3.4)


def key_minimum(hollow: bool = False) -> Any:
    """Of `pointer`; hollow where the minimum was not bracketed."""
    return key("black", "v", 4.5, face="white" if hollow else "#bbbbbb")


def whisker(axes: Axes, x: float, y: float, *, xs: Any = None, ys: Any = None, color: Any, z: float) -> None:
    """A bar at the point (x, y) between two places, xs or ys = (low, high), whichever side of the point they lie.

    An end at infinity or zero, which N and D on their logarithmic axes can have, runs out of the panel.
    """
    ends, at = (xs, x) if xs else (ys, y)
    if ends is None or any(e is None or math.isnan(e) for e in ends):
        return
    low = ends[0] if math.isfinite(ends[0]) and ends[0] else at / 1e9
    high = ends[1] if math.isfinite(ends[1]) else at * 1e9
    cap = {"fmt": "none", "ecolor": color, "elinewidth": 0.8, "capsize": 1.8, "capthick": 0.8, "zorder": z}
    if xs:
        axes.errorbar([(low + high) / 2], [y], xerr=(high - low) / 2, **cap)
    else:
        axes.errorbar([x], [(low + high) / 2], yerr=(high - low) / 2, **cap)


def dots(axes: Axes, x: Any, y: np.ndarray, colors: Iterable[Any], tips: Iterable[tuple[str, str]]) -> None:
    """Measurements, each with its tip, as in `interactive.tell`.

    Their standard errors are over held-out documents, which all share: bars would show differences as unsure.
    """
    drawn = axes.scatter(x, y, s=14, c=list(colors), edgecolors="white", linewidths=0.35, zorder=3)
    interactive.tell(drawn, tips)


def star(axes: Axes, x: float, y: float, tip: str = "forecast") -> None:
    """A forecast."""
    drawn = axes.scatter([x], [y], s=80, marker="*", c="white", edgecolors=FORECAST, linewidths=0.9, zorder=6)
    interactive.tell(drawn, [("", tip)])


def diamond(axes: Axes, x: float, y: float, tip: str = "measured") -> None:
    """What was measured for a forecast."""
    drawn = axes.scatter([x], [y], s=11, marker="D", c="black", linewidths=0, zorder=8)
    interactive.tell(drawn, [("", tip)])


def pointer(axes: Axes, x: float, y: float, color: Any, tip: str) -> None:
    """A triangle that stands on its tip at (x, y), so that it hides no measurement there."""
    shape: Any = [(0, 0.35), (-0.55, 1.35), (0.55, 1.35), (0, 0.35)]
    drawn = axes.scatter([x], [y], s=130, marker=shape, c=[color], edgecolors="black", linewidths=0.7, zorder=4.5)
    interactive.tell(drawn, [("", tip)])


def ring(axes: Axes, x: float, y: float, color: Any, tip: str) -> None:
    """The minimum of an isoFLOP curve on axes of its own."""
    drawn = axes.scatter([x], [y], s=22, marker="o", c=[color], edgecolors="black", linewidths=0.7, zorder=4.5)
    interactive.tell(drawn, [("", tip)])


def contours(axes: Axes, x: np.ndarray, y: np.ndarray, z: np.ndarray, levels: np.ndarray, row: int) -> None:
    """Lines of equal z over (x, y) on logarithmic axes, and a ground that is darker where z is high.

    The values stand along y[row], and those of lines that do not come that far by the right edge.
    """
    axes.set(xscale="log", yscale="log", xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    ground = [str(shade) for shade in np.linspace(0.985, 0.87, len(levels) + 1)]
    axes.contourf(x, y, z, levels=levels, colors=ground, extend="both", zorder=0.2)
    lines = axes.contour(x, y, z, levels=levels, colors="#9a9aa0", linewidths=0.6, zorder=0.5)
    margin = len(x) // 24
    side, places = len(x) - 1 - margin, []
    for level in levels:
        along, up = (np.flatnonzero(np.diff(np.sign(line - level))) for line in (z[row], z[:, side]))
        if len(along) and margin < along[0] < side:
            places.append((x[along[0]], y[row]))
        elif len(up) and up[-1] < row:
            places.append((x[side], y[up[-1]]))
    axes.clabel(lines, fontsize=7, colors="#55555c", inline_spacing=2, fmt=lambda value: f"{value:#.3g}", manual=places)


def band(axes: Axes, x: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """A line with the interval around it."""
    axes.fill_between(x, low, high, color=LAW, alpha=0.16, linewidth=0, zorder=1)
    axes.plot(x, y, color=LAW, zorder=2)


# Files


def settle(figure: Figure) -> None:
    """Lay the figure out once, and to the millionth: the solver's last bits differ from call to call, and show in ids."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        left, bottom, width, height = (round(edge, 6) for edge in axes.get_position(original=True).bounds)
        axes.set_position((left, bottom, width, height))


def svg(plot: Plot) -> str:
    """The figure as an SVG document, the same bytes for the same numbers; marks have their tips as titles.

    Every id begins with the figure's name, so that several can stand in one page: matplotlib names glyphs alike in all.
    """
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": plot.name}):
        settle(plot.figure)
        plot.figure.savefig(buffer, format="svg", metadata=nothing)
    text = interactive.mark(re.sub(r"<!DOCTYPE.*?>\s*", "", buffer.getvalue(), flags=re.DOTALL))
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{plot.name}-", text)


def png(plot: Plot) -> bytes:
    """At 300 dots an inch."""
    buffer = io.BytesIO()
    with style():
        settle(plot.figure)
        plot.figure.savefig(buffer, format="png", dpi=300, metadata={"Software": None})
    return buffer.getvalue()
