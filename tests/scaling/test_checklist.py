"""The checklist of Li et al. 2025: filled in where the run says, and «not known» where it does not."""

import pytest

from llm_jax.config import Config
from llm_jax.settings import to_dict
from scaling import checklist

TRIALS = [
    {
        "id": str(i), "status": "done", "N_params": n, "D_tokens": d, "C_flops": 6.0 * n * d, "loss": 2.0, "loss_se": 0.01,
        "N_non_embedding": n // 2, "C_full": 5.0 * n * d, "epochs": e, "tokens_per_step": 512 * (i + 1), "seed": 3,
        "warmup_steps": 10, "peak_lr": 0.01, "budget": None,
    }
    for i, (n, d, e) in enumerate([(10_000, 1_000_000, 0.5), (40_000, 4_000_000, 2.0)])
]  # fmt: skip
FIT = {
    "law": "chinchilla",
    "formula": "L = E + A / N^alpha + B / D^beta",
    "n": 2,
    "objective": {"name": "huber:1e-3", "value": 0.00101827},
    "parameters": {k: {"value": 1.5, "interval": [1, 2]} for k in ("E", "A", "B", "alpha", "beta")},
    "warnings": [],
}


def ask(**given):
    return {one.question: one.answer for one in checklist.answers(**({"fit": None, "trials": [], "setup": {}} | given))}


def setup():
    return {
        "config": to_dict(Config()),
        "ladder": {"aspect": 16, "num_heads": 4},
        "data": "12a0",
        "tokenizer_sha256": "ab",
    }


def test_nothing_known_is_said_of_nothing():
    """An answer that stands there whatever was done is no answer."""
    assert {name for name, answer in ask().items() if answer is not None} == set()


def test_a_bare_table_leaves_open_what_a_table_cannot_say():
    """Hyperparameters and evaluation decide what a law means; a CSV holds none, and the report must not guess ours."""
    columns = ("status", "N_params", "D_tokens", "C_flops", "loss")
    told = ask(fit=FIT, trials=[{k: t[k] for k in columns} for t in TRIALS])
    for unknown in ("Optimizer", "Learning rate", "Batch", "Warm-up", "Training data", "Data repeated", "Tokenizer", "Seeds",
                    "Evaluation set", "Metric", "Checkpoints of each run", "Algorithm", "Starts", "Code and versions"):  # fmt: skip
        assert told[unknown] is None, unknown
    assert told["Parameters N"] == "10k to 40k; <b>not known</b> whether embeddings are among them"
    assert told["Training tokens D"].startswith("1M to 4M")
    assert "counted as 6<i>ND</i>" in told["Compute C"]
    assert told["Points used"] == "2, all that have a loss"


def test_compute_that_is_not_6nd_is_not_called_so():
    """Conventions differ by more than the intervals of the exponents (Porian et al. 2024)."""
    told = ask(trials=[t | {"C_flops": 1.3 * t["C_flops"]} for t in TRIALS])
    assert "not 6<i>ND</i>" in told["Compute C"]
    assert "<b>not known</b> by which" in ask(trials=[t | {"D_tokens": None} for t in TRIALS])["Compute C"]


def test_a_run_answers_from_its_configuration():
    told = ask(fit=FIT, trials=TRIALS, setup=setup())
    config = Config()
    assert told["Optimizer"].startswith("AdamW, β₁ 0.9, β₂ 0.95")
    assert config.train.schedule in told["Learning rate"]
    assert told["Batch"] == "512 to 1.02k tokens, by rule from <i>D</i>"
    assert told["Data repeated"].startswith("1 runs see data again")
    assert told["Seeds"] == "one, 3, for all runs"
    assert f"{config.data.eval_tokens:,} fixed tokens" in told["Evaluation set"]
    assert "every matrix product" in told["Compute C"]
    assert told["Parameters fitted"] == "5: <i>E</i>, <i>A</i>, <i>B</i>, <i>α</i>, <i>β</i>"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("huber:1e-3", "Huber, δ = 1e-3, of the log of the loss"),
        ("huber:2:scale:linear", "Huber, δ = 2, of the values as they are"),
        ("l1", "absolute errors, of the log of the loss"),
        ("lsq:log", "half of squared errors, of the log of the loss"),
        ("<mine>", "&lt;mine&gt;"),
    ],
)
def test_objectives_in_words(name, said):
    """δ and the logarithm moved Chinchilla's exponents (Besiroglu et al. 2024)."""
    assert ask(fit=FIT | {"objective": {"name": name, "value": 1.0}})["Objective"].startswith(said)


def test_intervals_and_search_are_told_as_they_were_done():
    assert ask(fit=FIT)["Intervals"].endswith("<b>not known</b> how many resamples")
    none = FIT | {"parameters": {k: {"value": 1.0, "interval": None} for k in "EAB"}}
    assert ask(fit=none)["Intervals"] == "none"
    search = {
        "search": {"optimizer": "LM", "starts": 64, "agreeing": 0.984},
        "bootstrap": {"samples": 4000, "by": "row"},
    }
    told = ask(fit=FIT | search)
    assert told["Intervals"] == "bootstrap of 4,000 resamples; row"
    ends = {"profile": [0, 1], "bootstrap": [0, 2]}
    both = {"parameters": {k: {"value": 1.0, "interval": [0, 1], "intervals": ends} for k in "EAB"}}
    assert ask(fit=FIT | search | both)["Intervals"] == "profile likelihood; bootstrap of 4,000 resamples; row"
    assert "64 starts" in told["Starts"] and "98 %" in told["Starts"]


def test_a_missed_forecast_is_told():
    forecast = {
        "target": {"N": 1e5, "D": 1e7, "C": 6e12},
        "prediction": {"loss": 1.5, "interval": [1.4, 1.6], "level": 0.9},
    }
    verify = {"measured": 1.7, "inside": False, "error_relative": 0.133}
    told = ask(trials=TRIALS, forecast=forecast, verify=verify)["Checked by extrapolation"]
    assert "outside" in told and "1.7000" in told and "6.2 times the largest compute" in told
    assert "not measured yet" in ask(trials=TRIALS, forecast=forecast)["Checked by extrapolation"]
