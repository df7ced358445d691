"""Groups of trials in one figure: loss against compute and against parameters, and the exponents of each group's law."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from scaling import drawing
from scaling.drawing import DOTTED, Plot, Row, column, eng, is_number, key, key_line, power, series
from scaling.figures import C_LABEL, LOSS_LABEL, finished, trial_rows, trial_tip

HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")
"""Of Okabe and Ito (2008), without the yellow, which fades on paper; the last is another brown."""
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "*")


def comparison(trials: Sequence[Row], groups: Sequence[Row], by: str) -> Plot | None:
    """Left: loss against compute, with each group's efficient frontier; centre: against N; right: alpha and beta.

    A group is name, fit, bands and reason, as in compare.record; a trial belongs to the group that its column `by` names.
    The counterpart of Kaplan et al. 2020, figure 7, for any groups.
    """
    done = {group["name"]: [t for t in finished(trials) if str(t.get(by)) == group["name"]] for group in groups}
    groups = [group for group in groups if done[group["name"]]]
    if len(groups) < 2:
        return None
    exponents = [name for name in ("alpha", "beta") if any(g["fit"] and name in g["fit"]["parameters"] for g in groups)]
    figure, axes = drawing.new_figure(3 if exponents else 2, height=3.0, ratios=[1, 1, 0.62][: 3 if exponents else 2])
    entries, rows = {}, []
    losses: list[float] = []
    for i, group in enumerate(groups):
        mine, hue, shape = done[group["name"]], HUES[i % len(HUES)], SHAPES[i % len(SHAPES)]
        rows += [row | {by: group["name"]} for row in trial_rows(mine)]
        losses += [*column(mine, "loss")]
        for panel, x in zip(axes, ("C_flops", "N_params"), strict=False):
            placed = [t for t in mine if t.get(x)]
            if not placed:  # counted, not trained: no FLOPs
                panel.axhline(column(mine, "loss").min(), color=hue, linestyle=DOTTED, zorder=1)
                continue
            look: Any = {"s": 15, "marker": shape, "c": [hue], "edgecolors": "white", "linewidths": 0.35}
            drawn = panel.scatter(column(placed, x), column(placed, "loss"), **look)
            drawing.interactive.tell(drawn, map(trial_tip, placed))
        if group["bands"]:
            c, loss, low, high, n = (
                np.asarray(group["bands"][k], np.float64) for k in ("C", "loss", "loss_low", "loss_high", "N_opt")
            )
            inside = (c >= column(mine, "C_flops").min() / 1.05) & (c <= column(mine, "C_flops").max() * 1.05)
            axes[0].plot(c[inside], loss[inside], color=hue, zorder=2)
            axes[0].fill_between(c[inside], low[inside], high[inside], color=hue, alpha=0.13, linewidth=0, zorder=1)
            axes[1].plot(n[inside], loss[inside], color=hue, zorder=2)
            rows += [row | {by: group["name"]} for row in series("frontier", C=c, N=n, loss=loss)]
        entries[group["name"]] = key(hue, shape)
    if any(group["bands"] for group in groups):
        entries["efficient frontier, with band"] = key_line(drawing.NEUTRAL)
    every = [t for mine in done.values() for t in mine if t.get("C_flops")]
    drawing.set_log_axis(axes[0].xaxis, column(every, "C_flops"), power)
    drawing.set_log_axis(axes[1].xaxis, column(every, "N_params"), eng)
    for panel in axes[:2]:
        drawing.set_loss_axis(panel, losses)
    axes[0].set(xlabel=C_LABEL, ylabel=LOSS_LABEL)
    axes[1].set(xlabel="parameters $N$ (total)", yticklabels=[])
    if exponents:
        rows += draw_exponents(axes[2], groups, exponents, by)
    drawing.legend(figure, entries, 4)
    caption = (
        f"Trials of each {by}, final loss against compute C = 6ND (FLOPs) and against total parameters N; lines are the least loss "
        "that the group's own law promises for C, over its trials; a dotted line is the best of a group without FLOPs. "
        "Right: the exponents with 95 % intervals."
    )
    return Plot("comparison", f"Side by side, by {by}", caption, figure, rows, wide=True)


def draw_exponents(axes: drawing.Axes, groups: Sequence[Row], names: Sequence[str], by: str) -> list[Row]:
    """A line a group and exponent: the value and its interval, arrows where an end is open."""
    rows, labels, place = [], [], 0.0
    ends = []
    for name in names:
        for i, group in enumerate(groups):
            found = group["fit"]["parameters"].get(name) if group["fit"] else None
            if not found:
                continue
            hue, value = HUES[i % len(HUES)], found["value"]
            low, high = (end if is_number(end) else None for end in found["interval"] or (None, None))
            axes.plot([value], [place], marker=SHAPES[i % len(SHAPES)], ms=4, color=hue, mew=0)
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], color=hue, linewidth=1)
            ends += [end for end in (value, low, high) if end is not None]
            labels.append((place, f"{drawing.GREEK[name]}  {group['name']}"))
            rows += series("exponent", **{by: group["name"]}, parameter=name, value=value, low=low, high=high)
            place -= 1
        place -= 0.6
    axes.set_yticks([at for at, _ in labels], [text for _, text in labels])
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel="exponent", ylim=(place + 0.8, 0.8))
    margin = 0.06 * (max(ends) - min(ends)) or 0.05
    axes.set_xlim(min(ends) - margin, max(ends) + margin)
    return rows
