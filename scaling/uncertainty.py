"""How far to trust a fit: intervals of a law's parameters, and of the loss of one run beyond the table.

Two predictions must not be mixed up. The law is the plain fit of fit.py, exact and reproducible, and `bootstrap` says
how well the table determines it. `prediction_interval` is a forecast: it averages the law with two rivals, because in
simulation and on published tables no single form extrapolated best, and its width also counts what a bootstrap cannot
see.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from scipy import stats

from llm_jax.config import BadInput, did_you_mean
from scaling.fit import GRADES, Fit, fit, prepare
from scaling.isoflop import budgets
from scaling.laws import COUPLED, Law
from scaling.solver import Problem, huber, minimise
from scaling.tables import Table


@dataclass(frozen=True)
class Bootstrap:
    """Resampled parameters of a fit."""

    parameters: dict[str, np.ndarray]
    """Natural values, one a resample."""
    intervals: dict[str, tuple[float, float]]
    """95 %: the 2.5th and 97.5th percentile of each."""
    theta_SxP: np.ndarray
    """The same in the law's unconstrained form, for the columns as they are."""


@dataclass(frozen=True)
class Prediction:
    """The forecast loss of one run, nats a token."""

    loss: float
    """The average of the forms, weighed; not what the law alone says, which is law_loss."""
    low: float
    high: float
    level: float
    law_loss: float
    """What the plain fit of the law says at the same point."""
    parts: dict[str, float]
    """What the interval is made of, each as one standard deviation of log loss; they add in squares.

    parameters: spread of the refits over bootstrap resamples. one_run: residual noise of a single run. future: error of
    fits to the smaller budgets on the larger ones, scaled to this distance. forms: disagreement of the forms.
    """
    forms: dict[str, tuple[float, float]]
    """{form: (loss, weight)}."""
    extrapolation: float
    """6 N D over the largest in the table."""


def resample(groups_R: np.ndarray, samples: int, parameters: int, rng: np.random.Generator) -> np.ndarray:
    """Weights_SxR of rows drawn with replacement: within each group where all have at least four rows, else over all.

    Measured on isoFLOP tables of 15 and 20 rows under 5 parameters (noise 0.5 %, 60 tables a case): 90 % intervals of a
    prediction at 4 times the compute covered 0.82-0.93 with rows drawn within budgets, 0.85-0.97 over all rows,
    0.83-0.92 with residuals, 0.75-0.95 with exponential weights, which are too smooth for so few rows. Drawing within
    budgets gave the width closest to the true spread; groups of one row would have no spread at all. Resamples with
    fewer distinct rows than parameters say nothing and are drawn again.
    """
    rows = len(groups_R)
    members_of = [np.flatnonzero(groups_R == group) for group in np.unique(groups_R)]
    if min(map(len, members_of)) < 4:
        members_of = [np.arange(rows)]
    weights = np.zeros((samples, rows))
    again = np.arange(samples)
    for _ in range(20):
        weights[again] = 0
        for members in members_of:
            drawn = members[rng.integers(0, len(members), (len(again), len(members)))]
            np.add.at(weights, (again[:, None], drawn), 1)
        again = again[(weights[again] > 0).sum(1) < parameters]
        if not len(again):
            break
    return weights


def _refit(problem: Problem, theta_P: np.ndarray, weights_SxR: np.ndarray, max_steps: int = 400) -> np.ndarray:
    """Theta_SxP of fits under each row of weights, from the optimum; also from a middling E if the optimum has none."""
    starts = [theta_P]
    names, lowest = problem.law.parameters, problem.target.min()
    moves = problem.free_P is None or dict(zip(names, problem.free_P, strict=True)).get("E")
    if "E" in names and moves and theta_P[names.index("E")] < lowest - 3:
        # Close to its bound E has no slope left to come back along, though many resamples would have it higher.
        starts.append(np.where(np.array(names) == "E", lowest - 0.7, theta_P))
    problem = dataclasses.replace(problem, weights_SxR=np.tile(weights_SxR, (len(starts), 1)))
    theta, value, _ = minimise(problem, np.repeat(starts, len(weights_SxR), axis=0), max_steps, tolerance=1e-8)
    best = value.reshape(len(starts), -1).argmin(0)
    return theta.reshape(len(starts), len(weights_SxR), -1)[best, np.arange(len(weights_SxR))]


