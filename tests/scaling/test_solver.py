"""The solver against others, on an objective written out once more."""

import numpy as np
import pytest
from scipy.optimize import minimize
from simulated import CHINCHILLA, runs

from scaling import tables
from scaling.fit import fit
from scaling.solver import Problem, minimise


def huber_objective(theta, table, delta):
    """Hoffmann et al. 2022, eq. 3, written out once more and independently, in the columns as they are."""
    a, b, e, alpha, beta = theta
    log_n, log_d = np.log(table.column("N_params")), np.log(table.column("D_tokens"))
    log_pred = np.logaddexp(np.logaddexp(a - alpha * log_n, b - beta * log_d), e)
    size = np.abs(log_pred - np.log(table.column("loss")))
    return np.sum(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)))


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
