"""A law whose form is wrong for its table must be named as such, with the reason and the right sign, and no other."""

import re

import numpy as np
import pytest
import simulated
from simulated import CHINCHILLA

from llm_jax.settings import BadInput
from scaling import calibrate, laws, misfit, tables
from scaling.fit import fit
from scaling.isoflop import parabolas
from scaling.laws.dense import repeated
from scaling.robust import robust
from scaling.tables import Table

TRUTH = calibrate.TRUTHS["hoffmann"]
ISOFLOP, GRID = (calibrate.Design(layout, 60, "normal", "hoffmann") for layout in ("isoflop", "grid"))


def additive(n_params, d_tokens):
    """Hoffmann et al. 2022, eq. 2, written out independently of scaling/laws."""
    return TRUTH["E"] + TRUTH["A"] / n_params ** TRUTH["alpha"] + TRUTH["B"] / d_tokens ** TRUTH["beta"]


def kaplan(n_params, d_tokens):
    """Kaplan et al. 2020, eq. 1.5 with the values of their table 2: no irreducible loss, N and D coupled."""
    return ((8.8e13 / n_params) ** (0.076 / 0.095) + 5.4e13 / d_tokens) ** 0.095


def broken(n_params, d_tokens):
    """The exponent of D changes by 0.09 at 1e10 tokens, within half a decade."""
    bend = (1 + (d_tokens / 1e10) ** (1 / 0.3)) ** (-0.09)
    return TRUTH["E"] + TRUTH["A"] / n_params ** TRUTH["alpha"] + bend * TRUTH["B"] / d_tokens ** TRUTH["beta"]


def long_warmup(n_params, d_tokens):
    """A warm-up of 3e8 tokens for every run: those of few tokens, at small budgets, hardly leave it (Porian et al. 2024)."""
    return additive(n_params, d_tokens) * (1 + 0.3 * np.minimum(1, 3e8 / d_tokens))


def runs(truth, design=ISOFLOP, noise=0.003, seed=0, **columns):
    n_params, d_tokens = calibrate.columns(design)
    loss = truth(n_params, d_tokens) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n_params)))
    return Table(
        {"N_params": n_params, "D_tokens": d_tokens, "C_flops": 6 * n_params * d_tokens, "loss": loss} | columns
    )


def test_a_law_that_holds_is_seldom_blamed():
    """At most one table in a hundred, with 1 % of noise that may be heavy-tailed, or larger for small runs."""
    words = ("isoflop", 20, "student3", "hoffmann"), ("isoflop", 60, "normal", "epoch"), ("grid", 60, "uneven", "epoch")
    blamed, count = 0, 400
    for word in words:
        design = calibrate.Design(*word)
        log_n, log_d = log_KxR = np.log(calibrate.columns(design))
        found = robust(CHINCHILLA, log_KxR, calibrate.simulate(design, count, 0.01, [11])[1])
        axes = {"N": (True, log_n), "D": (True, log_d), "C": (True, log_n + log_d), "M": (True, log_d - log_n)}
        blamed += sum(misfit.along_axes(found, axes, table=table).wrong for table in range(count))
    assert blamed <= 0.01 * count * len(words)


@pytest.mark.parametrize("design", [ISOFLOP, GRID], ids=lambda design: design.name)
@pytest.mark.parametrize("truth", [kaplan, broken, long_warmup])
def test_a_law_that_does_not_hold_is_blamed(truth, design):
    """Other forms from the literature on 60 runs with 0.3 % of noise; the same runs of the law itself pass."""
    table = runs(truth, design)
    text = misfit.warning(fit(CHINCHILLA, table), table)
    assert text is not None and text.startswith("the form of chinchilla is wrong for this data: along ")
    assert "\n" not in text
    table = runs(additive, design)
    assert misfit.warning(fit(CHINCHILLA, table), table) is None


def test_runs_that_are_not_tuned_alike():
    """Porian et al. 2024: the warm-up lifts runs of few tokens, and the law fits once it is right. The axis must be D."""
    table = runs(long_warmup)
    found = misfit.lack_of_fit(fit(CHINCHILLA, table), table)
    assert found.axis == "D_tokens"
    assert "the residuals bend by" in found.sentence
    assert 0.003 < found.size < 0.02
    assert misfit.warning(fit(CHINCHILLA, runs(additive)), runs(additive)) is None


