"""Laws of what is built on the loss: task error and accuracy, rewards of reinforcement learning, repeated sampling."""

from __future__ import annotations

import numpy as np
from scipy import special

from scaling.laws.law import exponent, fraction, law, positive


@law(
    "downstream-error",
    "error = epsilon - k * e^(-gamma * L)",
    "Gadre et al. 2024, arXiv:2403.08540, eq. 5",
    target="error",
    log=False,
    objective="lsq",
    epsilon=fraction(0.3, 0.99),
    k=positive(0.1, 10, 1e-4, 1e4),
    gamma=positive(0.1, 3, 1e-3, 30),
)
def downstream_error(loss, epsilon, k, gamma):
    """Mean error of tasks, 0 to 1, by the loss in nats a token."""
    return epsilon - k * np.exp(-gamma * loss)


@law(
    "accuracy",
    "accuracy = b + a / (1 + e^(k * (L - L_0)))",
    "Bhagia et al. 2024 (OLMo ladder), arXiv:2412.04403, section 3.2; k > 0 here",
    target="accuracy",
    log=False,
    a=fraction(0.2, 0.9),
    b=fraction(0.02, 0.5),
    k=positive(0.5, 10, 1e-3, 1e3),
    L_0=positive(0.3, 4, 1e-3, 30),
)
def accuracy(loss, a, b, k, L_0):
    """Accuracy of a task, 0 to 1, by the loss of its answers; the second stage of the law "ladder"."""
    return b + a * special.expit(k * (L_0 - loss))


@law(
    "rl-compute",
    "R = R_0 + (A - R_0) / (1 + (C_mid / C)^B)",
    "Khatri et al. 2025 (ScaleRL), arXiv:2510.13786, eq. 1",
    target="reward",
    log=False,
    A=fraction(0.3, 0.95),
    R_0=fraction(0.02, 0.5),
    B=exponent(0.3, 3, 0.02, 20),
    C_mid=positive(0.05, 20, 1e-6, 1e6),
)
def rl_compute(C_flops, A, R_0, B, C_mid):
    """Pass rate, 0 to 1, by the compute of reinforcement learning: from R_0 to A, half-way at C_mid, B the steepness."""
    return R_0 + (A - R_0) * special.expit(B * (np.log(C_flops) - np.log(C_mid)))


@law(
    "coverage",
    "coverage = e^(-a * k^(-b))",
    "Brown et al. 2024 (Large Language Monkeys), arXiv:2407.21787, eq. 2 (c = exp(a k^b), a and b negative)",
    target="coverage",
    log=False,
    objective="lsq",
    a=positive(0.05, 20, 1e-4, 1e4),
    b=exponent(0.05, 1.5),
)
def coverage(k, a, b):
    """Share of problems that at least one of k samples solves."""
    return np.exp(-a * k**-b)
