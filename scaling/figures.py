"""The figures of a scaling report, each a function of plain rows of numbers; None where there is nothing to draw.

Conventions in all of them: N counts every parameter, a tied embedding once; C = 6ND FLOPs; losses are nats per token.
Draw them inside `drawing.style()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.settings import BadInput
from scaling import drawing, expressions, interactive
from scaling.drawing import (
    DASHED,
    DOTTED,
    FORECAST,
    LAW,
    NEUTRAL,
    TRUTH,
    Plot,
    Row,
    column,
    eng,
    is_number,
    key,
    key_diamond,
    key_line,
    key_star,
    power,
    series,
    shades,
)

Predict = Callable[[Any, Any], np.ndarray]
"""(N, D) -> loss, elementwise, in float64."""

N_LABEL = "parameters $N$ (total, tied embedding counted once)"
D_LABEL = "training tokens $D$"
C_LABEL = r"training compute $C = 6ND$ (FLOPs)"
LOSS_LABEL = "loss (nats per token)"


def predictor(fit: Row | None) -> Predict | None:
    """The fitted law as a function, read from its formula, as in "L = E + A / N^alpha + B / D^beta".

    None where there is no fit, or the formula is of something else than loss, or asks for more than N, D and the
    parameters.
    """
    if not fit:
        return None
    target, _, formula = fit["formula"].partition("=")
    letters = {name: np.float64(p["value"]) for name, p in fit["parameters"].items()}
    origin = f'formula "{fit["formula"]}"'
    try:
        tree = expressions.parse(formula.replace("^", "**"), origin, "L = E + A / N^alpha + B / D^beta")
    except BadInput:  # a law of many steps says more than one expression
        return None
    if target.strip() != "L" or expressions.names(tree) - {"N", "D", *letters}:
        return None

    def predict(n: Any, d: Any) -> np.ndarray:
        values = letters | {"N": np.asarray(n, np.float64), "D": np.asarray(d, np.float64)}
        found = expressions.number(tree, values.__getitem__, origin)
        return np.broadcast_to(found, np.broadcast_shapes(np.shape(n), np.shape(d)))  # a law need not read both

    return predict


def finished(trials: Iterable[Row]) -> list[Row]:
    """The trials that can be drawn, by budget and then by N."""
    done = [t for t in trials if t.get("status") == "done" and is_number(t.get("loss"))]
    return sorted(done, key=lambda t: (t.get("budget") or 0, t["N_params"], t["D_tokens"]))


def trial_rows(trials: Sequence[Row], **more: Any) -> list[Row]:
    """The trials as rows of a figure, with N, D and C for short; `more` are further columns."""
    ledger = {"N": "N_params", "D": "D_tokens", "C": "C_flops"}
    names = ("id", "budget", "N", "D", "C", "loss", "loss_se")
    return series("trial", **{n: [t.get(ledger.get(n, n)) for t in trials] for n in names}, **more)


def trial_tip(t: Row) -> tuple[str, str]:
    """What a trial's point says of it: its id, and a text."""
    error = f" ± {t['loss_se']:.4f}" if is_number(t.get("loss_se")) else ""
    text = f"{t['id']}\n{size_text(*map(t.get, ('N_params', 'D_tokens', 'C_flops')))}\nloss {t['loss']:.4f}{error}"
    return str(t["id"]), text


def size_text(n: Any, d: Any, c: Any) -> str:
    """N, D and C in words, for tips; those that are known."""
    sizes = ", ".join(f"{letter} = {eng(value)}" for letter, value in (("N", n), ("D", d)) if is_number(value))
    return sizes + (f"\nC = {drawing.plain_power(c)} FLOPs" if is_number(c) else "")


def outcome(forecast: Row | None, verify: Row | None) -> list[Row]:
    """The registered forecast, then what was measured for it, as points of a figure."""
    if not forecast:
        return []
    at, prediction = {name: forecast["target"][name] for name in "NDC"}, forecast["prediction"]
    low, high = prediction["interval"]
    rows = series("forecast", **at, loss=prediction["loss"], loss_low=low, loss_high=high)
    if verify:
        rows += series("measured", **at, loss=verify["measured"], loss_se=verify.get("standard_error"))
    return rows


def outcome_tip(row: Row) -> str:
    """What the star and the diamond say."""
    text = f"{row['series']}\n{size_text(row['N'], row['D'], row['C'])}\nloss {row['loss']:.4f}"
    return text + (f" [{row['loss_low']:.4f}, {row['loss_high']:.4f}]" if row["series"] == "forecast" else "")


def heights(done: Iterable[Row], told: Iterable[Row]) -> list[float]:
    """Every loss that a loss axis must show."""
    return [*column(done, "loss"), *(r[k] for r in told for k in ("loss", "loss_low", "loss_high") if k in r)]


