"""Is the form of a law wrong for a table? A test for what its residuals still say, and the reason in one line.

Residuals under the loss of robust.py are tested for bends along each column, and along products and ratios of two of
them, that the law itself cannot make. A warning takes a chance below CHANCE and a size above LEAST. Measured on tables
of Chinchilla's law, 1,000 to 2,000 in each of the 30 designs of calibrate.py with 1 % of noise, warnings in per cent:

    normal noise 0 to 0.2    Student's t 0 to 0.2    noise that falls sixfold with compute 0.3 to 0.8

and with residuals of ten fits to published tables drawn again, 400 times each, 0 to 0.3. Where the checkpoints of a run
share 20 to 80 % of their noise, 4 to 56 without `cluster` and 0.1 to 1.0 with it. Other truths fitted by Chinchilla's law,
200 tables each, at 0.3 and at 1 % of noise:

                                            isoFLOP 20      60       240    grid 20      60       240 rows
    Kaplan's law with its published values     100  99  100 100  100 100    100 100  100 100  100 100
    coupled, gamma 0.6                          77   1  100  24  100  99    100  10  100  71  100 100
    exponent of D less by 0.09 from 1e10        98  12  100  99  100 100    100   4  100  90  100 100
    tokens repeated up to 16 times             100 100  100 100  100 100    100  39  100 100  100 100
    30 % more loss at 3e8 tokens, as 1 / D      71   3  100  85  100 100     30   0  100   7  100  74
    1 % more loss in a bump, 1.6 wide in ln D    1   1   17   0   99   6      0   0   53   0  100   6

The bump leaves 0.1 to 0.3 % once the law is fitted to it, which takes hundreds of rows to see. Of the two places that a
warning names, the first did lie higher, without noise, in 95 to 100 % of the warnings of each kind.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from llm_jax.settings import BadInput
from scaling import isoflop, laws
from scaling.fit import Fit, prepare
from scaling.intervals import of_fit
from scaling.laws import Law
from scaling.robust import Robust, robust
from scaling.solver import huber
from scaling.tables import Table

DEGREES = ((2, 3), (2, 3, 4, 5))
"""Of the Legendre polynomials along an axis, in one test each: few of them see a wide bend, more of them a narrow one."""
SIZES = ("N_params", "D_tokens", "C_flops", "D_unique")
RULED = 0.1  # of its variance: what a power law of N and D may leave of a setting that follows them
UNREAD = ((1, 2), (1, 2, 3))
"""The same along a column that the law does not read."""
TURNS = ((3,), (3, 4))
"""Degrees in log N that isoFLOP curves may have beyond a parabola's."""
CHANCE = 1e-3
LEAST = 1e-3
"""Of the systematic part, rms. Over ten other forms the fitted law was off by 2.3 times that at ten times the compute, 0.9 to
3.6 in most: a quarter of a per cent, which is what another seed does."""
BETTER = 10.0
"""By which a richer law must lower the corrected Akaike criterion (Burnham and Anderson 2002: no support is left beyond 10)."""
SPANNED = 1e-3
"""Share of a polynomial's norm: with less outside of what the law itself can do, it is no direction of its own."""
PARTS = 5
"""Of the rows along an axis; the highest and the lowest of them are named."""


@dataclass(frozen=True)
class Misfit:
    """What the residuals of a law say along the axis where they say most."""

    law: str
    axis: str
    """A column, or a product or ratio of two, such as "D_tokens / N_params"."""
    read: bool
    """Whether the law reads what the axis is made of."""
    p: float
    """Chance of so much under the law, over all axes (Bonferroni)."""
    size: float
    """Root mean square of the systematic part of observed less law, less what noise adds to it, relative to the target."""
    high: tuple[str, float]
    """Where rows lie highest against the law, such as "the smallest (up to 3e+08)", and by how much, relative."""
    low: tuple[str, float]
    better: str = ""
    """The clause on a law that fits better."""

    @property
    def wrong(self) -> bool:
        """Whether it deserves a warning: beyond chance, and large enough to matter."""
        return self.p < CHANCE and self.size > LEAST

    @property
    def sentence(self) -> str:
        """The reason in one line."""
        (top, above), (bottom, below) = self.high, self.low
        bend = f"{100 * (above - below):.2g} %"
        what = f"along {self.axis} the residuals bend by {bend}"
        if not self.read:
            what = f"the residuals follow {self.axis}, which it does not read, by {bend}"
        return (
            f"the form of {self.law} is wrong for this data: {what} (rows at {top} lie {_side(above)} the law, "
            f"those at {bottom} {_side(below)}; {_chance(self.p)}); an extrapolation by it will be off"
            + (f"; {self.better}" if self.better else "")
        )


