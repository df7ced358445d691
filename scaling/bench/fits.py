"""How fast fits are: this package against the loop over SciPy of published analyses, in one process, one after the other.

The loop is that of Hoffmann et al. 2022, arXiv:2203.15556, appendix D.3, as Besiroglu et al. 2024, arXiv:2404.10102,
published it: L-BFGS-B from each of 4,500 starts on Huber's loss of the log-sum-exp, then one BFGS from the optimum for each
of 4,000 bootstraps. Their gradients come from autograd, which is timed where it is installed (pip install autograd); beside
it SciPy's own by differences, and gradients written by hand, which nobody published and which are the fastest.
"""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

from llm_jax.settings import BadInput
from scaling import calibrate, solver, tables, uncertainty
from scaling.fit import Fit, fit, prepare
from scaling.laws import CHINCHILLA
from scaling.progress import progress
from scaling.tables import Table

DELTA = 1e-3
OBJECTIVE = f"huber:{DELTA:g}"
STARTS_SxP = np.array(
    list(
        itertools.product(
            np.arange(0, 30, 5.0),  # log A
            np.arange(0, 30, 5.0),  # log B
            np.arange(-1, 1.5, 0.5),  # log E
            np.arange(0, 2.5, 0.5),  # alpha
            np.arange(0, 2.5, 0.5),  # beta
        )
    )
)
"""The grid of Hoffmann et al. 2022 in its 4,500 points; in the order of CHINCHILLA.parameters, as all of theta here."""
RESAMPLES, MANY = 4_000, 100_000
"""Bootstraps of the published analysis, and of the row that needs a GPU."""
TIMED_STARTS, TIMED_RESAMPLES = 200, 100
"""What SciPy is timed on, drawn at random, unless it is to do everything."""
REPEATS = 5
"""Timed calls of ours after one that is not timed; their median counts."""


# ---- The published loop ----


