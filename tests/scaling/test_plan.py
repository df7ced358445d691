"""Plans are spent money: each number is checked against brute force or against simulation."""

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import optimize
from simulated import CHINCHILLA, TRUTH, chinchilla, runs

from llm_jax.settings import BadInput
from scaling import cli, design, hardware, laws, plan, tables, uncertainty
from scaling.fit import fit
from scaling.tables import Table

TARGET = 1e13
UNEVEN = {"A": 482.0, "B": 2085.0, "E": 1.817, "alpha": 0.348, "beta": 0.366}  # Besiroglu et al. 2024, arXiv:2404.10102


@pytest.fixture
def write(tmp_path):
    """Writes a table, or columns, as a CSV and returns its path."""

    def written(table):
        rows = [dict(zip(table.columns, row, strict=True)) for row in zip(*table.columns.values(), strict=True)]
        path = tmp_path / "table.csv"
        path.write_text(tables.csv_text(rows))
        return path

    return written


def extended(table, n_params, d_tokens, loss):
    added = {"N_params": n_params, "D_tokens": d_tokens, "C_flops": 6 * n_params * d_tokens, "loss": loss}
    return Table({name: np.append(table.column(name), column) for name, column in added.items()})


# ---- The law ----


@pytest.mark.parametrize("truth", [TRUTH, UNEVEN])
def test_the_plan_of_an_exact_table_is_that_of_the_law(write, truth):
    """Without noise nothing may be lost: N*, D* and the loss are those of a search over the law that made the table."""
    planned = plan.plan(write(runs(lambda n, d: chinchilla(n, d, truth))), hardware.budget(TARGET), samples=100)
    found = optimize.minimize_scalar(
        lambda log_n: chinchilla(math.exp(log_n), TARGET / 6 / math.exp(log_n), truth), bounds=(5, 25), method="bounded"
    )
    best = {name: figure["value"] for name, figure in planned["optimum"].items()}
    assert best["loss"] == pytest.approx(found.fun, rel=1e-6)
    assert best["N"] == pytest.approx(math.exp(found.x), rel=1e-2)
    assert best["N"] == pytest.approx(laws.optimum(truth, TARGET)[0], rel=1e-4)
    assert 6 * best["N"] * best["D"] == pytest.approx(TARGET)
    assert best["tokens_per_parameter"] == pytest.approx(best["D"] / best["N"])


def test_many_refits_at_once_have_the_optimum_of_each():
    """The array form must not drift from laws.optimum, which all other verbs use."""
    both = {name: np.array([TRUTH[name], UNEVEN[name]]) for name in TRUTH}
    expected = [laws.optimum(one, 3e15) for one in (TRUTH, UNEVEN)]
    np.testing.assert_allclose(np.transpose(plan.optimal_sizes(both, 3e15)), expected, rtol=1e-12)


@pytest.mark.parametrize("truth", [TRUTH, UNEVEN])
@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
def test_extra_compute_is_that_of_an_equal_loss(truth, factor):
    """10 % extra has to mean that a compute-optimal run with 1 / 1.1 of the compute is as good."""
    n_params, d_tokens = laws.optimum(truth, TARGET)
    extra = plan.extra_compute(truth, n_params * factor, d_tokens / factor)
    frugal = laws.optimum(truth, TARGET / (1 + extra))
    assert chinchilla(*frugal, truth) == pytest.approx(
        chinchilla(n_params * factor, d_tokens / factor, truth), rel=1e-12
    )
    assert extra > 0.5 or factor == 1


@pytest.mark.parametrize("truth", [TRUTH, UNEVEN])
@pytest.mark.parametrize("served", [1e3, 1e7, 1e10, 1e13])
def test_serving_sizes_are_the_cheapest_of_their_loss(truth, served):
    """Against a search along the curve of equal loss: no other model of that loss costs less to train and serve."""
    best = laws.optimum(truth, TARGET)
    loss = chinchilla(*best, truth)
    n_params, d_tokens = plan.serving_sizes(truth, loss, served)
    assert chinchilla(n_params, d_tokens, truth) == pytest.approx(loss, rel=1e-12)

    def total(log_n):
        left = loss - truth["E"] - truth["A"] * math.exp(-truth["alpha"] * log_n)
        tokens = (truth["B"] / left) ** (1 / truth["beta"]) if left > 0 else math.inf
        return 6 * math.exp(log_n) * tokens + 2 * math.exp(log_n) * served

    smallest = math.log(truth["A"] / (loss - truth["E"])) / truth["alpha"]
    found = optimize.minimize_scalar(
        total, bounds=(smallest, math.log(best[0]) + 1), method="bounded", options={"xatol": 1e-9}
    )
    assert total(math.log(n_params)) <= found.fun * (1 + 1e-9)
    assert total(math.log(n_params)) <= min(total(math.log(n_params) + step) for step in (-1e-2, 1e-2))
    assert n_params < best[0]


