import dataclasses
import json

import numpy as np
import pytest
from scipy.optimize import minimize

from llm_jax.config import BadInput
from scaling import laws, tables
from scaling.fit import Problem, budgets, fit, frontier, isoflop, minimise
from scaling.laws import COUPLED
from scaling.tables import Table

CHINCHILLA = laws.by_name("chinchilla")
TRUTH = {"A": 47.3, "B": 63.0, "E": 0.55, "alpha": 0.35, "beta": 0.35}


def loss_of(truth, n_params, d_tokens):
    return truth["E"] + truth["A"] / n_params ** truth["alpha"] + truth["B"] / d_tokens ** truth["beta"]


def runs(truth=TRUTH, noise=0.0, budgets=(1e11, 3e11, 1e12), shapes=5, seed=0, low=3e4, high=7e5):
    """An isoFLOP table: `shapes` sizes at each budget, with Gaussian noise on the log loss."""
    compute = np.repeat(budgets, shapes)
    n_params = np.tile(np.geomspace(low, high, shapes), len(budgets))
    d_tokens = compute / 6 / n_params
    loss = loss_of(truth, n_params, d_tokens)
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(loss)))
    return Table({"N_params": n_params, "D_tokens": d_tokens, "C_flops": compute, "loss": loss})


def huber_objective(theta, table, delta):
    """Hoffmann et al. 2022, eq. 3, written out once more and independently, in the columns as they are."""
    a, b, e, alpha, beta = theta
    log_n, log_d = np.log(table.column("N_params")), np.log(table.column("D_tokens"))
    log_pred = np.logaddexp(np.logaddexp(a - alpha * log_n, b - beta * log_d), e)
    size = np.abs(log_pred - np.log(table.column("loss")))
    return np.sum(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)))


def test_reaches_the_published_optimum(shared_data):
    """Besiroglu et al. 2024 refit Hoffmann et al.'s points; a solver that stops early gives another, plausible law."""
    table = tables.read(shared_data("scaling/epoch_chinchilla.csv")).where("excluded_by_paper == 0")
    result = fit(CHINCHILLA, table, "huber:1e-3")
    assert result.n == 240
    assert result.value == pytest.approx(0.00101827402, rel=1e-8)
    assert result.parameters["A"] == pytest.approx(477.826, rel=2e-6)
    assert result.parameters["B"] == pytest.approx(2143.42, rel=3e-6)
    assert result.parameters["E"] == pytest.approx(1.81722, rel=3e-6)
    assert result.parameters["alpha"] == pytest.approx(0.347311, rel=3e-6)
    assert result.parameters["beta"] == pytest.approx(0.367172, rel=3e-6)
    assert result.starts_agreeing > 0.9
    assert result.warnings == ()


@pytest.mark.parametrize("objective", ["huber:1e-3", "lsq"])
@pytest.mark.parametrize("name", ["kyotakano_example.csv", "datablations_c4_paperfit182.csv", "gadre_overtraining.csv"])
def test_no_other_solver_does_better_on_published_tables(shared_data, name, objective):
    """Nelder-Mead from our answer and from around it, on an objective of its own, must not find a lower point."""
    table = tables.read(shared_data(f"scaling/{name}"))
    result = fit(CHINCHILLA, table, objective)
    delta = 1e-3 if objective == "huber:1e-3" else np.inf
    ours = huber_objective(result.theta, table, delta)
    assert ours == pytest.approx(result.value, rel=1e-9)
    for seed in range(3):
        start = result.theta * (1 + 0.01 * seed * np.random.default_rng(seed).standard_normal(5))
        other = minimize(
            huber_objective, start, (table, delta), "Nelder-Mead", options={"maxfev": 4000, "xatol": 1e-12}
        )
        assert ours <= other.fun * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_no_start_of_another_solver_does_better_on_small_noisy_tables(seed):
    """With 15 rows and a width of 1e-3 almost every row lies outside of it: the surface is all kinks and valleys."""
    table = runs(noise=0.008, seed=seed)
    result = fit(CHINCHILLA, table)
    for start in np.random.default_rng(seed).normal([3.9, 4.1, -0.6, 0.35, 0.35], [0.5, 0.5, 0.5, 0.05, 0.05], (6, 5)):
        other = minimize(
            huber_objective, start, (table, 1e-3), "Nelder-Mead", options={"maxfev": 6000, "maxiter": 6000}
        )
        assert result.value <= other.fun * (1 + 1e-7)