@dataclass(frozen=True)
class Published:
    """What the published loop minimises for one table."""

    log_n: np.ndarray
    log_d: np.ndarray
    log_loss: np.ndarray

    def _terms(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The log of the prediction by log-sum-exp, and the shares of its three terms before they are divided by their sum."""
        a, b, e, alpha, beta = theta
        terms = np.stack([a - alpha * self.log_n, b - beta * self.log_d, np.full_like(self.log_n, e)])
        highest = terms.max(0)
        shares = np.exp(terms - highest)
        return highest + np.log(shares.sum(0)), shares

    def value(self, theta: np.ndarray, weights: np.ndarray) -> float:
        """Hoffmann et al. 2022, eq. 3, over rows that count `weights` times."""
        residual = self._terms(theta)[0] - self.log_loss
        inner = np.minimum(np.maximum(residual, -DELTA), DELTA)
        return float(weights @ (inner * (residual - 0.5 * inner)))

    def value_and_gradient(self, theta: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """The same with its gradient by log A, log B, log E, alpha and beta."""
        log_pred, shares = self._terms(theta)
        residual = log_pred - self.log_loss
        inner = np.minimum(np.maximum(residual, -DELTA), DELTA)
        pulls = shares * (weights * inner / shares.sum(0))
        gradient = np.concatenate([pulls.sum(1), [-pulls[0] @ self.log_n, -pulls[1] @ self.log_d]])
        return float(weights @ (inner * (residual - 0.5 * inner))), gradient

    def gradients(self) -> dict[str, tuple[Callable[..., Any], Any]]:
        """By name: the function for SciPy, and its argument `jac`: True where the function returns the gradient too."""
        found: dict[str, tuple[Callable[..., Any], Any]] = {
            "by hand": (self.value_and_gradient, True),
            "by differences": (self.value, None),
        }
        return found | self._by_autograd()

    def _by_autograd(self) -> dict[str, tuple[Callable[..., Any], Any]]:
        try:
            import autograd.numpy as anp
            from autograd import grad
            from autograd.scipy.special import logsumexp
        except ImportError:
            return {}

        def value(theta: Any, weights: np.ndarray) -> Any:
            a, b, e, alpha, beta = theta
            terms = anp.array([a - alpha * self.log_n, b - beta * self.log_d, e * np.ones_like(self.log_n)])
            size = anp.abs(logsumexp(terms, axis=0) - self.log_loss)
            return anp.sum(weights * anp.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA)))

        return {"by autograd": (value, grad(value))}


@dataclass(frozen=True)
class Loop:
    """Runs of the published loop over some of its tasks."""

    seconds: dict[str, float]
    """{gradient: seconds for all tasks, scaled up from those that ran}."""
    timed: int
    """Tasks that ran with the fastest gradient."""
    which: np.ndarray
    """Those tasks, and where they ended."""
    value: np.ndarray
    theta: np.ndarray


def published_loop(
    loss: Published,
    method: str,
    tasks: Sequence[tuple[np.ndarray, np.ndarray]],
    sample: int,
    full: bool,
    note: Callable[[str], None] = lambda text: None,
) -> Loop:
    """Runs SciPy's `method` on tasks of (start, weights), one after the other.

    A random sample of the tasks is timed with each kind of gradient; if `full`, then all of them with the fastest.
    """
    chosen = np.sort(np.random.default_rng(0).permutation(len(tasks))[:sample])

    def run(which: np.ndarray, gradient: str) -> tuple[float, list[Any]]:
        function, jac = loss.gradients()[gradient]
        began = time.perf_counter()
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            ended = [minimize(function, tasks[i][0], (tasks[i][1],), method, jac=jac) for i in which]
        return (time.perf_counter() - began) * len(tasks) / len(which), ended

    timed = {}
    for gradient in loss.gradients():
        note(f"SciPy {method}, gradient {gradient}")
        run(chosen[:1], gradient)
        timed[gradient] = run(chosen, gradient)
    seconds = {gradient: one[0] for gradient, one in timed.items()}
    fastest = min(seconds, key=lambda gradient: seconds[gradient])
    ended = timed[fastest][1]
    if full:
        note(f"SciPy {method}, all {len(tasks):,}")
        chosen = np.arange(len(tasks))
        seconds[fastest], ended = run(chosen, fastest)
    theta, value = np.array([one.x for one in ended]), np.array([one.fun for one in ended])
    return Loop(seconds, len(chosen), chosen, value, theta)


# ---- Ours against it ----


def bench_fit(path: Path | None = None, where: str = "", full: bool = False) -> dict[str, Any]:
    """`llm-jax bench fit`: seconds of a multistart fit and of bootstraps, ours and SciPy's, and whether they agree.

    Chinchilla's law, Huber's loss of width 1e-3. `path` is a run or a CSV, by default 240 rows are simulated. See
    `describe` for what is in it.
    """
    if where and path is None:
        raise BadInput("--where chooses rows of a table; name one, as in llm-jax bench fit TABLE.csv --where ...")
    table = tables.read(path) if path else simulated()
    table = prepare(CHINCHILLA, table.where(where) if where else table)[0]
    with progress("bench", 1.0, "") as update:
        return measure(table, str(path or "simulated"), full, note=lambda text: update(0.0, text))


def simulated() -> Table:
    """240 rows on a grid of 12 sizes by 20 token counts that follow a known law, with normal noise of 1 %."""
    design = calibrate.Design("grid", 240, "normal", "epoch")
    log_KxR, target_SxR = calibrate.simulate(design, 1, 0.01, [0])
    n_params, d_tokens = np.exp(log_KxR)
    columns = {"N_params": n_params, "D_tokens": d_tokens, "C_flops": 6 * n_params * d_tokens}
    return Table(columns | {"loss": np.exp(target_SxR[0])})


def measure(
    table: Table,
    name: str,
    full: bool = False,
    starts_SxP: np.ndarray = STARTS_SxP,
    resamples: int = RESAMPLES,
    many: int = MANY,
    sample: tuple[int, int] = (TIMED_STARTS, TIMED_RESAMPLES),
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """`bench_fit` of a table. `sample`: starts and resamples that SciPy is timed on."""
    loss = Published(*(np.log(table.column(column)) for column in ("N_params", "D_tokens", "loss")))
    note("fit")
    fit_seconds, result = timed(lambda: fit(CHINCHILLA, table, OBJECTIVE))
    problem, by_K = _problem(result, table)
    centred_SxP = CHINCHILLA.shift(starts_SxP, by_K)
    note("the same starts")
    same_seconds, (_, same_value, _) = timed(lambda: solver.minimise(problem, centred_SxP, 400))
    note("bootstrap")
    boot_seconds, boot = timed(lambda: uncertainty.bootstrap(result, table, resamples))

    weights_SxR = uncertainty.resample(
        uncertainty.groups(table), resamples, len(CHINCHILLA.parameters), np.random.default_rng(0)
    )  # those of uncertainty.bootstrap
    once_R = np.ones(len(table))
    grid = published_loop(loss, "L-BFGS-B", [(start, once_R) for start in starts_SxP], sample[0], full, note)
    refits = published_loop(loss, "BFGS", [(result.theta, weights) for weights in weights_SxR], sample[1], full, note)
    ours = np.array([loss.value(boot.theta_SxP[i], weights_SxR[i]) for i in refits.which])
    return {
        "table": name,
        "rows": len(table),
        "law": CHINCHILLA.name,
        "objective": OBJECTIVE,
        "cores": solver.cores(),
        "multistart": {
            "scipy": _loop_facts(grid, len(starts_SxP)),
            "fit": _our_facts(fit_seconds, grid),
            "same_starts": _our_facts(same_seconds, grid),
            "optimum": {"scipy": grid.value.min(), "fit": result.value, "same_starts": same_value.min()},
            "reached": {
                "scipy": float(np.mean(grid.value <= result.value * (1 + 1e-6))),
                "fit": result.starts_agreeing,
                "same_starts": float(np.mean(same_value <= result.value * (1 + 1e-6))),
            },
            "agrees": bool(abs(result.value / grid.value.min() - 1) <= 1e-6),
            "never_above": bool(result.value <= grid.value.min() * (1 + 1e-6)),
        },
        "bootstrap": {
            "scipy": _loop_facts(refits, resamples),
            "ours": _our_facts(boot_seconds, refits),
            "lower": {
                "ours": float(np.mean(ours < refits.value * (1 - 1e-6))),
                "scipy": float(np.mean(ours > refits.value * (1 + 1e-6))),
            },
            "never_above": bool((ours <= refits.value * (1 + 1e-6)).all()),
            "percentiles": _percentiles(boot.theta_SxP[refits.which], refits.theta),
        },
        "accelerator": _accelerated(result, table, weights_SxR, many, note),
    }


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Median seconds of REPEATS calls after one that does not count, and what the last returned."""
    call()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        found = call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), found


