"""The families beside the Transformer against their own equations in NumPy float64, and against what no language model may do.

Parameters are random throughout: those of `init` hold zeros and ones, behind which most mistakes hide.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec
from numerics import (
    VOCAB,
    B,
    SEGMENT_BxT,
    T,
    assert_close,
    assert_gradient,
    change_token,
    decode,
    gradient_and_logits,
    in_float64,
    layers_of,
    mean_nll,
    random_params,
    random_tokens,
    reference_norm,
    run,
    sigmoid,
)

from llm_jax.config import Model
from llm_jax.generation import sampling
from llm_jax.models import families, recurrent
from llm_jax.models.layers import lookup

BASE = Model(vocab_size=VOCAB, num_layers=2, d_model=16, d_ff=24, family="lstm")
MODELS = {
    "lstm": BASE,
    "lstm, scanned, untied": replace(BASE, norm="layernorm", tie_embeddings=False, scan_layers=True, num_layers=3),
    "rnn": replace(BASE, family="rnn"),
    "feedforward": replace(BASE, family="feedforward", ngram_order=4),
    "feedforward, direct": replace(BASE, family="feedforward", ngram_order=3, direct_connections=True),
    "feedforward, bigram": replace(BASE, family="feedforward", ngram_order=2),
}
pytestmark = pytest.mark.usefixtures("quick_compilation")  # nine tenths of this file is compiling
every_model = pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
RECURRENT = [name for name in MODELS if "feedforward" not in name]


# The references: one row at a time and one step at a time, in float64.


def reference_recurrent(cfg: Model, params, tokens_T) -> np.ndarray:
    layers = layers_of(params["blocks"], cfg.num_layers)
    h, c = np.zeros((2, cfg.num_layers, cfg.d_model))
    logits = []
    for token in tokens_T:
        x = params["embed"][token] * np.sqrt(cfg.d_model)
        for layer, p in enumerate(layers):
            y = reference_norm(cfg.norm, x, p["norm"]["scale"])
            gates = [
                y @ p["input"][:, z] + h[layer] @ p["recurrent"][:, z] + p["bias"][z] for z in range(len(p["bias"]))
            ]
            if cfg.family == "lstm":
                i, f, g, o = gates
                c[layer] = sigmoid(f) * c[layer] + sigmoid(i) * np.tanh(g)
                h[layer] = sigmoid(o) * np.tanh(c[layer])
            else:
                h[layer] = np.tanh(gates[0])
            x = x + h[layer]
        x = reference_norm(cfg.norm, x, params["norm"]["scale"])
        logits.append(x @ (params["embed"].T if cfg.tie_embeddings else params["head"]))
    return np.stack(logits)


def reference_feedforward(cfg: Model, params, tokens_T) -> np.ndarray:
    logits = []
    for t in range(len(tokens_T)):
        hidden, y = params["bias"], params["head_bias"]
        for o in range(min(cfg.ngram_order - 1, t + 1)):
            x = params["embed"][tokens_T[t - o]] * np.sqrt(cfg.d_model)
            hidden = hidden + x @ params["hidden"][o]
            if cfg.direct_connections:
                y = y + x @ params["direct"][o]
        logits.append(y + np.tanh(hidden) @ params["head"])
    return np.stack(logits)


def reference(cfg: Model, params, tokens_T) -> np.ndarray:
    """Logits of one row, TxV."""
    return (reference_feedforward if cfg.family == "feedforward" else reference_recurrent)(cfg, params, tokens_T)


@every_model
def test_logits_equal_the_reference(cfg):
    """The model is the equations of its papers; gates in another order still train, only worse."""
    params, tokens_BxT = random_params(cfg), random_tokens()
    logits_BxTxV = run(cfg, params, tokens_BxT)
    assert logits_BxTxV.dtype == jnp.float32
    assert_close(logits_BxTxV, np.stack([reference(cfg, in_float64(params), row) for row in tokens_BxT]))


def documents(row_T, segment_T):
    return [row_T[segment_T == number] for number in dict.fromkeys(segment_T.tolist())]


@every_model
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_equal_finite_differences(cfg, packed):
    """The float32 gradient, by the recurrence's own backward pass, against central differences of the float64 reference.

    Packed rows are read by the reference a document at a time.
    """
    params, tokens_BxT, targets_BxT = random_params(cfg), random_tokens(0), random_tokens(1)
    segment_BxT = SEGMENT_BxT if packed else np.zeros_like(SEGMENT_BxT)

    def loss_of(params) -> float:
        rows = [
            np.concatenate([reference(cfg, params, document) for document in documents(row, segment)])
            for row, segment in zip(tokens_BxT, segment_BxT, strict=True)
        ]
        return float(np.mean([mean_nll(row, targets) for row, targets in zip(rows, targets_BxT, strict=True)]))

    grads, _ = gradient_and_logits(cfg, params, tokens_BxT, targets_BxT, segment_BxT if packed else None)
    assert_gradient(grads, loss_of, params)


@every_model
@pytest.mark.parametrize("t", [0, 4, T - 1])
def test_a_token_moves_no_logits_before_it_and_all_that_see_it(cfg, t):
    """A model that sees ahead reaches any loss. A recurrence reaches on to the end, n tokens reach n - 1 on."""
    params, tokens_BxT = random_params(cfg), random_tokens()
    before, after = run(cfg, params, tokens_BxT), run(cfg, params, change_token(tokens_BxT, t))
    rows = np.asarray(before != after).any(-1)
    end = T if cfg.family != "feedforward" else min(T, t + cfg.ngram_order - 1)
    for row in rows:
        assert np.flatnonzero(row).tolist() == list(range(t, end))


@every_model
def test_a_packed_document_reads_as_it_would_alone(cfg):
    """State starts anew with the document, and no n-gram reaches back over its start: packing is bookkeeping."""
    params, tokens_BxT = random_params(cfg), random_tokens()
    packed_BxTxV = np.asarray(run(cfg, params, tokens_BxT, SEGMENT_BxT))
    for row, segment, packed_TxV in zip(tokens_BxT, SEGMENT_BxT, packed_BxTxV, strict=True):
        alone = [reference(cfg, in_float64(params), document) for document in documents(row, segment)]
        assert_close(packed_TxV, np.concatenate(alone))


@every_model
def test_decoding_with_a_cache_equals_the_full_pass(cfg):
    """What a model says must not depend on how its prompt was fed: token by token, or in chunks and then steps."""
    params, tokens_BxT = random_params(cfg), random_tokens()
    expected_BxTxV = run(cfg, params, tokens_BxT)
    for chunks in [(1,) * T, (4, 4, 1), (2, 1, 5, 1)]:
        assert_close(decode(cfg, params, tokens_BxT, chunks, families.init_cache(cfg, B, T)), expected_BxTxV)


@every_model
def test_greedy_text_is_that_of_the_full_forward_pass(cfg):
    """The compiled generation serves every family: its cache is a state here, and the last tokens there."""
    params, text_BxT = random_params(cfg), random_tokens(5, (B, 3))
    fast = sampling.generate(cfg, params, jnp.asarray(text_BxT), jax.random.key(0), num_tokens=6, temperature=0)
    for _ in range(6):
        best_B = np.asarray(families.apply(cfg, params, text_BxT)[:, -1].argmax(-1), np.int32)
        text_BxT = np.concatenate([text_BxT, best_B[:, None]], axis=1)
    np.testing.assert_array_equal(fast, text_BxT[:, 3:])


@pytest.mark.parametrize("family", ["lstm", "rnn"])
def test_the_recurrence_is_that_of_flax(family):
    """Same weights, same outputs and same gradients as linen's OptimizedLSTMCell and SimpleCell, another program altogether."""
    rng = np.random.default_rng(0)
    cell, gates = recurrent.CELLS[family]
    width, names = 8, "ifgo"[:gates]
    x_TxBxD, dy_TxBxD = (jnp.asarray(rng.normal(size=(7, 3, width)), jnp.float32) for _ in range(2))
    input_DxZxD, w_DxZxD = (jnp.asarray(rng.normal(size=(width, gates, width)), jnp.float32) / 3 for _ in range(2))
    bias_ZxD = jnp.asarray(rng.normal(size=(gates, width)), jnp.float32)

    def ours(x_TxBxD, input_DxZxD, w_DxZxD, bias_ZxD):
        zeros = jnp.zeros((3, width))
        gates_TxBxZxD = jnp.einsum("tbd,dze->tbze", x_TxBxD, input_DxZxD) + bias_ZxD[None, None]
        return recurrent.unroll(cell, gates_TxBxZxD, w_DxZxD, (zeros, zeros if family == "lstm" else None), None)[0]

    def theirs(x_TxBxD, input_DxZxD, w_DxZxD, bias_ZxD):
        if family == "lstm":
            params = {f"i{name}": {"kernel": input_DxZxD[:, z]} for z, name in enumerate(names)}
            params |= {f"h{name}": {"kernel": w_DxZxD[:, z], "bias": bias_ZxD[z]} for z, name in enumerate(names)}
            module = nn.OptimizedLSTMCell(width)
        else:
            params = {"i": {"kernel": input_DxZxD[:, 0], "bias": bias_ZxD[0]}, "h": {"kernel": w_DxZxD[:, 0]}}
            module = nn.SimpleCell(width)
        return nn.RNN(module, time_major=True).apply({"params": {"cell": params}}, x_TxBxD)

    arguments = (x_TxBxD, input_DxZxD, w_DxZxD, bias_ZxD)
    with jax.numpy_rank_promotion("allow"):  # flax adds biases by broadcasting
        expected, their_gradient = jax.vjp(theirs, *arguments)
    actual, our_gradient = jax.vjp(ours, *arguments)
    assert_close(actual, expected, 1e-6)
    with jax.numpy_rank_promotion("allow"):
        for mine, yours in zip(our_gradient(dy_TxBxD), their_gradient(dy_TxBxD), strict=True):
            assert_close(mine, yours, 1e-5)