@pytest.mark.parametrize(("sign", "where"), [(1, "high"), (-1, "low")])
def test_the_side_is_right(sign, where):
    """Losses raised around 1e10 tokens lie above the law there, and lowered ones below: a wrong sign misleads."""

    def bumped(n_params, d_tokens):
        return additive(n_params, d_tokens) * np.exp(sign * 0.03 * np.exp(-(np.log(d_tokens / 1e10) ** 2)))

    found = misfit.lack_of_fit(fit(CHINCHILLA, runs(bumped, GRID)), runs(bumped, GRID))
    assert found.wrong and found.axis == "D_tokens"
    place, off = getattr(found, where)
    low, high = map(float, place.split(" to "))
    assert 2e9 < low < high < 5e10
    assert sign * off > 0.003
    assert f"{100 * abs(off):.2g} % {'above' if sign > 0 else 'below'}" in found.sentence


def test_every_part_of_the_sentence_is_true_of_the_residuals():
    """Mean residuals at the named places, taken from the table by hand, have the order that the sentence gives them."""
    for seed, truth in enumerate((kaplan, broken, long_warmup)):
        table = runs(truth, GRID, seed=seed)
        result = fit(CHINCHILLA, table, "lsq")
        found = misfit.lack_of_fit(result, table)
        n_params, d_tokens = calibrate.columns(GRID)
        axis = {"N_params": n_params, "D_tokens": d_tokens, "D_tokens / N_params": d_tokens / n_params}
        values = axis.get(found.axis, n_params * d_tokens)

        def mean(place, values=values, residuals=result.residuals):
            numbers = [float(number) for number in re.findall(r"\d[\d.]*(?:e[+-]?\d+)?", place)]
            low = 0 if "up to" in place else 0.9 * numbers[0]
            high = np.inf if "from" in place else 1.1 * numbers[-1]
            return -np.mean(residuals[(values >= low) & (values <= high)])

        assert mean(found.high[0]) > mean(found.low[0])


def test_a_column_that_the_law_does_not_read():
    """Tokens that repeat, fitted by a law of tokens seen: the reason is D_unique, and the law that reads it is named."""
    _, d_tokens = calibrate.columns(GRID)
    unique = d_tokens / np.tile([1, 16, 2, 8, 4], 12)
    given = TRUTH | {"R_N_star": 5.3, "R_D_star": 15.4}
    table = runs(lambda n, d: repeated(n, d, unique, **given), GRID, D_unique=unique)
    text = misfit.warning(fit(CHINCHILLA, table), table)
    assert "the residuals follow D_unique, which it does not read" in text
    assert re.search(r"data-constrained fits better \(AICc -\d+\)$", text)
    assert misfit.warning(fit(laws.LAWS["data-constrained"], table), table) is None


def test_a_better_law_of_the_same_columns_is_named():
    """Kaplan's data fitted by Chinchilla's law: theirs fits better, and nothing is said against it."""
    table = runs(kaplan)
    text = misfit.warning(fit(CHINCHILLA, table), table)
    assert re.search(r"; kaplan fits better \(AICc -\d+\)$", text)
    assert misfit.warning(fit(laws.LAWS["kaplan"], table), table) is None


def test_a_held_value_is_part_of_the_form():
    """An exponent held at a value that the data contradicts makes the law wrong; at the true one it does not."""
    table = runs(additive)
    assert misfit.warning(fit(CHINCHILLA, table, hold={"alpha": 0.38}), table) is not None
    assert misfit.warning(fit(CHINCHILLA, table, hold={"alpha": TRUTH["alpha"]}), table) is None


