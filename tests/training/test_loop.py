"""Whole runs: the same bits however they were cut, branches that equal runs of their own, and losses that are not finite."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from llm_jax.config import Config, Data, Mesh, Model, Train
from llm_jax.data import prepare
from llm_jax.generation import pairs, sampling
from llm_jax.settings import BadInput, override, to_dict
from llm_jax.training import loop, metrics, programs
from llm_jax.training import mesh as meshes

pytestmark = pytest.mark.usefixtures("mixed_dtypes", "quick_compilation")


@pytest.fixture
def cfg(tiny):
    return override(tiny, {"train.tokens": 64 * 100, "train.warmup_steps": 5, "train.checkpoint_every": 24})


def leaves(cfg, folder):
    return [np.asarray(x) for x in jax.tree.leaves(loop.load_params(cfg, folder))]


def assert_same_params(cfg, a, b):
    for x, y in zip(leaves(cfg, a), leaves(cfg, b), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_same_run(cfg, a, b, ra, rb):
    assert (ra.loss, ra.bits_per_byte) == (rb.loss, rb.bits_per_byte)
    assert_same_params(cfg, a, b)


def test_what_was_compiled_ahead_is_not_compiled_again(cfg, tmp_path):
    """Else a sweep on a GPU would compile every shape twice, the second time while the GPU waits."""
    cfg = override(cfg, {"model.d_model": 24, "model.num_heads": 1, "train.tokens": 64 * 8})  # a shape of no other test
    prepared = prepare.prepare(cfg)
    programs.compile_ahead(cfg, prepared)
    compiled = []

    def hear(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        loop.train(cfg, prepared, tmp_path / "ahead")
        assert not {"jit(call)", "jit(nll)", "jit(init)"} & set(compiled)
        loop.train(override(cfg, {"model.d_model": 40}), prepared, tmp_path / "not")
        assert {"jit(call)", "jit(nll)", "jit(init)"} <= set(compiled)
    finally:
        jax.monitoring.clear_event_listeners()


class Stop(Exception):
    pass


def assert_same_when_cut(cfg, prepared, folder, stop_at):
    """A run stopped at the first call that ends at `stop_at` or later, in folder/cut, goes on to what folder/whole is."""

    def stop(step, total, loss):
        if step >= stop_at:
            raise Stop

    with pytest.raises(Stop):
        loop.train(cfg, prepared, folder / "cut", progress=stop)
    again = loop.train(cfg, prepared, folder / "cut")
    whole = loop.train(cfg, prepared, folder / "whole")
    assert_same_run(cfg, folder / "cut", folder / "whole", again, whole)
    assert metrics.read_metrics(folder / "cut") == metrics.read_metrics(folder / "whole")


@pytest.mark.parametrize("stop_at", [8, 40, 72, 100])
def test_a_run_cut_and_started_again_has_the_same_bits(cfg, tmp_path, stop_at):
    """Parameters, optimizer, data order and dropout draws all come back from the checkpoint; so do the lines of metrics."""
    cfg = override(cfg, {"model.dropout": 0.1})
    assert_same_when_cut(cfg, prepare.prepare(cfg), tmp_path, stop_at)


RUN = """
import sys, time
from pathlib import Path
from llm_jax.config import Config
from llm_jax.settings import from_dict
from llm_jax.data import prepare
from llm_jax.generation import sampling
from llm_jax.training import loop
import json
cfg = from_dict(Config, json.loads(sys.argv[1]))
def slowly(step, total, loss):
    print(step, flush=True)
    time.sleep(0.02)
