"""The figures of how well the data hold a fit: profile likelihoods, and the bootstrap parameter by parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling import drawing
from scaling.drawing import DASHED, DOTTED, FORECAST, GREEK, LAW, NEUTRAL, TRUTH, Plot, Row, is_number, key_line, series

READ_FROM_ZERO = ("E", "epsilon")
"""Irreducible parts: a bootstrap may put them at zero, which a logarithmic axis would stretch without end."""
DRAWN = 2000
"""Resamples drawn and listed; the numbers are of all."""


def math_name(name: str) -> str:
    """alpha_N -> $\\alpha_{N}$."""
    base, _, index = name.partition("_")
    base = "\\" + base if base in GREEK else base if len(base) == 1 else rf"\mathrm{{{base}}}"
    return f"${base}_{{{index}}}$" if index else f"${base}$"


def is_scale(name: str, values: np.ndarray) -> bool:
    """Whether a parameter wants a logarithmic axis: positive, uncertain by a factor, and no exponent."""
    low, high = np.quantile(values, [0.025, 0.975])
    linear = name in READ_FROM_ZERO or name.partition("_")[0] in GREEK
    return bool(not linear and values.min() > 0 and high / low > 6)


def short(value: float) -> str:
    """0.342 -> "0.342", 3400 -> "3.4k", 12,000,000 -> "12M", 0.00002 -> "2e-05"."""
    return drawing.eng(value)


def set_value_axis(axis: Any, low: float, high: float, log: bool, ticks: int = 3) -> None:
    """An axis of a parameter's values, labelled at few round places."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

    axes, x = axis.axes, axis.axis_name == "x"
    (axes.set_xscale if x else axes.set_yscale)("log" if log else "linear")
    (axes.set_xlim if x else axes.set_ylim)(low, high)
    if log:
        places = drawing.log_ticks(low, high)
        axis.set_major_locator(FixedLocator(places[:: math.ceil(len(places) / (ticks + 1))]))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    else:
        axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))


