"""Ways from a table to numbers that are no fit of one law: the frontiers of Hoffmann et al. 2022, and laws in two stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llm_jax.settings import BadInput
from scaling import isoflop, laws
from scaling.fit import fit
from scaling.isoflop import Parabola
from scaling.tables import Table
from scaling.uncertainty import bootstrap, groups, resample


@dataclass(frozen=True)
class Outcome:
    """What a procedure found."""

    parameters: dict[str, float]
    n: int
    objective: str
    value: float
    intervals: dict[str, tuple[float, float]] | None
    """95 %, by parameter."""
    warnings: list[str]


@dataclass(frozen=True)
class Procedure:
    """A way from a table to parameters, under the same verb as a law."""

    name: str
    formula: str
    source: str
    columns: tuple[str, ...]
    target: str
    run: Callable[[Table, str, int], Outcome]
    """(table, objective or "", bootstrap samples or 0) -> outcome; BadInput where the table does not allow it."""

    @property
    def line(self) -> str:
        """One line for `llm-jax fit --list`."""
        return f"{self.name:<20} {self.formula}   [{', '.join(self.columns)} -> {self.target}]"


def _power_laws(compute: np.ndarray, n_opt: np.ndarray, weights: np.ndarray) -> tuple[dict[str, float], float]:
    """N* = k_N C^a and D* = C / 6 N* = k_D C^b by least squares in logs, and half the weighted squares."""
    log_c, log_n = np.log(compute), np.log(n_opt)
    centre = np.average(log_c, weights=weights)
    root = np.sqrt(weights)
    design = np.stack([np.ones_like(log_c), log_c - centre], 1) * root[:, None]
    (level, a), *_ = np.linalg.lstsq(design, log_n * root, rcond=None)
    squares = float(np.sum((design @ np.array([level, a]) - log_n * root) ** 2))
    k_n = float(np.exp(level - a * centre))
    return {"k_N": k_n, "a": float(a), "k_D": 1 / (6 * k_n), "b": float(1 - a)}, squares / 2


def _frontier(minima: Callable[[Table], list[Parabola]]) -> Callable[[Table, str, int], Outcome]:
    def once(table: Table) -> tuple[dict[str, float], float, list[Parabola]]:
        found = minima(table)
        inside, errors = isoflop.interior(found)
        weights = errors**-2.0 / np.mean(errors**-2.0)
        parameters, value = _power_laws(
            np.array([one.budget for one in inside]), np.array([one.n_opt for one in inside]), weights
        )
        return parameters, value, found

    def run(table: Table, objective: str, samples: int) -> Outcome:
        _only("lsq", objective)
        parameters, value, found = once(table)
        intervals = _resampled(table, lambda rows: once(rows)[0], groups(table), samples)
        warnings = [one.warning for one in found if one.warning]
        return Outcome(parameters, len(table), "lsq", value, intervals, warnings)

    return run


def _envelope(table: Table, objective: str, samples: int) -> Outcome:
    _only("lsq", objective)

    def once(rows: Table) -> tuple[dict[str, float], float]:
        compute, n_opt = isoflop.envelope(rows)
        return _power_laws(compute, n_opt, np.ones(len(compute)))

    parameters, value = once(table)
    intervals = _resampled(table, lambda rows: once(rows)[0], table.column("N_params"), samples)
    return Outcome(parameters, len(table), "lsq", value, intervals, [])


def _ladder(table: Table, objective: str, samples: int) -> Outcome:
    stages = laws.LAWS["chinchilla"], laws.LAWS["accuracy"]
    found = [fit(law, table, objective) for law in stages]
    parameters = found[0].parameters | found[1].parameters
    intervals: dict[str, tuple[float, float]] | None = None
    if samples:  # the same seed draws the same rows for both
        intervals = {}
        for one in found:
            intervals |= bootstrap(one, table, samples).intervals
    warnings = list(dict.fromkeys(warning for one in found for warning in one.warnings))
    value = found[0].value + found[1].value
    return Outcome(parameters, found[0].n, found[0].objective, value, intervals, warnings)


def _only(valid: str, objective: str) -> None:
    if objective not in ("", valid):
        raise BadInput(
            f'objective "{objective}" is not for this procedure, whose power law is fitted by {valid} in logs'
        )


def _resampled(
    table: Table, once: Callable[[Table], dict[str, float]], groups_R: np.ndarray, samples: int
) -> dict[str, tuple[float, float]] | None:
    """Percentiles over resampled rows; resamples that have no answer are left out, and too many of them are none."""
    if not samples:
        return None
    weights_SxR = resample(groups_R, samples, 5, np.random.default_rng(0)).astype(int)
    found = []
    for weights_R in weights_SxR:
        try:
            found.append(once(table.select(np.repeat(np.arange(len(table)), weights_R))))
        except BadInput:
            continue
    if len(found) < samples / 2:
        return None
    limits = {name: np.quantile([one[name] for one in found], [0.025, 0.975]) for name in found[0]}
    return {name: (float(low), float(high)) for name, (low, high) in limits.items()}


FRONTIER = "N* = k_N * C^a, D* = k_D * C^b"
PROCEDURES = {
    one.name: one
    for one in (
        Procedure(
            "envelope",
            FRONTIER,
            "Hoffmann et al. 2022, arXiv:2203.15556, approach 1: the best size for each compute over training curves",
            ("N_params", "C_flops"),
            "loss",
            _envelope,
        ),
        Procedure(
            "isoflop",
            FRONTIER,
            "Hoffmann et al. 2022, arXiv:2203.15556, approach 2: minima of parabolas in log N at equal compute",
            ("N_params", "D_tokens", "C_flops"),
            "loss",
            _frontier(isoflop.parabolas),
        ),
        Procedure(
            "isoflop-akima",
            FRONTIER,
            "Porian et al. 2024, arXiv:2406.19146, section 2: approach 2 with Akima's interpolation for the parabola",
            ("N_params", "D_tokens", "C_flops"),
            "loss",
            _frontier(isoflop.akima),
        ),
        Procedure(
            "ladder",
            "L = E + A / N^alpha + B / D^beta, accuracy = b + a / (1 + e^(k * (L - L_0)))",
            "Bhagia et al. 2024 (OLMo ladder), arXiv:2412.04403, sections 3.1 and 3.2: task loss, then accuracy",
            ("N_params", "D_tokens", "loss"),
            "accuracy",
            _ladder,
        ),
    )
}
