"""Fits of laws to tables: the published optimum, recovery, and what must be said instead of a number."""

import dataclasses

import numpy as np
import pytest
from scipy import stats
from simulated import CHINCHILLA, TRUTH, chinchilla, runs

from llm_jax.settings import BadInput
from scaling.fit import fit
from scaling.solver import parse_objective
from scaling.tables import Table


@pytest.mark.parametrize("objective", ["huber:1e-3", "lsq"])
def test_recovers_a_law_without_noise(objective):
    """Identifiable data must give back its truth."""
    result = fit(CHINCHILLA, runs(), objective)
    for name, value in TRUTH.items():
        assert result.parameters[name] == pytest.approx(value, rel=1e-5), name
    assert result.starts_agreeing == 1
    assert result.warnings == ()
    np.testing.assert_allclose(result.predict(1e6, [1e6, 1e7]), chinchilla(1e6, np.array([1e6, 1e7])), rtol=1e-7)


def test_units_of_the_columns_do_not_matter():
    """Millions of parameters or parameters: the same law, with A in other units."""
    table = runs(noise=0.005)
    scaled = Table({**table.columns, "N_params": table.column("N_params") / 1e6, "loss": table.column("loss") * 1e3})
    one, other = fit(CHINCHILLA, table), fit(CHINCHILLA, scaled)
    assert other.value == pytest.approx(one.value, rel=1e-9)
    assert other.parameters["alpha"] == pytest.approx(one.parameters["alpha"], rel=1e-5)
    expected = one.parameters["A"] * 1e3 * 1e-6 ** one.parameters["alpha"]
    assert other.parameters["A"] == pytest.approx(expected, rel=1e-4)


def test_huber_ignores_a_diverged_run_where_least_squares_does_not():
    """That is what the robust objective is for."""
    table = runs(noise=0.002)
    table.columns["loss"][7] *= 1.5
    robust, squares = fit(CHINCHILLA, table), fit(CHINCHILLA, table, "lsq")
    target = chinchilla(5e5, 4e12 / 6 / 5e5)
    assert abs(robust.predict(5e5, 4e12 / 6 / 5e5) / target - 1) < 0.01
    assert abs(squares.predict(5e5, 4e12 / 6 / 5e5) / target - 1) > 0.03


def test_says_when_the_irreducible_loss_is_not_bounded():
    """A table of a law without E drives log E to minus infinity; the numbers stay finite and the user is told."""
    result = fit(CHINCHILLA, runs(lambda n, d: chinchilla(n, d, {**TRUTH, "E": 0.0, "alpha": 0.3, "beta": 0.2})))
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


@pytest.mark.parametrize(
    "objective",
    ["huber", "huber:", "huber:0", "huber:-1", "huber:nan", "l2", "lsq:3", "l1:log:linear", "lsq:scale:scale"],
)
def test_unknown_objectives_are_refused(objective):
    """Another objective is another law."""
    with pytest.raises(BadInput, match="names no objective"):
        fit(CHINCHILLA, runs(), objective)


def test_unfinished_runs_are_left_out_and_said():
    """The loss of a run that stopped early is not that budget's loss."""
    table = runs(noise=0.003)
    status = np.array(["done"] * 13 + ["failed", "running"])
    loss = np.where(status == "done", table.column("loss"), np.nan)
    result = fit(CHINCHILLA, Table({**table.columns, "loss": loss, "status": status}))
    assert result.n == 13
    assert any("2 of 15 rows are left out" in warning for warning in result.warnings)
    assert result.parameters == fit(CHINCHILLA, table.select(np.arange(13))).parameters


def test_l1_passes_through_as_many_rows_as_it_has_parameters():
    """That is what least absolute errors do at a vertex; an answer between rows is no minimum."""
    result = fit(CHINCHILLA, runs(noise=0.005), "l1")
    assert np.sum(np.abs(result.residuals) < 1e-8) == 5
    assert result.value == pytest.approx(np.abs(result.residuals).sum())


@pytest.mark.parametrize(
    ("plain", "density"),
    [("lsq", stats.norm.logpdf), ("l1", stats.laplace.logpdf)],
)
def test_the_scale_as_a_parameter_is_a_likelihood(plain, density):
    """Normal or Laplace errors of fitted width: the law stays, the objective is the negative log-likelihood."""
    table = runs(noise=0.005)
    fixed, scaled = fit(CHINCHILLA, table, plain), fit(CHINCHILLA, table, f"{plain}:scale")
    assert scaled.parameters == pytest.approx(fixed.parameters, rel=1e-6)
    assert scaled.value == pytest.approx(-density(scaled.residuals, scale=scaled.sigma).sum(), rel=1e-9)
    for factor in (0.98, 1.02):
        assert -density(scaled.residuals, scale=factor * scaled.sigma).sum() > scaled.value


def test_huber_with_its_scale_counts_in_units_of_the_noise():
    """Wide, it is least squares; the width follows the noise, and the likelihood is that of Huber's density."""
    table = runs(noise=0.005)
    wide, squares = fit(CHINCHILLA, table, "huber:50:scale"), fit(CHINCHILLA, table, "lsq:scale")
    assert wide.parameters == pytest.approx(squares.parameters, rel=1e-5)
    assert wide.sigma == pytest.approx(squares.sigma, rel=1e-6)
    assert wide.value == pytest.approx(squares.value, rel=1e-6)
    narrow = fit(CHINCHILLA, table, "huber:1.345:scale")
    again = fit(CHINCHILLA, table, f"huber:{narrow.delta!r}")
    assert narrow.parameters == pytest.approx(again.parameters, rel=1e-5)
    grid = np.linspace(-60, 60, 400_001)
    goal = parse_objective("huber:1.345:scale")
    density = np.exp(-np.array([goal.value(np.array([r]), 2.0) for r in grid[::100]]))
    assert np.trapezoid(density, grid[::100]) == pytest.approx(1, abs=1e-4)


def test_parameters_may_be_given():
    """A law that extends one fitted before keeps its values; a scale without its exponent has no unit to be given in."""
    table = runs(noise=0.005)
    result = fit(CHINCHILLA, table, hold={"E": 0.5})
    assert result.parameters["E"] == 0.5
    assert result.value > fit(CHINCHILLA, table).value
    both = fit(CHINCHILLA, table, hold={"A": TRUTH["A"], "alpha": TRUTH["alpha"]})
    assert both.parameters["A"] == pytest.approx(TRUTH["A"], rel=1e-9)
    assert both.parameters["beta"] == pytest.approx(TRUTH["beta"], rel=0.3)
    with pytest.raises(BadInput, match="A cannot be held alone"):
        fit(CHINCHILLA, table, hold={"A": 40.0})
    with pytest.raises(BadInput, match='no parameter "alfa"; did you mean "alpha"'):
        fit(CHINCHILLA, table, hold={"alfa": 0.3})
    with pytest.raises(BadInput, match="cannot hold E = -1"):
        fit(CHINCHILLA, table, hold={"E": -1.0})
