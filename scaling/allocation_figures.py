"""The figures of how to spend compute: the isoFLOP triptych and the fitted loss over (N, C). Conventions as in figures.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from scaling import drawing
from scaling.drawing import (
    FORECAST,
    LAW,
    NEUTRAL,
    TIGHT,
    Plot,
    Row,
    column,
    eng,
    is_number,
    key,
    key_line,
    key_minimum,
    key_star,
    plain_power,
    power,
    series,
    shades,
)
from scaling.figures import (
    C_LABEL,
    LOSS_LABEL,
    Predict,
    draw_outcome,
    draw_trials,
    finished,
    heights,
    outcome_tip,
    trial_rows,
    trial_tip,
)

N_SHORT, C_SHORT = "parameters $N$ (total)", "compute $C = 6ND$ (FLOPs)"
SURFACE_POINTS = 121
LEVELS = 11


def triptych(
    trials: Sequence[Row], minima: Sequence[Row], bands: Row | None, told: Sequence[Row], predict: Predict | None
) -> Plot | None:
    """Loss against N at each budget, then N*(C) and D*(C) (Hoffmann et al. 2022, figure 3); the panels that have data."""
    done = [t for t in finished(trials) if t.get("budget")]
    inside = [m for m in minima if is_number(m.get("N_opt")) and not m.get("edge")]
    curves, optimum = bool(done), bool(bands or inside)
    if not curves and not optimum:
        return None
    count, ratios = (3, (1.32, 1, 1)) if curves and optimum else (1 if curves else 2, None)
    figure, panels = drawing.new_figure(count, height={1: 3.6, 2: 2.9, 3: 2.75}[count], ratios=ratios)
    color = shades([t["budget"] for t in done] + [m["budget"] for m in minima])
    rows: list[Row] = []
    entries: dict[str, Any] = {}
    captions = []
    if curves:
        found, caption = draw_curves(panels[0], done, minima, told, predict, color, entries)
        drawing.budget_bar(figure, panels[0], color)
        rows += found
        captions.append(caption)
    if optimum:
        found, caption = draw_optimum(panels[-2:], minima, inside, bands, told, color, entries)
        rows += found
        captions.append(caption)
    drawing.legend(figure, entries, 2 if count == 1 else 4)
    if count == 3:
        captions[0], captions[1] = f"Left: {captions[0]}", f"Centre and right: {captions[1]}"
    title = (
        "isoFLOP curves and the compute-optimal allocation"
        if count == 3
        else ("isoFLOP curves" if curves else "Compute-optimal allocation")
    )
    captions = [text[0].upper() + text[1:] for text in captions]
    return Plot("isoflop", title, " ".join(captions), figure, rows + list(told), wide=count > 1)


def draw_curves(
    axes: Any,
    done: Sequence[Row],
    minima: Sequence[Row],
    told: Sequence[Row],
    predict: Predict | None,
    color: dict[float, Any],
    entries: dict[str, Any],
) -> tuple[list[Row], str]:
    """Loss against N, one parabola in ln N a budget (Hoffmann et al. 2022, approach 2); the rows and the caption."""
    draw_trials(axes, done, "N_params", [color[t["budget"]] for t in done])
    rows = trial_rows(done)
    entries["trials"] = key(NEUTRAL, "o")
    sizes, losses = [*column(done, "N_params"), *(r["N"] for r in told)], heights(done, told)
    edges: list[Row] = []
    for m in minima:
        measured = [t["N_params"] for t in done if t["budget"] == m["budget"]]
        if not measured or not all(map(is_number, m["coefficients"])):
            continue
        n = np.geomspace(min(measured) / 1.12, max(measured) * 1.12, 81)
        parabola = np.polyval(m["coefficients"], np.log(n))
        axes.plot(n, parabola, color=color[m["budget"]], zorder=2)
        low, high = m.get("N_opt_interval") or (None, None)
        fitted = {
            "N": m.get("N_opt"),
            "N_low": low,
            "N_high": high,
            "loss": m.get("loss_opt"),
            "edge": m.get("edge") or "",
        }
        rows += series("parabola", budget=m["budget"], N=n, loss=parabola)
        rows += series("minimum", budget=m["budget"], **fitted)
        if m.get("edge") or not is_number(m.get("N_opt")):  # the bottom was not measured: mark the last size that was
            edges.append(m)
            at = min(measured) if m.get("edge") == "low" else max(measured)
            best = float(np.polyval(m["coefficients"], np.log(at)))
            drawing.pointer(
                axes, at, best, "white", f"the minimum of C = {plain_power(m['budget'])}\nlies beyond the sizes tried"
            )
            entries["minimum at the grid's edge"] = key_minimum(hollow=True)
        else:
            at, best = m["N_opt"], m["loss_opt"]
            drawing.whisker(axes, at, best, xs=(low, high), color="black", z=2.5)
            drawing.pointer(axes, at, best, color[m["budget"]], minimum_tip(m))
            entries["minimum, with interval"] = key_minimum()
        sizes.append(at)
        losses.append(best)
    draw_outcome(axes, told, "N", entries)
    if told and predict:
        target = told[0]
        n = target["N"] * np.geomspace(1 / 6, 6, 81)
        loss = predict(n, target["C"] / (6 * n))
        rows += series("law at the target", budget=target["C"], N=n, loss=loss)
        axes.plot(n, loss, color=FORECAST, linestyle=TIGHT, linewidth=0.9, zorder=1.9)
        entries[f"law at $C$ = {power(target['C'])}"] = key_line(FORECAST, TIGHT)
    drawing.set_log_axis(axes.xaxis, sizes, eng)
    drawing.set_loss_axis(axes, losses)
    axes.set(xlabel=N_SHORT, ylabel=LOSS_LABEL)
    caption = "final loss against total parameters N (tied embedding counted once), one colour a budget C = 6ND (FLOPs)"
    caption += "; a triangle marks where the parabola in ln N puts the best size." if minima else "."
    if edges:
        caption += f" Hollow: the minimum of {len(edges)} of {len(minima)} budgets lies at the edge of the sizes tried,"
        caption += " which only bounds the optimum."
    shared = column(done, "loss_se")
    if np.isfinite(shared).any():
        caption += f" Not drawn: the standard error over held-out documents, {np.nanmedian(shared):.2g}, which all trials share."
    return rows, caption


def draw_optimum(
    panels: Sequence[Any],
    minima: Sequence[Row],
    inside: Sequence[Row],
    bands: Row | None,
    told: Sequence[Row],
    color: dict[float, Any],
    entries: dict[str, Any],
) -> tuple[list[Row], str]:
    """N*(C) and D*(C): the law's band over the minima of the isoFLOP parabolas; the rows and the caption."""
    rows: list[Row] = []
    labels = ("optimal parameters $N$* (total)", "optimal tokens $D$*")
    for axes, x, label in zip(panels, "ND", labels, strict=True):
        names = {k: f"{x}_{k}" for k in ("low", "high")}
        compute, values = [r["C"] for r in told[:1]], [r[x] for r in told[:1]]
        if bands:
            c, best, low, high = (np.asarray(bands[k], np.float64) for k in ("C", f"{x}_opt", *names.values()))
            rows += series(f"law {x}*", **{"C": c, x: best, names["low"]: low, names["high"]: high})
            drawing.band(axes, c, best, low, high)
            entries["fitted law, with band"] = key_line(LAW)
            compute += [c.min(), c.max()]
            values += [low.min(), high.max()]
        for m in inside:
            c, at = m["budget"], m[f"{x}_opt"]
            ends = m.get("N_opt_interval") or (None, None)
            if x == "D":  # D = C / 6N along a budget, so the ends change places
                ends = tuple(c / (6 * n) if n else None for n in reversed(ends))
            rows += series(f"isoFLOP minimum {x}*", **{"C": c, x: at, names["low"]: ends[0], names["high"]: ends[1]})
            drawing.whisker(axes, c, at, ys=ends, color="black", z=4)
            drawing.ring(axes, c, at, color[c], minimum_tip(m))
            entries["isoFLOP minimum, with interval"] = key("black", "o", 4.5, face="#bbbbbb")
            compute.append(c)
            values += [at, *filter(is_number, ends)]
        for target in told[:1]:
            drawing.star(axes, target["C"], target[x], outcome_tip(target))
            entries.setdefault("target of the forecast", key_star())
        drawing.set_log_axis(axes.xaxis, compute, power)
        drawing.set_log_axis(axes.yaxis, values, eng)
        axes.set(xlabel=C_SHORT, ylabel=label)
    if "forecast, with interval" in entries:  # the same star
        entries.pop("target of the forecast", None)
    caption = "the compute-optimal size N* and tokens D* as C = 6ND grows"
    caption += ": the fitted law with its band" if bands else ""
    caption += (", and " if bands else ", ") + "the minima of the isoFLOP curves." if inside else "."
    skipped = len(minima) - len(inside)
    caption += f" Left out: {skipped} at the edge of the sizes tried." if skipped else ""
    return rows, caption


