"""The table of a model against the ledger's numbers, through the command line."""

import json

import pytest

from llm_jax.config import Config, Data, Media, Model, Train
from scaling import cli, explain

EXPERIMENT = """
from llm_jax.config import Data, Model, Train
from llm_jax.ladder import Ladder
from scaling.experiment import Experiment, axis

experiment = Experiment(
    model=Model(dtype="bfloat16"),
    data=Data(source="files", files=("{corpus}/*",), context=32, eval_tokens=1024, val_fraction=0.2),
    train=Train(tokens=6400, tokens_per_step=128, grad_accumulation=2, warmup_steps=5, peak_lr=1e-2),
    ladder=Ladder(aspect=8),
    axes=axis("depth", [2]),
)
"""


@pytest.fixture
def experiment(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(EXPERIMENT.replace("{corpus}", str(corpus)))
    return "tiny.py"


def run(capsys, *words):
    status = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("family", ["transformer", "encoder_decoder", "lstm", "rnn", "seq2seq_rnn", "feedforward"])
def test_the_sums_are_what_the_ledger_stores(experiment, capsys, family):
    """A table that is checked by hand is worth something only if the laws are fitted to the same numbers."""
    words = [experiment, "--model.family", family, "--data.prefix", 8]
    status, out, _ = run(capsys, "explain", *words, "--depth", 2, "--json")
    assert status == 0
    found = json.loads(out)
    row = json.loads(run(capsys, "sweep", *words, "--dry_run", "--json")[1])["trials"][0]
    assert {name: row[name] for name in found["run"]} == found["run"]
    total = {name: sum(part[name] for part in found["parts"]) for name in ("N_params", "flops")}
    assert total["N_params"] == row["N_params"]
    assert 3 * total["flops"] * row["D_tokens"] == row["C_full"]
    printed = run(capsys, "explain", *words, "--depth", 2)[1]
    assert f"{row['N_params']:,}" in printed
    assert f"{total['flops']:,}" in printed
    assert ("the encoder reads 8" in printed) == (family in ("encoder_decoder", "seq2seq_rnn"))


def test_activations_are_those_of_a_microbatch():
    """By hand: 64 tokens, 2 layers, bfloat16 but for logits."""
    model = Model(family="rnn", num_layers=2, d_model=16, dtype="bfloat16")
    config = Config(model=model, train=Train(tokens_per_step=256, grad_accumulation=2))
    sizes = {part["part"]: part["activation_bytes"] for part in explain.explain(config)["parts"]}
    assert sizes["blocks/input"] == 128 * 2 * 16 * 2
    assert sizes["embed"] == 128 * 16 * 2
    assert sizes["head"] == 128 * 256 * 4


def test_an_encoder_of_media_is_in_the_table():
    """By hand: a patch of 16 grey pixels becomes 8 numbers, for 2 x 4 of the 24 tokens of a row."""
    sees = Media(kind="image", items=2, size=8, patch=4, channels=1, num_layers=1, d_model=8, num_heads=1)
    config = Config(
        model=Model(num_layers=1, d_model=16, num_heads=1, media=sees),
        data=Data(source="media", files=("x",), context=24),
    )
    found = explain.explain(config)
    parts = {part["part"]: part for part in found["parts"]}
    assert parts["media/encoder/patch"]["flops"] == round(2 * 16 * 8 * 8 / 24)
    assert 3 * sum(part["flops"] for part in found["parts"]) == found["per_token"]["full"]
    n_media = sum(part["N_params"] for name, part in parts.items() if name.startswith("media/encoder/"))
    assert found["run"]["N_media"] == n_media
    assert f"encoder of media {n_media:,}; rows of 24 tokens, of which 8 are media" in explain.describe(found)


def test_what_is_counted_has_no_table(capsys):
    status, out, err = run(capsys, "explain", "--model.family", "ngram", "--train.tokens", "1e5")
    assert (status, out) == (2, "")
    assert "number of counts" in err


@pytest.mark.slow
@pytest.mark.usefixtures("mixed_dtypes")
def test_families_side_by_side_in_one_sweep(experiment, capsys, tmp_path):
    """An architecture is an axis like any other; the size of an n-gram model is known once it is counted."""
    words = ["--axis", "model.family", "lstm", "feedforward", "ngram", "--model.d_model", 16, "--json"]
    status, out, err = run(capsys, "sweep", experiment, *words)
    assert status == 0, err
    rows = {row["family"]: row for row in json.loads(out)["trials"]}
    assert {row["status"] for row in rows.values()} == {"done"}
    assert rows["ngram"]["N_params"] > 0
    assert rows["ngram"]["C_flops"] == rows["ngram"]["C_full"] == 0
    assert rows["lstm"]["C_flops"] == 6 * rows["lstm"]["N_params"] * rows["lstm"]["D_tokens"]
    assert len({row["D_tokens"] for row in rows.values()}) == 1
    assert all(row["loss"] < 4 for row in rows.values())
    folder = tmp_path / "runs" / "tiny"
    assert run(capsys, "generate", folder, "--trial", rows["ngram"]["id"], "--tokens", 5)[0] == 0
    assert "ngram" in (folder / "table.csv").read_text()


@pytest.mark.parametrize(
    "words", [["--axis", "compute", "1e8"], ["--train.tokens", "rule", "--axis", "train.seed", "0"]]
)
def test_a_budget_of_flops_sets_no_tokens_for_an_ngram(experiment, capsys, words):
    status, out, err = run(capsys, "sweep", experiment, "--model.family", "ngram", "--dry_run", *words)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "give train.tokens" in err