def test_runs_that_share_their_noise():
    """Eight checkpoints of each of ten runs, off by what their run is off: no bend, unless they are taken for 80 runs."""
    trunk = np.repeat(np.arange(10), 8)
    n_params, d_tokens = np.geomspace(5e7, 1e10, 10)[trunk], np.tile(np.geomspace(1e9, 4e11, 8), 10)
    log_n, log_d = log_KxR = np.log([n_params, d_tokens])
    rng, count = np.random.default_rng(0), 300
    noise_SxR = 0.008 * rng.standard_normal((count, 10))[:, trunk] + 0.004 * rng.standard_normal((count, 80))
    found = robust(CHINCHILLA, log_KxR, np.log(additive(n_params, d_tokens)) + noise_SxR)
    axes = {"N": (True, log_n), "D": (True, log_d), "C": (True, log_n + log_d), "M": (True, log_d - log_n)}
    alone, together = (
        sum(misfit.along_axes(found, axes, cluster_R, table).wrong for table in range(count))
        for cluster_R in (None, trunk)
    )
    assert together <= 0.01 * count
    assert alone > 0.3 * count
    columns = {"N_params": n_params, "D_tokens": d_tokens, "trunk": trunk.astype(float)}
    table = Table(columns | {"loss": kaplan(n_params, d_tokens) * np.exp(noise_SxR[0])})
    assert misfit.warning(fit(CHINCHILLA, table), table, "trunk") is not None
    with pytest.raises(BadInput, match='no column "trunks"; did you mean "trunk"'):
        misfit.warning(fit(CHINCHILLA, table), table, "trunks")


def test_units_of_the_loss_do_not_matter():
    """Bits for nats: the same verdict and size, between logs and between values."""
    table = runs(kaplan)
    in_bits = Table(table.columns | {"loss": table.column("loss") / np.log(2)})
    for name in ("chinchilla", "overtraining"):
        first, second = (misfit.lack_of_fit(fit(laws.LAWS[name], one), one) for one in (table, in_bits))
        assert second.axis == first.axis
        assert second.size == pytest.approx(first.size, rel=1e-3)
        assert np.log(second.p) == pytest.approx(np.log(first.p), rel=1e-2)


def test_nothing_to_test():
    """Exact data of the law, and rows too few to see a bend: no verdict, and no error."""
    exact = runs(additive, noise=0.0)
    assert misfit.warning(fit(CHINCHILLA, exact), exact) is None
    few = runs(additive).select(np.arange(0, 60, 9))
    assert misfit.lack_of_fit(fit(CHINCHILLA, few), few) is None


def isoflops(alpha, beta, reach=16, noise=0.001, seed=0):
    """Six budgets of nine sizes, from 1 / reach to reach times the optimum of E + A / N^alpha + B / D^beta; and that optimum."""
    truth = TRUTH | {"alpha": alpha, "beta": beta}
    budget = np.repeat(np.geomspace(1e18, 1e22, 6), 9)
    best = np.array([laws.optimum(truth, compute)[0] for compute in budget])
    n_params = best * np.tile(np.geomspace(1 / reach, reach, 9), 6)
    d_tokens = budget / 6 / n_params
    loss = truth["E"] + truth["A"] / n_params**alpha + truth["B"] / d_tokens**beta
    loss *= np.exp(noise * np.random.default_rng(seed).standard_normal(len(loss)))
    columns = {"N_params": n_params, "D_tokens": d_tokens, "C_flops": budget, "budget": budget, "loss": loss}
    return Table(columns), np.unique(best)


@pytest.mark.parametrize(("alpha", "beta", "side"), [(0.36, 0.26, "smaller"), (0.26, 0.36, "larger")])
def test_skewed_isoflop_curves(alpha, beta, side):
    """Chinchilla's own curves are steeper on the side of the larger exponent, so that wide parabolas miss their minima."""
    table, best = isoflops(alpha, beta)
    text = misfit.skewed(table)
    assert f"rise more steeply towards {side} models" in text
    low, high = map(float, re.search(r"moves N\* by ([+-]\d+) to ([+-]\d+) %", text).groups())
    missed = [100 * (true / curve.n_opt - 1) for true, curve in zip(best, parabolas(table), strict=True)]
    assert low == pytest.approx(min(missed), abs=4)
    assert high == pytest.approx(max(missed), abs=4)
    before, after = map(float, re.search(r"exponent from ([\d.]+) to ([\d.]+)", text).groups())
    assert after == pytest.approx(beta / (alpha + beta), abs=0.005)
    assert before == pytest.approx(after, abs=0.02)


