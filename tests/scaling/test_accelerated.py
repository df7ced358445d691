"""The solver in JAX is the fast path; the one in NumPy is its reference."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulated import runs

from scaling import accelerated, laws, solver
from scaling.tables import csv_text

QUICK = ("chinchilla", "overtraining", "accuracy", "coverage")  # the others compile for seconds each


def problem(law, samples=12, rows=60):
    """Resamples of a table that follows the law with noise of 1 %, and a start for all of them."""
    rng = np.random.default_rng(0)
    x_KxR = rng.uniform(-2, 2, (len(law.columns), rows))
    for k, column in enumerate(law.columns):
        if column in ("sparsity", "num_experts"):
            shares = {"sparsity": [0.1, 0.5, 0.75, 0.9], "num_experts": [1, 2, 8, 64]}[column]
            x_KxR[k] = np.log(rng.choice(shares, rows))
    middle = np.zeros(rows) if law.log else np.full(rows, 0.5)
    truth = law.starts(x_KxR, middle)[0]
    clean = law.evaluate(truth[None], x_KxR)[0][0]
    target = clean + 0.01 * rng.standard_normal(rows) * (1 if law.log else np.abs(clean))
    weights = rng.multinomial(rows, np.full(rows, 1 / rows), samples).astype(float)
    delta = np.inf if law.objective == "lsq" else 0.02
    return solver.Problem(law, x_KxR, target, delta, law.bounds(x_KxR, target), weights), np.tile(truth, (samples, 1))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in laws.LAWS]
)
def test_every_law_has_the_same_optimum_on_both(name):
    """Laws are plain NumPy functions; were one of them traced wrongly, its bootstraps on a GPU would be of another law."""
    posed, start = problem(laws.LAWS[name])
    _, plain, there = solver.minimise(posed, start, 3000, 1e-12)
    theta, fast, here = accelerated.minimise(posed, start, 3000, 1e-12)
    both = there & here  # of a law with a flat valley a resample may need more steps than that
    assert both.mean() >= 0.3
    np.testing.assert_allclose(fast[both], plain[both], rtol=1e-9)
    assert np.abs(theta - start).max() > 1e-3


def test_least_absolute_errors_held_parameters_and_chunks(monkeypatch):
    """What a problem can ask for besides: a width of 0, parameters that stay, more problems than fit at once, a prior."""
    posed, start = problem(laws.CHINCHILLA, samples=7)
    free = np.array([True, True, False, True, True])
    asked = solver.Problem(
        posed.law, posed.x_KxR, posed.target, 0.0, posed.bounds, posed.weights_SxR, free, np.full(5, 1e-3)
    )
    _, plain, _ = solver.minimise(asked, start)
    monkeypatch.setattr(accelerated, "CHUNK", 3 * posed.x_KxR.shape[1] * 5)
    theta, fast, _ = accelerated.minimise(asked, start)
    np.testing.assert_allclose(fast, plain, rtol=1e-6)  # the last width is 1e-9, not 0
    np.testing.assert_allclose(theta[:, 2], start[:, 2])


def test_float64_stays_inside():
    """Training computes in float32 and bfloat16 in the same process."""
    posed, start = problem(laws.CHINCHILLA, samples=2)
    _, value, _ = accelerated.minimise(posed, start)
    assert value.dtype == np.float64
    assert jnp.zeros(1).dtype == jnp.float32
    assert jax.config.jax_numpy_rank_promotion == "raise"


def test_equations_of_few_unknowns():
    """Written out, against LAPACK; also where all but one direction is faint, as close to collinear parameters."""
    rng = np.random.default_rng(0)
    slopes = rng.standard_normal((50, 5, 8))
    slopes[:25, 1] = slopes[:25, 0] * (1 + 1e-4)
    matrix = np.matmul(slopes, slopes.swapaxes(1, 2)) + 1e-6 * np.eye(5)
    right = rng.standard_normal((50, 5))
    with jax.enable_x64(True):
        found = np.asarray(accelerated._solve(jnp.asarray(matrix), jnp.asarray(right)))
    np.testing.assert_allclose(np.einsum("spq,sq->sp", matrix, found), right, rtol=1e-6, atol=1e-6)


def test_a_plain_fit_does_not_load_jax(tmp_path):
    """It takes longer than the fit."""
    columns = runs(noise=0.01).columns
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    (tmp_path / "table.csv").write_text(csv_text(rows), encoding="utf-8")
    program = "import sys; from scaling import cli; cli.main(sys.argv[1:]); sys.exit('jax' in sys.modules)"
    words = ["fit", str(tmp_path / "table.csv"), "--ci", "bootstrap:20"]
    subprocess.run([sys.executable, "-c", program, *words], check=True, stdout=subprocess.DEVNULL)
