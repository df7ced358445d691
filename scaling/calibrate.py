"""Do the intervals hold? Coverage of 95 % intervals on simulated tables whose law is known.

What was measured in choosing the default of intervals.py, 2,000 tables in each of 16 designs of 20 and 60 rows, normal
and heavy-tailed noise of 1 %, least and greatest coverage of alpha and beta:

    profile, Huber's loss 2 standard deviations wide              93.6-95.5 %
    the same, 1.345 standard deviations wide                      93.0-95.5 %
    the same, by median residual, no factor for few rows          92.7-95.3 %
    profile, least squares, F test                                94.3-95.8 %, 5-14 % wider under Student's t

and 1,000 tables in each of six isoFLOP designs of 20 and 60 rows, the last column with noise that falls as C^-0.2:

    widened for unequal noise by    normal       Student's t    uneven
    nothing                         94.8-95.9    93.2-95.0      87.7-89.2
    beyond 2 standard errors        94.8-96.0    93.6-95.5      88.6-90.9
    beyond 1, the default           95.0-96.2    94.1-96.0      89.9-92.1
    all of it                       95.3-96.7    94.9-96.7      91.6-93.2
    Hessian, sandwich               92.7-93.8    92.0-94.7      88.4-90.7

Letters of array names: S simulated tables, Q exponents, K columns, R rows.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_jax.settings import BadInput, did_you_mean
from scaling import laws
from scaling.fit import fit
from scaling.profile import profile_ends
from scaling.robust import robust, wald_ends
from scaling.tables import Table
from scaling.uncertainty import bootstrap

LAW = laws.by_name("chinchilla")
EXPONENTS = ("alpha", "beta")
TRUTHS = {
    # Besiroglu et al. 2024, arXiv:2404.10102, table 1: exponents all but equal.
    "epoch": {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658},
    # Hoffmann et al. 2022, arXiv:2203.15556, eq. 10; the digits of its exponents as Besiroglu et al. quote them.
    "hoffmann": {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.3392, "beta": 0.2849},
}
LAYOUTS = ("isoflop", "grid")
SHAPES = {20: (4, 5), 60: (6, 10), 240: (12, 20)}
"""{rows: (budgets, sizes at each) or (sizes, token counts)}."""
TAILS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "student3": lambda rng, shape: rng.standard_t(3, shape),  # a standard deviation of sqrt(3), and now and then of 10
    "uneven": lambda rng, shape: rng.standard_normal(shape),  # falls as C^-0.2: sixfold over four decades of compute
}
KEYS = ("rows", "layout", "tails", "truth")
LEVEL, BAND = 0.95, (0.93, 0.97)
CHUNK = 250  # simulations that a process takes at once
BOOTSTRAP_EVERY, RESAMPLES = 20, 200  # a bootstrap with its fit costs as much as some hundred profiles


@dataclass(frozen=True)
class Design:
    """Where the runs of a simulated table lie, the law they follow, and the noise on their log loss."""

    layout: str
    rows: int
    tails: str
    truth: str

    @property
    def name(self) -> str:
        """Such as isoflop-20-normal-epoch."""
        return f"{self.layout}-{self.rows}-{self.tails}-{self.truth}"


DESIGNS = tuple(
    Design(*one)
    for one in itertools.product(LAYOUTS, SHAPES, TAILS, TRUTHS)
    if one[2:] != ("uneven", "hoffmann")  # one law is enough to show what unequal noise does
)


def chosen(words: Sequence[str]) -> list[Design]:
    """The designs that have all parts of any of the words: "isoflop-20", "student3"; all without any word.

    BadInput for a part that no design has.
    """
    parts = {part for design in DESIGNS for part in design.name.split("-")}
    for part in itertools.chain.from_iterable(word.split("-") for word in words):
        if part not in parts:
            example = DESIGNS[0].name
            raise BadInput(f'"{part}" is part of no design such as {example}{did_you_mean(part, parts)}')
    found = [one for one in DESIGNS if any(set(word.split("-")) <= set(one.name.split("-")) for word in words)]
    if words and not found:
        raise BadInput(f"no design is all of {' '.join(words)}; one design is {DESIGNS[0].name}")
    return found or list(DESIGNS)


def columns(design: Design) -> tuple[np.ndarray, np.ndarray]:
    """N_params and D_tokens of the rows.

    isoFLOP: budgets of 1e18 to 1e22 FLOPs, at each sizes from an eighth to eight times the law's optimum. Grid: 5e7 to
    1e10 parameters by 1e9 to 4e11 tokens.
    """
    outer, inner = SHAPES[design.rows]
    if design.layout == "grid":
        return np.repeat(np.geomspace(5e7, 1e10, outer), inner), np.tile(np.geomspace(1e9, 4e11, inner), outer)
    budgets = np.geomspace(1e18, 1e22, outer)
    best = np.array([laws.optimum(TRUTHS[design.truth], c)[0] for c in budgets])
    n_params = (best[:, None] * np.geomspace(1 / 8, 8, inner)).ravel()
    return n_params, np.repeat(budgets, inner) / 6 / n_params


def simulate(design: Design, simulations: int, noise: float, seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log columns_KxR and log loss_SxR. `noise` is relative: its standard deviation, or the scale of Student's t."""
    log_KxR = np.log(np.stack(columns(design)))
    truth = TRUTHS[design.truth]
    theta_P = np.array([np.log(truth[name]) if name in ("A", "B", "E") else truth[name] for name in LAW.parameters])
    draws_SxR = TAILS[design.tails](np.random.default_rng(seed), (simulations, design.rows))
    if design.tails == "uneven":
        log_c_R = log_KxR.sum(0)
        draws_SxR *= np.exp(-0.2 * (log_c_R - log_c_R.mean()))
    return log_KxR, LAW.evaluate(theta_P[None], log_KxR)[0] + noise * draws_SxR


