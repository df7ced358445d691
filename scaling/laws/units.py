"""The units of a law's parameters, found from the law itself.

Counting N in millions leaves the curve of a law the same if its parameters change along: log A of A / N^alpha falls by
alpha log 1e6. Where such a change exists that is affine in theta, it is found here by linear algebra on the law's
derivatives, once, and checked; a law need not state it. Columns of one unit, such as D_tokens and D_unique, are rescaled
together. A column whose rescaling no parameters can make up for, such as a sparsity, stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from scipy.linalg import expm

SHARP = 1e-4
"""Least singular value of normalised slopes from which a movement of theta can be read off."""
Run = Callable[..., tuple[np.ndarray, np.ndarray]]
COUNTED = ("N", "D", "C")
"""First letters, before an underscore, of columns that count the same thing: parameters, tokens, FLOPs."""
KNOWN = np.array([1.0, np.log10(np.e), np.log2(np.e), np.log(10), 0.5 * np.log10(np.e)])
"""Rates are whole multiples of these; rounding them to that removes the error of the linear algebra."""


def unit(column: str) -> str:
    """The unit that a column is counted in, by its name."""
    first = column.split("_")[0]
    return first if first in COUNTED else column


class Units:
    """How theta follows a rescaling of each column; see the module."""

    def __init__(self, run: Run, some: Callable[[int, int], np.ndarray], columns: Sequence[str]):
        self.run, self.some, self.columns = run, some, columns

    @cached_property
    def rates(self) -> dict[str, np.ndarray]:
        """By unit: the generator, a (P+1)x(P+1) matrix on (theta, 1); units that cannot be rescaled are absent."""
        found = {}
        for name in dict.fromkeys(map(unit, self.columns)):
            members = [k for k, column in enumerate(self.columns) if unit(column) == name]
            with np.errstate(all="ignore"):
                rate = self._rate(members)
            if rate is not None:
                found[name] = rate
        return found

    def _rate(self, members: Sequence[int]) -> np.ndarray | None:
        theta_SxP = self.some(300, 1)
        parameters = theta_SxP.shape[1]
        x_KxR = np.random.default_rng(2).uniform(-1.2, 1.2, (len(self.columns), 64))
        value_SxR, slopes_SxPxR = self.run(theta_SxP, x_KxR, members)
        usable_SxR = np.isfinite(value_SxR) & np.isfinite(slopes_SxPxR).all(1)
        slopes_SxPxR = np.where(usable_SxR[:, None], slopes_SxPxR, 0)
        by_theta, by_column = slopes_SxPxR[:, :-1], slopes_SxPxR[:, -1]
        size_SxP = np.linalg.norm(by_theta, axis=2)
        # Where a term is off it says nothing of its parameters.
        left, singular, right = np.linalg.svd(by_theta / np.maximum(size_SxP, 1e-300)[:, :, None], full_matrices=False)
        sharp = (singular[:, -1] > SHARP) & (usable_SxR.sum(1) >= 2 * parameters)
        if sharp.sum() < 2 * (parameters + 1):
            return None
        along = np.einsum("spr,sr->sp", right[sharp], by_column[sharp]) / singular[sharp]
        moves = np.einsum("sqp,sp->sq", left[sharp], along) / size_SxP[sharp]
        missed = np.linalg.norm(np.einsum("sp,spr->sr", moves, by_theta[sharp]) - by_column[sharp], axis=1)
        if (missed > 1e-7 * np.linalg.norm(by_column[sharp], axis=1)).any():
            return None
        kept = np.pad(theta_SxP[sharp], ((0, 0), (0, 1)), constant_values=1.0)
        rate = np.linalg.lstsq(kept, moves, rcond=None)[0].T
        if not np.allclose(kept @ rate.T, moves, rtol=1e-4, atol=1e-4):
            return None
        rate = np.vstack([np.vectorize(_rounded)(rate), np.zeros(parameters + 1)])
        return rate if self._holds(members, rate) else None

    def _holds(self, members: Sequence[int], rate: np.ndarray) -> bool:
        theta_SxP = self.some(16, 3)
        x_KxR = np.random.default_rng(4).uniform(-1.2, 1.2, (len(self.columns), 32))
        by_K = np.zeros(len(self.columns))
        by_K[list(members)] = 1.5
        before, _ = self.run(theta_SxP, x_KxR)
        after, _ = self.run(_moved(theta_SxP, rate, 1.5), x_KxR - by_K[:, None])
        both = np.isfinite(before) & np.isfinite(after)
        return bool(both.any() and np.allclose(before[both], after[both], rtol=1e-8, atol=1e-8))

    def centre(self, x_KxR: np.ndarray) -> np.ndarray:
        """by_K: the mean of all log columns of a unit; 0 for those that cannot be rescaled."""
        by_K = np.zeros(len(self.columns))
        for name in self.rates:
            members = [k for k, column in enumerate(self.columns) if unit(column) == name]
            by_K[members] = x_KxR[members].mean()
        return by_K

    def shift(self, theta: np.ndarray, by_K: np.ndarray) -> np.ndarray:
        """Theta_...xP of the same curve over columns x - by."""
        for name, rate in self.rates.items():
            by = next(by_K[k] for k, column in enumerate(self.columns) if unit(column) == name)
            theta = _moved(theta, rate, float(by))
        return theta


def _rounded(value: float) -> float:
    if abs(value) < 1e-5:
        return 0.0
    near = np.round(2 * value / KNOWN) / 2 * KNOWN
    best = near[np.argmin(np.abs(near - value))]
    return float(best) if abs(best - value) < 1e-5 else float(value)


def _moved(theta: np.ndarray, rate: np.ndarray, by: float) -> np.ndarray:
    moved = expm(rate * by)
    return theta @ moved[:-1, :-1].T + moved[:-1, -1]