def draw_trials(axes: Any, done: Sequence[Row], x: str, colors: Iterable[Any]) -> None:
    """Loss against the column `x`."""
    drawing.dots(axes, column(done, x), column(done, "loss"), colors, map(trial_tip, done))


def draw_outcome(axes: Any, told: Iterable[Row], x: str, entries: dict[str, Any]) -> None:
    """The forecast as a star with its interval, the measurement as a filled diamond upon it."""
    for row in told:
        if row["series"] == "forecast":
            ends = (row["loss_low"], row["loss_high"])
            drawing.whisker(axes, row[x], row["loss"], ys=ends, color=FORECAST, z=6.5)
            drawing.star(axes, row[x], row["loss"], outcome_tip(row))
            entries["forecast, with interval"] = key_star()
        else:
            drawing.diamond(axes, row[x], row["loss"], outcome_tip(row))
            entries["measured"] = key_diamond()


def frontier(trials: Sequence[Row], bands: Row | None, told: Sequence[Row]) -> Plot | None:
    """Loss against compute, the efficient frontier and the forecast on it."""
    done = finished(trials)
    if not done:
        return None
    color = shades(t.get("budget") or 0 for t in done)
    figure, (axes,) = drawing.new_figure(height=3.6)
    draw_trials(axes, done, "C_flops", [color[t.get("budget") or 0] for t in done])
    rows, entries = trial_rows(done), {"trials": key(NEUTRAL, "o")}
    compute, losses = [*column(done, "C_flops"), *(r["C"] for r in told)], heights(done, told)
    if bands:
        c, loss, low, high = (np.asarray(bands[k], np.float64) for k in ("C", "loss", "loss_low", "loss_high"))
        rows += series("frontier", C=c, loss=loss, loss_low=low, loss_high=high)
        drawing.band(axes, c, loss, low, high)
        entries["efficient frontier, with band"] = key_line(LAW)
        compute += [c.min(), c.max()]
        losses += [loss.min()]
    draw_outcome(axes, told, "C", entries)
    drawing.set_log_axis(axes.xaxis, compute, power)
    drawing.set_loss_axis(axes, losses)
    axes.set(xlabel=C_LABEL, ylabel=LOSS_LABEL)
    drawing.legend(figure, entries, 2)
    caption = "Final loss of every trial against its training compute C = 6ND, in the colours of the budgets"
    caption += "; the line is the least loss that the fitted law promises for C." if bands else "."
    if len(told) == 2:
        left, right = np.log(axes.get_xlim())
        near = [t["loss"] for t in done if np.log(t["C_flops"]) > left + 0.3 * (right - left)]
        bottom, top = axes.get_ylim()  # room for the inset above whatever stands below it
        axes.set_ylim(bottom, max([top, *(bottom + (loss - bottom) / 0.55 for loss in near)]))
        zoom(axes, *told)
        caption += " The inset magnifies the forecast and the measurement."
    return Plot("frontier", "Loss against compute", caption, figure, rows + list(told))


def zoom(axes: Any, forecast: Row, measured: Row) -> None:
    """Forecast over measurement on one loss axis: an interval of a percent is invisible at the scale of the sweep."""
    from matplotlib.ticker import MaxNLocator

    inset = axes.inset_axes((0.52, 0.7, 0.47, 0.27))
    low, high = forecast["loss_low"], forecast["loss_high"]
    inset.axvspan(low, high, color=FORECAST, alpha=0.1, linewidth=0)
    drawing.whisker(inset, forecast["loss"], 1, xs=(low, high), color=FORECAST, z=5)
    drawing.star(inset, forecast["loss"], 1, outcome_tip(forecast))
    drawing.diamond(inset, measured["loss"], 0, outcome_tip(measured))
    left, right = min(low, measured["loss"]), max(high, measured["loss"])
    margin = 0.15 * (right - left) or 0.01
    inset.set(
        xlim=(left - margin, right + margin), ylim=(-0.8, 1.8), yticks=[0, 1], yticklabels=["measured", "forecast"]
    )
    inset.xaxis.set_major_locator(MaxNLocator(3))
    inset.tick_params(labelsize=7.5, length=2, pad=2)
    inset.tick_params(axis="y", length=0)
    for label in (*inset.get_xticklabels(), *inset.get_yticklabels()):
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    inset.grid(False)
    inset.spines["left"].set_visible(False)


