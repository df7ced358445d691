"""The solver of law fits: many small robust problems side by side."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from llm_jax.config import BadInput
from scaling.laws import Law

CHUNK = 400_000  # cells of a Jacobian solved at once: what stays in cache
RIDGE = 1e-2  # of the damping's metric, relative: of 1e-4 to 1e-1 what converged most often within 150 steps
EXACT = 1e-22  # an objective of this size is none: data without noise is fitted to rounding


def objective_delta(objective: str) -> float:
    """The width of the Huber loss that an objective names: "huber:1e-3" gives 1e-3, "lsq" infinity. BadInput for others."""
    if objective == "lsq":
        return np.inf
    kind, _, width = objective.partition(":")
    try:
        delta = float(width)
    except ValueError:
        delta = np.nan
    if kind != "huber" or not 0 < delta < np.inf:
        raise BadInput(f'"{objective}" names no objective; valid: huber:DELTA, for instance huber:1e-3, and lsq')
    return delta


def huber(residual: np.ndarray, delta: float) -> np.ndarray:
    """r^2 / 2 up to delta, delta (|r| - delta / 2) beyond (Huber 1964)."""
    size = np.abs(residual)
    if np.isinf(delta):
        return 0.5 * residual**2
    return np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


@dataclass(frozen=True)
class Problem:
    """Minimise sum_r weight_r Huber_delta(log L(theta) - log_loss_r), for one table and many weights side by side."""

    law: Law
    x_KxR: np.ndarray
    """Logs of the law's columns, centred."""
    log_loss: np.ndarray
    """R, or SxR."""
    delta: float
    bounds: tuple[np.ndarray, np.ndarray]
    """Lower and upper, P each."""
    weights_SxR: np.ndarray | None = None
    free_P: np.ndarray | None = None
    """Parameters that move; the others stay where they start. None: all."""
    precision_P: np.ndarray | None = None
    """Of a normal prior around zero: adds sum_p precision_p theta_p^2 / 2. None: none."""


