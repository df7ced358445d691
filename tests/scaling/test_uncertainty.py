"""Intervals that hold as often as they say, and stay narrow enough to be of use."""

import dataclasses

import numpy as np
import pytest
from simulated import CHINCHILLA, TRUTH, chinchilla, runs

from llm_jax.config import BadInput
from scaling.fit import fit
from scaling.solver import Problem, huber, minimise
from scaling.uncertainty import bootstrap, prediction_interval, resample


def coupled(n_params, d_tokens):
    """Another coupling of N and D, as in Kaplan et al. 2020: no Chinchilla law fits it."""
    return 0.4 + (0.62 * (1.5e5 / n_params) ** 0.4375 + 0.62 * (3.4e5 / d_tokens) ** 0.4375) ** 0.8


def penalised(n_params, d_tokens):
    """Runs on very little data do worse than their power law."""
    return chinchilla(n_params, d_tokens) + 0.06 * 1e5 / d_tokens


def best_size(truth, compute):
    n_params = np.geomspace(2e4, 5e6, 500)
    return float(n_params[np.argmin(truth(n_params, compute / 6 / n_params))])


def forecasts(truth, noise, tables, compute=4e12):
    """Share of single runs at `compute` inside of the 90 % interval, half-widths and errors in per cent."""
    n_params = best_size(truth, compute)
    d_tokens = compute / 6 / n_params
    inside, half, error = [], [], []
    for seed in range(tables):
        prediction = prediction_interval(CHINCHILLA, runs(truth, noise, seed=seed), n_params, d_tokens, seed=seed)
        run = truth(n_params, d_tokens) * np.exp(noise * np.random.default_rng(10_000 + seed).standard_normal())
        inside.append(prediction.low <= run <= prediction.high)
        half.append(50 * np.log(prediction.high / prediction.low))
        error.append(100 * abs(np.log(prediction.loss / truth(n_params, d_tokens))))
    return np.mean(inside), np.median(half), np.mean(error)


def test_forecasts_cover_and_stay_useful():
    """The promise of the interval, on 25 tables: enough runs inside of it, and narrow enough to tell a good run from a bad."""
    inside, half, error = forecasts(chinchilla, 0.005, tables=25)
    assert inside >= 0.8
    assert half < 2.5
    assert error < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.003, 0.005, 0.008])
def test_coverage_on_tables_of_the_law(noise):
    """90 % intervals that hold nine times in ten, give or take what 300 tables can tell, and not always."""
    inside, half, _ = forecasts(chinchilla, noise, tables=300)
    assert 0.85 <= inside <= 0.98
    assert half < 5 * 100 * noise


@pytest.mark.slow
@pytest.mark.parametrize("truth", [coupled, penalised], ids=lambda truth: truth.__name__)
def test_coverage_on_tables_of_another_law(truth):
    """Real losses follow no formula: the interval must survive a wrong one."""
    inside, _, _ = forecasts(truth, 0.005, tables=150)
    assert inside >= 0.85


@pytest.mark.slow
def test_the_forecast_beats_the_law_where_the_law_is_wrong():
    """That is the only reason to average forms; if it stops being true, print the law and nothing else."""
    n_params = best_size(coupled, 4e12)
    d_tokens = 4e12 / 6 / n_params
    truth = np.log(coupled(n_params, d_tokens))
    forecast, law = [], []
    for seed in range(40):
        prediction = prediction_interval(CHINCHILLA, runs(coupled, 0.005, seed=seed), n_params, d_tokens)
        forecast.append(abs(np.log(prediction.loss) - truth))
        law.append(abs(np.log(prediction.law_loss) - truth))
    assert np.mean(forecast) < 0.75 * np.mean(law)


def test_the_same_seed_gives_the_same_interval():
    """A registered forecast must be reproducible."""
    table = runs(noise=0.005)
    one, same, other = (prediction_interval(CHINCHILLA, table, 5e5, 1.3e6, seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert one.low != other.low
    assert one.loss == other.loss


def test_the_parts_add_up_and_the_law_is_named_apart():
    """The reader must be able to tell what the width is made of, and which number is the law's."""
    table = runs(noise=0.005)
    prediction = prediction_interval(CHINCHILLA, table, 5e5, 1.3e6)
    half = 1.6448536 * np.sqrt(sum(part**2 for part in prediction.parts.values()))
    assert np.log(prediction.high / prediction.loss) == pytest.approx(half, rel=1e-6)
    assert np.log(prediction.loss / prediction.low) == pytest.approx(half, rel=1e-6)
    assert prediction.law_loss == float(fit(CHINCHILLA, table).predict(5e5, 1.3e6))
    weights = [weight for _, weight in prediction.forms.values()]
    assert sum(weights) == pytest.approx(1)
    average = sum(weight * np.log(loss) for loss, weight in prediction.forms.values())
    assert np.log(prediction.loss) == pytest.approx(average)
    assert prediction.extrapolation == pytest.approx(6 * 5e5 * 1.3e6 / 1e12)


def test_intervals_widen_with_distance_level_and_noise():
    """Each is a reason to know less."""

    def width(noise=0.005, distance=3.0, level=0.9):
        n_params = best_size(chinchilla, distance * 1e12)
        table = runs(noise=noise)
        prediction = prediction_interval(CHINCHILLA, table, n_params, distance * 1e12 / 6 / n_params, level)
        return np.log(prediction.high / prediction.low)

    assert width(distance=1) < width(distance=3) < width(distance=10) < width(distance=30)
    assert width(level=0.5) < width(level=0.9) < width(level=0.99)
    assert width(noise=0.001) < width(noise=0.005) < width(noise=0.02)


def test_one_diverged_run_does_not_ruin_a_forecast():
    """Small sweeps often have one, and it is not always noticed."""
    table = runs(noise=0.005)
    clean = prediction_interval(CHINCHILLA, table, 5e5, 1.3e6)
    table.columns["loss"][7] *= 1.3
    spoiled = prediction_interval(CHINCHILLA, table, 5e5, 1.3e6)
    assert abs(np.log(spoiled.loss / clean.loss)) < 0.02
    assert spoiled.low < clean.loss < spoiled.high


@pytest.mark.parametrize(
    ("n_params", "d_tokens", "level", "rows", "message"),
    [
        (0, 1e6, 0.9, 15, "n_params must be positive"),
        (1e6, np.inf, 0.9, 15, "d_tokens must be positive"),
        (1e6, 1e6, 1.0, 15, r"level must lie in \(0, 1\)"),
        (1e6, 1e6, 0.9, 7, "needs 8 rows, the table has 7"),
    ],
)
def test_impossible_forecasts_are_refused(n_params, d_tokens, level, rows, message):
    """An interval from too little is a guess with error bars."""
    with pytest.raises(BadInput, match=message):
        prediction_interval(CHINCHILLA, runs(noise=0.005).select(np.arange(rows)), n_params, d_tokens, level)


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
