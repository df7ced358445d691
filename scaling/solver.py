"""The solver of law fits: many small robust problems side by side."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special

from llm_jax.settings import BadInput
from scaling.laws import Law

CHUNK = 400_000  # cells of a Jacobian solved at once: what stays in cache
RIDGE = 1e-2  # of the damping's metric, relative: of 1e-4 to 1e-1 what converged most often within 150 steps
WIDTHS = 1e-3 * 10.0 ** -np.arange(7)  # of Huber's loss on the way to least absolute errors
HUGE = 1e60  # of a slope or a residual
WILD = 100.0  # a step this long, before it is cut to 1, promises nothing
EXACT = 1e-22  # an objective of this size is none: data without noise is fitted to rounding


OBJECTIVES = "huber:DELTA, for instance huber:1e-3, l1 and lsq; each with :scale, :log or :linear after it"


@dataclass(frozen=True)
class Objective:
    """What a fit minimises over the residuals r of all rows, weighed by w; `parse_objective` reads it from its name.

    huber:DELTA is sum w Huber_delta(r) (Hoffmann et al. 2022, eq. 3), l1 is sum w |r|, lsq is sum w r^2 / 2. r is the
    difference of logs, or of the values themselves, as the law's paper has it unless :log or :linear says so.

    With :scale the width sigma of the noise is one more parameter, and the objective is the negative log-likelihood of
    errors that are Laplace's (l1), normal (lsq), or normal with exponential tails beyond DELTA sigma (huber). For l1
    and lsq that moves no other parameter; for huber it makes DELTA a multiple of the noise.
    """

    name: str
    delta: float
    """Infinity for lsq, 0 for l1."""
    scaled: bool = False
    log: bool | None = None
    """None: as the law has it."""

    def value(self, residual: np.ndarray, sigma: float = 1.0) -> float:
        """Over the rows of one fit, each of weight 1."""
        rows = len(residual)
        if not self.scaled:
            return float(np.abs(residual).sum() if self.delta == 0 else huber(residual, self.delta).sum())
        if self.delta == 0:
            return float(np.abs(residual).sum() / sigma + rows * np.log(2 * sigma))
        mass = np.sqrt(2 * np.pi)
        if np.isfinite(self.delta):
            mass = mass * special.erf(self.delta / np.sqrt(2)) + 2 * np.exp(-(self.delta**2) / 2) / self.delta
        return float(huber(residual / sigma, self.delta).sum() + rows * np.log(sigma * mass))

    def sigma(self, residual: np.ndarray) -> float:
        """The width of the noise that is likeliest for these residuals."""
        if self.delta == 0:
            return float(np.abs(residual).mean())
        sigma = float(np.sqrt(np.mean(residual**2)))
        for _ in range(200 if np.isfinite(self.delta) and sigma else 0):
            # d/d sigma of the likelihood: sum psi(r / sigma) r / sigma = n
            size = np.abs(residual) / sigma
            sigma *= float(np.sqrt(np.mean(np.where(size <= self.delta, size**2, self.delta * size))))
        return sigma


def parse_objective(name: str) -> Objective:
    """The Objective of that name. BadInput for others."""
    kind, *words = name.split(":")
    delta = {"lsq": np.inf, "l1": 0.0}.get(kind, np.nan)
    if kind == "huber" and words:
        try:
            delta = float(words.pop(0))
        except ValueError:
            delta = np.nan
    extra = set(words)
    wrong = len(extra) < len(words) or extra - {"scale", "log", "linear"} or {"log", "linear"} <= extra
    if wrong or np.isnan(delta) or (kind == "huber" and not 0 < delta < np.inf):
        raise BadInput(f'"{name}" names no objective; valid: {OBJECTIVES}')
    return Objective(name, delta, "scale" in extra, "log" in extra if extra & {"log", "linear"} else None)


def huber(residual: np.ndarray, delta: float) -> np.ndarray:
    """r^2 / 2 up to delta, delta (|r| - delta / 2) beyond (Huber 1964)."""
    size = np.abs(residual)
    if np.isinf(delta):
        return 0.5 * residual**2
    return np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


@dataclass(frozen=True)
class Problem:
    """Minimise sum_r weight_r Huber_delta(law(theta)_r - target_r), for one table and many weights side by side."""

    law: Law
    x_KxR: np.ndarray
    """Logs of the law's columns, centred."""
    target: np.ndarray
    """R, or SxR: what the law's `evaluate` is to give, its log for a law in logs."""
    delta: float
    """0 for least absolute errors: their sum, by Huber's loss of ever smaller widths."""
    bounds: tuple[np.ndarray, np.ndarray]
    """Lower and upper, P each."""
    weights_SxR: np.ndarray | None = None
    free_P: np.ndarray | None = None
    """Parameters that move, P or SxP; the others stay where they start. None: all."""
    precision_P: np.ndarray | None = None
    """Of a normal prior around zero: adds sum_p precision_p theta_p^2 / 2. None: none."""