def _side(off: float) -> str:
    return f"{100 * abs(off):.2g} % {'above' if off > 0 else 'below'}"


def _chance(p: float) -> str:
    return f"p = {p:.0e}" if p > 1e-30 else "p < 1e-30"


def warning(result: Fit, table: Table, cluster: str = "") -> str | None:
    """Why the form of a fitted law is wrong for its table, in one line; None where nothing shows that it is.

    `cluster` names a column, such as seed or trunk, whose equal values mark rows that share their noise: without it,
    checkpoints of the same runs look like a bend. BadInput for a table that the law cannot be fitted to, or no such column.
    """
    found = lack_of_fit(result, table, cluster)
    return found.sentence if found and found.wrong else None


def lack_of_fit(result: Fit, table: Table, cluster: str = "") -> Misfit | None:
    """The test behind `warning`; None where rows are too few for it. Where the form is wrong it looks for a better law."""
    table, found = prepare(result.law, table)[0], of_fit(result, table)
    cluster_R = table.column(cluster) if cluster else None
    misfit = along_axes(found, axes(result.law, table), cluster_R)
    if misfit is None or not misfit.wrong:
        return misfit
    return replace(misfit, better=_better(found, table, cluster_R))


def axes(law: Law, table: Table) -> dict[str, tuple[bool, np.ndarray]]:
    """{name: (whether the law reads it, its log_R)}: columns, products and ratios of those the law reads, other columns.

    Others are those that any law for the same target reads, where every row has a number; without settings that follow N and
    D by a rule, as learning rate and batch do in a sweep: what bends along N or D would be blamed on them.
    """
    read = [name for name in law.columns if (table.column(name) > 0).all()]
    log = {name: np.log(table.column(name)) for name in read}
    found = dict(log)
    for one, other in itertools.combinations(read, 2):
        found[f"{one} * {other}"] = log[one] + log[other]
        found[f"{other} / {one}"] = log[other] - log[one]
    known = {name for one in laws.LAWS.values() if one.target == law.target for name in one.columns}
    if {"N_params", "D_tokens"} <= set(read):
        known.discard("C_flops")
    unread = {}
    for name in sorted(known & set(table.columns) - set(law.columns)):
        values = table.column(name)
        if values.dtype.kind == "f" and (np.isfinite(values) & (values > 0)).all() and not _ruled(table, name):
            unread[name] = np.log(values)
    return {name: (True, values) for name, values in found.items()} | {
        name: (False, values) for name, values in unread.items()
    }


def _ruled(table: Table, name: str) -> bool:
    """Whether a column is all but a power law of N, total and active, and D."""
    if name in SIZES or not {"N_params", "D_tokens"} <= set(table.columns):
        return False
    sizes = [size for size in ("N_params", "N_active", "D_tokens") if size in table.columns]
    design = np.stack([np.ones(len(table)), *(np.log(table.column(size)) for size in sizes)], 1)
    log_R = np.log(table.column(name))
    left_R = log_R - design @ np.linalg.lstsq(design, log_R, rcond=None)[0]
    return bool(left_R.var() < RULED * log_R.var())