INTERVALS = ("none", "bootstrap")
"""Ways to intervals, by name; see `parse_intervals`."""


def parse_intervals(text: str) -> tuple[str, int]:
    """The method and its size: "bootstrap:200" gives ("bootstrap", 200), 1000 without a number. BadInput for others."""
    method, colon, size = text.partition(":")
    if method not in INTERVALS:
        raise BadInput(f'"{text}" names no way to intervals{did_you_mean(method, INTERVALS)}')
    if method == "none" and not colon:
        return method, 0
    if method == "none" or (colon and not (size.isascii() and size.isdigit() and int(size) > 1)):
        raise BadInput(f'"{text}" names no way to intervals; valid: none, bootstrap, bootstrap:N with N of at least 2')
    return method, int(size or 1000)


def bootstrap(result: Fit, table: Table, samples: int = 1000, seed: int = 0) -> Bootstrap:
    """Refits the law to `samples` resamples of the rows, all side by side, under the objective of the fit."""
    law = result.law
    table, log_KxR, target, _ = prepare(law, table)
    centre_K = law.centre(log_KxR)
    x_KxR = log_KxR - centre_K[:, None]
    weights = resample(groups(table), samples, len(law.parameters), np.random.default_rng(seed))
    bounds = law.bounds(x_KxR, target)
    problem = Problem(law, x_KxR, target, result.delta, bounds, free_P=result.free)
    theta_SxP = law.shift(_refit(problem, law.shift(result.theta, centre_K), weights), -centre_K)
    natural_SxP = law.natural(theta_SxP)
    low_P, high_P = np.quantile(natural_SxP, [0.025, 0.975], axis=0)
    return Bootstrap(
        parameters=dict(zip(law.parameters, natural_SxP.T, strict=True)),
        intervals={name: (float(a), float(b)) for name, a, b in zip(law.parameters, low_P, high_P, strict=True)},
        theta_SxP=theta_SxP,
    )


def groups(table: Table) -> np.ndarray:
    """R; the budget of each row, to resample within and to cut at; a table of rows without any compute is one group."""
    columns = table.columns
    if not {"budget", "C_flops"} & set(columns):
        if not {"N_params", "D_tokens"} <= set(columns):
            return np.zeros(len(table))
        table = Table({"C_flops": 6 * columns["N_params"] * columns["D_tokens"]})
    return budgets(table)


# ---- What the data leaves open ----

LIKELY = 3.841  # the 95 % point of chi-squared with one degree of freedom
OTHERS = ("huber:1e-3", "l1", "lsq")
"""Objectives that are compared: each was published for tables that another was published for."""


def _likelihood_ratio(result: Fit, value: np.ndarray, value_0: float) -> np.ndarray:
    """-2 log of the likelihood of a fit of this value, its noise as wide as it needs, over that of the best.

    n log(V / V_0) for the normal rows within the width of Huber's loss, twice that for Laplace's beyond; less for the
    parameters that the rows had to pay for.
    """
    beyond = np.abs(result.residuals) > result.delta
    rows = result.n + int(beyond.sum())
    spent = 1 - result.free.sum() / result.n
    with np.errstate(divide="ignore", invalid="ignore"):
        return spent * rows * np.log(np.maximum(value, value_0) / value_0)