@pytest.mark.parametrize("objective", ["huber:1e-3", "lsq"])
def test_recovers_a_law_without_noise(objective):
    """Identifiable data must give back its truth."""
    result = fit(CHINCHILLA, runs(), objective)
    for name, value in TRUTH.items():
        assert result.parameters[name] == pytest.approx(value, rel=1e-5), name
    assert result.starts_agreeing == 1
    assert result.warnings == ()
    np.testing.assert_allclose(result.predict(1e6, [1e6, 1e7]), loss_of(TRUTH, 1e6, np.array([1e6, 1e7])), rtol=1e-7)


def test_units_of_the_columns_do_not_matter():
    """Millions of parameters or parameters: the same law, with A in other units."""
    table = runs(noise=0.005)
    scaled = Table({**table.columns, "N_params": table.column("N_params") / 1e6, "loss": table.column("loss") * 1e3})
    one, other = fit(CHINCHILLA, table), fit(CHINCHILLA, scaled)
    assert other.value == pytest.approx(one.value, rel=1e-9)
    assert other.parameters["alpha"] == pytest.approx(one.parameters["alpha"], rel=1e-5)
    expected = one.parameters["A"] * 1e3 * 1e-6 ** one.parameters["alpha"]
    assert other.parameters["A"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("law", [CHINCHILLA, COUPLED], ids=lambda law: law.name)
def test_jacobians_match_finite_differences(law):
    """A wrong derivative still descends, to the wrong place."""
    rng = np.random.default_rng(0)
    x_KxR = rng.normal(size=(2, 7))
    theta = np.array([[0.1, -0.2, -0.4, 0.3, 0.5, 0.2], [-1.0, 0.5, 0.3, 0.8, 0.1, -0.4]])[:, : len(law.parameters)]
    _, jacobian = law.evaluate(theta, x_KxR)
    for p in range(theta.shape[1]):
        step = 1e-6 * np.eye(theta.shape[1])[p]
        numeric = (law.evaluate(theta + step, x_KxR)[0] - law.evaluate(theta - step, x_KxR)[0]) / 2e-6
        np.testing.assert_allclose(jacobian[:, p], numeric, atol=1e-8)


@pytest.mark.parametrize("law", [CHINCHILLA, COUPLED], ids=lambda law: law.name)
def test_shifting_the_columns_keeps_the_curve(law):
    """Fits are made on centred logs and reported for the columns as they are."""
    x_KxR, by_K = np.random.default_rng(1).normal(size=(2, 5)), np.array([12.0, 15.0])
    theta = np.array([[0.1, -0.2, -0.4, 0.3, 0.5, 0.2]])[:, : len(law.parameters)]
    moved = law.shift(theta, -by_K)
    np.testing.assert_allclose(law.evaluate(theta, x_KxR)[0], law.evaluate(moved, x_KxR + by_K[:, None])[0], rtol=1e-12)
    np.testing.assert_allclose(law.shift(moved, by_K), theta, rtol=1e-12, atol=1e-12)


def test_a_weight_of_two_is_a_row_twice():
    """Bootstraps and leave-out fits are weights: they must mean what repeating and dropping rows mean."""
    table = runs(noise=0.01)
    rows = np.array([0, 0, 0, 1, 2, 3, 4, 6, 8, 8, 9, 10, 11, 12, 14])
    log_KxR = np.log(np.stack([table.column("N_params"), table.column("D_tokens")]))
    x_KxR, y = log_KxR - log_KxR.mean(1, keepdims=True), np.log(table.column("loss"))
    starts, bounds = CHINCHILLA.starts(x_KxR, y), CHINCHILLA.bounds(x_KxR, y)
    weights = np.tile(np.bincount(rows, minlength=15).astype(float), (len(starts), 1))
    _, weighted, _ = minimise(Problem(CHINCHILLA, x_KxR, y, 1e-3, bounds, weights), starts)
    _, repeated, _ = minimise(Problem(CHINCHILLA, x_KxR[:, rows], y[rows], 1e-3, bounds), starts)
    assert weighted.min() == pytest.approx(repeated.min(), rel=1e-8)


def test_huber_ignores_a_diverged_run_where_least_squares_does_not():
    """That is what the robust objective is for."""
    table = runs(noise=0.002)
    table.columns["loss"][7] *= 1.5
    robust, squares = fit(CHINCHILLA, table), fit(CHINCHILLA, table, "lsq")
    target = loss_of(TRUTH, 5e5, 4e12 / 6 / 5e5)
    assert abs(robust.predict(5e5, 4e12 / 6 / 5e5) / target - 1) < 0.01
    assert abs(squares.predict(5e5, 4e12 / 6 / 5e5) / target - 1) > 0.03


def test_says_when_the_irreducible_loss_is_not_bounded():
    """A table of a law without E drives log E to minus infinity; the numbers stay finite and the user is told."""
    result = fit(CHINCHILLA, runs({**TRUTH, "E": 0.0, "alpha": 0.3, "beta": 0.2}))
    assert any(warning.startswith("E is at its lower bound") for warning in result.warnings)
    assert result.parameters["E"] < 1e-5
    assert np.all(np.isfinite([*result.parameters.values(), *result.theta, result.value]))
    assert result.parameters["alpha"] == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_says_when_parameters_cannot_be_told_apart(noise):
    """Where the loss does not depend on D, B / D^0 and E are one constant: any split of it fits, none means anything."""
    table = runs()
    table.columns["loss"] = 1 + 30 / table.column("N_params") ** 0.3
    table.columns["loss"] *= np.exp(noise * np.random.default_rng(0).standard_normal(15))
    warnings = fit(CHINCHILLA, table).warnings
    assert any(
        "B and E only act together" in w or "does not determine it" in w or "at its lower" in w for w in warnings
    )
    assert fit(CHINCHILLA, runs(noise=0.005)).warnings == ()


def test_never_returns_a_starting_point_unnoticed():
    """A solver that cannot move must say so: its numbers look like a law."""

    def flat(theta, x):
        return CHINCHILLA.evaluate(theta, x)[0], np.zeros((len(theta), 5, x.shape[1]))

    result = fit(dataclasses.replace(CHINCHILLA, evaluate=flat), runs(noise=0.01))
    assert any("did not move from its starting point" in warning for warning in result.warnings)


def test_says_when_the_solver_did_not_converge():
    """A derivative of the wrong sign leaves every start in the middle of nowhere."""

    def uphill(theta, x):
        log_loss, jacobian = CHINCHILLA.evaluate(theta, x)
        return log_loss, -jacobian

    result = fit(dataclasses.replace(CHINCHILLA, evaluate=uphill), runs(noise=0.01))
    assert any("do not use these numbers" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.select(np.arange(5)), "5 parameters and needs one row more; the table has 5"),
        (lambda t: t.where("N_params < 3.1e4 and loss > 0"), "needs one row more"),
        (lambda t: Table({**t.columns, "N_params": np.full(15, 1e6)}), "every row has the same N_params = 1e"),
        (lambda t: Table({**t.columns, "D_tokens": np.full(15, 1e6)}), "every row has the same D_tokens"),
        (lambda t: Table({**t.columns, "loss": np.where(np.arange(15) == 3, np.nan, 2)}), "row 4: loss is nan"),
        (lambda t: Table({**t.columns, "loss": np.where(np.arange(15) == 6, -1.0, 2)}), "row 7: loss is -1"),
        (lambda t: Table({**t.columns, "D_tokens": np.where(np.arange(15) == 0, 0.0, 2)}), "row 1: D_tokens is 0"),
        (lambda t: Table({**t.columns, "loss": np.full(15, "x")}), "must hold numbers"),
        (lambda t: Table({k: v for k, v in t.columns.items() if k != "loss"}), 'no column "loss"'),
    ],
)
def test_unusable_tables_are_refused(change, message):
    """A fit of a broken table is worse than none."""
    with pytest.raises(BadInput, match=message):
        fit(CHINCHILLA, change(runs()))


