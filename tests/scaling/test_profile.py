"""Intervals against what they must equal: exact ones, brute force, and derivatives taken another way."""

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq, minimize
from simulated import CHINCHILLA, chinchilla, runs

from llm_jax.settings import BadInput
from scaling import laws
from scaling.fit import fit
from scaling.intervals import METHODS, intervals, of_fit, parse_ci
from scaling.profile import curves
from scaling.robust import covariance, excess_variance, hessian_TxPxP
from scaling.tables import Table
from scaling.uncertainty import whole_clusters

BUDGETS = (1e11, 3e11, 1e12, 3e12, 1e13, 3e13)


def wide(noise=0.005, seed=0, truth=chinchilla):
    return runs(truth, noise, BUDGETS, seed)


def test_a_straight_line_has_the_interval_of_textbooks():
    """log L = alpha (log Nc - log N) is a line: under least squares the slope's interval is Student's t, exactly."""
    n_params = np.geomspace(1e5, 1e9, 12)
    # Noise that is least at the ends, so that nothing widens the interval.
    noise = 0.01 * np.array([0.2, -0.3, 0.5, -0.8, 1.1, 1.3, -1.4, 0.9, -0.6, 0.5, -0.3, 0.1])
    table = Table({"N_params": n_params, "loss": np.exp(1.1 - 0.08 * np.log(n_params) + 2 + noise)})
    found = intervals(fit(laws.by_name("kaplan-n"), table, "lsq"), table)
    name = next(name for name in found.intervals if name.startswith("alpha"))
    line = stats.linregress(np.log(n_params), np.log(table.column("loss")))
    half = stats.t.ppf(0.975, 10) * line.stderr
    assert found.objective == "lsq"
    np.testing.assert_allclose(found.intervals[name], (-line.slope - half, -line.slope + half), atol=2e-3 * half)


@pytest.mark.parametrize("name", ["A", "B", "E", "alpha", "beta"])
def test_profile_agrees_with_brute_force(name):
    """SciPy, an objective written out once more in the units of the table, and root finding must find the same ends."""
    table = wide(seed=5)
    result = fit(CHINCHILLA, table)
    robust, p = of_fit(result, table), CHINCHILLA.parameters.index(name)
    np.testing.assert_array_equal(excess_variance(robust), 1)  # its noise is even: nothing widens the intervals
    log_n, log_d, log_loss = (np.log(table.column(key)) for key in ("N_params", "D_tokens", "loss"))
    delta, n, free = robust.delta_T[0], len(table), 5

    def residual(theta):
        a, b, e, alpha, beta = theta
        return np.logaddexp(np.logaddexp(a - alpha * log_n, b - beta * log_d), e) - log_loss

    def objective(theta):
        size = np.abs(residual(theta))
        return 1e4 * np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum()

    options = {"maxfev": 40000, "maxiter": 40000, "xatol": 1e-9, "fatol": 1e-10}
    best = minimize(objective, result.theta, method="Nelder-Mead", options=options)
    r = residual(best.x)
    inside = np.mean(np.abs(r) <= delta)
    information = inside / ((np.clip(r, -delta, delta) ** 2).sum() / (n - free))
    information /= 1 + free / n * (1 - inside) / inside
    limit = stats.f.ppf(0.95, 1, n - free)
    direction = covariance(robust)[0][p]

    def excess(value):
        rest = np.delete(best.x + direction / direction[p] * (value - best.x[p]), p)
        held = minimize(lambda x: objective(np.insert(x, p, value)), rest, method="Nelder-Mead", options=options)
        return 2e-4 * (held.fun - best.fun) * information - limit

    half = np.sqrt(limit * direction[p])
    brackets = [(best.x[p] + 0.3 * sign * half, best.x[p] + 4 * sign * half) for sign in (-1, 1)]
    ends = [brentq(excess, *bracket, xtol=1e-4 * half) for bracket in brackets]
    natural = np.exp(ends) if name in "ABE" else np.array(ends)
    ours = np.array(intervals(result, table).intervals[name])
    np.testing.assert_allclose(ours, natural, atol=0.01 * np.ptp(natural))