def along_axes(
    found: Robust, by_name: dict[str, tuple[bool, np.ndarray]], cluster_R: np.ndarray | None = None, table: int = 0
) -> Misfit | None:
    """The axis along which one table's residuals bend least by chance; None where there is no direction to test."""
    delta, law = found.delta_T[table], found.law
    predicted, slopes = law.evaluate(found.theta_TxP[table : table + 1], found.x_KxR)
    observed = found.target_TxR[table]
    scores_R = np.clip(observed - predicted[0], -delta, delta)
    spanned_PxR = _orthonormal(np.nan_to_num(slopes[0])[found.free_P], 1e-6)
    member_GxR = None if cluster_R is None else (np.unique(cluster_R)[:, None] == cluster_R).astype(float)
    tests = []
    for name, (read, axis_R) in by_name.items():
        if not (reach := np.ptp(axis_R)) > 1e-9:
            continue
        for degrees in DEGREES if read else UNREAD:
            position = 2 * (axis_R - axis_R.min()) / reach - 1
            bends = np.polynomial.legendre.legvander(position, max(degrees))[:, list(degrees)].T
            if tested := _test(scores_R, spanned_PxR, bends, member_GxR):
                tests.append((*tested, name, read, axis_R))
    if not tests:
        return None
    p, size, smooth_R, name, read, axis_R = min(tests, key=lambda one: one[0])
    unit = 1.0 if law.log else float(np.median(np.abs(observed)))
    edges = np.quantile(axis_R, np.arange(1, PARTS) / PARTS)
    part_R = np.searchsorted(edges, axis_R, side="left")
    parts = [
        (_place(axis_R, part_R == part), float(smooth_R[part_R == part].mean()) / unit) for part in np.unique(part_R)
    ]
    return Misfit(
        law=law.name,
        axis=name,
        read=read,
        p=min(1.0, p * len(tests)),
        size=size / unit,
        high=max(parts, key=lambda one: one[1]),
        low=min(parts, key=lambda one: one[1]),
    )


def _place(axis_R: np.ndarray, rows: np.ndarray) -> str:
    low, high = np.exp([axis_R[rows].min(), axis_R[rows].max()])
    if axis_R[rows].min() == axis_R.min():
        return f"the smallest (up to {high:.2g})"
    if axis_R[rows].max() == axis_R.max():
        return f"the largest (from {low:.2g})"
    return f"{low:.2g} to {high:.2g}" if f"{low:.2g}" != f"{high:.2g}" else f"{low:.2g}"


def _orthonormal(rows_PxR: np.ndarray, least: float) -> np.ndarray:
    """A basis of what the rows span, each scaled to a length of 1 before; directions below `least` are left out."""
    scaled = rows_PxR / np.maximum(np.linalg.norm(rows_PxR, axis=1, keepdims=True), 1e-300)
    _, length, basis = np.linalg.svd(scaled, full_matrices=False)
    return basis[length > least]