def open_ends(result: Fit, table: Table) -> dict[str, tuple[str, ...]]:
    """{parameter: ("lower",), ("upper",) or both} where the profile likelihood has no end: at the bound of the search,
    the others refitted, the data is as likely as a 95 % interval allows."""
    law = result.law
    table, log_KxR, target, _ = prepare(law, table)
    by_K = law.centre(log_KxR)
    x_KxR = log_KxR - by_K[:, None]
    lower_P, upper_P = law.bounds(x_KxR, target)
    best_P = law.shift(result.theta, by_K)
    problem = Problem(law, x_KxR, target, result.delta, (lower_P, upper_P), free_P=result.free)
    value_0 = minimise(problem, best_P[None], max_steps=1)[1][0]
    free = np.flatnonzero(result.free)
    if value_0 <= 1e-18 or not len(free):
        return {}
    at = np.concatenate([free, free])
    ends = np.concatenate([lower_P[free], upper_P[free]])
    rows = np.arange(len(at))
    moving_SxP = np.tile(result.free, (len(at), 1))
    moving_SxP[rows, at] = False
    problem = dataclasses.replace(problem, free_P=moving_SxP)
    theta_SxP = np.tile(best_P, (len(at), 1))
    for share in (0.02, 0.1, 0.3, 0.6, 1.0):  # step by step, so that the others can follow
        theta_SxP[rows, at] = best_P[at] + share * (ends - best_P[at])
        for width in GRADES if 0 < problem.delta < np.inf else (1.0,):
            graded = dataclasses.replace(problem, delta=width * problem.delta)
            theta_SxP, value, _ = minimise(graded, theta_SxP, max_steps=200, tolerance=1e-6)
    likely = _likelihood_ratio(result, value, value_0) < LIKELY
    sides: dict[str, tuple[str, ...]] = {}
    for side, parts in (("lower", slice(0, len(free))), ("upper", slice(len(free), None))):
        for p in at[parts][likely[parts]]:
            sides[law.parameters[p]] = (*sides.get(law.parameters[p], ()), side)
    return sides


def standard_intervals(result: Fit, table: Table) -> dict[str, tuple[float, float]]:
    """Rough 95 % intervals from the Gauss-Newton Hessian and the median residual, to compare with and not to print."""
    law = result.law
    table, log_KxR, _, _ = prepare(law, table)
    by_K = law.centre(log_KxR)
    theta_P = law.shift(result.theta, by_K)
    jacobian_PxR = law.evaluate(theta_P[None], log_KxR - by_K[:, None])[1][0][result.free]
    spare = max(1, result.n - len(jacobian_PxR))
    sigma = 1.4826 * np.median(np.abs(result.residuals)) * np.sqrt(result.n / spare)
    covariance = sigma**2 * np.linalg.pinv(jacobian_PxR @ jacobian_PxR.T, hermitian=True)
    # To the units of the table: a linear map, taken by its columns.
    move = np.stack([law.shift(theta_P + one, -by_K) - result.theta for one in np.eye(len(theta_P))[result.free]], 1)
    half_P = 1.96 * np.sqrt(np.einsum("pi,ij,pj->p", move, covariance, move))
    with np.errstate(over="ignore"):
        low_P, high_P = law.natural(result.theta - half_P), law.natural(result.theta + half_P)
    return {name: (float(a), float(b)) for name, a, b in zip(law.parameters, low_P, high_P, strict=True)}


def disagreement(result: Fit, table: Table, intervals: dict[str, tuple[float, float]] | None) -> list[str]:
    """A warning for each other objective whose answer lies outside of the intervals; rough ones where none are given."""
    intervals = intervals or standard_intervals(result, table)
    held = {name: result.parameters[name] for name in result.held}
    told = []
    for name in OTHERS:
        if name.split(":")[0] == result.objective.split(":")[0]:
            continue
        suffix = ":log" if result.law.log else ":linear"
        other = fit(result.law, table, name + suffix, held)
        moved = [
            f"{key} {result.parameters[key]:.4g} and {value:.4g}"
            for key, value in other.parameters.items()
            if key not in result.held and not intervals[key][0] <= value <= intervals[key][1]
        ]
        if moved:
            told.append(
                f"{result.objective} and {name} disagree by more than the intervals: {', '.join(moved)}; "
                "rows far from the law decide, so look at the residuals before you trust either"
            )
    return told