def test_an_lstm_starts_by_remembering():
    """Jozefowicz et al. 2015: with a forget gate of one half at the start, an LSTM learns no long dependency.

    The state's map is orthogonal for each gate, so that an RNN neither grows nor loses it along a row.
    """
    params = families.init(replace(BASE, num_layers=3), jax.random.key(0))["blocks"]
    np.testing.assert_array_equal(params["bias"], np.broadcast_to(np.eye(4)[1][None, :, None], (3, 4, 16)))
    for w_DxZxD in np.asarray(params["recurrent"]):
        for z in range(4):
            assert_close(w_DxZxD[:, z] @ w_DxZxD[:, z].T, np.eye(16))
    assert not np.allclose(params["recurrent"][0], params["recurrent"][1])
    assert not families.init(replace(BASE, family="rnn"), jax.random.key(0))["blocks"]["bias"].any()


@every_model
def test_init_is_deterministic_and_in_scale(cfg):
    """Same config and seed, same bits; the first logits are of the order of one, whatever the family."""
    cfg = replace(cfg, vocab_size=64, d_model=64, d_ff=128)
    init = jax.jit(functools.partial(families.init, cfg))
    params, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert not np.array_equal(params["embed"], other["embed"])
    assert 0.3 < np.std(families.apply(cfg, params, random_tokens(0, (4, 16)))) < 3