def test_serving_nothing_is_compute_optimal():
    best = laws.optimum(TRUTH, TARGET)
    assert plan.serving_sizes(TRUTH, chinchilla(*best), 1e-9) == pytest.approx(best, rel=1e-9)


def test_slopes_are_those_of_the_law():
    """The design stands on them: central differences of log loss in each parameter, with N and D in units of the centre."""
    centre = (1e5, 2e6)
    n_params, d_tokens = np.array([3e4, 7e5]), np.array([4e6, 9e5])
    found = plan.log_slopes(TRUTH, n_params, d_tokens, centre)
    # In units of the centre the scales are A / centre^alpha and B / centre^beta.
    scaled = {**TRUTH, "A": TRUTH["A"] * centre[0] ** -0.35, "B": TRUTH["B"] * centre[1] ** -0.35}
    for at, name in enumerate(("A", "B", "E", "alpha", "beta")):
        ends = []
        for step in (1e-6, -1e-6):
            moved = scaled[name] * math.exp(step) if at < 3 else scaled[name] + step
            ends.append(np.log(chinchilla(n_params / centre[0], d_tokens / centre[1], {**scaled, name: moved})))
        np.testing.assert_allclose(found[:, at], (ends[0] - ends[1]) / 2e-6, rtol=1e-6)


def test_intervals_hold_the_truth():
    """On 40 tables of 40 noisy runs, 10 times below the target: nine in ten for N*, for the loss and for the served model."""
    budgets = np.geomspace(1e10, 1e12, 8)
    best = laws.optimum(TRUTH, TARGET)
    truth = best[0], chinchilla(*best), plan.serving_sizes(TRUTH, chinchilla(*best), 1e8)[0]
    inside, widths = [], []
    for seed in range(40):
        planned = plan.plan_table(
            runs(noise=0.003, budgets=budgets, seed=seed), hardware.budget(TARGET), served_tokens=1e8, samples=200
        )
        intervals = [planned["optimum"]["N"], planned["optimum"]["loss"], planned["serving"]["N"]]
        inside.append(
            [low <= true <= high for true, (low, high) in zip(truth, (i["interval"] for i in intervals), strict=True)]
        )
        widths.append(np.divide(*planned["optimum"]["N"]["interval"][::-1]))
    assert np.mean(inside, 0).min() >= 0.85
    assert np.median(widths) < 1.5


# ---- The next sweep ----


def test_chosen_runs_are_nearly_the_best_of_all_sets():
    """Every affordable set of up to four among eight candidates, repeats allowed, on 30 random problems."""
    shares = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        slopes, known, wanted = rng.standard_normal((8, 4)), rng.standard_normal((6, 4)), rng.standard_normal(4)
        cost, information = 2.0 ** rng.integers(0, 4, 8), 0.2 * known.T @ known
        budget = 1.5 * cost.max()
        sets = (list(s) for k in range(1, 5) for s in itertools.combinations_with_replacement(range(8), k))
        best = min(design.spread(slopes[s], information, wanted) for s in sets if cost[s].sum() <= budget)
        chosen = design.choose_runs(slopes, cost, information, wanted, budget, 4)
        assert cost[chosen].sum() <= budget
        assert len(chosen) <= 4
        today = design.spread(slopes[:0], information, wanted)
        shares.append((today - design.spread(slopes[chosen], information, wanted)) / (today - best))
    assert min(shares) > 0.9
    assert np.mean(np.array(shares) > 1 - 1e-9) > 0.8


def test_no_run_is_chosen_that_cannot_be_paid():
    assert design.choose_runs(np.eye(2), np.array([3.0, 4.0]), np.eye(2), np.ones(2), budget=2.0, runs=3) == []