def minimise(
    problem: Problem, theta_SxP: np.ndarray, max_steps: int = 150, tolerance: float = 1e-10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Solves S problems at once, each from its own start: theta_SxP, value_S and converged_S.

    Levenberg-Marquardt on Gauss-Newton's Hessian of the rows inside delta: outside of it the loss is linear, and close
    to a minimum the step is then Newton's, so that a width as small as 1e-3 costs some tens of steps where reweighted
    least squares creeps for hundreds. A problem stops when its step promises less than `tolerance` times its value.
    """
    size = max(1, CHUNK // (problem.x_KxR.shape[1] * theta_SxP.shape[1]))
    log_loss, weights = problem.log_loss, problem.weights_SxR
    parts = []
    for at in range(0, len(theta_SxP), size):
        rows = slice(at, at + size)
        part = dataclasses.replace(
            problem,
            log_loss=log_loss[rows] if log_loss.ndim == 2 else log_loss,
            weights_SxR=None if weights is None else weights[rows],
        )
        parts.append(_minimise_chunk(part, theta_SxP[rows], max_steps, tolerance))
    theta, value, converged = (np.concatenate(part) for part in zip(*parts, strict=True))
    return theta, value, converged


def _minimise_chunk(
    problem: Problem, theta_SxP: np.ndarray, max_steps: int, tolerance: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    delta, (lower, upper) = problem.delta, problem.bounds
    shape = len(theta_SxP), problem.x_KxR.shape[1]
    target = np.broadcast_to(problem.log_loss, shape)
    weight = np.broadcast_to(1.0 if problem.weights_SxR is None else problem.weights_SxR, shape)
    precision = np.zeros(theta_SxP.shape[1]) if problem.precision_P is None else problem.precision_P
    still = np.zeros(theta_SxP.shape[1], bool) if problem.free_P is None else ~problem.free_P

    def evaluate(theta):
        log_pred, jacobian = problem.law.evaluate(theta, problem.x_KxR)
        residual = log_pred - target
        jacobian = np.nan_to_num(jacobian)
        value = (weight * huber(residual, delta)).sum(1) + 0.5 * (precision * theta**2).sum(1)
        return residual, jacobian, np.where(np.isfinite(value), value, np.inf)

    theta = np.clip(theta_SxP, lower, upper)
    answer, answer_value = theta.copy(), np.full(len(theta), np.inf)
    converged = np.zeros(len(theta), bool)
    diagonal = np.arange(theta.shape[1])
    active, damping = np.arange(len(theta)), np.full(len(theta), 0.1)
    with np.errstate(all="ignore"):
        residual, jacobian, value = evaluate(theta)
        for _ in range(max_steps):
            gradient = np.einsum("spr,sr->sp", jacobian, weight * np.clip(residual, -delta, delta))
            gradient += precision * theta
            held = still | ((theta <= lower) & (gradient > 0)) | ((theta >= upper) & (gradient < 0))
            gradient[held] = 0
            moving = np.where(held[:, :, None], 0, jacobian)
            # The reweighted Hessian lies above the true one (it is that of reweighted least squares, whose every step
            # goes down); damping along it keeps A and alpha, or E and the rest, moving together.
            reweighted = weight * np.minimum(1, delta / np.maximum(np.abs(residual), 1e-300))
            hessian = np.matmul(moving * (weight * (np.abs(residual) <= delta))[:, None], moving.swapaxes(1, 2))
            metric = np.matmul(moving * reweighted[:, None], moving.swapaxes(1, 2))
            hessian[:, diagonal, diagonal] += precision
            metric[:, diagonal, diagonal] += precision
            scale = np.sqrt(metric[:, diagonal, diagonal])
            scale = np.where(scale > 0, scale, 1.0)
            metric /= scale[:, :, None] * scale[:, None, :]
            metric[:, diagonal, diagonal] += RIDGE
            whiten = np.linalg.inv(np.linalg.cholesky(metric)) / scale[:, None, :]
            curvature, axes = np.linalg.eigh(whiten @ hessian @ whiten.swapaxes(1, 2))
            axes = np.matmul(whiten.swapaxes(1, 2), axes)
            slope = np.einsum("spq,sp->sq", axes, gradient)
            move = -np.einsum("spq,sq->sp", axes, slope / (np.maximum(curvature, 0) + damping[:, None]))
            # theta is made of logs and exponents: a longer step than 1 leaves what the linearisation knows, and can
            # switch a term off for good.
            move = np.where(held, 0, move)
            move /= np.maximum(1, np.abs(move).max(1, keepdims=True))
            trial = np.clip(theta + move, lower, upper)
            step = trial - theta
            promised = -(step * gradient).sum(1) - 0.5 * np.einsum("sp,spq,sq->s", step, hessian, step)
            new_residual, new_jacobian, new_value = evaluate(trial)
            better = new_value <= value
            ratio = (value - new_value) / np.maximum(promised, 1e-300)
            damping *= np.where(better, np.where(ratio > 0.75, 0.1, np.where(ratio < 0.25, 3.0, 1.0)), 3.0)
            damping = np.maximum(damping, 1e-12)

            finished = np.abs(promised) <= tolerance * value + EXACT
            theta = np.where(better[:, None], trial, theta)
            residual = np.where(better[:, None], new_residual, residual)
            jacobian = np.where(better[:, None, None], new_jacobian, jacobian)
            value = np.where(better, new_value, value)
            # A promise that damping alone made small is no convergence.
            converged[active] = finished & (damping < 1e3)
            answer[active], answer_value[active] = theta, value
            stay = ~finished & (damping < 1e15)
            if not stay.all():
                active, damping, theta, value = active[stay], damping[stay], theta[stay], value[stay]
                residual, jacobian, weight, target = residual[stay], jacobian[stay], weight[stay], target[stay]
            if not len(active):
                break
    return answer, answer_value, converged