def law_panels(
    trials: Sequence[Row], fit: Row | None, predict: Predict | None, told: Sequence[Row], entropy: float | None
) -> Plot | None:
    """Loss against N in the colours of D, and against D in the colours of N, with the fitted law's curves."""
    done = finished(trials)
    if not done:
        return None
    figure, panels = drawing.new_figure(2, height=3.3)
    rows, entries = trial_rows(done), {"trials": key(NEUTRAL, "o")}
    if predict:
        entries["fitted law"] = key_line(NEUTRAL)
    losses = heights(done, told)
    floor = min(losses) - 0.75 * (max(losses) - min(losses))  # a level further down would squeeze the data
    caption = "Left: final loss against total parameters N (tied embedding counted once), in the colours of tokens D;"
    caption += " right: the reverse." + (" Lines are the fitted law at one D, and at one N." if predict else "")
    for name, value, interval, color, dash in levels(fit, entropy):
        low, high = interval or (None, None)  # type: Any, Any
        rows += series(name, loss=value, loss_low=low, loss_high=high)
        if value < floor:
            caption += f" Below the view: {name}, {value:.4g}."
            continue
        for axes in panels:
            axes.axhline(value, color=color, linestyle=dash, linewidth=1.0, zorder=1.5)
            if interval:
                axes.axhspan(low, high, color=color, alpha=0.1, linewidth=0, zorder=0.5)
        entries[name.replace(" E", " $E$")] = key_line(color, dash)
        losses += [value, *(max(v, floor) for v in interval or ())]
    letters = {"N": ("N_params", N_LABEL, "parameters $N$", "plasma"), "D": ("D_tokens", D_LABEL, D_LABEL, "cividis")}
    for axes, x, by in zip(panels, "ND", "DN", strict=True):
        (x_name, x_label, _, _), (by_name, _, by_label, colormap) = letters[x], letters[by]
        span, held = [*column(done, x_name), *(r[x] for r in told)], np.unique(column(done, by_name))
        scale = drawing.log_scale(held, colormap)
        draw_trials(axes, done, x_name, scale.to_rgba(column(done, by_name)))
        if len(held) > 7:  # in an isoFLOP sweep every trial has its own D
            held = np.geomspace(held[0], held[-1], 6)
        grid = np.geomspace(min(span) / 1.3, max(span) * 1.3, 81)
        for value in held if predict else ():
            loss = predict(*((grid, value) if x == "N" else (value, grid)))  # type: ignore[misc]
            rows += series("law", **{x: grid, by: value}, loss=loss)
            axes.plot(grid, loss, color=scale.to_rgba(value), linewidth=0.9, zorder=2)
        draw_outcome(axes, told, x, entries)
        drawing.set_log_axis(axes.xaxis, span, eng)
        drawing.set_loss_axis(axes, losses)
        axes.set(xlabel=x_label)
        drawing.color_bar(figure, axes, scale, by_label)
    panels[0].set_ylabel(LOSS_LABEL)
    panels[1].tick_params(labelleft=False)
    drawing.legend(figure, entries, 6)
    return Plot("law", "Loss against parameters and tokens", caption, figure, rows + list(told), wide=True)


def levels(fit: Row | None, entropy: float | None) -> list[tuple[str, float, Any, Any, Any]]:
    """(name, loss, interval, colour, dash) of what no model beats: as fitted, unless unbounded, and as it truly is."""
    found: list[tuple[str, float, Any, Any, Any]] = []
    fitted = fit["parameters"].get("E") if fit else None
    if fitted and not fitted.get("unbounded"):
        interval = fitted.get("interval")
        bounded = interval and all(map(is_number, interval))
        name = "fitted E, with interval" if bounded else "fitted E, no interval"
        found.append((name, fitted["value"], interval if bounded else None, LAW, DASHED))
    if entropy is not None:
        found.append(("true entropy of the source", entropy, None, TRUTH, DOTTED))
    return found