def test_what_the_data_leaves_open_is_said():
    """A law with E = 0 gives E no lower end; a term seen at one size alone gives its exponent no upper one."""

    def power_laws(n_params, d_tokens):
        return 47.3 / n_params**0.2 + 63.0 / d_tokens**0.2

    table = wide(truth=power_laws)
    found = intervals(fit(CHINCHILLA, table), table)
    assert found.unbounded["E"] == "below"
    assert found.intervals["E"][0] == -np.inf and np.isfinite(found.intervals["E"][1])
    assert found.intervals["alpha"][0] <= 0.2 <= found.intervals["alpha"][1]

    # Where the fit lies at the bound itself, there is no curvature to begin the search with.
    at_bound = wide(0.003, 0, lambda n, d: 47.3 / n**0.3 + 63.0 / d**0.2)
    low, high = intervals(fit(CHINCHILLA, at_bound), at_bound).intervals["E"]
    assert low == -np.inf and 0 < high < 0.5

    n_params, d_tokens = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e6, 1e8, 6), np.geomspace(1e8, 1e11, 5)))
    noise = 0.01 * np.random.default_rng(0).standard_normal(30)
    loss = (1 + 40 / n_params**0.3 + 0.3 * (d_tokens / 1e8) ** -3.0) * np.exp(noise)
    steep = Table({"N_params": n_params, "D_tokens": d_tokens, "loss": loss})
    found = intervals(fit(CHINCHILLA, steep), steep)
    assert found.unbounded["beta"] == "above" and found.intervals["beta"][0] < 3
    assert "alpha" not in found.unbounded and "E" not in found.unbounded


@pytest.mark.parametrize("objective", ["huber:1e-3", "lsq"])
def test_hessian_is_the_second_derivative(objective):
    """Gauss-Newton's Hessian leaves out the law's own curvature; Wald intervals need all of it."""
    table = wide(noise=0.01, seed=3)
    found = of_fit(fit(CHINCHILLA, table, objective), table)
    theta, delta = found.theta_TxP[0], found.delta_T[0]

    def value(theta_P):
        size = np.abs(CHINCHILLA.evaluate(theta_P[None], found.x_KxR)[0][0] - found.target_TxR[0])
        return np.where(size <= delta, size**2 / 2, delta * (size - delta / 2) if np.isfinite(delta) else 0).sum()

    step = 5e-5 * np.eye(5)
    assert (np.abs(np.abs(found.residual_TxR()) - delta) > 4e-4).all()  # no row crosses the width in a step
    numeric = [
        [
            (value(theta + i + j) - value(theta + i - j) - value(theta - i + j) + value(theta - i - j)) / 1e-8
            for j in step
        ]
        for i in step
    ]
    np.testing.assert_allclose(hessian_TxPxP(found)[0], numeric, rtol=1e-4, atol=1e-4)


def test_scale_and_exponent_move_together():
    """A and alpha are all but collinear in the table's units: a user who reads one interval alone must be told."""
    table = wide()
    result = fit(CHINCHILLA, table)
    for one in (intervals(result, table, method, samples=200) for method in METHODS):
        a, alpha, b, beta = (CHINCHILLA.parameters.index(name) for name in ("A", "alpha", "B", "beta"))
        assert one.correlations_PxP[a, alpha] > 0.95
        assert one.correlations_PxP[b, beta] > 0.95
        np.testing.assert_allclose(np.diag(one.correlations_PxP), 1)


@pytest.mark.parametrize("method", ["profile", "hessian", "bootstrap"])
def test_runs_of_one_trunk_count_once(method):
    """Every run written three times says nothing new: by cluster the interval stays, by row it shrinks by sqrt(3)."""
    once = wide(noise=0.01)
    thrice = Table({name: np.tile(column, 3) for name, column in once.columns.items()})
    thrice = Table(thrice.columns | {"trunk": np.tile(np.arange(30.0), 3)})
    width = {}
    for key, table, cluster in (("once", once, ""), ("by row", thrice, ""), ("by trunk", thrice, "trunk")):
        low, high = intervals(fit(CHINCHILLA, table, "huber:0.02"), table, method, cluster=cluster).intervals["alpha"]
        width[key] = high - low
    assert width["by row"] < 0.72 * width["once"]
    assert 0.8 * width["once"] < width["by trunk"] < 1.3 * width["once"]


