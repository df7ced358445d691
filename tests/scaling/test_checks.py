"""Warnings that must come when they are true, and never else."""

import numpy as np
import pytest
from simulated import CHINCHILLA, TRUTH, chinchilla, runs

from scaling import checks, conventions, laws
from scaling.fit import fit
from scaling.tables import Table

BUDGETS = (1e11, 3e11, 1e12, 3e12)


def test_decay_must_end_with_the_run():
    """Hoffmann et al. 2022, appendix B: a schedule made for a longer run leaves the loss above that of its budget."""
    table = runs()
    tokens = table.column("D_tokens")
    ends = tokens.copy()
    assert checks.decay(Table({**table.columns, "decay_tokens": ends})) == []
    ends[2], ends[7] = 2.0 * tokens[2], 1.2 * tokens[7]
    (warning,) = checks.decay(Table({**table.columns, "decay_tokens": ends}))
    assert "1 trials does not match" in warning and "2 times its tokens" in warning
    schedule = np.where(np.arange(len(table)) < 3, "constant", "cosine")
    (warning,) = checks.decay(Table({**table.columns, "schedule": schedule}))
    assert "3 trials does not decay" in warning


def test_runs_of_a_common_trunk_are_not_independent():
    """Only where two share one, and where the intervals do not know of it already."""
    table = runs()
    lone = np.array([f"t{i}" for i in range(len(table))])
    assert checks.shared_noise(Table({**table.columns, "trunk": lone}), "") == []
    pairs = Table({**table.columns, "trunk": np.array([f"t{i // 2}" for i in range(len(table))])})
    assert "15 trials branch from 8 trunks" in checks.shared_noise(pairs, "")[0]
    assert checks.shared_noise(pairs, "trunk") == []


def test_a_fit_outside_of_its_intervals_is_told():
    """A narrow Huber loss follows the rows next to the law, and the interval all of them."""
    result = fit(CHINCHILLA, runs(noise=0.003))
    alpha = result.parameters["alpha"]
    assert checks.outliers(result, {"alpha": (alpha - 0.1, alpha + 0.1)}, "huber:0.01") == []
    (warning,) = checks.outliers(result, {"alpha": (alpha + 0.1, alpha + 0.2)}, "huber:0.01")
    assert f"alpha = {alpha:.4g} [" in warning


def counted_twice(noise, embeddings=2e4, seed=0):
    """Losses that follow N without embeddings, in a table whose N_params has them too, and FLOPs by two counts."""
    bare, tokens = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e4, 1e6, 7), np.geomspace(1e6, 1e8, 6)))
    rng = np.random.default_rng(seed)
    loss = chinchilla(bare, tokens) * np.exp(noise * rng.standard_normal(len(bare)))
    return Table(
        {
            "N_params": bare + embeddings, "N_non_embedding": bare, "D_tokens": tokens, "loss": loss,
            "C_flops": 6 * (bare + embeddings) * tokens, "C_6N_matrices": 6 * bare * tokens,
        }
    )  # fmt: skip


def test_exponents_under_each_count():
    """The count that the losses follow gets the law's own exponents, and N* ~ C^a with a = beta / (alpha + beta)."""
    found = conventions.under_each(CHINCHILLA, counted_twice(1e-4))
    by = {(one.sizes, one.compute): one.exponents for one in found}
    assert len(by) == 4
    own = by["N_non_embedding", "C_6N_matrices"]
    for name in ("alpha", "beta"):
        value, low, high = own[name]
        assert value == pytest.approx(TRUTH[name], abs=2e-3) and low < value < high
    assert own["a"][0] == pytest.approx(0.5, abs=4e-3)
    assert by["N_params", "C_flops"]["alpha"][0] > TRUTH["alpha"] + 0.1


def test_counts_that_decide_are_told_and_others_not():
    """Embeddings are two thirds of the smallest model here: the exponent of N is then not one number (Pearce and Song 2024)."""
    (warning, *_) = conventions.warnings(conventions.under_each(CHINCHILLA, counted_twice(1e-4)))
    assert "the count decides: alpha has" in warning
    assert "all parameters" in warning and "without embeddings and head" in warning
    assert conventions.warnings(conventions.under_each(CHINCHILLA, counted_twice(0.01, embeddings=200))) == []
    assert conventions.under_each(CHINCHILLA, runs()) == []


def test_isoflop_minima_under_each_count():
    """Runs of equal 6ND are not of equal cost by another count: the minima must be those of equal cost by that one."""
    table = runs(noise=0.0, budgets=BUDGETS)
    n, d = table.column("N_params"), table.column("D_tokens")
    extra = 6 * (n + 30 * n**0.75) * d  # attention and head, which grow more slowly than N
    found = conventions.under_each("isoflop", Table({**table.columns, "C_full": extra}))
    by = {one.compute: one.exponents["a"][0] for one in found}
    sizes = np.geomspace(3e3, 1e7, 20_001)
    best = []
    for compute in (3e11, 3e12):
        tokens = compute / 6 / (sizes + 30 * sizes**0.75)
        best.append(sizes[chinchilla(sizes, tokens).argmin()])
    exact = np.log(best[1] / best[0]) / np.log(10)
    assert abs(exact - 0.5) > 0.015
    assert by["C_flops"] == pytest.approx(0.5, abs=0.01)
    assert by["C_full"] == pytest.approx(exact, abs=0.012)


def test_a_law_of_compute_alone_is_fitted_under_each_count():
    """Its exponent is read off one column, whichever that is."""
    table = counted_twice(1e-3)
    found = conventions.under_each(laws.by_name("kaplan-c"), table)
    assert [one.compute for one in found] == ["C_flops", "C_6N_matrices"]
    assert found[0].exponents.keys() == {"alpha_C"}
