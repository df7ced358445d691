"""One step: its sums, its microbatches, and several steps in one call."""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config import Data, Model, Train
from llm_jax.data.pipeline import EvalSet
from llm_jax.models import families
from llm_jax.training import losses, pretrain
from llm_jax.training.optimizer import adamw
from llm_jax.training.step import init_state, make_train_call, make_train_step

MODEL = Model(num_layers=2, d_model=16, num_heads=2, vocab_size=32)
pytestmark = pytest.mark.usefixtures("mixed_dtypes", "quick_compilation")


def batches(steps, rows, seed=0):
    return {"tokens": np.random.default_rng(seed).integers(0, 32, (steps, rows, 9)).astype(np.int32)}


TWO_BYTES: Any = SimpleNamespace(bos=0, pad=31, token_bytes=lambda: np.full(32, 2, np.int32))
"""A tokenizer as far as an evaluation knows one."""


@functools.cache
def params_of(model, seed=0):
    return jax.jit(functools.partial(families.init, model))(jax.random.key(seed))


def fresh(cfg, model=MODEL):
    return init_state(jax.tree.map(jnp.copy, params_of(model)), jax.jit(adamw(cfg).init), 0)  # calls donate their state


def test_cross_entropy_against_numpy():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 5, 7)) * 3, rng.integers(0, 7, (2, 5))
    weights = rng.random((2, 5)).astype(np.float32)
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    total, sums = losses.cross_entropy(
        jnp.asarray(logits, jnp.float32), jnp.asarray(targets), jnp.asarray(weights), 1e-2
    )
    assert float(sums["nll"]) == pytest.approx((nll * weights).sum(), rel=1e-5)
    assert float(sums["weight"]) == pytest.approx(weights.sum(), rel=1e-6)
    assert float(total) == pytest.approx(((nll + 1e-2 * log_z**2) * weights).sum(), rel=1e-5)


def test_label_smoothing_against_numpy():
    """Szegedy et al. 2016, section 7: cross-entropy with (1 - e) of the target and e / V of every token; reported is the plain loss."""
    rng = np.random.default_rng(0)
    logits, targets, weights = rng.normal(size=(2, 5, 7)) * 3, rng.integers(0, 7, (2, 5)), rng.random((2, 5))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = 0.9 * np.eye(7)[targets] + 0.1 / 7
    arrays = jnp.asarray(logits, jnp.float32), jnp.asarray(targets), jnp.asarray(weights, jnp.float32)
    total, sums = losses.cross_entropy(*arrays, label_smoothing=0.1)
    assert float(total) == pytest.approx(-((wanted * log_p).sum(-1) * weights).sum(), rel=1e-5)
    assert float(sums["nll"]) == pytest.approx(float(losses.cross_entropy(*arrays)[0]), rel=1e-6)


def test_bf16_logits_are_scored_in_float32():
    """A loss in bfloat16 has steps of a hundredth of a nat."""
    logits = jnp.full((1, 1, 1000), 3.0, jnp.bfloat16)
    nll, _ = losses.token_nll(logits, jnp.zeros((1, 1), jnp.int32))
    assert nll.dtype == jnp.float32
    assert float(nll[0, 0]) == pytest.approx(np.log(1000), rel=1e-5)