def binned(tokens: np.ndarray, loss: np.ndarray, bins: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """Means over bins of equal width in log tokens; a bin with one point keeps it as it is."""
    edges = np.geomspace(tokens.min(), tokens.max(), bins + 1)
    where = np.clip(np.searchsorted(edges, tokens, side="right") - 1, 0, bins - 1)
    count = np.bincount(where, minlength=bins)
    log_x, y = (
        np.bincount(where, weights=v, minlength=bins)[count > 0] / count[count > 0] for v in (np.log(tokens), loss)
    )
    return np.exp(log_x), y


def learning_curves(trials: Sequence[Row], curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Plot | None:
    """Training loss against tokens seen."""
    sizes = {t["id"]: t["N_params"] for t in trials if t["id"] in curves and len(curves[t["id"]]["tokens"])}
    if not sizes:
        return None
    figure, (axes,) = drawing.new_figure(height=3.0)
    scale = drawing.log_scale(sizes.values(), "plasma")
    rows: list[Row] = []
    seen: list[float] = []
    losses: list[float] = []
    raw = 0
    for name, size in sorted(sizes.items(), key=lambda item: (item[1], item[0])):
        curve, color = curves[name], scale.to_rgba(size)
        tokens, loss = np.asarray(curve["tokens"], np.float64), np.asarray(curve["loss"], np.float64)
        rows += series("training", id=name, N=size, tokens=tokens, loss=loss)
        drawn = np.isfinite(loss) & (
            tokens >= 0.01 * tokens.max()
        )  # before that it falls from ln V, and dwarfs the rest
        if drawn.any():
            x, y = binned(tokens[drawn], loss[drawn])
            axes.plot(x, y, color=color, linewidth=0.8)
            seen, losses, raw = [*seen, *x], [*losses, *y], raw + int(drawn.sum())
        if curve.get("eval_tokens"):
            rows += series(
                "held out", id=name, N=size, tokens=list(curve["eval_tokens"]), loss=list(curve["eval_loss"])
            )
            drawn = axes.scatter(
                curve["eval_tokens"], curve["eval_loss"], s=9, color=color, edgecolors="black", lw=0.4, zorder=3
            )
            evaluations = zip(curve["eval_tokens"], curve["eval_loss"], strict=True)
            interactive.tell(
                drawn, [(name, f"{name}\nN = {eng(size)}\n{loss:.4f} at {eng(at)} tokens") for at, loss in evaluations]
            )
    if not seen:
        return None
    drawing.set_log_axis(axes.xaxis, seen, eng, pad=0.02)
    drawing.set_loss_axis(axes, losses)
    axes.set(xlabel="tokens seen", ylabel="training " + LOSS_LABEL)
    drawing.color_bar(figure, axes, scale, "parameters $N$ (total)")
    caption = (
        "Training loss from 1 % of the tokens of each trial on, one line a trial, in the colours of total parameters N"
    )
    caption += "; smoothed: means over 160 equal steps of log tokens." if raw > len(seen) else "; not smoothed."
    caption += " Dots are evaluations on the held-out set." if any(curves[n].get("eval_tokens") for n in sizes) else ""
    return Plot("curves", "Learning curves", caption, figure, rows)


def residuals(trials: Sequence[Row], predict: Predict | None, told: Sequence[Row]) -> Plot | None:
    """How far each trial lies from the fitted law, in percent of the law."""
    done = finished(trials)
    if not done or predict is None:
        return None
    c, expected = column(done, "C_flops"), predict(column(done, "N_params"), column(done, "D_tokens"))
    relative = 100 * (column(done, "loss") / expected - 1)
    rows = trial_rows(done, predicted=expected, residual_percent=relative)
    figure, (axes,) = drawing.new_figure(height=3.0)
    color = shades(t.get("budget") or 0 for t in done)
    axes.axhline(0, color=LAW, linewidth=0.9, zorder=2)
    tips = [
        (trial, f"{text}\n{gap:+.2f} % of the law")
        for (trial, text), gap in zip(map(trial_tip, done), relative, strict=True)
    ]
    drawing.dots(axes, c, relative, [color[t.get("budget") or 0] for t in done], tips)
    entries, compute = {"trials": key(NEUTRAL, "o")}, list(c)
    widest = [np.nanmax(np.abs(relative))]
    if len(told) == 2:
        forecast, measured = told
        gap, *ends = (
            100 * (v / forecast["loss"] - 1) for v in (measured["loss"], forecast["loss_low"], forecast["loss_high"])
        )
        rows += series(
            "measured", C=measured["C"], loss=measured["loss"], predicted=forecast["loss"], residual_percent=gap
        )
        drawing.whisker(axes, measured["C"], 0, ys=ends, color=FORECAST, z=5)
        drawing.diamond(axes, measured["C"], gap, f"{outcome_tip(measured)}\n{gap:+.2f} % of the forecast")
        entries |= {"interval of the forecast": key_line(FORECAST), "measured": key_diamond()}
        compute.append(measured["C"])
        widest += map(abs, (gap, *ends))
    limit = 1.12 * max(widest) or 1.0
    drawing.set_log_axis(axes.xaxis, compute, power)
    axes.set(xlabel=C_LABEL, ylabel="(measured − law) / law (%)", ylim=(-limit, limit))
    drawing.legend(figure, entries, 3)
    caption = "What the fitted law leaves over, against C = 6ND, in the colours of the budgets"
    caption += f"; root mean square {np.sqrt(np.mean(relative**2)):.2g} %. A trend along C would speak against the law."
    return Plot("residuals", "Residuals of the fit", caption, figure, rows)