@pytest.mark.slow
def test_chosen_runs_sharpen_the_prediction_as_promised():
    """On 100 simulated tables the spread of the fitted loss at the target shrinks to the promised share, give or take the
    linearisation, and further than by random runs of the same candidates at the same cost."""
    noise, sweep_budget = 0.003, TARGET / 4
    planned = plan.next_sweep(fit(CHINCHILLA, runs(noise=noise, seed=999), "lsq"), runs(), TARGET, sweep_budget, 6)
    count = len(planned["runs"])
    chosen = np.array([[run["N"], run["D"]] for run in planned["runs"]])
    assert planned["compute"] <= sweep_budget
    levels = np.geomspace(1e11, sweep_budget, plan.LEVELS)
    best = laws.optimum(TRUTH, TARGET)
    losses = {"today": [], "chosen": [], "random": []}
    for seed in range(100):
        table, rng = runs(noise=noise, seed=seed), np.random.default_rng(10_000 + seed)
        compute = np.zeros(1)
        while abs(compute.sum() / planned["compute"] - 1) > 0.1:
            compute = rng.choice(levels, count)
        sizes = plan.optimal_sizes(TRUTH, compute)[0] * rng.choice(plan.SIZES, count)
        sets = {"today": np.zeros((0, 2)), "chosen": chosen, "random": np.stack([sizes, compute / 6 / sizes], 1)}
        for name, added in sets.items():
            loss = chinchilla(*added.T) * np.exp(noise * rng.standard_normal(len(added)))
            losses[name].append(np.log(fit(CHINCHILLA, extended(table, *added.T, loss), "lsq").predict(*best)))
    spread = {name: np.std(values) for name, values in losses.items()}
    promised = planned["runs"][-1]["width_ratio"]
    assert 0.5 < promised < 0.85
    assert spread["chosen"] / spread["today"] == pytest.approx(promised, abs=0.15)
    assert spread["chosen"] < 0.85 * spread["random"]
    assert 1.96 * spread["today"] * chinchilla(*best) == pytest.approx(planned["half_width_linear"], rel=0.4)


def test_the_sweep_stays_within_the_table_and_the_budget():
    """A law is a poor guide below the smallest run that it has seen, and a sweep is not to cost what it saves."""
    table = runs(noise=0.003)
    sweep = plan.next_sweep(fit(CHINCHILLA, table), table, 1e15, 1e14, 8)
    assert min(run["C"] for run in sweep["runs"]) >= 1e14 / 128
    sweep = plan.next_sweep(fit(CHINCHILLA, table), table, 1e13, 1e12, 8)
    assert min(run["C"] for run in sweep["runs"]) >= 1e11 * (1 - 1e-9)
    assert sum(run["C"] for run in sweep["runs"]) == pytest.approx(sweep["compute"])
    assert sweep["compute"] <= 1e12 * (1 + 1e-9)
    ratios = [run["width_ratio"] for run in sweep["runs"]]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] < 1


def test_a_table_along_one_line_promises_nothing():
    """With D = 20 N throughout and alpha = beta, A and B only act together: the linearised law has no width to shrink."""
    table = runs()
    line = Table({"N_params": table.column("N_params"), "D_tokens": 20 * table.column("N_params")})
    fitted = dataclasses.replace(fit(CHINCHILLA, table), parameters=TRUTH)
    assert plan.next_sweep(fitted, line, TARGET, TARGET / 10, 4) is None
    assert plan.next_sweep(fitted, table, TARGET, TARGET / 10, 4) is not None


# ---- Budgets ----


def test_budgets_by_compute_time_and_money_agree():
    """An hour of one A100 at half its 312 TFLOP/s is 5.616e17 FLOPs; two units of money buy it at two an hour."""
    by_hours = hardware.budget(device_hours=1, chip="a100", price_per_hour=2, mfu=0.5)
    assert by_hours.compute == pytest.approx(5.616e17, rel=1e-12)
    assert by_hours.price == 2
    by_price = hardware.budget(price=2, chip="A100", price_per_hour=2, mfu=0.5)
    by_compute = hardware.budget(5.616e17, chip="a100", price_per_hour=2, mfu=0.5)
    for name, value in dataclasses.asdict(by_hours).items():
        for other in (by_price, by_compute):
            assert getattr(other, name) == (value if name == "chip" else pytest.approx(value)), name
    assert hardware.budget(1e21) == hardware.Budget(1e21)


# ---- The verb ----


def run(capsys, *words):
    status = cli.main(["plan", *map(str, words)])
    out, err = capsys.readouterr()
    return status, out, err


def test_json_holds_every_number(write, capsys):
    """What a script builds on: the keys, numbers that agree with each other, and the same object the second time."""
    path = write(runs(noise=0.003))
    words = (path, "--compute", TARGET, "--served_tokens", 1e8, "--chip", "l4", "--bootstrap", 200, "--json")
    status, out, err = run(capsys, *words)
    assert (status, err) == (0, "")
    planned = json.loads(out)
    assert set(planned) == {
        "law", "n", "objective", "parameters", "budget", "extrapolation", "optimum", "deviations", "serving", "sweep",
        "warnings",
    }  # fmt: skip
    assert set(planned["optimum"]) == {"N", "D", "tokens_per_parameter", "loss"}
    for figure in planned["optimum"].values():
        assert figure["interval"][0] < figure["value"] < figure["interval"][1]
    assert [row["factor"] for row in planned["deviations"]] == [0.25, 0.5, 1.0, 2.0, 4.0]
    best = planned["optimum"]
    assert planned["deviations"][0]["N"] == pytest.approx(best["N"]["value"] / 4)
    assert min(row["loss"] for row in planned["deviations"]) == best["loss"]["value"]
    serving = planned["serving"]
    assert serving["total_compute"] < serving["total_compute_chinchilla"]
    assert serving["saved_share"]["value"] == pytest.approx(
        1 - serving["total_compute"] / serving["total_compute_chinchilla"]
    )
    assert planned["budget"]["device_hours"] == pytest.approx(TARGET / (121e12 * 0.4 * 3600))
    assert planned["extrapolation"] == pytest.approx(10)
    assert planned["sweep"]["half_width"] == pytest.approx(np.diff(best["loss"]["interval"])[0] / 2)
    assert json.loads(run(capsys, *words)[1]) == planned


