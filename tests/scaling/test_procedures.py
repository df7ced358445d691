"""Frontiers and laws in two stages: what they find on tables whose truth is known."""

import numpy as np
import pytest
from simulated import TRUTH, chinchilla

from llm_jax.settings import BadInput
from scaling.analysis import analyse
from scaling.isoflop import akima, parabolas
from scaling.procedures import PROCEDURES
from scaling.tables import Table

BUDGETS = np.geomspace(1e11, 1e14, 7)
EXPONENT = TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])
"""Of N* in C under the law (Hoffmann et al. 2022, eq. 4)."""


def best_size(compute):
    balance = TRUTH["alpha"] * TRUTH["A"] / (TRUTH["beta"] * TRUTH["B"])
    return (balance * (compute / 6) ** TRUTH["beta"]) ** (1 / (TRUTH["alpha"] + TRUTH["beta"]))


def isoflops(noise=0.0, shapes=9):
    compute = np.repeat(BUDGETS, shapes)
    n_params = best_size(compute) * np.tile(np.geomspace(0.25, 4, shapes), len(BUDGETS))
    d_tokens = compute / 6 / n_params
    loss = chinchilla(n_params, d_tokens) * np.exp(noise * np.random.default_rng(0).standard_normal(len(compute)))
    return Table({"N_params": n_params, "D_tokens": d_tokens, "C_flops": compute, "loss": loss})


@pytest.mark.parametrize("name", ["isoflop", "isoflop-akima"])
def test_minima_give_the_exponent_of_the_law(name):
    """Approach 2 and approach 3 of Hoffmann et al. 2022 must agree where the law is the truth."""
    found = PROCEDURES[name].run(isoflops(), "", 0)
    assert found.parameters["a"] == pytest.approx(EXPONENT, abs=0.01)
    assert found.parameters["a"] + found.parameters["b"] == pytest.approx(1)
    n_opt = found.parameters["k_N"] * 1e12 ** found.parameters["a"]
    assert n_opt == pytest.approx(best_size(1e12), rel=0.05)
    assert found.parameters["k_D"] * 1e12 ** found.parameters["b"] * n_opt * 6 == pytest.approx(1e12)
    noisy = PROCEDURES[name].run(isoflops(0.001), "", 60)
    low, high = noisy.intervals["a"]
    assert low < EXPONENT < high
    assert high - low < 0.3


def test_akima_does_not_assume_a_parabola():
    """On a skewed curve over a wide grid the parabola's minimum is pulled aside (Porian et al. 2024)."""
    n_params = np.geomspace(1e4, 1e7, 13)
    u = np.log(n_params / 3e5)
    table = Table({"N_params": n_params, "D_tokens": 1e12 / 6 / n_params, "C_flops": np.full(13, 1e12)})
    table.columns["loss"] = 2 + 0.1 * (np.exp(0.7 * u) - 0.7 * u)
    (free,), (bent,) = akima(table), parabolas(table)
    step = u[1] - u[0]
    assert abs(np.log(free.n_opt / 3e5)) < step / 4
    assert abs(np.log(bent.n_opt / 3e5)) > step
    with pytest.raises(BadInput, match="five sizes"):
        akima(table.select(np.arange(4)))


def test_the_envelope_follows_the_best_size():
    """Approach 1: over training curves of many sizes, the best for each compute grows as the law says."""
    sizes = np.geomspace(best_size(1e11) / 2, best_size(1e14) * 2, 25)
    n_params = np.repeat(sizes, 40)
    d_tokens = np.tile(np.geomspace(1e4, 1e9, 40), len(sizes)) * 3
    columns = {"N_params": n_params, "D_tokens": d_tokens, "C_flops": 6 * n_params * d_tokens}
    table = Table(columns | {"loss": chinchilla(n_params, d_tokens)})
    table = table.where("C_flops > 1e11 and C_flops < 1e14")
    assert PROCEDURES["envelope"].run(table, "", 0).parameters["a"] == pytest.approx(EXPONENT, abs=0.03)
    with pytest.raises(BadInput, match="three sizes"):
        PROCEDURES["envelope"].run(table.where(f"N_params < {sizes[1] * 1.01}"), "", 0)


def test_the_ladder_climbs_from_size_to_loss_to_accuracy():
    """Bhagia et al. 2024: both stages from one table, each parameter back."""
    table = isoflops()
    truth = {"a": 0.6, "b": 0.25, "k": 3.0, "L_0": 1.5}
    accuracy = truth["b"] + truth["a"] / (1 + np.exp(truth["k"] * (table.column("loss") - truth["L_0"])))
    found = analyse(Table({**table.columns, "accuracy": accuracy}), "ladder", "lsq", ci="none")
    for name, value in (TRUTH | truth).items():
        assert found.parameters[name] == pytest.approx(value, rel=1e-3), name
    assert "ladder: L = E" in found.summary()


def test_a_procedure_has_no_other_objective():
    """An objective that is taken and not used would be believed."""
    with pytest.raises(BadInput, match="is not for this procedure"):
        PROCEDURES["isoflop"].run(isoflops(), "huber:1e-3", 0)
    with pytest.raises(BadInput, match='did you mean "isoflop"'):
        analyse(isoflops(), "isoflp")