def test_isoflop_curves_near_enough_to_parabolas():
    """Sizes within a factor of three of the optimum, or equal exponents: no warning; one table in a hundred at most."""
    assert misfit.skewed(isoflops(0.36, 0.26, reach=3)[0]) is None
    assert sum(misfit.skewed(isoflops(0.31, 0.31, noise=0.005, seed=seed)[0]) is not None for seed in range(200)) <= 2


def test_isoflop_curves_that_are_no_parabolas_but_even():
    """Steeper at both ends alike: parabolas fit badly and still find the minimum, which is all that they are for."""
    budget, off = np.repeat(np.geomspace(1e18, 1e22, 6), 9), np.tile(np.linspace(-2.5, 2.5, 9), 6)
    n_params = 0.1 * budget**0.5 * np.exp(off)
    noise = 0.001 * np.random.default_rng(0).standard_normal(54)
    columns = {"N_params": n_params, "D_tokens": budget / 6 / n_params, "C_flops": budget, "budget": budget}
    even, uneven = (
        Table(columns | {"loss": (2 + 0.03 * off**2 + 0.003 * off**4 + cubic * off**3) * np.exp(noise)})
        for cubic in (0, 0.01)
    )
    assert misfit.skewed(even) is None
    assert "towards larger models" in misfit.skewed(uneven)


def test_isoflop_curves_of_one_budget_or_few_sizes():
    """One curve of nine sizes can be judged; three sizes a budget fit any parabola, and say nothing."""
    table, _ = isoflops(0.36, 0.26, reach=64, noise=1e-4)
    one = table.where("budget < 2e18")
    assert "towards smaller models" in misfit.skewed(one)
    assert "exponent" not in misfit.skewed(one)
    size = np.tile(np.arange(9), 6)
    assert misfit.skewed(table.select(np.isin(size, [0, 4, 8]))) is None


def test_published_tables(shared_data):
    """Hoffmann et al.'s runs bend away from Kaplan's law along N; Gadre et al.'s over-trained ones from Chinchilla's."""
    epoch = tables.read(shared_data("scaling/epoch_chinchilla.csv")).where("excluded_by_paper == 0")
    text = misfit.warning(fit(laws.LAWS["kaplan"], epoch), epoch)
    assert "along N_params the residuals bend" in text and "coupled fits better" in text
    gadre = tables.read(shared_data("scaling/gadre_overtraining.csv")).where('dataset == "c4_original"')
    assert "along D_tokens / N_params" in misfit.warning(fit(CHINCHILLA, gadre), gadre)
    assert misfit.warning(fit(laws.COUPLED, gadre), gadre) is None


def test_settings_that_follow_by_rule_are_not_blamed():
    """A sweep's batch and learning rate are functions of N and D: the bend is along those, and a researcher would look elsewhere."""
    table = simulated.runs(noise=0.003, budgets=(1e11, 3e11, 1e12, 3e12))
    n, d = table.column("N_params"), table.column("D_tokens")
    batch = 128 * np.round(d**0.5 / 128 + 1)
    ruled = Table({**table.columns, "tokens_per_step": batch, "peak_lr": 0.01 * n**-0.3 * d**-0.2})
    result = fit(laws.by_name("kaplan-n"), ruled)
    assert set(misfit.axes(result.law, ruled)) == {"N_params", "C_flops", "D_tokens"}
    assert "D_tokens" in misfit.warning(result, ruled) or "C_flops" in misfit.warning(result, ruled)
    experts = Table({**ruled.columns, "N_active": n, "N_params": n * np.tile([1.0, 8.0, 2.0, 4.0, 16.0], 4)})
    assert "peak_lr" not in misfit.axes(result.law, experts)
    tried = np.random.default_rng(0).permutation(np.tile([0.001, 0.01, 0.003, 0.03], 5))
    free = Table({**ruled.columns, "peak_lr": tried})
    assert "peak_lr" in misfit.axes(result.law, free)