def _problem(result: Fit, table: Table) -> tuple[solver.Problem, np.ndarray]:
    _, log_KxR, target, _ = prepare(CHINCHILLA, table)
    by_K = CHINCHILLA.centre(log_KxR)
    x_KxR = log_KxR - by_K[:, None]
    return solver.Problem(CHINCHILLA, x_KxR, target, result.delta, CHINCHILLA.bounds(x_KxR, target)), by_K


def _loop_facts(loop: Loop, tasks: int) -> dict[str, Any]:
    return {"seconds": loop.seconds, "timed": loop.timed, "of": tasks}


def _our_facts(seconds: float, loop: Loop) -> dict[str, Any]:
    """Divided into SciPy's, for each of its gradients."""
    return {"seconds": seconds, "faster": {gradient: one / seconds for gradient, one in loop.seconds.items()}}


def _percentiles(ours_SxP: np.ndarray, scipys_SxP: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """By parameter: 2.5th, 50th and 97.5th percentile of the resamples that SciPy was run on."""
    both = {"ours": ours_SxP, "scipy": scipys_SxP}
    shown = {
        who: np.quantile(CHINCHILLA.natural(theta_SxP), [0.025, 0.5, 0.975], axis=0) for who, theta_SxP in both.items()
    }
    return {name: {who: shown[who][:, p].tolist() for who in both} for p, name in enumerate(CHINCHILLA.parameters)}


def _accelerated(
    result: Fit, table: Table, weights_SxR: np.ndarray, many: int, note: Callable[[str], None]
) -> dict[str, Any] | None:
    """`many` bootstraps as uncertainty.bootstrap does them where there is a GPU; None where there is none."""
    import jax

    from scaling import accelerated

    if not accelerated.available():
        return None
    note(f"{many:,} bootstraps on the accelerator")
    began = time.perf_counter()
    uncertainty.bootstrap(result, table, many)
    first = time.perf_counter() - began
    seconds, _ = timed(lambda: uncertainty.bootstrap(result, table, many))
    problem, by_K = _problem(result, table)
    some_SxR = weights_SxR[:1000]
    found = [
        uncertainty.refit(problem, CHINCHILLA.shift(result.theta, by_K), some_SxR, by=solve)
        for solve in (accelerated.minimise, solver.minimise)
    ]
    values = [
        (some_SxR * solver.huber(CHINCHILLA.evaluate(theta_SxP, problem.x_KxR)[0] - problem.target, DELTA)).sum(1)
        for theta_SxP in found
    ]
    return {
        "device": jax.devices()[0].device_kind,
        "bootstraps": many,
        "seconds": seconds,
        "compile_seconds": max(0.0, first - seconds),
        "largest_difference": float(np.abs(values[0] / values[1] - 1).max()),
    }


def describe(found: dict[str, Any]) -> str:
    """The table for people: seconds, and how many times faster than SciPy; then whether the answers are the same."""
    starts, boots = found["multistart"], found["bootstrap"]
    kinds = list(starts["scipy"]["seconds"])
    lines: list[tuple[str, ...]] = [("", "seconds", *(f"gradient {kind}" for kind in kinds))]

    def scipy_line(facts: dict[str, Any], what: str) -> None:
        scaled = f", timed {facts['timed']:,} of {facts['of']:,}" if facts["timed"] < facts["of"] else ""
        lines.append((f"SciPy, {what}{scaled}", "", *(f"{facts['seconds'][kind]:.3g} s" for kind in kinds)))

    def our_line(what: str, facts: dict[str, Any]) -> None:
        lines.append((what, f"{facts['seconds']:.3g}", *(f"{facts['faster'][kind]:.3g} x" for kind in kinds)))

    scipy_line(starts["scipy"], f"{starts['scipy']['of']:,} starts of L-BFGS-B")
    our_line("llm-jax fit", starts["fit"])
    our_line(f"our solver from the same {starts['scipy']['of']:,} starts", starts["same_starts"])
    scipy_line(boots["scipy"], f"{boots['scipy']['of']:,} bootstraps by BFGS")
    our_line(f"our {boots['scipy']['of']:,} bootstraps", boots["ours"])
    gpu = found["accelerator"]
    if gpu:
        blank = [""] * len(kinds)
        lines.append((f"our {gpu['bootstraps']:,} bootstraps on {gpu['device']}", f"{gpu['seconds']:.3g}", *blank))
        lines.append(("  and to compile, once", f"{gpu['compile_seconds']:.3g}", *blank))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [f"{found['table']}: {found['rows']} rows, {found['law']}, {found['objective']}; {found['cores']} cores", ""]
    text += ["  ".join([a.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip() for a, *rest in lines]
    optimum, reached, lower = starts["optimum"], starts["reached"], boots["lower"]
    text += [
        "",
        f"optimum: ours {optimum['fit']:.9g}, SciPy's {optimum['scipy']:.9g}: {'the same' if starts['agrees'] else 'NOT THE SAME'}"
        f"{'' if starts['never_above'] else '; OURS IS ABOVE'}; reached by {100 * reached['fit']:.0f} % of the starts of "
        f"llm-jax fit, of the grid by {100 * reached['same_starts']:.0f} % ours, {100 * reached['scipy']:.0f} % SciPy's",
        f"bootstraps: ours is lower in {100 * lower['ours']:.0f} % of the resamples, SciPy's in {100 * lower['scipy']:.0f} %, "
        "the others agree to 1e-6",
    ]
    for name, by in boots["percentiles"].items():
        shown = "; ".join(f"{who} {' '.join(f'{one:.5g}' for one in by[who])}" for who in ("ours", "scipy"))
        text.append(f"  {name:<6} 2.5, 50 and 97.5 %: {shown}")
    text.append("no GPU: NumPy does everything, and nothing is compiled" if not gpu else
                f"GPU and NumPy agree to {gpu['largest_difference']:.1e} of the objective")  # fmt: skip
    return "\n".join(text)
