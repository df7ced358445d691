"""Scaling laws as formulas: derivatives, units, and the optimum of a budget."""

import numpy as np
import pytest
from simulated import CHINCHILLA, TRUTH, chinchilla

from llm_jax.config import BadInput
from scaling import laws
from scaling.laws import COUPLED


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


def test_unknown_laws_are_answered_with_the_nearest():
    """One line with the right name."""
    with pytest.raises(BadInput, match='did you mean "chinchilla"'):
        laws.by_name("chinchila")


def test_the_optimum_is_the_least_loss_of_the_budget():
    """Hoffmann et al. 2022, eq. 4, against a search along the isoFLOP curve."""
    truth = {**TRUTH, "alpha": 0.3, "beta": 0.4}
    n_params, d_tokens = laws.optimum(truth, 1e15)
    assert 6 * n_params * d_tokens == pytest.approx(1e15)
    best = chinchilla(n_params, d_tokens, truth)
    assert all(best < chinchilla(n_params * f, d_tokens / f, truth) for f in (0.5, 0.99, 1.01, 2))
    with pytest.raises(BadInput, match="no compute-optimal size"):
        laws.optimum({**truth, "beta": -0.1}, 1e15)
    with pytest.raises(BadInput, match="compute must be positive"):
        laws.optimum(truth, 0)
