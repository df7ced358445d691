"""Intervals that hold as often as they say, and stay narrow enough to be of use."""

import dataclasses

import numpy as np
import pytest
from simulated import CHINCHILLA, TRUTH, chinchilla, runs

from scaling.fit import fit
from scaling.solver import Problem, huber, minimise
from scaling.uncertainty import bootstrap, resample


def test_bootstrap_intervals_cover_the_parameters():
    """95 % intervals of alpha, beta and E over 60 tables of 20 rows; 20 rows cannot do it exactly."""
    hits = []
    for seed in range(60):
        table = runs(noise=0.005, budgets=(3e10, 1e11, 3e11, 1e12), seed=seed)
        intervals = bootstrap(fit(CHINCHILLA, table, "lsq"), table, samples=200, seed=seed).intervals
        hits += [intervals[name][0] <= TRUTH[name] <= intervals[name][1] for name in ("alpha", "beta", "E")]
    assert 0.85 < np.mean(hits) < 1


def test_bootstraps_are_reproducible_and_centred_on_the_fit():
    """The middle of the resamples is close to the fit, and a seed fixes them all."""
    table = runs(noise=0.003, budgets=(3e10, 1e11, 3e11, 1e12))
    result = fit(CHINCHILLA, table)
    one, same = (bootstrap(result, table, samples=300, seed=3) for _ in range(2))
    np.testing.assert_array_equal(one.theta_SxP, same.theta_SxP)
    for name, value in result.parameters.items():
        low, high = one.intervals[name]
        assert low < value < high
        assert len(one.parameters[name]) == 300


def power_laws(n_params, d_tokens):
    """No irreducible loss: the fit puts E at its bound, where it has no slope to come back along."""
    return 10 / n_params**0.2 + 12 / d_tokens**0.22


@pytest.mark.parametrize("objective", ["huber:1e-3", "lsq"])
@pytest.mark.parametrize("truth", [chinchilla, power_laws], ids=lambda truth: truth.__name__)
def test_warm_starts_find_what_many_starts_find(truth, objective):
    """Resamples start from the optimum of the table: were they stuck there, every interval would be too short."""
    table, samples = runs(truth, 0.005, seed=9), 30
    result = fit(CHINCHILLA, table, objective)
    assert (result.parameters["E"] < 1e-4) == (truth is power_laws)
    log_KxR = np.log(np.stack([table.column("N_params"), table.column("D_tokens")]))
    x_KxR, log_loss = log_KxR - log_KxR.mean(1, keepdims=True), np.log(table.column("loss"))
    starts_SxP, delta = CHINCHILLA.starts(x_KxR, log_loss), result.delta
    weights = resample(table.column("C_flops"), samples, 5, np.random.default_rng(0))
    problem = Problem(CHINCHILLA, x_KxR, log_loss, delta, CHINCHILLA.bounds(x_KxR, log_loss), weights)
    problem = dataclasses.replace(problem, weights_SxR=np.repeat(weights, len(starts_SxP), axis=0))
    _, value, _ = minimise(problem, np.tile(starts_SxP, (samples, 1)), max_steps=400)
    residuals = CHINCHILLA.evaluate(bootstrap(result, table, samples).theta_SxP, log_KxR)[0] - log_loss
    warm = (weights * huber(residuals, delta)).sum(1)
    assert np.mean(warm <= value.reshape(samples, -1).min(1) * 1.001 + 1e-9) >= 0.9


def test_resamples_keep_every_budget_and_determine_the_law():
    """A resample without its largest budget extrapolates from elsewhere; one of four distinct rows has no fit."""
    groups = np.repeat([1.0, 2.0, 3.0], 5)
    weights = resample(groups, 500, 5, np.random.default_rng(0))
    for group in (1.0, 2.0, 3.0):
        np.testing.assert_array_equal(weights[:, groups == group].sum(1), 5)
    alone = resample(np.arange(9.0), 500, 5, np.random.default_rng(0))
    np.testing.assert_array_equal(alone.sum(1), 9)
    assert (alone > 0).sum(1).min() >= 5
    assert alone.std(0).min() > 0.5