Solver = Callable[[Problem, np.ndarray, int, float], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""`minimise`, or `accelerated.minimise`."""


def minimise(
    problem: Problem, theta_SxP: np.ndarray, max_steps: int = 150, tolerance: float = 1e-10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Solves S problems at once, each from its own start: theta_SxP, value_S and converged_S.

    Levenberg-Marquardt on Gauss-Newton's Hessian of the rows inside delta: outside of it the loss is linear, and close
    to a minimum the step is then Newton's, so that a width as small as 1e-3 costs some tens of steps where reweighted
    least squares creeps for hundreds. A problem stops when its step promises less than `tolerance` times its value.
    """
    if problem.delta == 0:
        return least_absolute(problem, theta_SxP, max_steps, tolerance, minimise)
    size = max(1, CHUNK // (problem.x_KxR.shape[1] * theta_SxP.shape[1]))
    target, weights, free = problem.target, problem.weights_SxR, problem.free_P

    def solve(rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        part = dataclasses.replace(
            problem,
            target=target[rows] if target.ndim == 2 else target,
            weights_SxR=None if weights is None else weights[rows],
            free_P=free[rows] if free is not None and free.ndim == 2 else free,
        )
        return _minimise_chunk(part, theta_SxP[rows], max_steps, tolerance)

    _keep_memory()
    chunks = [slice(at, at + size) for at in range(0, len(theta_SxP), size)]
    if len(chunks) == 1:
        return solve(chunks[0])
    with concurrent.futures.ThreadPoolExecutor(
        min(cores(), len(chunks))
    ) as pool:  # NumPy's loops run beside each other
        theta, value, converged = (np.concatenate(part) for part in zip(*pool.map(solve, chunks), strict=True))
    return theta, value, converged


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _keep_memory() -> None:
    """Has glibc keep freed arrays: fresh pages from the kernel for each of them take more time than the arithmetic.

    Its limits for giving memory back follow the largest block that was freed, up to 32 MiB (mallopt(3),
    M_MMAP_THRESHOLD). A block that nobody touches costs nothing.
    """
    np.empty((32 << 20) - 4096, np.uint8)


def least_absolute(
    problem: Problem, theta_SxP: np.ndarray, max_steps: int, tolerance: float, by: Solver
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least absolute errors: Huber fits `by` a solver of ever smaller widths, each from the one before."""
    unit = 1.0 if problem.law.log else float(np.median(np.abs(problem.target)))
    for width in WIDTHS:
        wide = dataclasses.replace(problem, delta=width * unit)
        theta_SxP, _, converged = by(wide, theta_SxP, max_steps, tolerance)
    with np.errstate(all="ignore"):
        residual = np.abs(problem.law.evaluate(theta_SxP, problem.x_KxR)[0] - problem.target)
    weights = 1.0 if problem.weights_SxR is None else problem.weights_SxR
    return theta_SxP, (weights * residual).sum(1), converged


def _minimise_chunk(
    problem: Problem, theta_SxP: np.ndarray, max_steps: int, tolerance: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    delta, (lower, upper) = problem.delta, problem.bounds
    shape = len(theta_SxP), problem.x_KxR.shape[1]
    target = np.broadcast_to(problem.target, shape)
    weight = np.broadcast_to(1.0 if problem.weights_SxR is None else problem.weights_SxR, shape)
    precision = np.zeros(theta_SxP.shape[1]) if problem.precision_P is None else problem.precision_P
    still = np.broadcast_to(False if problem.free_P is None else ~problem.free_P, theta_SxP.shape)

    def evaluate(theta):
        alike = (theta == theta[0]).all()  # as where a bootstrap starts: one evaluation serves all
        log_pred, jacobian = problem.law.evaluate(theta[:1] if alike else theta, problem.x_KxR)
        residual = log_pred - target
        inner = np.maximum(np.minimum(residual, delta), -delta)
        pull = weight * inner
        value = np.einsum("sr,sr->s", pull, residual - 0.5 * inner) + 0.5 * (precision * theta**2).sum(1)
        # Far out a law overflows; such a step is refused by its value, and its slopes must not spoil the algebra.
        if not (jacobian.max() < HUGE and jacobian.min() > -HUGE):
            jacobian = np.clip(np.nan_to_num(jacobian, nan=0.0, posinf=0.0, neginf=0.0), -HUGE, HUGE)
        finite = np.isfinite(value)
        if not finite.all():
            residual = np.nan_to_num(residual, nan=0.0, posinf=HUGE, neginf=-HUGE)
            pull = weight * np.clip(residual, -delta, delta)
        jacobian = np.repeat(jacobian, len(theta), axis=0) if alike else jacobian
        return residual, pull, jacobian, np.where(finite, value, np.inf)

    theta = np.clip(theta_SxP, lower, upper)
    answer, answer_value = theta.copy(), np.full(len(theta), np.inf)
    converged = np.zeros(len(theta), bool)
    diagonal = np.arange(theta.shape[1])
    active, damping = np.arange(len(theta)), np.full(len(theta), 0.1)
    with np.errstate(all="ignore"):
        residual, pull, jacobian, value = evaluate(theta)
        for _ in range(max_steps):
            gradient = np.matmul(jacobian, pull[:, :, None])[:, :, 0] + precision * theta
            held = still | ((theta <= lower) & (gradient > 0)) | ((theta >= upper) & (gradient < 0))
            gradient[held] = 0
            # The reweighted Hessian lies above the true one (it is that of reweighted least squares, whose every step
            # goes down); damping along it keeps A and alpha, or E and the rest, moving together.
            size = np.abs(residual)
            hessian = np.matmul(jacobian * (weight * (size <= delta))[:, None], jacobian.swapaxes(1, 2))
            metric = hessian.copy()
            if delta < np.inf:
                reweighted = weight * (delta / np.maximum(size, delta))
                metric = np.matmul(jacobian * reweighted[:, None], jacobian.swapaxes(1, 2))
            for matrix in hessian, metric:
                matrix[held] = 0
                matrix.swapaxes(1, 2)[held] = 0
                matrix[:, diagonal, diagonal] += precision
            scale = np.sqrt(metric[:, diagonal, diagonal])
            scale = np.where(scale > 0, scale, 1.0)
            both = scale[:, :, None] * scale[:, None, :]
            metric /= both
            metric[:, diagonal, diagonal] += RIDGE
            move = -np.linalg.solve(hessian / both + damping[:, None, None] * metric, (gradient / scale)[:, :, None])
            # theta is made of logs and exponents: a longer step than 1 leaves what the linearisation knows, and can
            # switch a term off for good.
            move = np.where(held, 0, move[:, :, 0] / scale)
            longest = np.abs(move).max(1)
            move /= np.maximum(1, longest)[:, None]
            trial = np.clip(theta + move, lower, upper)
            step = trial - theta
            curved = np.matmul(hessian, step[:, :, None])[:, :, 0]
            promised = -(step * (gradient + 0.5 * curved)).sum(1)
            new_residual, new_pull, new_jacobian, new_value = evaluate(trial)
            worse = ~(new_value <= value)
            ratio = (value - new_value) / np.maximum(promised, 1e-300)
            damping *= np.where(worse | (ratio < 0.25), 3.0, np.where(ratio > 0.75, 0.1, 1.0))
            damping = np.maximum(damping, 1e-12)

            # One parameter without slope can ask for so long a step that nothing of it is left for the others.
            finished = (np.abs(promised) <= tolerance * value + EXACT) & (longest < WILD)
            now = theta, residual, pull, jacobian, value
            theta, residual, pull, jacobian, value = trial, new_residual, new_pull, new_jacobian, new_value
            if worse.any():
                for kept, tried in zip(now, (theta, residual, pull, jacobian, value), strict=True):
                    tried[worse] = kept[worse]
            # A promise that damping alone made small is no convergence.
            converged[active] = finished & (damping < 1e3)
            answer[active], answer_value[active] = theta, value
            stay = ~finished & (damping < 1e15)
            if not stay.all():
                active, damping, theta, value = active[stay], damping[stay], theta[stay], value[stay]
                residual, pull, jacobian = residual[stay], pull[stay], jacobian[stay]
                weight, target, still = weight[stay], target[stay], still[stay]
            if not len(active):
                break
    return answer, answer_value, converged
