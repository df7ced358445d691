"""Scaling laws as functions: derivatives, units, recovery from their own data, and laws of the user."""

import dataclasses

import numpy as np
import pytest
from simulated import CHINCHILLA, TRUTH, chinchilla

from llm_jax.settings import BadInput
from scaling import laws
from scaling.fit import GRADES, fit, optimum, prepare
from scaling.laws import LAWS, dual
from scaling.solver import Problem, minimise, parse_objective
from scaling.tables import Table

SIZES = {"N_params": (1e7, 1e10), "D_tokens": (1e9, 1e12)}
SHAPE = {"A": 400.0, "B": 2000.0, "E": 1.7, "alpha": 0.35, "beta": 0.37}
TRUTHS = {
    "chinchilla": (SIZES, SHAPE),
    "coupled": (SIZES, SHAPE | {"E": 1.2, "gamma": 0.8}),
    "kaplan-n": ({"N_params": (1e6, 1e9)}, {"N_c": 8.8e13, "alpha_N": 0.076}),
    "kaplan-d": ({"D_tokens": (1e8, 1e11)}, {"D_c": 5.4e13, "alpha_D": 0.095}),
    "kaplan-c": ({"C_flops": (1e16, 1e21)}, {"C_c": 2.7e28, "alpha_C": 0.05}),
    "kaplan": (SIZES, {"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103}),
    "critical-batch": ({"loss": (2.0, 6.0)}, {"B_star": 2.1e8, "alpha_B": 0.21}),
    "data-constrained": (
        SIZES | {"D_unique": (1e8, 1e10)},
        {"A": 520.0, "B": 1490.0, "E": 1.87, "alpha": 0.353, "beta": 0.353, "R_N_star": 5.3, "R_D_star": 15.4},
    ),
    "data-constrained-c4": (SIZES | {"D_unique": (1e8, 1e10)}, {"R_N_star": 5.3, "R_D_star": 15.4}),
    "overtraining": (SIZES, {"a": 113.0, "b": 190.0, "E": 1.5, "eta": 0.2425}),
    "learning-rate": (SIZES | {"peak_lr": (1e-4, 1e-1)}, SHAPE | {"K": 1.79, "p": -0.713, "q": 0.307, "h": 0.02}),
    "learning-rate-batch": (
        SIZES | {"peak_lr": (1e-4, 1e-1), "tokens_per_step": (3e4, 3e7)},
        SHAPE | {"K": 1.79, "p": -0.713, "q": 0.307, "h": 0.02, "K_B": 0.58, "s": 0.571, "g": 0.015},
    ),
    "bnsl": ({"C_flops": (1e16, 1e24)}, {"a": 0.5, "b": 60.0, "c0": 0.08, "c1": 0.12, "d1": 1e20, "f1": 0.4}),
    "routed": (
        {"N_active": (1e7, 1e10), "num_experts": (1.0, 512.0)},
        {"a": -0.083, "b": -0.118, "c": 0.0099, "d": 1.114, "E_start": 2.07, "E_max": 239.0},
    ),
    "granularity": (
        SIZES | {"granularity": (1.0, 64.0)},
        {"A": 18.1, "B": 30.8, "E": 0.47, "g": 2.1, "alpha": 0.115, "beta": 0.147, "gamma": 0.58},
    ),
    "sparsity": (
        SIZES | {"sparsity": (0.3, 0.98)},
        {
            "A": 16612.0,
            "B": 5455.0,
            "E": 0.94,
            "c": 0.4598,
            "d": 17.26,
            "alpha": 0.5962,
            "beta": 0.3954,
            "lam": -0.1666,
            "delta": 0.1603,
            "gamma": 0.1595,
        },
    ),
    "downstream-error": ({"loss": (2.0, 5.0)}, {"epsilon": 0.857, "k": 2.2, "gamma": 0.715}),
    "accuracy": ({"loss": (0.4, 1.6)}, {"a": 0.7, "b": 0.25, "k": 6.0, "L_0": 0.9}),
    "rl-compute": ({"C_flops": (1e18, 1e23)}, {"A": 0.61, "R_0": 0.15, "B": 1.1, "C_mid": 3e20}),
    "coverage": ({"k": (1.0, 1e4)}, {"a": 1.9, "b": 0.3}),
}
MANY_MINIMA = ("bnsl", "sparsity", "accuracy")
"""Two terms of the first two can change roles, and the third is a step between two levels: not every start is a good one."""


def own_data(name, noise=0.0, rows=120, seed=0):
    """A table that follows a law, at columns drawn log-uniformly, with noise on what the law takes residuals of."""
    law, (ranges, truth), rng = LAWS[name], TRUTHS[name], np.random.default_rng(seed)
    columns = {key: np.exp(rng.uniform(*np.log(ends), rows)) for key, ends in ranges.items()}
    theta = law.stored({key: truth[key] for key in law.parameters})
    value = law.evaluate(theta[None], np.log(np.stack([columns[key] for key in law.columns])))[0][0]
    value = value + noise * rng.standard_normal(rows)
    return Table(columns | {law.target: np.exp(value) if law.log else value})


def test_every_law_is_tested():
    """A law that nobody fits to its own data may be misprinted."""
    assert set(TRUTHS) == set(LAWS)
    for law in LAWS.values():
        assert law.source
        assert law.line.startswith(law.name)
        assert set(law.parameters) == set(TRUTHS[law.name][1])


@pytest.mark.parametrize("name", LAWS)
def test_laws_recover_themselves(name):
    """Data without noise gives every parameter back, from starts that know nothing of it."""
    result = fit(LAWS[name], own_data(name), "lsq")
    for key, value in TRUTHS[name][1].items():
        assert result.parameters[key] == pytest.approx(value, rel=1e-6), key
    assert result.starts_agreeing == 1 or name in MANY_MINIMA
    assert not any("do not use" in warning for warning in result.warnings)


@pytest.mark.parametrize("name", LAWS)
def test_the_optimum_does_not_depend_on_the_start(name):
    """Under noise and the law's own objective, the odd and the even starts lead to one optimum, and none stays put."""
    law = LAWS[name]
    table, log_KxR, target, _ = prepare(law, own_data(name, noise=0.003, seed=1))
    x_KxR = log_KxR - law.centre(log_KxR)[:, None]
    starts = law.starts(x_KxR, target)
    delta = parse_objective(law.objective).delta
    free = np.array([key not in law.late for key in law.parameters])
    problem = Problem(law, x_KxR, target, delta, law.bounds(x_KxR, target))
    theta, _, _ = minimise(dataclasses.replace(problem, free_P=free), starts, max_steps=30)
    for width in GRADES if np.isfinite(delta) else (1.0,):
        graded = Problem(law, x_KxR, target, delta * width, problem.bounds)
        theta, value, _ = minimise(graded, theta, max_steps=400)
    assert value[::2].min() == pytest.approx(value[1::2].min(), rel=1e-6)
    assert np.abs(theta - starts).max(1).min() > 1e-3
    best = fit(law, table).value
    assert best <= value.min() * (1 + 1e-9)


@pytest.mark.parametrize("name", LAWS)
def test_jacobians_match_finite_differences(name):
    """A wrong derivative still descends, to the wrong place."""
    law = LAWS[name]
    table = own_data(name, rows=9)
    log_KxR = np.log(np.stack([table.column(key) for key in law.columns]))
    by_K = law.centre(log_KxR)
    x_KxR = log_KxR - by_K[:, None]
    theta = law.shift(law.stored({key: TRUTHS[name][1][key] for key in law.parameters})[None], by_K)
    _, jacobian = law.evaluate(theta, x_KxR)
    for p, step in enumerate(1e-6 * np.eye(theta.shape[1])):
        numeric = (law.evaluate(theta + step, x_KxR)[0] - law.evaluate(theta - step, x_KxR)[0]) / 2e-6
        np.testing.assert_allclose(jacobian[:, p], numeric, atol=2e-8 * max(1, np.abs(numeric).max()))


@pytest.mark.parametrize("name", LAWS)
def test_shifting_the_columns_keeps_the_curve(name):
    """Fits are made on centred logs and reported for the columns as they are: units.py must find how, by itself."""
    law = LAWS[name]
    table = own_data(name, rows=7)
    log_KxR = np.log(np.stack([table.column(key) for key in law.columns]))
    by_K = law.centre(log_KxR)
    raw = {"critical-batch": {"loss"}, "routed": {"num_experts"}, "sparsity": {"sparsity"}}.get(name, set())
    raw |= {"N_params", "D_tokens", "D_unique"} if name == "data-constrained-c4" else set()
    assert {key for key, by in zip(law.columns, by_K, strict=True) if by == 0} == raw
    theta = law.stored({key: TRUTHS[name][1][key] for key in law.parameters})[None]
    moved = law.shift(theta, by_K)
    before, after = law.evaluate(theta, log_KxR)[0], law.evaluate(moved, log_KxR - by_K[:, None])[0]
    np.testing.assert_allclose(before, after, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(law.shift(moved, -by_K), theta, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(law.natural(theta)[0], [TRUTHS[name][1][key] for key in law.parameters], rtol=1e-12)


X, Y = np.array([[0.3, 1.7, 2.2]]), np.array([[1.1], [0.6]])


@pytest.mark.parametrize("rule", dual.RULES, ids=lambda rule: rule.__name__)
def test_every_rule_of_the_duals_is_a_derivative(rule):
    """Each function, by each of its arguments, with the other plain and the other dual as well."""
    arguments = (X, Y)[: rule.nin]
    for at in range(rule.nin):
        step = [1e-6 * (k == at) for k in range(rule.nin)]
        high = rule(*(one + by for one, by in zip(arguments, step, strict=True)))
        low = rule(*(one - by for one, by in zip(arguments, step, strict=True)))
        mixed = [dual.Dual(one, {0: np.ones_like(one)}) if k == at else one for k, one in enumerate(arguments)]
        found = rule(*mixed)
        np.testing.assert_allclose(found.value, rule(*arguments), rtol=1e-15)
        np.testing.assert_allclose(np.broadcast_to(found.slopes[0], found.shape), (high - low) / 2e-6, atol=1e-8)
    both = [dual.Dual(one, {k: np.ones_like(one)}) for k, one in enumerate(arguments)]
    assert set(rule(*both).slopes) == set(range(rule.nin))


def test_duals_choose_and_compare():
    """Laws have branches: np.where takes the slope of the side that it takes the value of."""
    x = dual.Dual(X, {0: np.ones_like(X)})
    found = np.where(x > 1, x**2, 3 * x)
    np.testing.assert_allclose(found.slopes[0], [[3, 3.4, 4.4]])
    np.testing.assert_allclose((0.0**x).slopes[0], 0)
    with pytest.raises(BadInput, match=r"np\.sum"):
        np.sum(x)
    with pytest.raises(BadInput, match=r"np\.arctan, whose derivative is not known"):
        np.arctan(x)


def test_residuals_between_values_or_logs():
    """The same law with the other residuals: its value, its slope and the data-scaled starts."""
    law = LAWS["downstream-error"]
    table = own_data(law.name)
    logs, values = law.between(log=True), law.between(log=True).between(log=False)
    x_KxR = np.log(table.column("loss"))[None]
    theta = law.stored(TRUTHS[law.name][1])[None]
    np.testing.assert_allclose(np.exp(logs.evaluate(theta, x_KxR)[0]), law.evaluate(theta, x_KxR)[0])
    np.testing.assert_allclose(values.evaluate(theta, x_KxR)[1], law.evaluate(theta, x_KxR)[1])
    for key, value in TRUTHS[law.name][1].items():
        assert fit(law, table, "lsq:log").parameters[key] == pytest.approx(value, rel=1e-6)


OWN = '''
import numpy as np
from scaling.laws import exponent, law, positive, scale

def mine(N_params, D_tokens, E, A, alpha, B, beta):
    """L = E + A / N^alpha + B / D^beta"""
    return E + A / N_params**alpha + B * np.exp(-beta * np.log(D_tokens))

def kinds(N_params, A=scale(), c=positive(0.1, 10)):
    return A * np.log1p(c / N_params ** 0.3)

def broken(N_params, A):
    return np.cumsum(A * N_params)

def columns_alone(N_params, D_tokens):
    return N_params
'''


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_a_law_of_the_user_is_one_function(own_file):
    """Columns are the arguments that the table has; starts, units and derivatives come by themselves."""
    table = own_data("chinchilla", noise=0.002)
    law = laws.by_name(f"{own_file}:mine", table.columns)
    assert law.columns == ("N_params", "D_tokens")
    ours, theirs = fit(law, table), fit(CHINCHILLA, table)
    assert ours.value == pytest.approx(theirs.value, rel=1e-9)
    for key, value in theirs.parameters.items():
        assert ours.parameters[key] == pytest.approx(value, rel=1e-5)
    assert ours.starts_agreeing == 1
    assert law.formula == "L = E + A / N^alpha + B / D^beta"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own.py:mein", 'no function "mein"; did you mean "mine"'),
        ("own.py:columns_alone", "has no parameter"),
        ("nowhere.py:mine", "no such file"),
        ("chinchila", 'did you mean "chinchilla"'),
    ],
)
def test_laws_that_are_none_are_answered_with_the_nearest(own_file, name, message):
    """One line with the right name."""
    with pytest.raises(BadInput, match=message):
        laws.by_name(str(own_file.parent / name) if ".py" in name else name, ["N_params", "D_tokens", "loss"])


def test_a_law_that_is_not_elementwise_is_refused(own_file):
    """A prediction for a run must not depend on the others."""
    table = own_data("chinchilla")
    with pytest.raises(BadInput, match=r"np\.cumsum"):
        fit(laws.by_name(f"{own_file}:broken", table.columns), table)


def test_the_optimum_is_the_least_loss_of_the_budget():
    """Hoffmann et al. 2022, eq. 4, against a search along the isoFLOP curve."""
    truth = {**TRUTH, "alpha": 0.3, "beta": 0.4}
    n_params, d_tokens = laws.optimum(truth, 1e15)
    assert 6 * n_params * d_tokens == pytest.approx(1e15)
    best = chinchilla(n_params, d_tokens, truth)
    assert all(best < chinchilla(n_params * f, d_tokens / f, truth) for f in (0.5, 0.99, 1.01, 2))
    searched = laws.best_split(lambda n, d: chinchilla(n, d, truth), 1e15, 1, 1e14)
    assert searched == pytest.approx((n_params, d_tokens), rel=1e-4)
    with pytest.raises(BadInput, match="no compute-optimal size"):
        laws.optimum({**truth, "beta": -0.1}, 1e15)
    with pytest.raises(BadInput, match="compute must be positive"):
        laws.optimum(truth, 0)
    with pytest.raises(BadInput, match="this one has no A"):
        laws.optimum({"N_c": 1.0}, 1e15)


def test_every_law_of_size_and_tokens_has_its_optimum():
    """Kaplan et al. 2020, eq. 1.5: at the optimum the loss does not change along the budget; a law of N alone has none."""
    result = fit(LAWS["kaplan"], own_data("kaplan"))
    n_params, d_tokens = optimum(result, 1e20)
    assert 6 * n_params * d_tokens == pytest.approx(1e20)
    near = result.predict(n_params * np.array([0.9, 1, 1.1]), d_tokens / np.array([0.9, 1, 1.1]))
    assert near.argmin() == 1
    with pytest.raises(BadInput, match="kaplan-n reads N_params"):
        optimum(fit(LAWS["kaplan-n"], own_data("kaplan-n")), 1e20)
