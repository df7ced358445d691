"""What a scaling law is: one function of columns and parameters, and what solver.py needs of it, which follows from it.

    @law(
        "chinchilla", "L = E + A / N^alpha + B / D^beta", "Hoffmann et al. 2022, arXiv:2203.15556, eq. 2",
        A=scale(), B=scale(), E=scale(), alpha=exponent(), beta=exponent(),
    )
    def chinchilla(N_params, D_tokens, A, B, E, alpha, beta):
        return E + A / N_params**alpha + B / D_tokens**beta

Arguments that the decorator does not name are columns of the table. Derivatives come from dual numbers, starts from the
kinds' ranges and the table, and the units of the parameters from units.py.

Letters of array names in scaling/: S problems side by side, P parameters of a law, K columns a law reads, R rows.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy import special
from scipy.stats import qmc

from scaling.laws import units
from scaling.laws.dual import Dual

FLOOR = 1e-6
"""A term at or below this share of the median loss is zero for every purpose; the solver stops there."""
STARTS = 64
"""Starts of a fit by an automatic law: the best of POOL points of a Sobol sequence, the same ones every time."""
POOL = 1024

FAINT = 0.03
"""Of its median effect on the prediction over the pool: less than this and a start is passed over."""

Formula = Callable[..., Any]


@dataclass(frozen=True)
class Parameter:
    """What is known of a parameter before the data: its kind, and where to look for it.

    Ranges hold where every column that the law can rescale has a geometric mean of 1, as in a fit; there N_params **
    -alpha is near 1 whatever alpha is.
    """

    kind: Literal["positive", "free", "fraction"]
    """Stored as its log, as it is, or as its log-odds."""
    low: float
    high: float
    """Between them a fit starts."""
    least: float
    most: float
    """Beyond them a fit does not go: far outside of what data can tell."""
    of_target: bool = False
    """In units of the target: low to most are multiples of its median."""
    late: bool = False
    """Held while the others first find their places: it bends the law where a bad start has it run away."""

    def stored(self, natural: Any) -> Any:
        """natural -> theta."""
        if self.kind == "positive":
            return np.log(natural)
        return natural if self.kind == "free" else special.logit(natural)

    def natural(self, theta: Any) -> Any:
        """theta -> natural."""
        if self.kind == "positive":
            return np.exp(theta)
        return theta if self.kind == "free" else special.expit(theta)

    def slope(self, natural: np.ndarray) -> np.ndarray | float:
        """d natural / d theta."""
        if self.kind == "positive":
            return natural
        return 1.0 if self.kind == "free" else natural * (1 - natural)


def scale(low: float = 0.02, high: float = 1.0) -> Parameter:
    """A positive number in units of the target, such as E or A of L = E + A / N^alpha, in medians of the target."""
    return Parameter("positive", low, high, FLOOR, 20 * high, of_target=True)


def positive(
    low: float, high: float, least: float | None = None, most: float | None = None, late: bool = False
) -> Parameter:
    """A positive number of its own units, such as a count of epochs."""
    return Parameter("positive", low, high, least or low * 1e-4, most or high * 1e4, late=late)


def exponent(low: float = 0.05, high: float = 1.0, least: float = -2.0, most: float = 8.0) -> Parameter:
    """A number of either sign, stored as it is."""
    return Parameter("free", low, high, least, most)


def fraction(low: float = 0.05, high: float = 0.95) -> Parameter:
    """A number between 0 and 1, stored as log-odds."""
    return Parameter("fraction", low, high, 1e-6, 1 - 1e-6)


Arrays = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Law:
    """A law for one column of a table. `theta` is unconstrained: the log of every scale, and exponents as they are.

    The solver works on x, the logs of the columns less their means, since A and alpha are all but collinear otherwise;
    `shift` undoes that afterwards. `by_function` makes all of it from one function.
    """

    name: str
    formula: str
    source: str
    parameters: tuple[str, ...]
    """Names of the natural values, in the order of theta."""
    columns: tuple[str, ...]
    """Columns of the table that the law reads; all positive."""
    evaluate: Callable[[np.ndarray, np.ndarray], Arrays] = field(repr=False)
    """(theta_SxP, x_KxR) -> prediction_SxR, jacobian_SxPxR; the prediction's log where `log`."""
    starts: Callable[[np.ndarray, np.ndarray], np.ndarray] = field(repr=False)
    """(x_KxR centred, target_R) -> theta_SxP: a few dozen points that the ranges of the data make plausible."""
    bounds: Callable[[np.ndarray, np.ndarray], Arrays] = field(repr=False)
    """(x_KxR centred, target_R) -> lower_P, upper_P: far outside of what data can tell; they keep numbers finite."""
    shift: Callable[[np.ndarray, np.ndarray], np.ndarray] = field(repr=False)
    """(theta_...xP, by_K) -> theta of the same curve over columns x - by."""
    natural: Callable[[np.ndarray], np.ndarray] = field(repr=False)
    """theta_...xP -> the values named by `parameters`, in their order."""
    stored: Callable[[dict[str, float]], np.ndarray] = field(repr=False)
    """Natural values of some parameters -> their part of theta."""
    centre: Callable[[np.ndarray], np.ndarray] = field(default=lambda x_KxR: x_KxR.mean(1), repr=False)
    """x_KxR -> by_K: what may be taken from each log column."""
    target: str = "loss"
    """The column that the law predicts: nats a token for a loss, 0 to 1 for error, accuracy, coverage and reward."""
    log: bool = True
    """Residuals are taken between logs; else between the values, as the paper does."""
    objective: str = "huber:1e-3"
    """That of the paper; see solver.Objective."""
    late: frozenset[str] = frozenset()
    """Parameters that are held while the others first find their places."""

    @property
    def line(self) -> str:
        """One line for `llm-jax fit --list`: formula and columns."""
        return f"{self.name:<20} {self.formula}   [{', '.join(self.columns)} -> {self.target}]"

    def between(self, log: bool) -> Law:
        """The same law with residuals between logs, or between values."""
        if log == self.log:
            return self

        def evaluate(theta_SxP: np.ndarray, x_KxR: np.ndarray) -> Arrays:
            value_SxR, jacobian_SxPxR = self.evaluate(theta_SxP, x_KxR)
            with np.errstate(all="ignore"):
                if log:
                    return np.log(value_SxR), jacobian_SxPxR / value_SxR[:, None]
                return np.exp(value_SxR), jacobian_SxPxR * np.exp(value_SxR)[:, None]

        native = np.log if self.log else np.exp
        return dataclasses.replace(
            self,
            log=log,
            evaluate=evaluate,
            starts=lambda x_KxR, target_R: self.starts(x_KxR, native(target_R)),
            bounds=lambda x_KxR, target_R: self.bounds(x_KxR, native(target_R)),
        )