def test_whole_clusters_are_drawn_whole():
    """Half a trunk in a resample would count its shared noise as if it were the rows' own."""
    cluster_R = np.array([3, 3, 1, 1, 1, 2, 0, 0])
    weights = whole_clusters(cluster_R, 500, 3, np.random.default_rng(0))
    for cluster in range(4):
        members = weights[:, cluster_R == cluster]
        assert (members == members[:, :1]).all()
    assert weights.mean(0) == pytest.approx(1, abs=0.2) and ((weights > 0).sum(1) >= 3).all()


def test_unequal_noise_widens_the_profile():
    """Noise at the ends of the range moves an exponent more than the same noise in the middle."""
    base, rng = wide(), np.random.default_rng(2)
    log_c = np.log(base.column("C_flops"))
    loss = chinchilla(base.column("N_params"), base.column("D_tokens"))
    uneven = 0.01 * rng.standard_normal(30) * np.where(np.abs(log_c - log_c.mean()) > 2, 3, 0.1)
    table = Table(base.columns | {"loss": loss * np.exp(uneven)})
    assert excess_variance(of_fit(fit(CHINCHILLA, table), table))[0, 3:].max() > 1.3


def test_curves_reach_the_limit_at_the_ends_of_the_interval():
    """A figure of the profile must show the interval that the table beside it prints."""
    table = wide()
    result = fit(CHINCHILLA, table)
    found = intervals(result, table).intervals
    drawn = curves(of_fit(result, table))
    assert list(drawn) == list(CHINCHILLA.parameters)
    for name, curve in drawn.items():
        sign = np.where(curve.values < np.median(curve.values[np.argsort(curve.root_f)[:3]]), -1, 1)
        ends = np.interp([-curve.limit, curve.limit], sign * curve.root_f, curve.values)
        np.testing.assert_allclose(ends, found[name], atol=0.02 * np.ptp(found[name]))


def test_held_parameters_have_no_interval_and_narrow_the_others():
    """What is given is not uncertain, and what was fitted beside it is less so."""
    table = wide()
    free = intervals(fit(CHINCHILLA, table), table).intervals
    held = intervals(fit(CHINCHILLA, table, hold={"E": 0.55}), table)
    assert "E" not in held.intervals and held.estimates["E"] == pytest.approx(0.55)
    assert np.ptp(held.intervals["alpha"]) < 0.7 * np.ptp(free["alpha"])


def test_data_without_noise_has_intervals_of_no_width():
    """Zero noise must not divide by itself."""
    table = wide(noise=0.0)
    found = intervals(fit(CHINCHILLA, table), table).intervals
    assert found["alpha"] == pytest.approx((0.35, 0.35), abs=1e-5)


def test_wrong_questions_are_refused():
    """Each with the reason."""
    table = wide()
    result = fit(CHINCHILLA, table)
    with pytest.raises(BadInput, match='did you mean "profile"'):
        intervals(result, table, "profil")
    with pytest.raises(BadInput, match="level"):
        intervals(result, table, level=95)
    with pytest.raises(BadInput, match="no column"):
        intervals(result, table, "hessian", cluster="trunk")
    with pytest.raises(BadInput, match="need more than 5"):
        intervals(result, Table(table.columns | {"seed": np.arange(30.0) % 3}), "bootstrap", cluster="seed")


def test_methods_are_chosen_by_name():
    """The first is the one to quote."""
    assert parse_ci("all") == (METHODS, 1000)
    assert parse_ci("bootstrap:50") == (("bootstrap",), 50)
    assert parse_ci("none")[0] == ()
    for wrong in ("profile:3", "bootstrap:x", "bootstrap:1", "boots", ""):
        with pytest.raises(BadInput, match="names no way to intervals"):
            parse_ci(wrong)
