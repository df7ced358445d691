"""The compute-optimal frontier and its bands."""

import dataclasses

import numpy as np
import pytest
from simulated import chinchilla, runs

from scaling import laws
from scaling.analysis import analyse
from scaling.frontier import bands, span
from scaling.tables import Table


def test_search_and_formula_agree():
    """The search along the budget must give what Hoffmann et al. 2022, eq. 4, gives where both can be had."""
    table = runs(noise=0.003)
    exact, searched = (analyse(table, law, ci="bootstrap:60") for law in ("chinchilla", "coupled"))
    theta = np.append(exact.fit.theta, 0.0)  # gamma = 1: the same curve
    same = dataclasses.replace(searched.fit, theta=theta)
    boot = dataclasses.replace(searched.bootstrap, theta_SxP=np.pad(exact.bootstrap.theta_SxP, ((0, 0), (0, 1))))
    by_formula = bands(exact.fit, exact.bootstrap, table)
    by_search = bands(same, boot, table)
    for name in ("C", "N_opt", "D_opt", "loss"):
        np.testing.assert_allclose(by_search[name], by_formula[name], rtol=2e-3)
    for low, n, high in zip(*(by_search[k] for k in ("N_low", "N_opt", "N_high")), strict=True):
        assert low <= n <= high


def test_bands_reach_to_what_is_asked():
    """A forecast's target must lie on the frontier that is drawn for it."""
    table = runs(noise=0.003)
    found = analyse(table, "chinchilla", ci="bootstrap:20")
    assert span(table, reach=1e15)[-1] > 1e15
    (at,) = bands(found.fit, found.bootstrap, table, [1e15])["N_opt"]
    assert at == pytest.approx(laws.optimum(found.fit.parameters, 1e15)[0])


def test_a_mixture_of_experts_spends_by_its_active_parameters():
    """C = 6 N_active D: with all parameters in its place the frontier would lie above every run of its own table."""
    dense = runs(noise=0.001, budgets=(1e11, 3e11, 1e12, 3e12))
    n, d = dense.column("N_params"), dense.column("D_tokens")
    sparse = Table({**dense.columns, "N_params": 4 * n, "N_active": n, "loss": chinchilla(4 * n, d)})
    found = analyse(sparse, "chinchilla", ci="bootstrap:20")
    best = bands(found.fit, found.bootstrap, sparse, [1e12])
    sizes = np.geomspace(1e4, 1e7, 20_001)
    losses = chinchilla(4 * sizes, 1e12 / 6 / sizes)
    assert best["loss"][0] == pytest.approx(losses.min(), rel=2e-3)
    assert best["N_opt"][0] == pytest.approx(4 * sizes[losses.argmin()], rel=0.05)
    assert best["D_opt"][0] == pytest.approx(1e12 / 6 / sizes[losses.argmin()], rel=0.05)
