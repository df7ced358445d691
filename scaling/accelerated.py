"""solver.minimise on a GPU: the same steps in JAX, in float64, for tens of thousands of problems at once.

Laws are plain NumPy functions. Here they run on `Traced`, a JAX array that NumPy's functions take; its derivatives are
those of the dual numbers of laws/dual.py. Importing this module loads JAX, so import it inside functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling.laws import Law
from scaling.laws.dual import Dual
from scaling.solver import EXACT, HUGE, RIDGE, WILD, Problem, least_absolute

CHUNK = 30_000_000  # cells of a Jacobian at once: 240 MB of float64


def available() -> bool:
    """Whether JAX finds a GPU. TPUs have no float64."""
    return jax.default_backend() == "gpu"


class Traced(np.lib.mixins.NDArrayOperatorsMixin):
    """A JAX array under the elementwise functions of NumPy and SciPy: each is that of jax.numpy of the same name."""

    __slots__ = ("array",)

    def __init__(self, array: jax.Array):
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.array.shape

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Any:
        return map(Traced, self.array)

    def __getitem__(self, at: Any) -> Traced:
        return Traced(self.array[at])

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__" or kwargs or any(isinstance(one, Dual) for one in inputs):
            return NotImplemented
        home = jnp if hasattr(jnp, ufunc.__name__) else jax.scipy.special
        return Traced(getattr(home, ufunc.__name__)(*map(_array, inputs)))

    def __array_function__(self, function: Callable[..., Any], types: Any, args: Any, kwargs: Any) -> Any:
        if Dual in types:
            return NotImplemented
        plain = [[_array(one) for one in arg] if isinstance(arg, list) else _array(arg) for arg in args]
        return Traced(getattr(jnp, function.__name__)(*plain, **kwargs))


def _array(one: Any) -> Any:
    return one.array if isinstance(one, Traced) else one


def minimise(
    problem: Problem, theta_SxP: np.ndarray, max_steps: int = 150, tolerance: float = 1e-10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As solver.minimise, which says what it does; compiled on first use for each law and shape."""
    if problem.delta == 0:
        return least_absolute(problem, theta_SxP, max_steps, tolerance, minimise)
    samples, parameters = theta_SxP.shape
    rows = problem.x_KxR.shape[1]
    chunks = -(-samples * rows * parameters // CHUNK)
    size = -(-samples // chunks)
    weights = np.ones((1, rows)) if problem.weights_SxR is None else problem.weights_SxR
    free = np.ones((1, parameters), bool) if problem.free_P is None else np.atleast_2d(problem.free_P)
    target = np.atleast_2d(problem.target)
    precision = np.zeros(parameters) if problem.precision_P is None else problem.precision_P

    def part(array: np.ndarray, at: int) -> np.ndarray:
        """The rows of a chunk, the last one again where they end early: one shape, one compilation."""
        if len(array) == 1 < samples:
            return array
        return np.pad(array[at : at + size], ((0, max(0, at + size - samples)), (0, 0)), "edge")

    # Scoped: training stays in its own precision, with its own rules of promotion.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run = _compiled(problem.law)
        found = [
            run(
                *(part(array, at) for array in (theta_SxP, target, weights, free)),
                problem.x_KxR, precision, *problem.bounds, problem.delta, max_steps, tolerance,
            )
            for at in range(0, samples, size)
        ]  # fmt: skip
    theta, value, converged = (np.concatenate(one)[:samples] for one in zip(*found, strict=True))
    return theta, value, converged


@functools.cache
def _compiled(law: Law) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    return jax.jit(functools.partial(_minimise_chunk, law))


def _minimise_chunk(
    law: Any, theta, target, weight, free, x_KxR, precision, lower, upper, delta, max_steps, tolerance
):  # fmt: skip
    parameters = theta.shape[1]

    def evaluate(theta):
        """Value_S, gradient_SxP, and Hessian and metric_SxPxP: all that a step needs, and nothing as long as the table."""
        log_pred, jacobian = (one.array for one in law.evaluate(Traced(theta), Traced(x_KxR)))
        residual = log_pred - target
        inner = jnp.clip(residual, -delta, delta)
        value = (weight * inner * (residual - 0.5 * inner)).sum(1) + 0.5 * (precision * theta**2).sum(1)
        residual = jnp.nan_to_num(residual, nan=0.0, posinf=HUGE, neginf=-HUGE)
        jacobian = jnp.clip(jnp.where(jnp.isfinite(jacobian), jacobian, 0.0), -HUGE, HUGE)
        size = jnp.abs(residual)
        pull = weight * jnp.clip(residual, -delta, delta)
        across = jacobian.swapaxes(1, 2)
        gradient = jnp.matmul(jacobian, pull[:, :, None])[:, :, 0] + precision * theta
        hessian = jnp.matmul(jacobian * (weight * (size <= delta))[:, None], across)
        reweighted = weight * jnp.where(size <= delta, 1.0, delta / jnp.maximum(size, 1e-300))
        metric = jnp.matmul(jacobian * reweighted[:, None], across)
        return jnp.where(jnp.isfinite(value), value, jnp.inf), gradient, hessian, metric

    def advance(state):
        step_count, theta, summary, damping, active, converged = state
        value, gradient, hessian, metric = summary
        held = ~free | ((theta <= lower) & (gradient > 0)) | ((theta >= upper) & (gradient < 0))
        gradient = jnp.where(held, 0.0, gradient)
        either = held[:, :, None] | held[:, None, :]
        hessian = jnp.where(either, 0.0, hessian) + jnp.diag(precision)
        metric = jnp.where(either, 0.0, metric) + jnp.diag(precision)
        scale = jnp.sqrt(jnp.diagonal(metric, axis1=1, axis2=2))
        scale = jnp.where(scale > 0, scale, 1.0)
        both = scale[:, :, None] * scale[:, None, :]
        damped = hessian / both + damping[:, None, None] * (metric / both + RIDGE * jnp.eye(parameters))
        move = jnp.where(held, 0.0, -_solve(damped, gradient / scale) / scale)
        longest = jnp.abs(move).max(1)
        move = move / jnp.maximum(1.0, longest)[:, None]
        trial = jnp.clip(theta + move, lower, upper)
        step = trial - theta
        promised = -(step * (gradient + 0.5 * jnp.matmul(hessian, step[:, :, None])[:, :, 0])).sum(1)
        tried = evaluate(trial)
        worse = ~(tried[0] <= value)
        ratio = (value - tried[0]) / jnp.maximum(promised, 1e-300)
        factor = jnp.where(worse | (ratio < 0.25), 3.0, jnp.where(ratio > 0.75, 0.1, 1.0))
        damping = jnp.where(active, jnp.maximum(damping * factor, 1e-12), damping)
        finished = (jnp.abs(promised) <= tolerance * value + EXACT) & (longest < WILD) & (step_count > 0)
        taken = active & ~worse
        theta = jnp.where(taken[:, None], trial, theta)
        summary = tuple(
            jnp.where(taken.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
            for new, old in zip(tried, summary, strict=True)
        )
        converged = jnp.where(active, finished & (damping < 1e3), converged)
        return step_count + 1, theta, summary, damping, active & ~finished & (damping < 1e15), converged

    theta = jnp.clip(theta, lower, upper)
    samples = len(theta)
    # The first pass moves nothing: it evaluates the start, so that the law is compiled once, and takes damping to 0.1.
    square = jnp.zeros((samples, parameters, parameters))
    summary = jnp.full(samples, jnp.inf), jnp.zeros((samples, parameters)), square, square
    state = 0, theta, summary, jnp.ones(samples), jnp.ones(samples, bool), jnp.zeros(samples, bool)
    _, theta, summary, _, _, converged = jax.lax.while_loop(
        lambda state: (state[0] <= max_steps) & state[4].any(), advance, state
    )
    return theta, summary[0], converged


def _solve(matrix_SxPxP: jax.Array, right_SxP: jax.Array) -> jax.Array:
    """Positive definite systems by Cholesky's L D L^T, written out over the few parameters: one fused pass over S."""
    parameters = right_SxP.shape[1]
    lower: dict[tuple[int, int], jax.Array] = {}
    pivot: list[jax.Array] = []
    found: list[jax.Array] = []
    for i in range(parameters):
        for j in range(i):
            part = matrix_SxPxP[:, i, j] - sum(lower[i, k] * lower[j, k] * pivot[k] for k in range(j))
            lower[i, j] = part / pivot[j]
        left = matrix_SxPxP[:, i, i] - sum(lower[i, k] ** 2 * pivot[k] for k in range(i))
        pivot.append(jnp.maximum(left, 1e-16))  # what rounding leaves of a smaller one
        found.append(right_SxP[:, i] - sum(lower[i, k] * found[k] for k in range(i)))
    for i in reversed(range(parameters)):
        found[i] = found[i] / pivot[i] - sum(lower[k, i] * found[k] for k in range(i + 1, parameters))
    return jnp.stack(found, 1)