def minimum_tip(m: Row) -> str:
    """What the mark of an isoFLOP minimum says."""
    ends = [eng(end) for end in m.get("N_opt_interval") or () if is_number(end)]
    within = f" [{', '.join(ends)}]" if len(ends) == 2 else ""
    return f"minimum of C = {plain_power(m['budget'])}\nN* = {eng(m['N_opt'])}{within}\nD* = {eng(m['D_opt'])}\nloss {m['loss_opt']:.4f}"


def surface(
    trials: Sequence[Row], predict: Predict | None, bands: Row | None, told: Sequence[Row], floor: float = 0.0
) -> Plot | None:
    """The fitted loss over (C, N) as contours, the efficient frontier on it, and where the trials are.

    Hoffmann et al. 2022, figure 4, left. Contours lie evenly in the logarithm of the loss above `floor`, the law's
    irreducible loss.
    """
    done = finished(trials)
    if not done or predict is None:
        return None
    at_c, at_n = (
        [*column(done, name), *(r[letter] for r in told[:1])] for name, letter in (("C_flops", "C"), ("N_params", "N"))
    )
    c, n = (np.geomspace(min(v) / 1.6, max(v) * above, SURFACE_POINTS) for v, above in ((at_c, 1.6), (at_n, 2.2)))
    loss = predict(n[:, None], c / (6 * n[:, None]))
    if (loss == loss[:, :1]).all():  # a law of N alone has no best size
        return None
    seen = [*column(done, "loss"), *(r["loss"] for r in told)]
    low, high = float(loss.min()), max(*seen, float(np.quantile(loss, 0.8)))
    floor = floor if 0 < floor < low else 0.0
    if not np.isfinite([low, high]).all() or not low < high:
        return None
    levels = floor + np.geomspace(low - floor, high - floor, LEVELS + 1)[1:]
    figure, (axes,) = drawing.new_figure(height=3.6)
    drawing.contours(axes, c, n, loss, levels, int(np.searchsorted(n, 1.5 * max(at_n))))
    rows = series("law", C=np.tile(c, len(n)), N=np.repeat(n, len(c)), loss=loss.ravel()) + trial_rows(done)
    entries = {"trials": key(NEUTRAL, "o")}
    best = loss.argmin(0)
    bounded = (best > 0) & (best < len(n) - 1)  # elsewhere the best size lies off the figure
    if bands:
        along, opt, least, most = (np.asarray(bands[k], np.float64) for k in ("C", "N_opt", "N_low", "N_high"))
        drawing.band(axes, along, opt, least, most)
        entries["efficient frontier, with band"] = key_line(LAW)
        rows += series("frontier", C=along, N=opt, N_low=least, N_high=most)
    elif bounded.any():
        axes.plot(c[bounded], n[best[bounded]], color=LAW, zorder=2)
        entries["efficient frontier"] = key_line(LAW)
        rows += series("frontier", C=c[bounded], N=n[best[bounded]])
    color = shades(t.get("budget") or 0 for t in done)
    colors = [color[t.get("budget") or 0] for t in done]
    tips = [(str(t["id"]), surface_tip(t, predict)) for t in done]
    drawing.dots(axes, column(done, "C_flops"), column(done, "N_params"), colors, tips)
    for target in told[:1]:
        drawing.star(axes, target["C"], target["N"], outcome_tip(target))
        entries["target of the forecast"] = key_star()
    drawing.set_log_axis(axes.xaxis, at_c, power)
    drawing.set_log_axis(axes.yaxis, at_n, eng)
    axes.set(xlabel=C_LABEL, ylabel=N_SHORT, xlim=(c[0], c[-1]), ylim=(n[0], n[-1]))
    axes.grid(False)
    drawing.legend(figure, entries, 2)
    caption = "Lines of equal loss (nats per token) of the fitted law over total parameters N and compute C = 6ND,"
    caption += (
        " with the trials in the colours of their budgets; the dark line is the size that the law finds best for C."
    )
    return Plot("surface", "The fitted loss over N and C", caption, figure, rows + list(told[:1]))


def surface_tip(t: Row, predict: Predict) -> str:
    """A trial, and what the law says of it."""
    return f"{trial_tip(t)[1]}\nlaw {float(predict(t['N_params'], t['D_tokens'])):.4f}"
