"""IsoFLOP parabolas: minima, their intervals, and what a grid cannot say."""

import numpy as np
import pytest

from llm_jax.settings import BadInput
from scaling.isoflop import budgets, frontier, parabolas
from scaling.tables import Table


def parabolic(minima, noise=0.0, seed=0, shapes=7, curvature=0.1):
    """Losses 2 + curvature (log N - log minimum)^2 at budgets 1e12, 2e12, ... around sizes from 1e5 to 1e6."""
    rng = np.random.default_rng(seed)
    budget = np.repeat(1e12 * 2.0 ** np.arange(len(minima)), shapes)
    n_params = np.tile(np.geomspace(1e5, 1e6, shapes), len(minima))
    loss = 2 + curvature * np.log(n_params / np.repeat(minima, shapes)) ** 2
    loss *= np.exp(noise * rng.standard_normal(len(loss)))
    return Table({"N_params": n_params, "D_tokens": budget / 6 / n_params, "C_flops": budget, "loss": loss})


def test_parabolas_find_their_minima():
    """Approach 2 of Hoffmann et al. 2022 on exact parabolas with N* = C^0.5."""
    minima = 2e5 * 2.0 ** (0.5 * np.arange(4))
    found = parabolas(parabolic(minima))
    np.testing.assert_allclose([p.n_opt for p in found], minima, rtol=1e-9)
    np.testing.assert_allclose([p.loss_opt for p in found], 2, rtol=1e-9)
    np.testing.assert_allclose([6 * p.n_opt * p.d_opt for p in found], [p.budget for p in found], rtol=1e-9)
    law = frontier(found)
    assert law.exponent == pytest.approx(0.5, abs=1e-9)
    assert law.coefficient * 1e12**law.exponent == pytest.approx(2e5, rel=1e-6)


@pytest.mark.parametrize(("minimum", "side"), [(5e4, "smaller"), (1.1e5, "smaller"), (9e5, "larger"), (2e6, "larger")])
def test_a_minimum_at_the_edge_is_flagged_with_its_side(minimum, side):
    """An optimum that the grid does not bracket is an extrapolation: the fix is to run more shapes on that side."""
    inner, edge = parabolas(parabolic([3e5, minimum]))
    assert inner.warning == ""
    assert f"add {side} shapes" in edge.warning
    assert "budget 2e+12" in edge.warning


def test_a_curve_without_a_minimum_is_flagged():
    """Losses that bend down have no optimum; the lower end says which side to extend."""
    (curve,) = parabolas(parabolic([3e6], noise=0.001, curvature=-0.1))
    assert "add smaller shapes" in curve.warning
    assert curve.n_interval == (0, np.inf)


def test_intervals_of_the_optimum_cover_it():
    """95 % intervals over 300 tables with half a percent of noise, with five sizes and with three (pooled noise)."""
    minima = np.array([2.2e5, 3e5, 4.5e5])
    for shapes in (5, 4):
        hits = []
        for seed in range(300):
            found = parabolas(parabolic(minima, 0.005, seed, shapes))
            hits += [p.n_interval[0] <= m <= p.n_interval[1] for p, m in zip(found, minima, strict=True)]
            hits += [p.loss_interval[0] <= 2 <= p.loss_interval[1] for p in found]
        assert 0.93 < np.mean(hits) < 0.97


def test_interval_of_the_exponent_covers_it():
    """The exponent of N* ~ C^a is the number that plans the next run."""
    minima = 2e5 * 2.0 ** (0.5 * np.arange(4))
    hits = []
    for seed in range(300):
        law = frontier(parabolas(parabolic(minima, 0.003, seed)))
        hits.append(law.low <= 0.5 <= law.high)
    assert 0.92 < np.mean(hits) <= 0.99


def test_a_power_law_needs_minima_inside_the_grid():
    """Two give a line and no interval; one gives nothing."""
    two = frontier(parabolas(parabolic([2e5, 3e5, 2e6], noise=0.001)))
    assert two.n == 2
    assert np.isnan(two.low)
    with pytest.raises(BadInput, match="needs two budgets"):
        frontier(parabolas(parabolic([2e5, 2e6])))
    with pytest.raises(BadInput, match="three sizes"):
        parabolas(parabolic([2e5, 3e5], shapes=2))


def test_budgets_come_from_the_column_or_from_compute_within_five_percent():
    """Whole steps make runs of one budget differ by a percent or two."""
    compute = np.array([1e12, 1.02e12, 0.99e12, 3e12, 3.05e12])
    near = budgets(Table({"C_flops": compute}))
    assert len(np.unique(near)) == 2
    np.testing.assert_allclose(near[:3], 1e12, rtol=0.02)
    named = np.array([1e12, 1e12, 2e12, 2e12, 2e12])
    np.testing.assert_array_equal(budgets(Table({"C_flops": compute, "budget": named})), named)