def test_the_text_fits_a_terminal(write, capsys):
    """80 columns, without a number that overflows its place, also for large budgets and with every part shown."""
    path = write(runs(noise=0.003))
    for compute in (1e13, 1e26):
        status, out, _ = run(
            capsys, path, "--compute", compute, "--served_tokens", 1e15, "--chip", "h100", "--price_per_hour", 2.5, "--bootstrap", 100
        )  # fmt: skip
        assert status == 0
        assert max(map(len, out.splitlines())) <= 80, max(out.splitlines(), key=len)
        assert "nan" not in out
    assert "times the largest run of the table; beyond 10 times" in " ".join(out.split())


def test_far_budgets_and_open_parameters_are_said(write):
    """The intervals do not cover what the form of the law may do beyond the table, and an E at its bound is no number."""
    table = runs(lambda n, d: chinchilla(n, d, {**TRUTH, "E": 0.0}), noise=0.003)
    near = plan.plan_table(table, hardware.budget(1e13 * 0.99), samples=100)
    far = plan.plan_table(table, hardware.budget(3e13), samples=100)
    assert not any("largest run" in warning for warning in near["warnings"])
    assert any("30 times the largest run" in warning for warning in far["warnings"])
    assert any(warning.startswith("E is at its lower bound") for warning in far["warnings"])
    assert far["sweep"]["runs"]


@pytest.mark.parametrize(("lost", "said"), [(0, ""), (2, "1.0% of the"), (10, "there is no interval")])
def test_refits_without_an_optimum_are_not_dropped_in_silence(monkeypatch, lost, said):
    """A table that hardly tells beta from zero has refits without a best size: an interval over the others is too narrow."""
    refits = {name: np.full(200, value) * np.linspace(0.99, 1.01, 200) for name, value in TRUTH.items()}
    refits["beta"][:lost] = -0.01
    monkeypatch.setattr(uncertainty, "bootstrap", lambda *_: SimpleNamespace(parameters=refits))
    planned = plan.plan_table(runs(), hardware.budget(TARGET))
    assert said in " ".join(planned["warnings"])
    assert bool(said) == any("refits" in warning for warning in planned["warnings"])
    assert np.isfinite(planned["optimum"]["N"]["interval"]).all() == (lost < 5)
    text = plan.describe(planned)
    assert ("no interval\n" in text) == (lost > 5)
    assert "nan" not in text
    assert "inf" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one budget"),
        (["--compute", 1e13, "--price", 5], "got --compute and --price"),
        (["--compute", -1], "must be positive"),
        (["--device_hours", 5, "--chip", "h10"], 'did you mean "h100"'),
        (["--device_hours", 5, "--chip", "v5p"], 'did you mean "tpu-v5p"'),
        (["--device_hours", 5], "--device_hours needs --chip; valid: a100"),
        (["--price", 5, "--chip", "h100"], "--price needs --price_per_hour"),
        (["--compute", 1e13, "--price_per_hour", 2], "--price_per_hour needs --chip"),
        (["--compute", 1e13, "--mfu", 40], "share of the peak"),
        (["--compute", 1e13, "--served_tokens", 0], "--served_tokens must be positive"),
        (["--compute", 1e13, "--sweep_share", 2], "--sweep_share"),
        (["--compute", 1e13, "--sweep_runs", 0], "--sweep_runs"),
        (["--compute", 1e13, "--bootstrap", 0], "--bootstrap must be at least 100"),
        (["--compute", 1e13, "--where", "N_parms > 0"], 'did you mean "N_params"'),
        (["--compute", 1e13, "--served_token", 1], 'did you mean "--served_tokens"'),
    ],
)
def test_bad_input_is_one_line(write, capsys, words, message):
    status, out, err = run(capsys, write(runs()), *words)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err


def test_a_law_without_an_optimum_is_refused_in_one_line(write, capsys):
    """Where more data does harm there is no best size, and no plan is better than one from a formula gone wrong."""
    path = write(runs(lambda n, d: chinchilla(n, 1e12 / d)))
    status, out, err = run(capsys, path, "--compute", TARGET)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "compute-optimal size" in err


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(BadInput, match="is no run directory"):
        plan.plan(tmp_path, hardware.budget(1e13))
