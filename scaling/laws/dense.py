"""Laws of dense models: loss by parameters, tokens, compute and repetition, and the critical batch size."""

from __future__ import annotations

import numpy as np

from scaling.laws.law import exponent, law, positive, scale

# Arguments are arrays of floats, or the dual numbers that stand for them (dual.py).


@law(
    "chinchilla",
    "L = E + A / N^alpha + B / D^beta",
    "Hoffmann et al. 2022, arXiv:2203.15556, eq. 2 (approach 3); refitted by Besiroglu et al. 2024, arXiv:2404.10102",
    A=scale(),
    B=scale(),
    E=scale(),
    alpha=exponent(),
    beta=exponent(),
)
def chinchilla(N_params, D_tokens, A, B, E, alpha, beta):
    """Loss in nats a token of N parameters trained on D tokens, each seen once."""
    return E + A / N_params**alpha + B / D_tokens**beta


@law(
    "coupled",
    "L = E + (A / N^alpha + B / D^beta)^gamma",
    "Kaplan et al. 2020, arXiv:2001.08361, eq. 1.5, with the E of Hoffmann et al. 2022; gamma = 1 is theirs",
    A=scale(),
    B=scale(),
    E=scale(),
    alpha=exponent(),
    beta=exponent(),
    gamma=positive(0.5, 2, 0.135, 7.39),
)
def coupled(N_params, D_tokens, A, B, E, alpha, beta, gamma):
    """Not a law to print, few tables tell its six parameters apart; a rival for forecasts."""
    return E + (A / N_params**alpha + B / D_tokens**beta) ** gamma


@law(
    "kaplan-n",
    "L = (N_c / N)^alpha_N",
    "Kaplan et al. 2020, arXiv:2001.08361, eq. 1.1; N without embeddings there",
    N_c=positive(1e2, 1e12, 1e-3, 1e60),
    alpha_N=exponent(0.03, 0.5),
)
def kaplan_n(N_params, N_c, alpha_N):
    """Loss in nats a token of models of N parameters trained to convergence on unlimited data."""
    return (N_c / N_params) ** alpha_N


@law(
    "kaplan-d",
    "L = (D_c / D)^alpha_D",
    "Kaplan et al. 2020, arXiv:2001.08361, eq. 1.2",
    D_c=positive(1e2, 1e12, 1e-3, 1e60),
    alpha_D=exponent(0.03, 0.5),
)
def kaplan_d(D_tokens, D_c, alpha_D):
    """Loss in nats a token of large models on D tokens with early stopping."""
    return (D_c / D_tokens) ** alpha_D


@law(
    "kaplan-c",
    "L = (C_c / C)^alpha_C",
    "Kaplan et al. 2020, arXiv:2001.08361, eq. 1.3; C in PF-days there",
    C_c=positive(1e2, 1e12, 1e-3, 1e60),
    alpha_C=exponent(0.03, 0.5),
)
def kaplan_c(C_flops, C_c, alpha_C):
    """Loss in nats a token of the best model for a compute of C FLOPs; the rows must lie on that frontier."""
    return (C_c / C_flops) ** alpha_C


@law(
    "kaplan",
    "L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D",
    "Kaplan et al. 2020, arXiv:2001.08361, eq. 1.5",
    N_c=positive(1e2, 1e10, 1e-6, 1e60),
    D_c=positive(1e2, 1e10, 1e-6, 1e60),
    alpha_N=exponent(0.03, 0.5, 1e-3, 4),
    alpha_D=exponent(0.03, 0.5, 1e-3, 4),
)
def kaplan(N_params, D_tokens, N_c, D_c, alpha_N, alpha_D):
    """Loss in nats a token of N parameters on D tokens; N_c in parameters, D_c in tokens."""
    return ((N_c / N_params) ** (alpha_N / alpha_D) + D_c / D_tokens) ** alpha_D


