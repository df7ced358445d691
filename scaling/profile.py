"""Profile likelihood: how far the data lets a parameter go while all others are refitted.

Letters of array names as in robust.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from scaling.laws.units import unit
from scaling.robust import Robust, affine, excess_variance, freedom, in_units, inverse, rows_inside, select, solve

CLOSE = 2e-3  # precision of an interval's end, relative to its distance
ROUNDS = 60  # of a search; 3 or 4 are usual


@dataclass(frozen=True)
class Curve:
    """The profile of one parameter."""

    values: np.ndarray
    """Natural."""
    root_f: np.ndarray
    """sqrt(F) of the fit with the parameter held there, all others refitted; near 0 at the estimate."""
    limit: float
    """What it reaches at the ends of the interval."""


def profile_ends(
    found: Robust, parameters: Sequence[int], level: float, cluster_R: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """low_TxQ and high_TxQ of theta, for the columns as they are: how far the test of `information_T` lets each go.

    All tables, parameters and sides are searched side by side, the other parameters refitted at every point. An end
    that is not met before the bounds of the law is infinite.
    """
    tables = len(found.theta_TxP)
    ends_TxQx2 = np.empty((tables, len(parameters), 2))
    pending = np.arange(tables)
    for _ in range(3):
        part = select(found, pending)
        better_TxP = part.theta_TxP.copy()
        better_T = part.value_T.copy()
        for units, members in _by_units(found, parameters).items():
            by_K = np.array(units)
            ends, theta_TxP, value_T = _search(in_units(part, by_K), [parameters[q] for q in members], level, cluster_R)
            ends_TxQx2[pending[:, None], members] = ends
            lower = value_T < better_T
            better_TxP[lower] = found.law.shift(theta_TxP[lower], found.by_K - by_K)
            better_T[lower] = value_T[lower]
        # Held fits that lie below the free one: it was in another valley.
        wrong = np.flatnonzero(better_T < part.value_T * (1 - 1e-5))
        if not len(wrong):
            break
        theta_TxP, value_T = found.theta_TxP.copy(), found.value_T.copy()
        pending = pending[wrong]
        theta_TxP[pending], value_T[pending] = solve(found, pending, better_TxP[wrong], found.free_P)
        found = replace(found, theta_TxP=theta_TxP, value_T=value_T)
    return ends_TxQx2[..., 0], ends_TxQx2[..., 1]


def _by_units(found: Robust, parameters: Sequence[int]) -> dict[tuple[float, ...], list[int]]:
    """{by_K: places in `parameters`}: the columns are centred but for those in whose units the parameter itself is.

    A and alpha of A / N^alpha are all but collinear for N as it is; but once A is held, alpha no longer minds.
    """
    groups: dict[tuple[float, ...], list[int]] = {}
    for place, p in enumerate(parameters):
        by_K = found.by_K.copy()
        for name in set(map(unit, found.law.columns)):
            members = np.array([unit(column) == name for column in found.law.columns])
            matrix_PxP, offset_P = affine(found.law, np.where(members, found.by_K, 0))
            if offset_P[p] or (matrix_PxP[p] != np.eye(len(offset_P))[p]).any():
                by_K[members] = 0
        groups.setdefault(tuple(by_K.tolist()), []).append(place)
    return groups


def _information(found: Robust, cluster_R: np.ndarray | None) -> np.ndarray:
    """That of found.information_T for each parameter, TxP, over its excess variance (Chandler and Bate 2007)."""
    return found.information_T()[:, None] / excess_variance(found, cluster_R)


def _search(
    found: Robust, parameters: Sequence[int], level: float, cluster_R: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ends_TxQx2 of theta in the units of `found`, and the best theta_TxP and value_T met on the way."""
    tables, (lower, upper) = len(found.theta_TxP), found.bounds
    shape = tables, len(parameters), 2
    table_S, place_S, side_S = (axis.ravel() for axis in np.indices(shape))
    p_S, side_S = np.array(parameters)[place_S], 2.0 * side_S - 1
    each = np.arange(len(p_S))
    centre_SxP, information_S = found.theta_TxP[table_S], _information(found, cluster_R)[table_S, p_S]
    limit = float(np.sqrt(stats.f.ppf(level, 1, freedom(found, cluster_R))))
    at_S = centre_SxP[each, p_S]
    room_S = np.where(side_S > 0, upper[p_S] - at_S, at_S - lower[p_S])
    free_SxP = np.tile(found.free_P, (len(p_S), 1))
    free_SxP[each, p_S] = False

    covariance = inverse(rows_inside(found))[table_S, :, p_S]
    variance_S = np.maximum(covariance[each, p_S], 1e-300)
    slope_SxP = np.nan_to_num(side_S[:, None] * covariance / variance_S[:, None])
    # At a bound the parameter has no curvature to judge a first step by.
    distance_S = np.where(covariance[each, p_S] > 0, limit * np.sqrt(variance_S / information_S), np.inf)
    distance_S = np.minimum(distance_S, room_S / 4)
    near_S, near_f, near_SxP = np.zeros(len(p_S)), np.zeros(len(p_S)), centre_SxP.copy()
    far_S, far_f = np.full(len(p_S), np.inf), np.full(len(p_S), np.inf)
    end_S = np.full(len(p_S), np.inf)
    best_TxP, best_T = found.theta_TxP.copy(), found.value_T.copy()
    active = np.flatnonzero(room_S > 1e-6)
    for round_ in range(ROUNDS):
        if not len(active):
            break
        a, d = active, distance_S[active]
        start = near_SxP[a] + slope_SxP[a] * (d - near_S[a])[:, None]
        start = np.where(free_SxP[a], start, near_SxP[a])
        start[np.arange(len(a)), p_S[a]] = at_S[a] + side_S[a] * d
        theta, value = solve(found, table_S[a], np.clip(start, lower, upper), free_SxP[a])
        excess = 2 * (value - found.value_T[table_S[a]])
        f = np.sqrt(np.maximum(excess, 0) * information_S[a])
        for i in np.flatnonzero(excess < 0):
            if value[i] < best_T[table_S[a[i]]]:
                best_TxP[table_S[a[i]]], best_T[table_S[a[i]]] = theta[i], value[i]
        inside = f <= limit
        into, beyond = a[inside], a[~inside]
        slope_SxP[into] = (theta[inside] - near_SxP[into]) / (d[inside] - near_S[into])[:, None]
        near_S[into], near_f[into], near_SxP[into] = d[inside], f[inside], theta[inside]
        far_S[beyond], far_f[beyond] = d[~inside], f[~inside]

        met = (np.abs(f - limit) <= CLOSE * limit) | (far_S[a] - near_S[a] <= CLOSE * d)
        end_S[a[met]] = d[met]
        open_end = inside & (d >= room_S[a])
        end_S[a[open_end]] = np.inf
        active = a[~met & ~open_end]
        a = active
        with np.errstate(all="ignore"):
            grown = near_S[a] * np.clip(limit / near_f[a], 1.1, 4)
            along = np.clip((limit - near_f[a]) / (far_f[a] - near_f[a]), 0.05, 0.95)
        along = np.where(np.isfinite(far_f[a]) & (round_ < 12), along, 0.5)
        between = near_S[a] + along * (np.where(np.isfinite(far_S[a]), far_S[a], 0) - near_S[a])
        distance_S[a] = np.where(np.isfinite(far_S[a]), between, np.minimum(grown, room_S[a]))
    # A and B in units of a column meet the floor of the search only where an exponent is extreme: an end of the box alone.
    matrix_PxP, offset_P = affine(found.law, np.ones(len(found.by_K)))
    in_units_P = (matrix_PxP != np.eye(len(offset_P))).any(1) | (offset_P != 0)
    floored_SxP = free_SxP & in_units_P & (near_SxP <= lower + 1e-6) & (centre_SxP > lower + 1e-6)
    end_S[floored_SxP.any(1)] = np.inf
    return (at_S + side_S * end_S).reshape(shape), best_TxP, best_T


