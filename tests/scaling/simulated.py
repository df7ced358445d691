"""Tables of runs that follow a known law, for the tests of what is fitted to them."""

import numpy as np

from scaling import laws
from scaling.tables import Table

CHINCHILLA = laws.by_name("chinchilla")
TRUTH = {"A": 47.3, "B": 63.0, "E": 0.55, "alpha": 0.35, "beta": 0.35}


def chinchilla(n_params, d_tokens, parameters=TRUTH):
    """Hoffmann et al. 2022, eq. 2, written out independently of scaling/laws.py."""
    p = parameters
    return p["E"] + p["A"] / n_params ** p["alpha"] + p["B"] / d_tokens ** p["beta"]


def runs(truth=chinchilla, noise=0.0, budgets=(1e11, 3e11, 1e12), seed=0):
    """An isoFLOP table of loss = truth(n_params, d_tokens): five sizes from 3e4 to 7e5 at each budget, Gaussian noise on log loss."""
    compute = np.repeat(budgets, 5)
    n_params = np.tile(np.geomspace(3e4, 7e5, 5), len(budgets))
    d_tokens = compute / 6 / n_params
    loss = truth(n_params, d_tokens) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(compute)))
    return Table({"N_params": n_params, "D_tokens": d_tokens, "C_flops": compute, "budget": compute, "loss": loss})