@law(
    "critical-batch",
    "B_crit = B_star / L^(1 / alpha_B)",
    "Kaplan et al. 2020, arXiv:2001.08361, eq. 1.4",
    target="batch",
    objective="lsq",
    B_star=scale(0.1, 1e3),
    alpha_B=exponent(0.05, 0.6, 1e-3, 8),
)
def critical_batch(loss, B_star, alpha_B):
    """Batch in tokens beyond which more of it saves few steps, by the loss reached; McCandlish et al. 2018 measure it."""
    return B_star / loss ** (1 / alpha_B)


def repeated(N_params, D_tokens, D_unique, A, B, E, alpha, beta, R_N_star, R_D_star):
    """Muennighoff et al. 2023: D_eff = U + U R_D* (1 - exp(-R_D / R_D*)), R_D = D / U - 1 repetitions of U unique tokens.

    N_eff alike from U_N = min(N, the compute-optimal N of U tokens). R_N*, R_D* are in repetitions.
    """
    balance = alpha * A / (beta * B)
    optimal = np.exp((np.log(balance) + beta * np.log(D_unique)) / alpha)  # alpha A / N^alpha = beta B / D^beta
    used = np.minimum(N_params, optimal)
    excess = np.maximum(N_params / used - 1, 0)
    repeats = np.maximum(D_tokens / D_unique - 1, 0)
    n_eff = used * (1 - R_N_star * np.expm1(-excess / R_N_star))
    d_eff = D_unique * (1 - R_D_star * np.expm1(-repeats / R_D_star))
    return E + A / n_eff**alpha + B / d_eff**beta


@law(
    "data-constrained",
    "L = E + A / N_eff^alpha + B / D_eff^beta",
    "Muennighoff et al. 2023, arXiv:2305.16264, section 3.1",
    A=scale(),
    B=scale(),
    E=scale(),
    alpha=exponent(0.1, 0.8, 0.01, 4),
    beta=exponent(0.1, 0.8, 0.01, 4),
    R_N_star=positive(0.5, 50, 1e-2, 1e6),
    R_D_star=positive(0.5, 50, 1e-2, 1e6),
)
def data_constrained(N_params, D_tokens, D_unique, A, B, E, alpha, beta, R_N_star, R_D_star):
    """Loss in nats a token where tokens repeat and parameters exceed what the unique tokens can use; see `repeated`."""
    return repeated(N_params, D_tokens, D_unique, A, B, E, alpha, beta, R_N_star, R_D_star)


C4 = {"A": np.exp(6.255414), "B": np.exp(7.3049974), "E": np.exp(0.6254804), "alpha": 0.3526596, "beta": 0.3526596}
"""What Muennighoff et al. 2023 hold while they fit R_N* and R_D* on C4 (huggingface/datablations)."""


@law(
    "data-constrained-c4",
    "L = 1.869 + 520.8 / N_eff^0.3527 + 1488 / D_eff^0.3527",
    "Muennighoff et al. 2023, arXiv:2305.16264, section 5: the values that hold without repetition on C4 are given",
    R_N_star=positive(0.5, 50, 1e-2, 1e6),
    R_D_star=positive(0.5, 50, 1e-2, 1e6),
)
def data_constrained_c4(N_params, D_tokens, D_unique, R_N_star, R_D_star):
    """The law "data-constrained" with R_N* and R_D* alone to fit, as the paper does."""
    return repeated(N_params, D_tokens, D_unique, **C4, R_N_star=R_N_star, R_D_star=R_D_star)


@law(
    "overtraining",
    "L = E + a / N^eta + b / (6^0.5 * D)^eta",
    "Gadre et al. 2024, arXiv:2403.08540, eq. 4, in the terms of their code",
    log=False,
    objective="lsq",
    a=scale(),
    b=scale(),
    E=scale(),
    eta=exponent(),
)
def overtraining(N_params, D_tokens, a, b, E, eta):
    """Loss in nats a token of models trained on M = D / N tokens a parameter, whatever M.

    The paper prints it as L = E + (a' M^eta' + b M^-eta') C^-eta' with C = 6 N D, eta' = eta / 2 and a' = 6^eta' a.
    Residuals are those of the loss itself, as in the paper's fits.
    """
    return E + a * N_params**-eta + b * (np.sqrt(6) * D_tokens) ** -eta


