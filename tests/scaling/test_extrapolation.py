"""Forecasts: intervals that hold as often as they say, and stay narrow enough to be of use."""

import numpy as np
import pytest
from scipy import stats
from simulated import CHINCHILLA, chinchilla, runs

from llm_jax.settings import BadInput
from scaling.extrapolation import predict, prediction_interval
from scaling.fit import fit
from scaling.tables import Table


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


def large_table(truth, seed):
    """60 runs with 0.5 % of noise, ten sizes at six budgets, and five runs at 3 to 10 times the largest, with noise too."""
    rng = np.random.default_rng(seed)
    compute = np.concatenate([np.repeat(np.geomspace(1e10, 3e12, 6), 10), 3e12 * np.geomspace(3, 10, 5)])
    wide = np.concatenate([np.tile(np.geomspace(0.2, 5, 10), 6), [0.7, 1.4, 0.7, 1.4, 1.0]])
    n_params = np.array([best_size(truth, one) for one in compute]) * wide
    d_tokens = compute / 6 / n_params
    loss = truth(n_params, d_tokens) * np.exp(0.005 * rng.standard_normal(len(compute)))
    table = Table({"N_params": n_params, "D_tokens": d_tokens, "loss": loss})
    return table.select(np.arange(65) < 60), table.select(np.arange(65) >= 60)


@pytest.mark.parametrize("truth", [chinchilla, coupled], ids=lambda truth: truth.__name__)
def test_forecasts_from_many_rows_cover_and_beat_the_law(truth):
    """Where rows are many the form is what errs: 90 % intervals hold on the law's own tables and on another's.

    The five runs of one table err together, so that the tolerance is that of the number of tables.
    """
    inside, error, law_error = [], [], []
    for seed in range(8):
        small, large = large_table(truth, seed)
        loss = large.column("loss")
        found = predict(CHINCHILLA, small, large.column("N_params"), large.column("D_tokens"))
        inside.append(np.mean([one.low <= run <= one.high for one, run in zip(found, loss, strict=True)]))
        error += [abs(np.log(one.loss / run)) for one, run in zip(found, loss, strict=True)]
        law_error += [abs(np.log(one.law_loss / run)) for one, run in zip(found, loss, strict=True)]
    assert np.mean(inside) >= stats.binom.ppf(0.01, 8, 0.9) / 8
    if truth is coupled:
        assert np.mean(error) < 0.8 * np.mean(law_error)
    else:
        assert np.mean(error) < 1.2 * np.mean(law_error)


def test_many_points_are_forecast_as_each_alone():
    """One fit serves all points: the interval of a run may not depend on what else was asked."""
    table, n_params, d_tokens = runs(noise=0.005), [2e5, 5e5], [2e6, 1.3e6]
    together = predict(CHINCHILLA, table, n_params, d_tokens)
    for one, n, d in zip(together, n_params, d_tokens, strict=True):
        alone = prediction_interval(CHINCHILLA, table, n, d)
        assert (one.loss, one.low, one.high) == pytest.approx((alone.loss, alone.low, alone.high), rel=1e-9)


def test_the_larger_runs_are_fitted_alone_only_where_rows_are_many():
    """Half of a small sweep does not determine five parameters."""
    small, _ = large_table(chinchilla, 0)
    few = prediction_interval(CHINCHILLA, small.select(np.arange(60) >= 40), 1e6, 1e7)
    many = prediction_interval(CHINCHILLA, small, 1e6, 1e7)
    assert list(few.forms) == ["chinchilla", "chinchilla, E = 0", "coupled"]
    assert sum("larger runs" in form for form in many.forms) == 3
    assert "chinchilla, E = 0" not in many.forms