def curves(found: Robust, level: float = 0.95, points: int = 41) -> dict[str, Curve]:
    """The profile of each free parameter of one table, all grid values refitted side by side: for figures."""
    law, names = found.law, found.law.parameters
    free = np.flatnonzero(found.free_P).tolist()
    low_Q, high_Q = (ends[0] for ends in profile_ends(found, free, level))
    limit = float(np.sqrt(stats.f.ppf(level, 1, found.freedom)))
    drawn = {}
    for units, members in _by_units(found, free).items():
        there = in_units(found, np.array(units))
        theta_P, (lower, upper) = there.theta_TxP[0], there.bounds
        covariance, information_P = inverse(rows_inside(there))[0], _information(there, None)[0]
        for q in members:
            p = free[q]
            # Past each end by a third; where there is none, as far as on the other side, or three times what Wald says.
            usual = 3 * limit * np.sqrt(covariance[p, p] / information_P[p])
            down, up = theta_P[p] - low_Q[q], high_Q[q] - theta_P[p]
            finite = [size for size in (down, up) if np.isfinite(size)]
            down, up = (size if np.isfinite(size) else max([*finite, usual]) for size in (down, up))
            value_G = np.clip(
                np.linspace(theta_P[p] - 4 / 3 * down, theta_P[p] + 4 / 3 * up, points), lower[p], upper[p]
            )
            slope_P = np.nan_to_num(covariance[p] / max(covariance[p, p], 1e-300))
            start_GxP = np.where(there.free_P, theta_P + slope_P * (value_G - theta_P[p])[:, None], theta_P)
            start_GxP[:, p] = value_G
            free_P = there.free_P & (np.arange(len(names)) != p)
            theta_GxP, height_G = solve(there, np.zeros(points, int), np.clip(start_GxP, lower, upper), free_P)
            f_G = np.sqrt(np.maximum(2 * (height_G - there.value_T[0]), 0) * information_P[p])
            drawn[names[p]] = Curve(law.natural(theta_GxP)[:, p], f_G, limit)
    return {name: drawn[name] for name in names if name in drawn}