@law(
    "learning-rate",
    "L = (E + A / N^alpha + B / D^beta) * e^(h / 2 * ln(lr / lr_opt)^2), lr_opt = K * N^p * D^q",
    "optimum as in Li et al. 2025 (Step Law), arXiv:2503.04715, eq. 1; the basin is ours",
    A=scale(),
    B=scale(),
    E=scale(),
    alpha=exponent(),
    beta=exponent(),
    K=positive(0.3, 3),
    p=exponent(-1, 0.2, -4, 4),
    q=exponent(-0.2, 0.6, -4, 4),
    h=positive(3e-3, 0.1),
)
def learning_rate(N_params, D_tokens, peak_lr, A, B, E, alpha, beta, K, p, q, h):
    """Loss in nats a token over the whole basin in the learning rate, a parabola in its log with the optimum K N^p D^q.

    A basin uses every run; the argmin of a grid has the grid's error, and one diverged neighbour moves it.
    """
    off = np.log(peak_lr) - np.log(K) - p * np.log(N_params) - q * np.log(D_tokens)
    return (E + A / N_params**alpha + B / D_tokens**beta) * np.exp(h * np.square(off) / 2)


@law(
    "learning-rate-batch",
    "L = (E + A / N^alpha + B / D^beta) * e^(h / 2 * ln(lr / lr_opt)^2 + g / 2 * ln(batch / batch_opt)^2), "
    "lr_opt = K * N^p * D^q, batch_opt = K_B * D^s",
    "optima as in Li et al. 2025 (Step Law), arXiv:2503.04715, eq. 1; the basin is ours",
    A=scale(),
    B=scale(),
    E=scale(),
    alpha=exponent(),
    beta=exponent(),
    K=positive(0.3, 3),
    p=exponent(-1, 0.2, -4, 4),
    q=exponent(-0.2, 0.6, -4, 4),
    h=positive(3e-3, 0.1),
    K_B=positive(0.3, 3),
    s=exponent(0.1, 0.9, -4, 4),
    g=positive(3e-3, 0.1),
)
def learning_rate_batch(N_params, D_tokens, peak_lr, tokens_per_step, A, B, E, alpha, beta, K, p, q, h, K_B, s, g):
    """Loss in nats a token over the basin in learning rate and batch (tokens a step), with power laws as optima."""
    off = np.log(peak_lr) - np.log(K) - p * np.log(N_params) - q * np.log(D_tokens)
    wide = np.log(tokens_per_step) - np.log(K_B) - s * np.log(D_tokens)
    basin = np.exp(h * np.square(off) / 2 + g * np.square(wide) / 2)
    return (E + A / N_params**alpha + B / D_tokens**beta) * basin


@law(
    "bnsl",
    "L = a + b / C^c0 * (1 + (C / d1)^(1 / f1))^(-c1 * f1)",
    "Caballero et al. 2023, arXiv:2210.14891, eq. 1, with one break",
    a=scale(1e-3, 0.8),
    b=scale(0.1, 1),
    c0=exponent(0.0, 0.6),
    c1=exponent(-0.4, 0.8, -4, 4),
    d1=positive(0.05, 20, 1e-4, 1e4),
    f1=positive(0.1, 1, 0.01, 5),
)
def broken(C_flops, a, b, c0, c1, d1, f1):
    """A smoothly broken power law: slope c0 before C = d1 FLOPs and c0 + c1 after, f1 the width of the bend in ln C."""
    return a + b * C_flops**-c0 * np.exp(-c1 * f1 * np.logaddexp(0.0, np.log(C_flops / d1) / f1))