Ends = tuple[np.ndarray, np.ndarray]


def intervals(design: Design, simulations: int, noise: float, seed: Sequence[int]) -> dict[str, Ends]:
    """{method: (low_SxQ, high_SxQ)} of the exponents; those of the bootstrap for one table in BOOTSTRAP_EVERY.

    Profile and Hessian are those of intervals.py, for all tables side by side.
    """
    log_KxR, target_SxR = simulate(design, simulations, noise, seed)
    found = robust(LAW, log_KxR, target_SxR)
    places = [LAW.parameters.index(name) for name in EXPONENTS]
    wald = wald_ends(found, LEVEL)
    resampled = []
    for target_R in target_SxR[::BOOTSTRAP_EVERY]:
        n_params, d_tokens = np.exp(log_KxR)
        columns = {"N_params": n_params, "D_tokens": d_tokens, "C_flops": 6 * n_params * d_tokens}
        table = Table(columns | {"loss": np.exp(target_R)})
        samples = bootstrap(fit(LAW, table), table, RESAMPLES)
        resampled.append([samples.intervals[name] for name in EXPONENTS])
    low_SxQ, high_SxQ = np.moveaxis(np.array(resampled), -1, 0)
    return {
        "profile": profile_ends(found, places, LEVEL),
        "hessian": (wald[0][:, places], wald[1][:, places]),
        "bootstrap": (low_SxQ, high_SxQ),
    }


def calibrate(
    designs: Sequence[Design],
    simulations: int = 1000,
    noise: float = 0.01,
    seed: int = 0,
    update: Callable[[float, str], None] = lambda done, note: None,
) -> list[dict[str, Any]]:
    """Coverage by design, method and exponent, one row each; `update` is told the tables done so far.

    coverage is the share of intervals that hold the truth, an infinite one among them, and coverage_se its Monte-Carlo
    standard error; unbounded is the share of intervals that are infinite on a side. Every table depends on the seed and
    its design alone. One process a core. BadInput for fewer than two simulations, and for a noise that is not positive.
    """
    if simulations < 2:
        raise BadInput(f"coverage needs at least 2 simulations, got {simulations}")
    if not 0 < noise < np.inf:
        raise BadInput(f"noise must be positive, got {noise}")
    tasks = []
    for design in sorted(designs, key=lambda one: -one.rows):  # the longest first: the cores end together
        for first in range(0, simulations, CHUNK):
            size = min(CHUNK, simulations - first)
            tasks.append((design, size, noise, (seed, DESIGNS.index(design), first)))
    parts: dict[Design, list[dict[str, Ends]]] = {design: [] for design in designs}
    done = 0
    for (design, size, *_), ends in _in_processes(tasks):
        parts[design].append(ends)
        done += size
        update(done, design.name)
    return [row for design in designs for row in _rows(design, noise, parts[design])]


