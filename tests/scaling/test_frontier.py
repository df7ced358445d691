"""The compute-optimal frontier and its bands."""

import dataclasses

import numpy as np
import pytest
from simulated import runs

from scaling import laws
from scaling.analysis import analyse
from scaling.frontier import bands, span


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