# ---- Forecasts ----
# The constants below were chosen by simulation, on isoFLOP tables of 5 shapes and 3 or 4 budgets with 0.3 to 0.8 % of
# noise under 13 true laws (five Chinchilla laws, four a little off, four with another coupling of N and D) at 4 times the
# largest compute, and on the large runs of four published tables forecast from 18 of their small ones.

SAMPLES = 120
TEMPER = 3.0
"""Divides the Akaike criterion. Mean error in % on those three groups of laws: 0.41, 0.52, 2.82 by least squares on the
Chinchilla form alone; 0.47, 1.01, 1.15 averaged untempered; 0.48, 0.92, 1.16 with 3. The insurance costs a little."""
FUTURE = 0.5
"""Share of the leave-future-out error that counts, as its fits have fewer rows than ours. 90 % intervals then covered
0.95, 0.95 and 0.89 on the three groups and 0.92 to 1.00 on the published tables; without it down to 0.60 on these."""
GAMMA_SPREAD = 0.4
"""Standard deviation of the prior on log gamma of the coupled form."""


@dataclass(frozen=True)
class _Form:
    name: str
    law: Law
    held: str = ""
    """A parameter kept at its lower bound."""
    spread: tuple[tuple[str, float], ...] = ()
    """Standard deviations of a normal prior around zero, by parameter."""


def _forms(law: Law) -> list[_Form]:
    """The law and its rivals: without an irreducible loss, and with another coupling of N and D."""
    forms = [_Form(law.name, law)]
    if "E" in law.parameters:
        forms.append(_Form(f"{law.name}, E = 0", law, held="E"))
    if law.name == "chinchilla":
        forms.append(_Form("coupled", COUPLED, spread=(("gamma", GAMMA_SPREAD),)))
    return forms


