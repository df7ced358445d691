"""What would make a fit's numbers misleading: each check gives its warnings, a line each, none where all is well."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from scaling.fit import Fit, fit
from scaling.laws import Law
from scaling.tables import Table

Ends = Mapping[str, tuple[float, float]]

MANY_EPOCHS = 4
"""Muennighoff et al. 2023: up to about four epochs repeated tokens are worth nearly as much as new ones."""
DECAY = 1.25
"""Hoffmann et al. 2022, appendix B: a cosine that would end more than a quarter later than the run costs loss visibly."""
OBJECTIVES = ("huber:1e-3", "l1", "lsq")
"""Objectives that are compared: each was published for tables that another was published for."""


def open_sides(result: Fit, ends: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The open ends (uncertainty.open_ends) that the fit has not told of itself."""
    return [
        f"{name} is not bounded {'above' if side == 'upper' else 'below'} by this data"
        for name, sides in ends.items()
        for side in sides
        if result.at_bound.get(name) != side
    ]


def outliers(result: Fit, ends: Ends, around: str) -> list[str]:
    """Where the fit's own value lies outside of the interval, which is `around` the law under another objective."""
    beyond = [
        f"{name} = {result.parameters[name]:.4g} [{low:.4g}, {high:.4g}]"
        for name, (low, high) in ends.items()
        if not low <= result.parameters[name] <= high
    ]
    if not beyond:
        return []
    return [
        f"the fit lies outside of its own intervals in {', '.join(beyond)}: they are those of {around}, as wide as the noise, "
        f"and {result.objective} counts the rows near the law alone"
    ]


def disagreement(result: Fit, table: Table, ends: Ends) -> list[str]:
    """A warning for each other objective whose answer lies outside of the intervals, and farther off than half of their width:
    they need not be around the fit itself."""
    held = {name: result.parameters[name] for name in result.held}
    suffix = ":log" if result.law.log else ":linear"
    told = []
    for name in OBJECTIVES:
        if name.split(":")[0] == result.objective.split(":")[0]:
            continue
        other = fit(result.law, table, name + suffix, held)
        moved = [
            f"{key} {result.parameters[key]:.4g} and {value:.4g}"
            for key, value in other.parameters.items()
            if key in ends
            and not ends[key][0] <= value <= ends[key][1]
            and abs(value - result.parameters[key]) > (ends[key][1] - ends[key][0]) / 2
        ]
        if moved:
            told.append(
                f"{result.objective} and {name} disagree by more than the intervals: {', '.join(moved)}; "
                "rows far from the law decide, so look at the residuals before you trust either"
            )
    return told


def repetition(table: Table, law: Law) -> list[str]:
    """Where tokens repeat, unless the law knows of it."""
    epochs_R = _numbers(table, "epochs")
    if "D_unique" in law.columns or epochs_R is None or not (epochs_R > MANY_EPOCHS).any():
        return []
    return [
        f"{int((epochs_R > MANY_EPOCHS).sum())} trials repeat their data more than {MANY_EPOCHS} times, one "
        f"{np.nanmax(epochs_R):.1f} times: their loss is that of fewer tokens (Muennighoff et al. 2023)"
    ]


def decay(table: Table) -> list[str]:
    """Where the learning rate has not decayed when the loss is read, or long before: `schedule` and `decay_tokens`, the
    tokens at which the schedule ends, say so."""
    told = []
    schedule_R = table.columns.get("schedule")
    if schedule_R is not None and (constant := int((schedule_R == "constant").sum())):
        told.append(
            f"the learning rate of {constant} trials does not decay: their loss is not that of their budget "
            "(Hoffmann et al. 2022, appendix B)"
        )
    ends_R, tokens_R = _numbers(table, "decay_tokens"), _numbers(table, "D_tokens")
    if ends_R is not None and tokens_R is not None:
        ratio_R = ends_R / tokens_R
        off = (ratio_R > DECAY) | (ratio_R < 1 / DECAY)
        if off.any():
            worst = ratio_R[off][np.argmax(np.abs(np.log(ratio_R[off])))]
            told.append(
                f"the learning-rate decay of {int(off.sum())} trials does not match their budget: one ends at {worst:.2g} times "
                "its tokens, so that the loss is not that of the budget (Hoffmann et al. 2022, appendix B)"
            )
    return told


def shared_noise(table: Table, cluster: str) -> list[str]:
    """Where runs branch from a common trunk and the intervals do not know it."""
    trunk_R = table.columns.get("trunk")
    if cluster or trunk_R is None or trunk_R.dtype.kind == "f":
        return []
    named = trunk_R[trunk_R != ""]
    if len(np.unique(named)) == len(named):
        return []
    return [
        f"{len(named)} trials branch from {len(np.unique(named))} trunks and share their errors: intervals that take rows "
        "for independent are too narrow; give --cluster trunk"
    ]


def _numbers(table: Table, name: str) -> np.ndarray | None:
    column = table.columns.get(name)
    return column if column is not None and column.dtype.kind == "f" else None