@pytest.mark.slow
def test_accumulated_microbatches_equal_one_batch():
    """Also where rows weigh unequally: the sums are divided once, at the end (the mean of means is a known bug of trainers)."""
    data = batches(1, 8)["tokens"][0]
    weights = np.linspace(0, 1, 8).astype(np.float32)

    def loss(params, batch, key):
        logits = families.apply(MODEL, params, batch["tokens"][:, :-1])
        rows = jnp.broadcast_to(batch["weight"][:, None], (len(batch["tokens"]), 8))
        return losses.cross_entropy(logits, batch["tokens"][:, 1:], rows)

    cfg = Train(epsilon=1e-3)
    ends = []
    for parts in (1, 4):
        step = jax.jit(make_train_step(loss, adamw(cfg), parts))
        ends.append(step(fresh(cfg), {"tokens": data, "weight": weights}, jnp.float32(1e-2)))
    for a, b in zip(*map(jax.tree.leaves, (ends[0][0].params, ends[1][0].params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for name in ends[0][1]:
        assert float(ends[0][1][name]) == pytest.approx(float(ends[1][1][name]), rel=1e-5)


def test_one_call_of_many_steps_equals_many_calls():
    """Stopping between any two steps and going on must give the same bits: calls cut short run the same program."""
    cfg, data, rates = Train(), batches(8, 4), np.linspace(1e-3, 1e-2, 8).astype(np.float32)
    step = make_train_step(pretrain.loss_fn(MODEL, Train(z_loss=1e-4)), adamw(cfg))
    call = make_train_call(step, 8)
    whole, metrics = call(fresh(cfg), data, rates, 8)
    state = fresh(cfg)
    for start, stop in ((0, 3), (3, 4), (4, 8)):
        shifted = {"tokens": np.roll(data["tokens"], -start, axis=0)}
        state, part = call(state, shifted, np.roll(rates, -start), stop - start)
        np.testing.assert_array_equal(part["nll"][: stop - start], metrics["nll"][start:stop])
        assert not np.asarray(part["nll"][stop - start :]).any()
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert call._cache_size() == 1, "a short call must not compile again"


def test_a_call_against_plain_steps():
    """The loop in the compiled call is the plain step, step after step."""
    cfg, data = Train(), batches(5, 4)
    step = make_train_step(pretrain.loss_fn(MODEL, Train()), adamw(cfg))
    state = fresh(cfg)
    expected = []
    for i in range(5):
        state, metrics = jax.jit(step)(state, {"tokens": data["tokens"][i]}, jnp.float32(1e-2))
        expected.append(float(metrics["nll"]))
    called, metrics = make_train_call(step, 5)(fresh(cfg), data, np.full(5, 1e-2, np.float32), 5)
    np.testing.assert_allclose(metrics["nll"], expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(called.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_training_learns_and_dropout_draws_anew_each_step():
    model = Model(num_layers=1, d_model=32, num_heads=1, vocab_size=32, dropout=0.5)
    cfg = Train()
    data = {"tokens": np.tile(np.arange(9, dtype=np.int32), (60, 4, 1))}
    step = make_train_step(pretrain.loss_fn(model, Train()), adamw(cfg))
    state = fresh(cfg, model)
    _, metrics = make_train_call(step, 60)(state, data, np.full(60, 1e-2, np.float32), 60)
    losses_C = np.asarray(metrics["nll"])
    assert losses_C[0] > 3
    assert losses_C[-5:].mean() < 0.5
    still = make_train_call(step, 60)(fresh(cfg, model), data, np.zeros(60, np.float32), 60)[1]["nll"]
    assert len(set(np.asarray(still).tolist())) > 50, "at rate 0 only the dropout masks differ between steps"


def test_evaluation_counts_every_row_once_and_its_error_is_by_document():
    """A padded last batch must not enter, and the error must be the cluster formula's."""
    rng = np.random.default_rng(0)
    held = EvalSet(rng.integers(0, 32, (21, 9)).astype(np.int32), np.repeat([0, 1, 2, 3, 4, 5, 6], 3))
    params = params_of(MODEL, 1)
    found = pretrain.evaluate(MODEL, params, held, TWO_BYTES, Data())
    logits = np.asarray(families.apply(MODEL, params, held.tokens_BxT[:, :-1]), np.float64)
    picked = np.take_along_axis(logits, held.tokens_BxT[:, 1:, None], -1)[..., 0]
    nll = np.log(np.exp(logits).sum(-1)) - picked
    assert found.loss == pytest.approx(nll.mean(), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nll.mean() / 2 / np.log(2), rel=1e-5)
    by_document = nll.reshape(7, -1).mean(1)  # equally large: the ratio estimate is the plain one
    assert found.standard_error == pytest.approx(by_document.std(ddof=1) / 7**0.5, rel=1e-3)


def test_the_prefix_is_not_scored():
    """Trained and evaluated on the same targets, those after the prefix, whatever the family; padding of pairs weighs nothing."""
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 30, (5, 9)).astype(np.int32)
    held, params = EvalSet(rows, np.arange(5)), params_of(MODEL, 1)

    def scored(data, mask_BxT, segment_BxT=None):
        logits = np.asarray(families.apply(MODEL, params, rows[:, :-1], segment_BxT), np.float64)
        nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, rows[:, 1:, None], -1)[..., 0]
        expected = (nll * mask_BxT).sum() / mask_BxT.sum()
        found = pretrain.evaluate(MODEL, params, held, TWO_BYTES, data)
        batch = pretrain.make_batch(rows, TWO_BYTES, data)
        total, sums = pretrain.loss_fn(MODEL, Train(), data.prefix)(params, batch, jax.random.key(0))
        assert found.loss == pytest.approx(expected, rel=1e-5)
        assert float(total) / float(sums["weight"]) == pytest.approx(expected, rel=1e-5)

    after = np.broadcast_to(np.arange(8) >= 3, (5, 8))
    scored(Data(context=8, prefix=3), after)
    rows[:2, :2], rows[1:3, 7:] = TWO_BYTES.pad, TWO_BYTES.pad
    pairs = Data(source="pairs", files=("x.tsv",), context=8, prefix=3)
    scored(pairs, after & (rows[:, 1:] != TWO_BYTES.pad), (rows[:, :-1] == TWO_BYTES.pad).astype(np.int32))