def prediction_interval(
    law: Law, table: Table, n_params: float, d_tokens: float, level: float = 0.9, seed: int = 0
) -> Prediction:
    """Forecasts the loss of one run of n_params on d_tokens, up to about 10 times the largest compute in the table.

    Forms are averaged in log loss by Akaike weights (Burnham and Anderson 2002, corrected for few rows, tempered). The
    variance adds the bootstrap spread, the noise of one run, the leave-future-out error times the ratio of distances in
    log C, and the disagreement of the forms. BadInput with fewer than parameters + 3 rows.
    """
    if not 0 < level < 1:
        raise BadInput(f"level must lie in (0, 1), got {level}")
    for name, size in (("n_params", n_params), ("d_tokens", d_tokens)):
        if not 0 < size < np.inf:
            raise BadInput(f"{name} must be positive and finite, got {size}")
    if law.columns != ("N_params", "D_tokens"):
        raise BadInput(f"{law.name} reads {', '.join(law.columns)}; a forecast needs a law of N_params and D_tokens")
    plain = fit(law, table)
    table, log_KxR, log_loss, _ = prepare(law, table)
    rows, parameters = len(table), len(law.parameters)
    if rows < parameters + 3:
        raise BadInput(f"a forecast by {law.name} needs {parameters + 3} rows, the table has {rows}")
    centre_K = law.centre(log_KxR)
    x_KxR = log_KxR - centre_K[:, None]
    at_Kx1 = np.log([[n_params], [d_tokens]]) - centre_K[:, None]
    # Least squares uses the rows better than a width of 1e-3; rows beyond two standard deviations still count linearly.
    residuals = fit(law, table, "lsq").residuals
    spread = 1.4826 * np.median(np.abs(residuals)) * np.sqrt(rows / (rows - parameters))
    delta = max(1e-3, 2 * spread)
    forms = _forms(law)
    weights_SxR = resample(groups(table), SAMPLES, parameters, np.random.default_rng(seed))

    logs, variances, criteria, noise, future = [], [], [], 0.0, 0.0
    for form in forms:
        names = form.law.parameters
        free = np.array([name != form.held for name in names])
        precision = np.array([(max(spread, 1e-3) / dict(form.spread).get(name, np.inf)) ** 2 for name in names])
        bounds = form.law.bounds(x_KxR, log_loss)
        problem = Problem(form.law, x_KxR, log_loss, delta, bounds, free_P=free, precision_P=precision)
        theta, value, _ = minimise(problem, np.where(free, form.law.starts(x_KxR, log_loss), bounds[0]))
        theta_P = theta[np.argmin(value)]
        residual = form.law.evaluate(theta_P[None], x_KxR)[0][0] - log_loss
        squares, k = 2 * float(huber(residual, delta).sum()) + 1e-12, int(free.sum())
        logs.append(form.law.evaluate(theta_P[None], at_Kx1)[0].item())
        refits_SxP = _refit(problem, theta_P, weights_SxR, max_steps=50)
        variances.append(form.law.evaluate(refits_SxP, at_Kx1)[0].var())
        criteria.append(rows * np.log(squares / rows) + 2 * k + 2 * k * (k + 1) / (rows - k - 1))
        if form is forms[0]:
            noise = float(np.sqrt(squares / (rows - k)))
            future = _future_error(problem, table, theta_P, noise)
    weight = np.exp(-0.5 * (np.array(criteria) - min(criteria)) / TEMPER)
    weight /= weight.sum()
    centre = float(weight @ logs)
    compute = 6 * table.column("N_params") * table.column("D_tokens")
    extrapolation = 6 * n_params * d_tokens / compute.max()
    parts = {
        "parameters": float(np.sqrt(weight @ variances)),
        "one_run": float(noise),
        "future": FUTURE * future * max(0.0, float(np.log(extrapolation))),
        "forms": float(np.sqrt(weight @ (np.array(logs) - centre) ** 2)),
    }
    half = stats.norm.ppf(0.5 + level / 2) * np.sqrt(sum(part**2 for part in parts.values()))
    return Prediction(
        loss=float(np.exp(centre)),
        low=float(np.exp(centre - half)),
        high=float(np.exp(centre + half)),
        level=level,
        law_loss=float(plain.predict(n_params, d_tokens)),
        parts=parts,
        forms={form.name: (float(np.exp(log)), float(w)) for form, log, w in zip(forms, logs, weight, strict=True)},
        extrapolation=float(extrapolation),
    )


def _future_error(problem: Problem, table: Table, theta_P: np.ndarray, noise: float) -> float:
    """Rolling origin: rms log error, less noise, of fits to the budgets up to a cut on those beyond, a unit of log C.

    0 where no cut leaves enough rows on its left.
    """
    log_c = np.log(6 * table.column("N_params") * table.column("D_tokens"))
    groups_R = groups(table)
    cuts = np.unique(groups_R)[:-1]
    if len(cuts) > 6:
        cuts = np.quantile(groups_R, [0.3, 0.45, 0.6, 0.75, 0.9])
    past = [
        rows
        for rows in (groups_R <= cut for cut in cuts)
        if rows.sum() >= len(theta_P) + 2 and not rows.all() and np.ptp(problem.x_KxR[:, rows], axis=1).min() > 0.1
    ]
    if not past:
        return 0.0
    theta_SxP = _refit(problem, theta_P, np.array(past, float))
    errors = problem.law.evaluate(theta_SxP, problem.x_KxR)[0] - problem.target
    squares = np.concatenate([error[~rows] ** 2 for error, rows in zip(errors, past, strict=True)])
    reach = np.concatenate([log_c[~rows] - log_c[rows].max() for rows in past])
    return float(np.sqrt(max(0.0, squares.mean() - noise**2)) / max(reach.mean(), 0.1))