def _test(
    scores_R: np.ndarray,
    spanned_PxR: np.ndarray,
    added_QxR: np.ndarray,
    member_GxR: np.ndarray | None = None,
) -> tuple[float, float, np.ndarray] | None:
    """p that scores depend on directions outside of those spanned, the rms of that part less noise, and the part itself.

    The F test of added variables on the residuals cut at the width of the loss (a score test, Markatou and Hettmansperger
    1990, JASA 85:187). Where the noise is larger at the rows that these directions lean on, F is smaller by that much.
    Rows of a cluster may share a part of their noise, whose variance is then estimated as well.
    """
    added_QxR = added_QxR / np.maximum(np.linalg.norm(added_QxR, axis=1, keepdims=True), 1e-300)
    added_QxR = added_QxR - (added_QxR @ spanned_PxR.T) @ spanned_PxR
    _, length, basis = np.linalg.svd(added_QxR, full_matrices=False)
    basis_QxR = basis[length > SPANNED]
    q, rows = basis_QxR.shape
    spare = rows - len(spanned_PxR) - q
    if not q or spare < 3:
        return None
    # With a finite width the fit sets slopes x scores to 0; at a bound of the search it does not.
    scores_R = scores_R - spanned_PxR.T @ (spanned_PxR @ scores_R)
    along_Q = basis_QxR @ scores_R
    part_R = along_Q @ basis_QxR
    rest_R = scores_R - part_R
    noise = max(float(rest_R @ rest_R) / spare, 1e-300)
    leaning_R = (basis_QxR**2).sum(0)
    leverage_R = leaning_R + (spanned_PxR**2).sum(0)
    variance_R = rest_R**2 / np.maximum(1 - leverage_R, 0.05)  # HC2 of MacKinnon and White 1985
    uneven = float(leaning_R @ variance_R) / (q * max(variance_R.mean(), 1e-300))
    covariance, freedom = noise * np.eye(q), float(spare)
    if member_GxR is not None:
        known_KxR = np.concatenate([spanned_PxR, basis_QxR])
        left_GxR = member_GxR - (member_GxR @ known_KxR.T) @ known_KxR
        clusters = float(((left_GxR**2).sum(1) / member_GxR.sum(1)).sum())
        if clusters < 3:
            return None
        # Moments: of the squares of all that is left, and of its sums over clusters (Henderson 1953, Biometrics 9:226).
        both = (left_GxR**2).sum()
        moments = np.array([[spare, both], [both, ((left_GxR @ member_GxR.T) ** 2).sum()]])
        own, shared = np.linalg.lstsq(
            moments, np.array([rest_R @ rest_R, ((member_GxR @ rest_R) ** 2).sum()]), rcond=None
        )[0]
        if shared > 0:
            sums_QxG = basis_QxR @ member_GxR.T
            covariance = max(own, 1e-3 * noise) * np.eye(q) + shared * sums_QxG @ sums_QxG.T
            share = shared * (sums_QxG**2).sum() / np.trace(covariance)
            freedom = 1 / (share / clusters + (1 - share) / spare)
    ratio = float(along_Q @ np.linalg.solve(covariance, along_Q)) / q / max(1.0, uneven)
    beyond = max(0.0, float(along_Q @ along_Q) - float(np.trace(covariance)))
    return float(stats.f.sf(ratio, q, freedom)), float(np.sqrt(beyond / rows)), part_R


def _better(found: Robust, table: Table, cluster_R: np.ndarray | None) -> str:
    """The clause on the best of the laws that read the same columns, or more of the table's, for the same target."""
    own, rows = found.law, len(table)
    delta = float(found.delta_T[0])

    def criterion(fitted: Robust) -> float:
        """Akaike's, corrected for few rows, under the loss of the law that does not fit."""
        k = int(fitted.free_P.sum())
        loss = 2 * float(huber(fitted.residual_TxR()[0], delta).sum())
        return rows * np.log(max(loss, 1e-300) / rows) + 2 * k + 2 * k * (k + 1) / (rows - k - 1)

    usual, rivals = criterion(found), []
    for law in laws.LAWS.values():
        if law.name == own.name or law.target != own.target or not set(own.columns) <= set(law.columns):
            continue
        if not set(law.columns) <= set(table.columns) or len(law.parameters) + 2 > rows:
            continue
        rival = law.between(own.log)
        try:
            table, log_KxR, target, _ = prepare(rival, table)
        except BadInput:
            continue
        fitted = robust(rival, log_KxR, target[None], least_delta=delta)
        rivals.append((criterion(fitted) - usual, law.name, fitted))
    if not rivals or (best := min(rivals, key=lambda one: one[0]))[0] > -BETTER:
        return ""
    gain, name, fitted = best
    rest = along_axes(fitted, axes(fitted.law, table), cluster_R)
    still = f", though along {rest.axis} it bends too" if rest and rest.wrong else ""
    return f"{name} fits better (AICc {gain:.0f}){still}"