@every_model
def test_dropout_is_off_without_a_key_and_drawn_from_the_key(cfg):
    """An evaluation under dropout measures another model; a resumed step must draw the numbers it would have drawn."""
    cfg = replace(cfg, dropout=0.25)
    params, tokens_BxT = random_params(cfg), random_tokens()
    plain = run(cfg, params, tokens_BxT)
    np.testing.assert_array_equal(plain, run(replace(cfg, dropout=0.0), params, tokens_BxT))
    first, again, other = (run(cfg, params, tokens_BxT, dropout_key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, plain)


@pytest.mark.parametrize("family", ["lstm", "rnn"])
def test_dropout_never_touches_the_recurrence(family):
    """Zaremba et al. 2014, section 3.1: dropped from the state, a memory is lost at every step.

    Of one layer whose input is silenced, the state that goes on is the same whatever was dropped from its output.
    """
    cfg = replace(BASE, family=family, num_layers=1, dropout=0.5)
    params = random_params(cfg)
    params = {**params, "blocks": {**params["blocks"], "input": jnp.zeros_like(params["blocks"]["input"])}}
    tokens_BxT, cache = random_tokens(), families.init_cache(cfg, B, T)
    logits, plain = run(cfg, params, tokens_BxT, None, cache)
    dropped_logits, dropped = run(cfg, params, tokens_BxT, None, cache, jax.random.key(0))
    assert not np.array_equal(logits, dropped_logits)
    jax.tree.map(np.testing.assert_array_equal, plain, dropped)


@every_model
def test_bfloat16_is_near_float32(cfg):
    """Computing in bfloat16 changes the logits by its rounding, about 1 % here; parameters, logits and gradients are float32."""
    half = replace(cfg, dtype="bfloat16")
    params, tokens_BxT = random_params(cfg), random_tokens()
    exact, rounded = run(cfg, params, tokens_BxT), run(half, params, tokens_BxT)
    assert rounded.dtype == jnp.float32
    error = np.sqrt(np.square(exact - rounded).mean() / np.square(exact).mean())
    assert 2**-10 < error < 0.03
    grads = jax.eval_shape(functools.partial(gradient_and_logits, half), params, tokens_BxT, tokens_BxT)[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    cache = families.init_cache(half, B, T)
    after = jax.eval_shape(functools.partial(families.apply, half), params, tokens_BxT, None, cache)[1]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)


@every_model
def test_logical_axes_name_every_dimension(cfg):
    """A mesh shards by these names: one too few, or on the wrong dimension, and it shards something else."""
    cfg = replace(cfg, d_model=20, num_layers=3, d_ff=28)
    sizes = {"vocab": VOCAB, "layers": 3, "embed": 20, "state": 20, "mlp": 28, "context": cfg.ngram_order - 1}
    sizes["gates"] = 4 if cfg.family == "lstm" else 1
    shapes = jax.eval_shape(functools.partial(families.init, cfg), jax.random.key(0))
    axes = families.logical_axes(cfg)
    assert jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, PartitionSpec)) == jax.tree.structure(shapes)
    jax.tree.map(
        lambda leaf, spec: np.testing.assert_equal(leaf.shape, tuple(sizes[name] for name in spec)), shapes, axes
    )


def test_the_gradient_of_a_frequent_token_adds_up_in_float32():
    """A sum in bfloat16 stops growing where a term is less than a 512th of it: the commonest tokens would learn the slowest."""

    def value(table):
        return lookup(table, jnp.zeros(3000, jnp.int32), jnp.bfloat16).astype(jnp.float32).sum()

    assert float(jax.grad(value)(jnp.ones((2, 1)))[0, 0]) == 3000


@every_model
def test_every_family_looks_its_tokens_up_so(cfg):
    half = replace(cfg, dtype="bfloat16")
    shapes = jax.eval_shape(functools.partial(families.init, half), jax.random.key(0))
    tokens_BxT = random_tokens()
    traced = str(jax.make_jaxpr(functools.partial(gradient_and_logits, half))(shapes, tokens_BxT, tokens_BxT))
    sums = [line.split("=")[0] for line in traced.splitlines() if "= scatter-add" in line]
    assert sums
    assert not [one for one in sums if "bf16" in one]
