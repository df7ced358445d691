"""Laws of mixtures of experts."""

from __future__ import annotations

import numpy as np

from scaling.laws.law import exponent, law, positive, scale


@law(
    "routed",
    "log10 L = a * log10 N + b * log10 E_hat + c * log10 N * log10 E_hat + d",
    "Clark et al. 2022, arXiv:2202.01169, eqs. 1 and 2 (Table 3)",
    objective="lsq",
    a=exponent(-0.3, 0.0, -2, 2),
    b=exponent(-0.3, 0.1, -2, 2),
    c=exponent(-0.03, 0.03, -1, 1),
    d=exponent(0.2, 0.8, -20, 20),
    E_start=positive(1.0, 6.0, 0.02, 30, late=True),
    E_max=positive(60, 2000, 30, 1e6, late=True),
)
def routed(N_active, num_experts, a, b, c, d, E_start, E_max):
    """Loss in nats a token; N are the parameters of the dense model that an expert layer was put in: the active ones.

    E_hat saturates: 1 / E_hat = 1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max. Least squares in log10, as the
    paper has it, and in log have the same minimum.
    """
    inner = num_experts - 1 + 1 / (1 / E_start - 1 / E_max)
    n, e = np.log10(N_active), -np.log10(1 / inner + 1 / E_max)
    return np.exp(np.log(10) * (a * n + b * e + c * n * e + d))


@law(
    "granularity",
    "L = E + (g / G^gamma + A) / N^alpha + B / D^beta",
    "Krajewski et al. 2024, arXiv:2402.07871, eq. 9 (c there is E)",
    A=scale(),
    B=scale(),
    E=scale(),
    g=scale(),
    alpha=exponent(),
    beta=exponent(),
    gamma=exponent(0.2, 1.2, -2, 4),
)
def granularity(N_params, D_tokens, granularity, A, B, E, g, alpha, beta, gamma):
    """Loss in nats a token of fine-grained experts; G = hidden width of the dense MLP over that of an expert."""
    return E + (g / granularity**gamma + A) / N_params**alpha + B / D_tokens**beta


@law(
    "sparsity",
    "L = E + A / N^alpha + B / D^beta + c / (1 - S)^lam + d / ((1 - S)^delta * N^gamma)",
    "Abnar et al. 2025, arXiv:2501.12370, section 4",
    A=scale(),
    B=scale(),
    E=scale(),
    c=scale(),
    d=scale(),
    alpha=exponent(),
    beta=exponent(),
    lam=exponent(-0.6, 0.6, -4, 4),
    delta=exponent(-0.6, 0.6, -4, 4),
    gamma=exponent(),
)
def sparsity(N_params, D_tokens, sparsity, A, B, E, c, d, alpha, beta, lam, delta, gamma):
    """Loss in nats a token of N total parameters with a share S of the experts idle, 0 for dense."""
    active = 1 - sparsity
    return E + A / N_params**alpha + B / D_tokens**beta + c / active**lam + d / (active**delta * N_params**gamma)