@pytest.mark.parametrize("objective", ["huber", "huber:", "huber:0", "huber:-1", "huber:nan", "l1", "lsq:3", ""])
def test_unknown_objectives_are_refused(objective):
    """Another objective is another law."""
    with pytest.raises(BadInput, match="names no objective"):
        fit(CHINCHILLA, runs(), objective)


def test_unknown_laws_are_answered_with_the_nearest():
    """One line with the right name."""
    with pytest.raises(BadInput, match='did you mean "chinchilla"'):
        laws.by_name("chinchila")


def test_unfinished_runs_are_left_out_and_said():
    """The loss of a run that stopped early is not that budget's loss."""
    table = runs(noise=0.003)
    status = np.array(["done"] * 13 + ["failed", "running"])
    loss = np.where(status == "done", table.column("loss"), np.nan)
    result = fit(CHINCHILLA, Table({**table.columns, "loss": loss, "status": status}))
    assert result.n == 13
    assert any("2 of 15 rows are left out" in warning for warning in result.warnings)
    assert result.parameters == fit(CHINCHILLA, table.select(np.arange(13))).parameters


def test_json_and_summary_carry_the_law_its_numbers_and_its_warnings():
    """What is printed is all that most readers will see."""
    result = fit(CHINCHILLA, runs(noise=0.005))
    record = json.loads(result.to_json())
    assert record["parameters"] == result.parameters
    assert (record["law"], record["n"], record["value"]) == ("chinchilla", 15, result.value)
    warned = dataclasses.replace(result, warnings=("beware",))
    text = warned.summary({"alpha": (0.25, 0.45)})
    assert "L = E + A / N^alpha + B / D^beta" in text
    assert f"{result.parameters['alpha']:.6g}" in text
    assert "[0.25, 0.45]" in text
    assert "warning: beware" in text