print(loop.train(cfg, prepare.prepare(cfg), Path(sys.argv[2]), progress=slowly).loss)
"""


@pytest.mark.slow  # test_ledger.py has a quick one, of a sweep
def test_kill_9_in_the_middle_of_a_run(cfg, tmp_path):
    """The kill falls wherever it falls: between steps, or into a checkpoint that is being written."""
    prepared = prepare.prepare(cfg)
    command = [sys.executable, "-c", RUN, json.dumps(to_dict(cfg)), str(tmp_path / "killed")]
    for lines in (4, 2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(lines):
                process.stdout.readline()
            time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
    # The same process environment as the killed ones, since the number of simulated devices changes the thread pool.
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    command[-1] = str(tmp_path / "whole")
    whole = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    assert again == whole
    assert_same_params(cfg, tmp_path / "killed", tmp_path / "whole")
    assert prepared.fingerprint
    assert os.path.exists(tmp_path / "killed" / "metrics.jsonl")


def test_a_branch_equals_a_run_of_its_own(cfg, tmp_path):
    """One trunk of the schedule wsd serves several horizons: the steps saved change nothing (Haegele et al. 2024)."""
    long = override(cfg, {"train.schedule": "wsd"})
    short = override(long, {"train.tokens": 64 * 50})
    prepared = prepare.prepare(cfg)
    trunks = tmp_path / "trunks"
    loop.train(long, prepared, tmp_path / "long", trunks=trunks, branch_steps=[40])
    branched = loop.train(short, prepared, tmp_path / "branch", trunks=trunks)
    alone = loop.train(short, prepared, tmp_path / "alone")
    assert branched.first_step == 40
    assert alone.first_step == 0
    assert_same_run(short, tmp_path / "branch", tmp_path / "alone", branched, alone)
    for change in ({"train.peak_lr": 2e-2}, {"train.seed": 1}):
        folder = tmp_path / next(iter(change))
        other = loop.train(override(short, change), prepared, folder, trunks=trunks)
        assert other.first_step == 0, "another rate or seed is another trunk"


def test_a_loss_that_is_not_finite_ends_the_run(cfg, tmp_path):
    """And says at which step; a checkpoint of NaN is never left behind."""
    wild = override(cfg, {"train.peak_lr": 1e30, "train.clip_norm": 1e30, "train.warmup_steps": 0})
    result = loop.train(wild, prepare.prepare(cfg), tmp_path / "wild")
    assert result.status == "failed"
    assert "step" in result.reason
    assert not list((tmp_path / "wild" / "checkpoints").glob("[0-9]*"))


def test_evaluations_on_the_way_change_nothing(cfg, tmp_path):
    """Nor do they miss the last one: the held-out loss of the end is in the metrics once."""
    prepared = prepare.prepare(cfg)
    plain = loop.train(cfg, prepared, tmp_path / "plain")
    watched = loop.train(override(cfg, {"train.eval_every": 20}), prepared, tmp_path / "watched")
    assert plain.loss == watched.loss
    lines = [line for line in metrics.read_metrics(tmp_path / "watched") if "eval_loss" in line]
    assert [line["step"] for line in lines] == [24, 40, 64, 80, 100]
    assert lines[-1]["eval_loss"] == watched.loss
    assert next((tmp_path / "watched" / "tensorboard").glob("events*")).stat().st_size > 0


def test_document_mask_trains_on_isolated_documents(cfg, tmp_path):
    masked = override(cfg, {"data.document_mask": True})
    result = loop.train(masked, prepare.prepare(masked), tmp_path / "masked")
    plain = loop.train(cfg, prepare.prepare(cfg), tmp_path / "plain")
    assert result.status == "done"
    assert result.loss != plain.loss


MIXTURE = {
    "model.d_model": 32,
    "model.experts.number": 4,
    "model.experts.balance": "bias",
    "model.experts.gate": "sigmoid",
    "model.experts.bias_rate": 0.01,
}


@pytest.mark.slow
def test_a_mixture_of_experts_learns_and_continues_to_the_same_bits(cfg, tmp_path):
    """The routers' bias has no gradient and no optimizer: it too must come back from the checkpoint. What routers do is in the metrics."""
    cfg = override(cfg, MIXTURE)
    assert_same_when_cut(cfg, prepare.prepare(cfg), tmp_path, 40)
    lines = metrics.read_metrics(tmp_path / "whole")
    bias_LxE = np.asarray(loop.load_params(cfg, tmp_path / "whole")["blocks"]["mlp"]["router_bias"])
    assert 0 < np.abs(bias_LxE).max() < 100 * 0.01 + 1e-6
    assert lines[-2]["loss"] < lines[0]["loss"] - 1
    for line in lines[:-1]:
        assert np.shape(line["expert_load"]) == (1, 4)
        assert np.mean(line["expert_load"]) == pytest.approx(1, abs=1e-4)
        assert 1 <= line["expert_load_max"] <= 4 / 2
        assert line["experts_unused"] == np.sum(np.array(line["expert_load"]) == 0)
        assert 0 < line["router_entropy"] <= np.log(4)
        assert line["dropped"] == 0


def test_a_capacity_is_of_training_alone(cfg, tmp_path):
    """The steps report what they drop; the held-out loss is that of a model that drops nothing, whatever the batch it is read in."""
    small = override(cfg, MIXTURE | {"model.experts.capacity_factor": 0.5, "train.tokens": 64 * 8})
    prepared = prepare.prepare(small)
    loop.train(small, prepared, tmp_path / "run")
    line, end = metrics.read_metrics(tmp_path / "run")
    assert 0.4 < line["dropped"] < 0.7
    params = loop.load_params(small, tmp_path / "run")
    free = override(small, {"model.experts.capacity_factor": None})
    assert loop._evaluation(free, prepared)(params=params).loss == end["eval_loss"]


@pytest.mark.slow
def test_microbatches_route_alike_and_their_loads_add_up(cfg, tmp_path):
    """The bias follows the load of the whole batch, however it is cut."""
    cfg = override(cfg, MIXTURE | {"train.tokens": 64 * 8, "train.tokens_per_step": 128, "train.peak_lr": 1e-3})
    prepared = prepare.prepare(cfg)
    halves = override(cfg, {"train.grad_accumulation": 2, "data.shuffle_seed": 0})
    one, two = (loop.train(c, prepared, tmp_path / str(i)) for i, c in enumerate((cfg, halves)))
    assert one.loss == pytest.approx(two.loss, rel=1e-4)
    first, second = (metrics.read_metrics(tmp_path / str(i))[0] for i in range(2))
    np.testing.assert_allclose(first["expert_load"], second["expert_load"], atol=0.02)