def profiles(found: Sequence[Row]) -> Plot | None:
    """A panel a parameter: how much worse the best fit is where the parameter is held at a value.

    A row is parameter, values, increase (of -2 log likelihood over its least), threshold, value (the fitted one) and
    interval [low, high], an end of which is None where the increase never reaches the threshold.
    """
    from matplotlib.figure import Figure

    found = [p for p in found if len(p["values"]) > 1]
    if not found:
        return None
    columns = min(3, len(found))
    lines = math.ceil(len(found) / columns)
    figure = Figure(figsize=(drawing.PAGE, 0.4 + 1.75 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.ravel()[len(found) :]:
        axes.set_visible(False)
    rows: list[Row] = []
    open_ones: list[str] = []
    for i, (axes, p) in enumerate(zip(grid.ravel(), found, strict=False)):
        name, threshold, ends = p["parameter"], p["threshold"], p.get("interval") or (None, None)
        values, increase = (np.asarray(p[k], np.float64) for k in ("values", "increase"))
        order = np.argsort(values)
        values, increase = values[order], increase[order]
        rows += series("profile", parameter=name, value=values, increase=increase, threshold=threshold)
        rows += series("interval", parameter=name, value=p["value"], low=ends[0], high=ends[1])
        low, high = ends[0] if is_number(ends[0]) else values[0], ends[1] if is_number(ends[1]) else values[-1]
        axes.axvspan(low, high, color=LAW, alpha=0.08, linewidth=0, zorder=0.5)
        axes.axhline(threshold, color=FORECAST, linestyle=DASHED, linewidth=0.9, zorder=1.5)
        for end in filter(is_number, ends):
            axes.axvline(end, color=LAW, linestyle=DOTTED, linewidth=0.9, zorder=1.5)
        axes.plot(values, increase, color=LAW, zorder=2.5)
        axes.plot([p["value"]], [0], "o", color=TRUTH, ms=4, zorder=3, clip_on=False)
        log = is_scale(name, values)
        set_value_axis(axes.xaxis, *view(values, log), log, ticks=4)
        axes.set_ylim(0, 2.6 * threshold)
        axes.set_xlabel(named(name, p["value"], ends), labelpad=2)
        sides = [side for side, end in zip(("below", "above"), ends, strict=True) if not is_number(end)]
        if sides:
            open_ones.append(name)
            told = "unbounded" if len(sides) == 2 else f"unbounded {sides[0]}"
            place: dict[str, Any] = {"x": 0.03, "ha": "left"} if sides == ["below"] else {"x": 0.97, "ha": "right"}
            if len(sides) == 2:
                place = {"x": 0.5, "ha": "center"}
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
            axes.text(
                y=0.94,
                s=told,
                va="top",
                transform=axes.transAxes,
                color=FORECAST,
                fontsize=8.5,
                bbox=box,
                zorder=4,
                **place,
            )
        if i % columns:
            axes.tick_params(labelleft=False)
    figure.supylabel(r"increase of $-2\,\log$ likelihood", fontsize=9)
    point = drawing.key(TRUTH, "o", 4)
    entries = {
        "profile": key_line(LAW),
        "threshold": key_line(FORECAST, DASHED),
        "ends of the interval": key_line(LAW, DOTTED),
        "fitted value": point,
    }
    drawing.legend(figure, entries, 4)
    caption = "Each parameter held at a value, the others refitted: how much less likely the data then are."
    caption += f" The interval is where the curve stays below the threshold of {found[0]['threshold']:.3g}."
    if open_ones:
        caption += f" Not bounded by these data: {', '.join(GREEK.get(name, name) for name in open_ones)}."
    return Plot("profiles", "Profile likelihoods", caption, figure, rows, wide=True)


def named(name: str, value: float, ends: Sequence[float | None]) -> str:
    """$E$ = 0.912 [0.1, 1.3], or the one end that the data give it, as in $E$ = 0.912 (≤ 1.3)."""
    low, high = (short(end) if is_number(end) else "" for end in ends)  # type: ignore[arg-type]
    within = f"[{low}, {high}]" if low and high else f"(≥ {low})" if low else f"(≤ {high})" if high else ""
    return f"{math_name(name)} = {short(value)} {within}"


def view(values: np.ndarray, log: bool) -> tuple[float, float]:
    """The ends of an axis over values, with a little room."""
    low, high = float(values.min()), float(values.max())
    if log:
        margin = (high / low) ** 0.03
        return low / margin, high * margin
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return (0.0 if 0 <= low < margin else low - margin), high + margin


def corner(samples: Mapping[str, Sequence[float]], fitted: Mapping[str, float]) -> Plot | None:
    """The bootstrap, parameters against each other: clouds below the diagonal, correlations above, counts on it.

    `samples` are natural values, one a resample and in the same order for all; `fitted` the values of the fit.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = {name: np.asarray(values, np.float64) for name, values in samples.items()}
    keep = np.all([np.isfinite(v) for v in columns.values()], axis=0) if columns else np.array([])
    columns = {name: v[keep] for name, v in columns.items()}
    columns = {name: v for name, v in columns.items() if len(v) > 2 and np.ptp(v) > 0}  # what was held does not move
    size = len(columns)
    if size < 2:
        return None
    names = list(columns)
    logs = {name: is_scale(name, v) for name, v in columns.items()}
    views = {name: view(middle(v), logs[name]) for name, v in columns.items()}
    axis_values = np.array([np.log(v) if logs[name] else v for name, v in columns.items()])
    correlation = np.corrcoef(axis_values)
    width = drawing.COLUMN if size == 2 else drawing.PAGE
    figure = Figure(figsize=(width, width * 0.94), layout="constrained", dpi=220)
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0.02, hspace=0.02)  # type: ignore[union-attr, call-arg]
    grid = figure.subplots(size, size, squeeze=False)
    tint = colormaps["PuOr"]
    ticks, text_size = (3 if size < 4 else 2), 8.5 if size < 7 else 7
    for i, y in enumerate(names):
        for j, x in enumerate(names):
            axes = grid[i][j]
            if j > i:
                r = correlation[i, j]
                axes.set_facecolor((*tint(0.5 + 0.5 * r)[:3], 0.55))
                axes.text(
                    0.5,
                    0.5,
                    f"{r:+.2f}".replace("-", "−"),
                    transform=axes.transAxes,
                    ha="center",
                    va="center",
                    fontsize=text_size + 1.5,
                )
                axes.set(xticks=[], yticks=[])
                for spine in axes.spines.values():
                    spine.set_visible(False)
                continue
            set_value_axis(axes.xaxis, *views[x], logs[x], ticks)
            if i == j:
                low, high = views[x]
                edges = np.geomspace(low, high, 31) if logs[x] else np.linspace(low, high, 31)
                axes.hist(columns[x], edges, color="#c9c9c9", linewidth=0)
                for end in np.quantile(columns[x], [0.025, 0.975]):
                    axes.axvline(end, color=LAW, linestyle=DOTTED, linewidth=0.9)
                axes.set_yticks([])
                axes.spines["left"].set_visible(False)
                axes.set_title(math_name(x), fontsize=10, pad=2)
            else:
                set_value_axis(axes.yaxis, *views[y], logs[y], ticks)
                cloud = (columns[x][:DRAWN], columns[y][:DRAWN])
                axes.scatter(*cloud, s=3, color=NEUTRAL, alpha=0.35, linewidths=0, rasterized=True, zorder=2)
                if y in fitted:
                    axes.axhline(fitted[y], color=FORECAST, linewidth=0.7, zorder=3)
            if x in fitted:
                axes.axvline(fitted[x], color=FORECAST, linewidth=0.7, zorder=3)
            axes.tick_params(labelsize=text_size - 0.5, labelbottom=i == size - 1, labelleft=j == 0 and i > 0)
            axes.grid(False)
            if i == size - 1:
                axes.set_xlabel(math_name(x))
            if j == 0 and i > 0:
                axes.set_ylabel(math_name(y))
    figure.align_labels()
    rows = series("resample", **{name: v[:DRAWN] for name, v in columns.items()})
    for i, y in enumerate(names):
        rows += [
            {"series": "correlation", "of": y, "with": x, "r": correlation[i, j]} for j, x in enumerate(names) if j > i
        ]
    total = len(columns[names[0]])
    drawn = f", of which {DRAWN:,} are drawn" if total > DRAWN else ""
    caption = f"The fit repeated on {total:,} resamples of the trials{drawn}: each parameter on the diagonal, its 95 %"
    caption += " interval dotted, and each pair below it; orange is the fit to all trials. Above: their correlation"
    scales = [name for name in names if logs[name]]
    caption += f", taken of the logarithm of {', '.join(GREEK.get(name, name) for name in scales)}." if scales else "."
    caption += " Axes show the middle 98 %."
    return Plot("corner", "Bootstrap of the parameters", caption, figure, rows, wide=size > 2)


def middle(values: np.ndarray) -> np.ndarray:
    """The middle 98 %: a few wild resamples would squeeze the rest."""
    low, high = np.quantile(values, [0.01, 0.99])
    return values[(values >= low) & (values <= high)]
