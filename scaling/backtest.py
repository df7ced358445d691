"""How forecasts from a table's smaller runs would have done on its larger ones."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm_jax.settings import BadInput
from scaling import laws, tables
from scaling.extrapolation import predict
from scaling.fit import prepare
from scaling.laws import Law
from scaling.tables import Table


@dataclass(frozen=True)
class Backtest:
    """Forecasts of the runs beyond a share of the largest compute, from those up to it, against what was measured.

    Errors and widths are of log loss, which for the sizes at hand is the same as relative to the loss.
    """

    law: str
    share: float
    level: float
    fitted: int
    """Rows with C = 6 N D up to share times the largest."""
    held_out: int
    """The other rows."""
    coverage: float
    """Share of the held-out rows inside of their intervals; `level` is what it promises."""
    half_width: float
    """Of the intervals, mean."""
    needed: float
    """Half-width that would have been right: the quantile `level` of the absolute errors."""
    error: float
    """Of the forecasts, mean absolute."""
    law_error: float
    """Of the plain fit of the law by its own objective, mean absolute."""
    errors: tuple[float, ...]
    """Log of forecast less log of measured loss, a held-out row in the order of the table."""

    def summary(self) -> str:
        """A few lines of text."""
        return (
            f"{self.law}: {self.fitted} rows up to {self.share:g} of the largest compute forecast the other {self.held_out}\n"
            f"  {100 * self.level:.0f} % intervals cover {100 * self.coverage:.0f} %\n"
            f"  half-width {100 * self.half_width:.2f} %, needed {100 * self.needed:.2f} %\n"
            f"  mean error {100 * self.error:.2f} %, of the plain fit {100 * self.law_error:.2f} %"
        )

    def to_json(self) -> str:
        """What `llm-jax backtest --json` prints, on one line."""
        return json.dumps(dataclasses.asdict(self))


def backtest(law: Law, table: Table, share: float = 0.1, level: float = 0.9, seed: int = 0) -> Backtest:
    """Fits the rows with C = 6 N D <= share C_max and forecasts the others.

    BadInput for shares outside of (0, 1), and where too few rows are left on the smaller side.
    """
    if not 0 < share < 1:
        raise BadInput(f"share must lie in (0, 1), got {share}")
    if law.columns != ("N_params", "D_tokens"):
        raise BadInput(f"{law.name} reads {', '.join(law.columns)}; a forecast needs a law of N_params and D_tokens")
    table, log_KxR, log_loss, _ = prepare(law, table)
    log_c = log_KxR.sum(0)
    small = log_c <= log_c.max() + np.log(share)
    if small.sum() < (least := len(law.parameters) + 3):
        raise BadInput(
            f"only {small.sum()} rows lie below {share:g} of the largest compute; a forecast by {law.name} needs {least}"
        )
    large = table.select(~small)
    found = predict(law, table.select(small), large.column("N_params"), large.column("D_tokens"), level, seed)
    observed = log_loss[~small]
    centre, low, high, plain = np.log([(one.loss, one.low, one.high, one.law_loss) for one in found]).T
    errors = centre - observed
    return Backtest(
        law=law.name,
        share=share,
        level=level,
        fitted=int(small.sum()),
        held_out=len(large),
        coverage=float(np.mean((low <= observed) & (observed <= high))),
        half_width=float(np.mean(high - low) / 2),
        needed=float(np.quantile(np.abs(errors), level)),
        error=float(np.abs(errors).mean()),
        law_error=float(np.abs(plain - observed).mean()),
        errors=tuple(map(float, errors)),
    )


def backtest_table(path: Path, law: str, share: float, level: float, where: str) -> Backtest:
    """The verb: the rows of a run directory or CSV for which `where` holds."""
    table = tables.read(path)
    return backtest(laws.by_name(law, table.columns), table.where(where), share, level)