Task = tuple[Design, int, float, tuple[int, int, int]]


def _in_processes(tasks: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Ends]]]:
    """Each task with its answer, as they end."""
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, len(tasks))
    if workers == 1:
        yield from ((task, intervals(*task)) for task in tasks)
        return
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(intervals, *task): task for task in tasks}
        try:
            for future in concurrent.futures.as_completed(waiting):
                yield waiting[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _rows(design: Design, noise: float, parts: Sequence[dict[str, Ends]]) -> list[dict[str, Any]]:
    rows = []
    for method in parts[0]:
        low_SxQ, high_SxQ = (np.concatenate([part[method][side] for part in parts]) for side in (0, 1))
        for q, name in enumerate(EXPONENTS):
            low, high, truth = low_SxQ[:, q], high_SxQ[:, q], TRUTHS[design.truth][name]
            coverage = float(np.mean((low <= truth) & (truth <= high)))
            # Of the standard error at the level, where all or none covered.
            spread = np.sqrt(max(coverage * (1 - coverage), LEVEL * (1 - LEVEL) / 4) / len(low))
            rows.append(
                {
                    "layout": design.layout,
                    "rows": design.rows,
                    "tails": design.tails,
                    "truth": design.truth,
                    "noise": noise,
                    "method": method,
                    "parameter": name,
                    "simulations": len(low),
                    "coverage": coverage,
                    "coverage_se": float(spread),
                    "unbounded": float(np.mean(np.isinf(low) | np.isinf(high))),
                    "median_width": float(np.median(high - low)),
                }
            )
    return rows


def describe(rows: Sequence[dict[str, Any]]) -> str:
    """The table for people and for Markdown, a line a design, and a line on each method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [
        ["rows", "layout", "noise", "truth", *(f"{method} {name}" for method in methods for name in EXPONENTS)],
    ]
    keyed = {(*(row[key] for key in KEYS), row["method"], row["parameter"]): row for row in rows}
    for key in dict.fromkeys(key[:4] for key in keyed):
        cells = [keyed[*key, method, name] for method in methods for name in EXPONENTS]
        open_ends = (f", {100 * cell['unbounded']:.0f} % open" if cell["unbounded"] else "" for cell in cells)
        shown = [
            f"{100 * cell['coverage']:.1f} ± {100 * cell['coverage_se']:.1f}{note}"
            for cell, note in zip(cells, open_ends, strict=True)
        ]
        lines.append([str(key[0]), *key[1:], *shown])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    text.append("")
    for uneven, method in itertools.product((False, True), methods):
        own = [row for row in rows if row["method"] == method and (row["tails"] == "uneven") == uneven]
        if not own:
            continue
        shares = np.array([row["coverage"] for row in own])
        within = int(((shares >= BAND[0]) & (shares <= BAND[1])).sum())
        usual = [keyed[*(row[key] for key in KEYS), methods[0], row["parameter"]]["median_width"] for row in own]
        with np.errstate(invalid="ignore"):
            wider = np.median(np.array([row["median_width"] for row in own]) / usual)
        text.append(
            f"{method}{', uneven noise' if uneven else ''}: {100 * shares.mean():.1f} % covered on average, "
            f"{100 * shares.min():.1f} to {100 * shares.max():.1f} %, "
            f"{within} of {len(own)} within {100 * BAND[0]:.0f} to {100 * BAND[1]:.0f} %; {own[0]['simulations']} tables each"
            + (f"; {wider:.2f} times as wide as by {methods[0]}" if method != methods[0] else "")
        )
    return "\n".join(text)