def law(
    name: str,
    formula: str,
    source: str,
    *,
    target: str = "loss",
    log: bool = True,
    objective: str = "huber:1e-3",
    **kinds: Parameter,
) -> Callable[[Formula], Law]:
    """Decorator: the Law of a function, with the kinds of its parameters by name; its other arguments are columns."""

    def wrap(function: Formula) -> Law:
        arguments = list(inspect.signature(function).parameters)
        ordered = {argument: kinds[argument] for argument in arguments if argument in kinds}
        columns = [argument for argument in arguments if argument not in kinds]
        return by_function(function, name, formula, source, columns, ordered, target, log, objective)

    return wrap


def by_function(
    function: Formula,
    name: str,
    formula: str,
    source: str,
    columns: Sequence[str],
    kinds: dict[str, Parameter],
    target: str = "loss",
    log: bool = True,
    objective: str = "huber:1e-3",
) -> Law:
    """The Law of a function that takes `columns` and the parameters of `kinds` by name."""
    names, each = tuple(kinds), tuple(kinds.values())

    def run(theta_SxP: np.ndarray, x_KxR: np.ndarray, moved: Sequence[int] = ()) -> Arrays:
        """Prediction and slopes; those by a common shift of the log columns `moved` come last."""
        extra = len(each)
        given: dict[str, Any] = dict(zip(columns, np.exp(x_KxR)[:, None, :], strict=True))
        for k in moved:
            given[columns[k]] = Dual(given[columns[k]], {extra: given[columns[k]]})
        for p, (key, kind) in enumerate(zip(names, each, strict=True)):
            natural = kind.natural(theta_SxP[:, p : p + 1])
            given[key] = Dual(natural, {p: kind.slope(natural)})
        found = function(**given)
        shape = len(theta_SxP), x_KxR.shape[1]
        value, slopes = (found.value, found.slopes) if isinstance(found, Dual) else (found, {})
        by_value = 1 / value if log else 1.0
        slopes_P = [slopes.get(p, 0.0) for p in range(extra + bool(moved))]
        value = np.broadcast_to(np.log(value) if log else value, shape)
        if not isinstance(value, np.ndarray):  # accelerated.py's
            return value, np.stack([np.broadcast_to(slope * by_value, shape) for slope in slopes_P], 1)
        jacobian_SxPxR = np.empty((shape[0], len(slopes_P), shape[1]))
        for p, slope in enumerate(slopes_P):
            np.multiply(slope, by_value, out=jacobian_SxPxR[:, p])
        return value, jacobian_SxPxR

    def evaluate(theta_SxP: np.ndarray, x_KxR: np.ndarray) -> Arrays:
        with np.errstate(all="ignore"):
            return run(theta_SxP, x_KxR)

    def limits(values: Sequence[tuple[float, float]], target_R: np.ndarray) -> Arrays:
        typical = float(np.median(np.exp(target_R) if log else np.abs(target_R)))
        ends = [
            kind.stored(np.array(ends) * (typical if kind.of_target else 1))
            for kind, ends in zip(each, values, strict=True)
        ]
        low_P, high_P = np.array(ends, float).T
        return low_P, high_P

    def bounds(x_KxR: np.ndarray, target_R: np.ndarray) -> Arrays:
        return limits([(kind.least, kind.most) for kind in each], target_R)

    def look(theta_SxP: np.ndarray, x_KxR: np.ndarray) -> Arrays:
        """Predictions_SxR, and the largest slope of any row by each parameter, SxP."""
        predicted_SxR, jacobian_SxPxR = evaluate(theta_SxP, x_KxR)
        return predicted_SxR, np.maximum(jacobian_SxPxR.max(2), -jacobian_SxPxR.min(2))

    def starts(x_KxR: np.ndarray, target_R: np.ndarray) -> np.ndarray:
        low_P, high_P = limits([(kind.low, kind.high) for kind in each], target_R)
        theta_SxP = low_P + (high_P - low_P) * qmc.Sobol(len(each), rng=np.random.default_rng(0)).random(POOL)
        parts = np.array_split(theta_SxP, 8)  # what stays in cache
        looks = [look(part, x_KxR) for part in parts]
        predicted_SxR, effect_SxP = (np.concatenate(one) for one in zip(*looks, strict=True))
        with np.errstate(all="ignore"):
            if log:  # all terms together brought to the height of the data
                offset_S = np.nan_to_num(np.median(target_R - predicted_SxR, axis=1))
                of_target = np.array([kind.of_target for kind in each])
                theta_SxP = theta_SxP + np.clip(offset_S, -3, 3)[:, None] * of_target
                predicted_SxR = predicted_SxR + offset_S[:, None] * of_target.any()
            misfit_S = np.mean(np.abs(predicted_SxR - target_R), axis=1)
            # Where a parameter does next to nothing, a term of the law is off and has no slope to come back along.
            misfit_S = np.where((effect_SxP < FAINT * np.nanmedian(effect_SxP, axis=0)).any(1), np.inf, misfit_S)
        order = np.argsort(np.where(np.isfinite(misfit_S), misfit_S, np.inf), kind="stable")
        return theta_SxP[order[:STARTS]]

    def some(count: int, seed: int) -> np.ndarray:
        """Values of theta to find the units by."""
        low_P, high_P = limits([(kind.low, kind.high) for kind in each], np.zeros(1) if log else np.ones(1))
        return low_P + (high_P - low_P) * np.random.default_rng(seed).uniform(0.25, 0.6, (count, len(each)))

    found = units.Units(run, some, tuple(columns))
    return Law(
        name=name,
        formula=formula,
        source=source,
        parameters=names,
        columns=tuple(columns),
        evaluate=evaluate,
        starts=starts,
        bounds=bounds,
        shift=found.shift,
        natural=lambda theta: np.stack(
            [kind.natural(one) for kind, one in zip(each, np.moveaxis(theta, -1, 0), strict=True)], -1
        ),
        stored=lambda values: np.array([kinds[key].stored(value) for key, value in values.items()], float),
        centre=found.centre,
        target=target,
        log=log,
        objective=objective,
        late=frozenset(key for key, kind in kinds.items() if kind.late),
    )