def skewed(table: Table) -> str | None:
    """Why parabolas are wrong for isoFLOP curves, in one line; None where nothing shows that they are.

    A cubic term in log N, or one with a quartic beside it, must be beyond chance and move the minima inside the grid by
    more than their standard errors, by the median of each. The terms are shares of the loss, linear in log C over the
    budgets. Exact parabolas with 0.3 % of noise, normal, Student's t or uneven, on 20 to 60 rows: 0 to 0.3 % of 1,000 tables
    each are called skewed. BadInput as in isoflop.parabolas.
    """
    curves = isoflop.parabolas(table)
    if "status" in table.columns:
        table = table.select(table.column("status") == "done")
    budget_R, log_n_R, loss_R = isoflop.budgets(table), np.log(table.column("N_params")), table.column("loss")
    kept_R = np.isin(budget_R, [curve.budget for curve in curves])
    budget_R, log_n_R, loss_R = budget_R[kept_R], log_n_R[kept_R], loss_R[kept_R]
    member_BxR = np.array([budget_R == curve.budget for curve in curves])
    centre_B, level_B = ((member_BxR @ values) / member_BxR.sum(1) for values in (log_n_R, loss_R))
    u_R = log_n_R - centre_B @ member_BxR
    shapes_PxR = np.concatenate([member_BxR * u_R**k / loss_R for k in range(3)])
    spanned_PxR = _orthonormal(shapes_PxR[np.abs(shapes_PxR).max(1) > 0], 1e-9)
    excess_R = 1 - spanned_PxR.T @ spanned_PxR.sum(1)
    width = 2 * 1.4826 * np.median(np.abs(excess_R)) * np.sqrt(len(u_R) / max(1, len(u_R) - len(spanned_PxR)))
    scores_R = np.clip(excess_R, -width, width)
    log_c_B = np.log([curve.budget for curve in curves])
    slant_B = log_c_B - log_c_B.mean()
    added = {
        degrees: np.array([u_R**k * ((level_B * tilt) @ member_BxR) / loss_R for k in degrees for tilt in (1, slant_B)])
        for degrees in TURNS
    }
    tests = [(found[0], degrees) for degrees in TURNS if (found := _test(scores_R, spanned_PxR, added[degrees]))]
    if not tests:
        return None
    p, degrees = min(tests)
    inside = [b for b, curve in enumerate(curves) if not curve.edge]
    if not (p := p * len(tests)) < CHANCE or not inside:
        return None
    outside_QxR = added[degrees] - (added[degrees] @ spanned_PxR.T) @ spanned_PxR
    shares = np.linalg.lstsq(outside_QxR.T, scores_R, rcond=None)[0].reshape(-1, 2)
    higher_BxK = np.zeros((len(curves), 5))
    higher_BxK[:, list(degrees)] = level_B[:, None] * (shares[:, 0] + slant_B[:, None] * shares[:, 1])
    moved_B = np.array([_moved(u_R[member_BxR[b]], loss_R[member_BxR[b]], higher_BxK[b]) for b in inside])
    errors_B = np.array([curves[b].log_n_error for b in inside])
    if np.median(np.abs(moved_B)) <= np.median(errors_B):
        return None
    first, last = ("smaller" if higher_BxK[b, 3] < 0 else "larger" for b in (inside[0], inside[-1]))
    steeper = f"{first} models" + ("" if first == last else f" at small budgets and {last} ones at large")
    by = 100 * np.expm1([moved_B.min(), moved_B.max()])
    text = (
        f"parabolas are wrong for these isoFLOP curves: they rise more steeply towards {steeper} ({_chance(p)}); "
        f"allowing for that moves N* by {by[0]:+.0f} to {by[1]:+.0f} %"
    )
    if len(inside) > 2:
        log_n_B = np.log([curves[b].n_opt for b in inside])
        before, after = (
            np.polyfit(slant_B[inside], values, 1, w=1 / errors_B)[0] for values in (log_n_B, log_n_B + moved_B)
        )
        text += f" and its exponent from {before:.3f} to {after:.3f}"
    return text + ": take isoflop-akima, or sizes nearer to the minimum"


def _moved(u_R: np.ndarray, loss_R: np.ndarray, higher: np.ndarray) -> float:
    """How far terms of higher degree, given as coefficients from 0 on, move the minimum of a parabola in u, within its ends."""
    polynomial = np.polynomial.polynomial
    _, before, bend = polynomial.polyfit(u_R, loss_R, 2, w=1 / loss_R)
    fine = np.linspace(u_R.min(), u_R.max(), 2001)
    lower = polynomial.polyfit(u_R, loss_R - polynomial.polyval(u_R, higher), 2, w=1 / loss_R)
    curve = polynomial.polyval(fine, lower) + polynomial.polyval(fine, higher)
    return float(fine[curve.argmin()] + before / (2 * bend))
