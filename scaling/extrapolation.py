"""Forecasts of single runs beyond the table, with intervals that hold.

The law is the plain fit of fit.py, exact and reproducible; `Prediction.law_loss` is what it says. A forecast is
something else: an average of several fits, because in simulation and on published tables no single one extrapolated
best, with a width that also counts what a bootstrap cannot see. Two kinds of table want two kinds of average:

few rows    three forms of the law, each fitted to all rows, by Akaike weights
many rows   forms fitted to all rows and to those of the larger budgets, by how well the same fit to the smaller runs of
            the table foretold its larger ones (rolling origin, also called leave future out)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from llm_jax.settings import BadInput
from scaling.fit import fit, prepare
from scaling.laws import COUPLED, Law
from scaling.solver import Problem, huber, minimise
from scaling.tables import Table
from scaling.uncertainty import groups, refit, resample

SAMPLES = 120
"""Resamples of the rows."""
GAMMA_SPREAD = 0.4
"""Standard deviation of the prior on log gamma of the coupled form."""
ENOUGH = 2
"""Rows beyond the parameters that a fit to the past needs."""

# Few rows. Chosen by simulation, on isoFLOP tables of 5 shapes and 3 or 4 budgets with 0.3 to 0.8 % of noise under 13 true
# laws (five Chinchilla laws, four a little off, four with another coupling of N and D) at 4 times the largest compute.

TEMPER = 3.0
"""Divides the Akaike criterion. Mean error in % on those three groups of laws: 0.41, 0.52, 2.82 by least squares on the
Chinchilla form alone; 0.47, 1.01, 1.15 averaged untempered; 0.48, 0.92, 1.16 with 3. The insurance costs a little."""
FUTURE = 0.5
"""Share of the rolling-origin error that counts, as its fits have fewer rows than ours. 90 % intervals then covered 0.95,
0.95 and 0.89 on the three groups; without it down to 0.60 on published tables."""

# Many rows. Chosen on six published tables and their random parts of 15 to 60 rows, fitted up to 1/3, 1/10 and 1/30 of the
# largest compute, and on simulated tables of 60 and 240 rows under eight laws.

MANY = 6
"""Rows a parameter from which on rows are many: three in either half of the budgets. Below, fits to half of the rows go
astray: 23 rows of datablations, up to 1/30, covered 0.11 of what came where they counted as many."""


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


@dataclass(frozen=True)
class _Form:
    name: str
    law: Law
    held: str = ""
    """A parameter kept at its lower bound."""
    spread: tuple[tuple[str, float], ...] = ()
    """Standard deviations of a normal prior around zero, by parameter."""
    upper: bool = False
    """Fitted to the larger half of the budgets alone."""

    def rows(self, past_R: np.ndarray, budget_R: np.ndarray) -> np.ndarray:
        """Which of the rows of the past it is fitted to."""
        return past_R & (budget_R >= np.median(budget_R[past_R])) if self.upper else past_R


def _forms(law: Law, windows: bool) -> list[_Form]:
    """The law and its rivals: without an irreducible loss, with another coupling of N and D, of the larger runs alone.

    A law without an irreducible loss is a local one: right for a narrow range of compute, so that where there are rows
    enough it is fitted to the larger runs only.
    """
    forms = [_Form(law.name, law)]
    if "E" in law.parameters:
        forms.append(_Form(f"{law.name}, E = 0", law, held="E"))
    if law.name == "chinchilla":
        forms.append(_Form("coupled", COUPLED, spread=(("gamma", GAMMA_SPREAD),)))
    if not windows:
        return forms
    larger = [dataclasses.replace(form, name=f"{form.name}, larger runs", upper=True) for form in forms]
    return [form for form in forms if not form.held] + larger


@dataclass(frozen=True)
class _Fitted:
    """One form, fitted to the table, to resamples of it, and to its past at several cuts; T points, C cuts, R rows."""

    log_T: np.ndarray
    boot_SxT: np.ndarray
    errors_CxR: np.ndarray
    """Residuals, log of prediction less log of observation, on all rows of fits to the rows before a cut."""
    residual: np.ndarray
    """On the rows that the form is fitted to."""
    squares: float
    """Twice the objective: the sum of squares, but for rows beyond delta."""
    free: int
    """Parameters that move."""


def predict(
    law: Law,
    table: Table,
    n_params: Sequence[float] | np.ndarray,
    d_tokens: Sequence[float] | np.ndarray,
    level: float = 0.9,
    seed: int = 0,
) -> list[Prediction]:
    """Forecasts the loss of single runs, of n_params on d_tokens each, up to some 10 times the table's largest compute.

    The table is fitted once for all points. Forms are averaged in log loss, by Akaike weights (Burnham and Anderson
    2002, tempered) where rows are few and by inverse mean squared rolling-origin error where they are many. The
    variance adds the bootstrap spread of the average, the noise of one run, the disagreement of the forms, and the
    rolling-origin error of the average times the ratio of distances in log C. BadInput with fewer than parameters + 3
    rows, and for points and levels that are none.
    """
    if not 0 < level < 1:
        raise BadInput(f"level must lie in (0, 1), got {level}")
    n_params, d_tokens = np.atleast_1d(np.asarray(n_params, float)), np.atleast_1d(np.asarray(d_tokens, float))
    for name, sizes in (("n_params", n_params), ("d_tokens", d_tokens)):
        if len(bad := sizes[~((sizes > 0) & (sizes < np.inf))]):
            raise BadInput(f"{name} must be positive and finite, got {bad[0]:g}")
    if law.columns != ("N_params", "D_tokens"):
        raise BadInput(f"{law.name} reads {', '.join(law.columns)}; a forecast needs a law of N_params and D_tokens")
    plain = fit(law, table)
    table, log_KxR, log_loss, _ = prepare(law, table)
    rows, parameters = len(table), len(law.parameters)
    if rows < parameters + 3:
        raise BadInput(f"a forecast by {law.name} needs {parameters + 3} rows, the table has {rows}")
    centre_K = law.centre(log_KxR)
    x_KxR, at_KxT = log_KxR - centre_K[:, None], np.log([n_params, d_tokens]) - centre_K[:, None]
    log_c = np.log(6) + log_KxR.sum(0)
    budget_R = groups(table)

    forms = _forms(law, windows=True)
    past_CxR = _pasts(forms, x_KxR, budget_R, parameters)
    many = len(past_CxR) > 0 and rows >= MANY * parameters
    if not many:
        forms = _forms(law, windows=False)
        past_CxR = _pasts(forms, x_KxR, budget_R, parameters)
    spread = _spread(fit(law, table, "lsq").residuals, parameters)
    # Least squares uses few rows better than a width of 1e-3; rows beyond two standard deviations still count linearly.
    # Many rows show where the form is wrong, which is no noise: the narrow width is better at leaving that aside.
    delta = plain.delta if many else max(1e-3, 2 * spread)
    weights_SxR = resample(budget_R, SAMPLES, parameters, np.random.default_rng(seed))
    fitted = [
        _fit_form(form, x_KxR, log_loss, at_KxT, budget_R, past_CxR, weights_SxR, delta, spread) for form in forms
    ]
    log_MxT, boot_MxSxT = np.array([one.log_T for one in fitted]), np.array([one.boot_SxT for one in fitted])
    errors_MxCxR = np.array([one.errors_CxR for one in fitted])
    if many:
        weight = _by_future(errors_MxCxR, past_CxR)
        noise = np.sqrt(weight @ np.array([_spread(one.residual, one.free) for one in fitted]) ** 2)
        # Resamples that lack a telling row go far astray: two thirds of them say more than their variance.
        low_T, high_T = np.quantile(np.einsum("m,mst->st", weight, boot_MxSxT), [0.16, 0.84], axis=0)
        boot_T = (high_T - low_T) / 2
        errors_CxR = np.einsum("m,mcr->cr", weight, errors_MxCxR)
        share_C = (past_CxR.sum(1) - parameters) / (rows - parameters)
    else:
        weight = _by_akaike(fitted)
        noise = np.sqrt(fitted[0].squares / (rows - fitted[0].free))
        boot_T = np.sqrt(weight @ boot_MxSxT.var(1))
        errors_CxR, share_C = errors_MxCxR[0], np.full(len(past_CxR), FUTURE)
    centre_T = weight @ log_MxT
    distance_T = np.log(6 * n_params * d_tokens) - log_c.max()
    parts_T = {
        "parameters": boot_T,
        "one_run": np.full(len(n_params), noise),
        "future": _future_error(errors_CxR, past_CxR, log_c, noise, share_C) * np.maximum(0, distance_T),
        "forms": np.sqrt(weight @ (log_MxT - centre_T) ** 2),
    }
    half_T = stats.norm.ppf(0.5 + level / 2) * np.sqrt(sum(part**2 for part in parts_T.values()))
    law_T = plain.predict(n_params, d_tokens)
    return [
        Prediction(
            loss=float(np.exp(centre_T[t])),
            low=float(np.exp(centre_T[t] - half_T[t])),
            high=float(np.exp(centre_T[t] + half_T[t])),
            level=level,
            law_loss=float(law_T[t]),
            parts={name: float(part[t]) for name, part in parts_T.items()},
            forms={
                form.name: (float(np.exp(log[t])), float(w))
                for form, log, w in zip(forms, log_MxT, weight, strict=True)
            },
            extrapolation=float(np.exp(distance_T[t])),
        )
        for t in range(len(n_params))
    ]


def prediction_interval(
    law: Law, table: Table, n_params: float, d_tokens: float, level: float = 0.9, seed: int = 0
) -> Prediction:
    """Forecasts the loss of one run of n_params on d_tokens; see `predict`."""
    return predict(law, table, [n_params], [d_tokens], level, seed)[0]


def _fit_form(
    form: _Form,
    x_KxR: np.ndarray,
    log_loss: np.ndarray,
    at_KxT: np.ndarray,
    budget_R: np.ndarray,
    past_CxR: np.ndarray,
    weights_SxR: np.ndarray,
    delta: float,
    spread: float,
) -> _Fitted:
    names = form.law.parameters
    free = np.array([name != form.held for name in names])
    precision = np.array([(max(spread, 1e-3) / dict(form.spread).get(name, np.inf)) ** 2 for name in names])
    bounds = form.law.bounds(x_KxR, log_loss)
    inside_R = form.rows(np.ones(len(log_loss), bool), budget_R)
    starts = np.where(free, form.law.starts(x_KxR, log_loss), bounds[0])
    problem = Problem(form.law, x_KxR, log_loss, delta, bounds, free_P=free, precision_P=precision)
    here = dataclasses.replace(problem, weights_SxR=np.tile(inside_R.astype(float), (len(starts), 1)))
    theta, value, _ = minimise(here, starts)
    theta_P = theta[np.argmin(value)]
    residual = (form.law.evaluate(theta_P[None], x_KxR)[0][0] - log_loss)[inside_R]
    refits_SxP = refit(problem, theta_P, weights_SxR * inside_R, max_steps=50)
    errors_CxR = np.zeros((0, len(log_loss)))
    if len(past_CxR):
        fitted_CxR = np.array([form.rows(past, budget_R) for past in past_CxR], float)
        errors_CxR = form.law.evaluate(refit(problem, theta_P, fitted_CxR), x_KxR)[0] - log_loss
    return _Fitted(
        log_T=form.law.evaluate(theta_P[None], at_KxT)[0][0],
        boot_SxT=form.law.evaluate(refits_SxP, at_KxT)[0],
        errors_CxR=errors_CxR,
        residual=residual,
        squares=2 * float(huber(residual, delta).sum()) + 1e-12,
        free=int(free.sum()),
    )


def _spread(residual: np.ndarray, parameters: int) -> float:
    """Robust standard deviation of residuals, corrected for the parameters that were fitted to them."""
    rows = len(residual)
    return float(1.4826 * np.median(np.abs(residual)) * np.sqrt(rows / (rows - parameters)))


def _pasts(forms: Sequence[_Form], x_KxR: np.ndarray, budget_R: np.ndarray, parameters: int) -> np.ndarray:
    """CxR: the rows up to each cut in compute, between budgets or, where these are many, at five quantiles of the rows.

    Cuts that leave some form too few rows, or sizes too much alike, are left out.
    """
    cuts = np.unique(budget_R)[:-1]
    if len(cuts) > 6:
        cuts = np.quantile(budget_R, [0.3, 0.45, 0.6, 0.75, 0.9])

    def enough(past_R: np.ndarray) -> bool:
        fitted = [form.rows(past_R, budget_R) for form in forms]
        least = min(rows.sum() for rows in fitted)
        return least >= parameters + ENOUGH and all(np.ptp(x_KxR[:, rows], axis=1).min() > 0.1 for rows in fitted)

    kept = [past_R for past_R in (budget_R <= cut for cut in cuts) if not past_R.all() and enough(past_R)]
    return np.array(kept, bool).reshape(len(kept), len(budget_R))


def _by_akaike(fitted: Sequence[_Fitted]) -> np.ndarray:
    """Akaike weights, corrected for few rows and tempered, of fits to the same rows."""
    rows, k = len(fitted[0].residual), np.array([one.free for one in fitted])
    criterion = rows * np.log([one.squares / rows for one in fitted]) + 2 * k + 2 * k * (k + 1) / (rows - k - 1)
    weight = np.exp(-0.5 * (criterion - criterion.min()) / TEMPER)
    return weight / weight.sum()


def _by_future(errors_MxCxR: np.ndarray, past_CxR: np.ndarray) -> np.ndarray:
    """Inverse mean squared error beyond a cut, relative to the mean of all forms there so that every cut has one vote.

    Powers of 1 to 4 of the error forecast alike on the published tables; 2 is that of independent estimates (Bates and
    Granger 1969).
    """
    squares_MxC = (errors_MxCxR**2 * ~past_CxR).sum(-1) / (~past_CxR).sum(-1) + 1e-16
    weight = 1 / (squares_MxC / squares_MxC.mean(0)).mean(1)
    return weight / weight.sum()


def _future_error(
    errors_CxR: np.ndarray, past_CxR: np.ndarray, log_c: np.ndarray, noise: float, share_C: np.ndarray
) -> float:
    """Rolling origin: rms log error beyond the cuts, less noise, a unit of log C; 0 where no cut could be made.

    Rows beyond one cut err together, so that each cut is one piece of evidence. Its fit has fewer rows than ours and is
    worse for it: `share_C` says how much of its error counts.
    """
    squares = [
        share**2
        * max(0.0, np.mean(error[~past] ** 2) - noise**2)
        / max(0.01, np.mean((log_c[~past] - log_c[past].max()) ** 2))
        for error, past, share in zip(errors_CxR, past_CxR, share_C, strict=True)
    ]
    return float(np.sqrt(np.mean(squares))) if squares else 0.0
