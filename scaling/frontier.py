"""The compute-optimal frontier of a fit: N*, D* and the loss along C, with the band of the bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jax.settings import BadInput
from scaling import laws
from scaling.fit import Fit
from scaling.tables import Table
from scaling.uncertainty import Bootstrap

POINTS = 41


def bands(
    fitted: Fit, boot: Bootstrap, table: Table, compute: Sequence[float] | np.ndarray = ()
) -> dict[str, Any] | None:
    """Lists of C, N_opt, D_opt and loss, and of N_low, N_high, D_low, ... (95 %), at each `compute`, in FLOPs; None where the
    law has no optimum at every C. Resamples without one are left out. Without `compute`, over that of the table.
    """
    if fitted.law.columns != ("N_params", "D_tokens"):
        return None
    c_C = np.array(compute, float) if len(compute) else span(table)
    six_nd = np.allclose(table.column("C_flops"), 6 * table.column("N_params") * table.column("D_tokens"), rtol=0.02)
    has_formula = six_nd and fitted.law.name == "chinchilla"
    found = _by_formula(fitted, boot, c_C) if has_formula else _by_search(fitted, boot, table, c_C)
    if found is None:
        return None
    (n_C, loss_C), (n_SxC, loss_SxC) = found
    per_token = flops_per_token(table)
    d_C, d_SxC = (c_C / np.exp(np.polyval(per_token, np.log(n))) for n in (n_C, n_SxC))
    answer = {"C": c_C, "loss": loss_C, "N_opt": n_C, "D_opt": d_C}
    for name, values_SxC in (("N", n_SxC), ("D", d_SxC), ("loss", loss_SxC)):
        answer[f"{name}_low"], answer[f"{name}_high"] = np.quantile(values_SxC, [0.025, 0.975], axis=0)
    return {name: values.tolist() for name, values in answer.items()}


def flops_per_token(table: Table, compute: str = "C_flops") -> np.ndarray:
    """Coefficients of ln(C / D) as a polynomial in ln N: of the second degree, as attention and head grow slower than N, and
    active parameters than all of them. Exactly ln 6 + ln N where C = 6 N D."""
    log_n_R, log_f_R = np.log(table.column("N_params")), np.log(table.column(compute) / table.column("D_tokens"))
    if np.ptp(log_f_R - log_n_R) < 0.02:
        return np.array([1.0, np.mean(log_f_R - log_n_R)])
    return np.polyfit(log_n_R, log_f_R, min(2, len(np.unique(log_n_R)) - 1))


def span(table: Table, reach: float = 0.0) -> np.ndarray:
    """POINTS values of compute, from a little less than the least of the table to a little more than its greatest or `reach`."""
    compute = table.column("C_flops")
    return np.geomspace(compute.min() / 1.3, max(compute.max(), reach) * 1.3, POINTS)


Curves = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""N* and loss of the fit, C each; and of the resamples, SxC each."""


def _by_formula(fitted: Fit, boot: Bootstrap, c_C: np.ndarray) -> Curves | None:
    samples = boot.parameters
    usable = np.all([samples[name] > 0 for name in ("A", "B", "alpha", "beta")], axis=0)
    try:
        n_C, d_C = np.asarray([laws.optimum(fitted.parameters, float(c)) for c in c_C]).T
    except BadInput:
        return None
    if not usable.any():
        return None
    rows = [{name: values[i] for name, values in samples.items()} for i in np.flatnonzero(usable)]
    n_SxC, d_SxC = np.moveaxis(np.asarray([[laws.optimum(row, float(c)) for c in c_C] for row in rows]), -1, 0)
    part = {name: values[usable][:, None] for name, values in samples.items()}
    loss_SxC = part["E"] + part["A"] / n_SxC ** part["alpha"] + part["B"] / d_SxC ** part["beta"]
    return (n_C, fitted.predict(n_C, d_C)), (n_SxC, loss_SxC)


def _by_search(
    fitted: Fit, boot: Bootstrap, table: Table, c_C: np.ndarray, sizes: int = 121, samples: int = 100
) -> Curves | None:
    """For a law without a formula for its optimum, over a grid of sizes; None where the optimum lies at its end."""
    log_n_R, per_token = np.log(table.column("N_params")), flops_per_token(table)
    log_n_G = np.linspace(log_n_R.min() - 4, log_n_R.max() + 4, sizes)
    log_d_CxG = np.log(c_C)[:, None] - np.polyval(per_token, log_n_G)
    x_KxR = np.stack([np.tile(log_n_G, len(c_C)), log_d_CxG.ravel()])
    theta_SxP = np.concatenate([fitted.theta[None], boot.theta_SxP[:samples]])
    value = np.concatenate([fitted.law.evaluate(one[None], x_KxR)[0] for one in theta_SxP])
    loss_SxCxG = (np.exp(value) if fitted.law.log else value).reshape(len(theta_SxP), len(c_C), sizes)
    at_SxC = loss_SxCxG.argmin(2)
    inside_S = np.isfinite(loss_SxCxG).all((1, 2)) & ((at_SxC > 0) & (at_SxC < sizes - 1)).all(1)
    if not inside_S[0] or inside_S.sum() < 2:
        return None
    below, here, above = (
        np.take_along_axis(loss_SxCxG, (at_SxC + step)[..., None].clip(0, sizes - 1), 2)[..., 0] for step in (-1, 0, 1)
    )
    offset_SxC = 0.5 * (below - above) / np.maximum(below - 2 * here + above, 1e-300)
    n_SxC = np.exp(log_n_G[at_SxC] + np.clip(offset_SxC, -0.5, 0.5) * (log_n_G[1] - log_n_G[0]))
    return (n_SxC[0], here[0]), (n_SxC[inside_S], here[inside_S])