def test_the_optimum_is_the_least_loss_of_the_budget():
    """Hoffmann et al. 2022, eq. 4, against a search along the isoFLOP curve."""
    truth = {**TRUTH, "alpha": 0.3, "beta": 0.4}
    n_params, d_tokens = laws.optimum(truth, 1e15)
    assert 6 * n_params * d_tokens == pytest.approx(1e15)
    best = loss_of(truth, n_params, d_tokens)
    assert all(best < loss_of(truth, n_params * f, d_tokens / f) for f in (0.5, 0.99, 1.01, 2))
    with pytest.raises(BadInput, match="no compute-optimal size"):
        laws.optimum({**truth, "beta": -0.1}, 1e15)
    with pytest.raises(BadInput, match="compute must be positive"):
        laws.optimum(truth, 0)


# ---- IsoFLOP parabolas ----


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
    found = isoflop(parabolic(minima))
    np.testing.assert_allclose([p.n_opt for p in found], minima, rtol=1e-9)
    np.testing.assert_allclose([p.loss_opt for p in found], 2, rtol=1e-9)
    np.testing.assert_allclose([6 * p.n_opt * p.d_opt for p in found], [p.budget for p in found], rtol=1e-9)
    law = frontier(found)
    assert law.exponent == pytest.approx(0.5, abs=1e-9)
    assert law.coefficient * 1e12**law.exponent == pytest.approx(2e5, rel=1e-6)


@pytest.mark.parametrize(("minimum", "side"), [(5e4, "smaller"), (1.1e5, "smaller"), (9e5, "larger"), (2e6, "larger")])
def test_a_minimum_at_the_edge_is_flagged_with_its_side(minimum, side):
    """An optimum that the grid does not bracket is an extrapolation: the fix is to run more shapes on that side."""
    inner, edge = isoflop(parabolic([3e5, minimum]))
    assert inner.warning == ""
    assert f"add {side} shapes" in edge.warning
    assert "budget 2e+12" in edge.warning


def test_a_curve_without_a_minimum_is_flagged():
    """Losses that bend down have no optimum; the lower end says which side to extend."""
    (curve,) = isoflop(parabolic([3e6], noise=0.001, curvature=-0.1))
    assert "add smaller shapes" in curve.warning
    assert curve.n_interval == (0, np.inf)


def test_intervals_of_the_optimum_cover_it():
    """95 % intervals over 300 tables with half a percent of noise, with five sizes and with three (pooled noise)."""
    minima = np.array([2.2e5, 3e5, 4.5e5])
    for shapes in (5, 4):
        hits = []
        for seed in range(300):
            found = isoflop(parabolic(minima, 0.005, seed, shapes))
            hits += [p.n_interval[0] <= m <= p.n_interval[1] for p, m in zip(found, minima, strict=True)]
            hits += [p.loss_interval[0] <= 2 <= p.loss_interval[1] for p in found]
        assert 0.93 < np.mean(hits) < 0.97


def test_interval_of_the_exponent_covers_it():
    """The exponent of N* ~ C^a is the number that plans the next run."""
    minima = 2e5 * 2.0 ** (0.5 * np.arange(4))
    hits = []
    for seed in range(300):
        law = frontier(isoflop(parabolic(minima, 0.003, seed)))
        hits.append(law.low <= 0.5 <= law.high)
    assert 0.92 < np.mean(hits) <= 0.99


def test_a_power_law_needs_minima_inside_the_grid():
    """Two give a line and no interval; one gives nothing."""
    two = frontier(isoflop(parabolic([2e5, 3e5, 2e6], noise=0.001)))
    assert two.n == 2
    assert np.isnan(two.low)
    with pytest.raises(BadInput, match="needs two budgets"):
        frontier(isoflop(parabolic([2e5, 2e6])))
    with pytest.raises(BadInput, match="three sizes"):
        isoflop(parabolic([2e5, 3e5], shapes=2))


def test_budgets_come_from_the_column_or_from_compute_within_five_percent():
    """Whole steps make runs of one budget differ by a percent or two."""
    compute = np.array([1e12, 1.02e12, 0.99e12, 3e12, 3.05e12])
    near = budgets(Table({"C_flops": compute}))
    assert len(np.unique(near)) == 2
    np.testing.assert_allclose(near[:3], 1e12, rtol=0.02)
    named = np.array([1e12, 1e12, 2e12, 2e12, 2e12])
    np.testing.assert_array_equal(budgets(Table({"C_flops": compute, "budget": named})), named)