@pytest.mark.parametrize("family", ["lstm", "rnn", "feedforward", "ngram"])
@pytest.mark.parametrize("document_mask", [False, True])
def test_every_family_learns(cfg, tmp_path, family, document_mask):
    """One loop, one evaluation and one generation for all of them: the loss falls far below ln 256, from where each starts.

    Two hundred bottles of beer leave less than half a nat a byte to a good model; 2.9 is what frequencies of bytes alone give.
    """
    cfg = override(
        cfg,
        {"model.family": family, "model.ngram_order": 4, "data.document_mask": document_mask, "train.tokens": 64 * 200},
    )
    prepared = prepare.prepare(cfg)
    result = loop.train(cfg, prepared, tmp_path / "run")
    assert result.status == "done"
    assert result.loss < 2.0
    assert (result.n_params is None) == (family != "ngram")
    assert loop.train(cfg, prepared, tmp_path / "again").loss == result.loss
    text = sampling.continue_text(cfg, prepared, tmp_path / "run", "7 bottles of", 8, temperature=0)
    assert text == sampling.continue_text(cfg, prepared, tmp_path / "again", "7 bottles of", 8, temperature=0)
    assert len(text) > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["encoder_decoder", "seq2seq_rnn", "transformer"])
def test_families_with_an_encoder_learn_text(cfg, tmp_path, family):
    """On the same rows and targets as others: the encoder reads the first tokens, and generation takes prompts of any length."""
    cfg = override(cfg, {"model.family": family, "data.prefix": 8, "train.tokens": 64 * 200})
    prepared = prepare.prepare(cfg)
    result = loop.train(cfg, prepared, tmp_path / "run")
    assert result.loss < 2.5, "2.9 is what frequencies of bytes alone give"
    for prompt in ("7", "7 bottles of beer, "):
        text = sampling.continue_text(cfg, prepared, tmp_path / "run", prompt, 8, temperature=0)
        assert len(text) > 0


@pytest.mark.parametrize(
    "family", ["encoder_decoder", *(pytest.param(name, marks=pytest.mark.slow) for name in ("seq2seq_rnn", "lstm"))]
)
def test_pairs_are_learned(tmp_path, family):
    """A task that only the source solves: its first letter, written in capitals. Without it one in ten would be right."""
    letters = "абвгдежзик"
    (tmp_path / "pairs.tsv").write_text(
        "".join(f"{a}{b}{c}\t{a.upper()}\n" for a in letters for b in letters for c in "xyz")
    )
    cfg = Config(
        model=Model(family=family, vocab_size=300, num_layers=1, d_model=32, num_heads=2),
        data=Data(
            source="pairs", files=(f"{tmp_path}/pairs.tsv",), tokenizer="bpe", context=10, prefix=6, val_fraction=0.2
        ),
        train=Train(tokens=10 * 16 * 300, tokens_per_step=160, peak_lr=1e-2, warmup_steps=10, label_smoothing=0.1),
        mesh=Mesh(data=1),
    )
    cfg = override(cfg, {"train.schedule": "inverse_sqrt", "data.eval_tokens": 600})
    prepared = prepare.prepare(cfg)
    result = loop.train(cfg, prepared, tmp_path / "run")
    assert result.loss < 0.6
    held = pairs.held_out(cfg, prepared)
    source, wanted = zip(*held, strict=True)
    params = loop.load_params(cfg, tmp_path / "run")
    for width in (1, 3):
        found = pairs.transduce(cfg, prepared.tokenizer(), params, source, width=width)
        assert pairs.score(found, wanted)["exact_match"] > 0.9
    with pytest.raises(BadInput, match="leaves room for 5"):
        pairs.transduce_text(cfg, prepared, tmp_path / "run", "абвгдежз")


def test_trials_of_one_shape_share_one_compilation(cfg, tmp_path):
    """Horizon, rate, schedule and seed are arguments of the compiled call and not part of it."""
    prepared = prepare.prepare(cfg)
    loop.train(cfg, prepared, tmp_path / "first")
    mesh = meshes.make(cfg)
    call, _ = programs.compiled_call(cfg.model, programs.program(cfg.train), 0, mesh)
    before = call._cache_size()
    for i, change in enumerate(
        [{"train.peak_lr": 1e-3}, {"train.tokens": 640}, {"train.schedule": "wsd"}, {"train.seed": 3}]
    ):
        changed = override(cfg, change)
        loop.train(changed, prepared, tmp_path / str(i))
        assert programs.compiled_call(changed.model, programs.program(changed.train), 0, mesh)[0] is call
    assert call._cache_size() == before
