"""The families with an encoder against their own equations in NumPy float64, and against what source and target may see.

Parameters are random throughout: those of `init` hold zeros and ones, behind which most mistakes hide.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from numerics import (
    VOCAB,
    B,
    T,
    assert_close,
    assert_gradient,
    change_token,
    in_float64,
    layers_of,
    mean_nll,
    random_params,
    random_tokens,
    reference_mlp,
    reference_norm,
    reference_rotation,
    sigmoid,
)

from llm_jax.config import Config, Data, Model
from llm_jax.generation import sampling
from llm_jax.models import families
from llm_jax.settings import BadInput

P = 4
BASE = Model(vocab_size=VOCAB, num_layers=2, d_model=16, d_ff=24)
VASWANI = replace(
    BASE,
    family="encoder_decoder",
    norm_position="post",
    norm="layernorm",
    positions="sinusoidal",
    mlp="relu",
    qk_norm=False,
)
MODELS = {
    "vaswani": VASWANI,
    "modern": replace(
        BASE, family="encoder_decoder", num_encoder_layers=1, num_kv_heads=1, mlp="swiglu", scan_layers=True
    ),
    "learned": replace(BASE, family="encoder_decoder", positions="learned", max_context=8, tie_embeddings=False),
    "bahdanau": replace(BASE, family="seq2seq_rnn", num_layers=1, num_encoder_layers=2),
    "deep rnn": replace(BASE, family="seq2seq_rnn", num_layers=3, num_encoder_layers=1, tie_embeddings=False),
}
pytestmark = pytest.mark.usefixtures("quick_compilation")  # nine tenths of this file is compiling
every_model = pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)


@functools.partial(jax.jit, static_argnums=(0, 6))
def run(cfg, params, tokens_BxT, segment_BxT=None, cache=None, dropout_key=None, prefix=P):
    return families.apply(cfg, params, tokens_BxT, segment_BxT, cache, dropout_key, prefix)


# The references: one row at a time, one head and one step at a time, in float64.


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference_attention(cfg, p, x, source, causal, rotary):
    """Of the rows of x to those of `source`, head by head."""
    out, group = 0.0, cfg.num_heads // cfg.kv_heads
    for n in range(cfg.num_heads):
        q, k, v = x @ p["q"][:, n], source @ p["k"][:, n // group], source @ p["v"][:, n // group]
        if cfg.qk_norm:
            q, k = (reference_norm("rmsnorm", y, p[f"{i}_norm"]["scale"]) for i, y in (("q", q), ("k", k)))
        if rotary:
            q, k = reference_rotation(q, cfg.rope_theta), reference_rotation(k, cfg.rope_theta)
        scores = q @ k.T / np.sqrt(cfg.head_width)
        if causal:
            scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        out = out + softmax(scores) @ v @ p["out"][n]
    return out


def reference_transformer(cfg, params, source, target):
    def embedded(tokens):
        x = params["embed"][tokens] * np.sqrt(cfg.d_model)
        if cfg.positions == "learned":
            return x + params["positions"][: len(tokens)] * np.sqrt(cfg.d_model)
        if cfg.positions == "sinusoidal":
            angle = np.arange(len(tokens))[:, None] / 10_000 ** (np.arange(cfg.d_model // 2) / (cfg.d_model // 2))
            return x + np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
        return x

    def block(p, x, *branches):
        for i, branch in enumerate(branches, 1):
            norm = functools.partial(reference_norm, cfg.norm, scale=p[f"norm{i}"]["scale"])
            x = x + branch(norm(x)) if cfg.norm_position == "pre" else norm(x + branch(x))
        return x

    def last(name, x):
        return reference_norm(cfg.norm, x, params[name]["scale"]) if cfg.norm_position == "pre" else x

    rotary = cfg.positions == "rotary"
    read = embedded(source)
    for p in layers_of(params["encoder_blocks"], cfg.encoder_layers):
        read = block(
            p,
            read,
            lambda y, p=p: reference_attention(cfg, p["attention"], y, y, False, rotary),
            lambda y, p=p: reference_mlp(cfg, p["mlp"], y),
        )
    read, x = last("encoder_norm", read), embedded(target)
    for p in layers_of(params["decoder_blocks"], cfg.num_layers):
        x = block(
            p,
            x,
            lambda y, p=p: reference_attention(cfg, p["attention"], y, y, True, rotary),
            lambda y, p=p: reference_attention(cfg, p["cross"], y, read, False, False),
            lambda y, p=p: reference_mlp(cfg, p["mlp"], y),
        )
    return last("norm", x) @ (params["embed"].T if cfg.tie_embeddings else params["head"])


def lstm(gates_ZxD, c):
    i, f, g, o = gates_ZxD
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def products(y, w_DxZxD):
    return np.stack([y @ w_DxZxD[:, z] for z in range(4)])


def reference_recurrent(cfg, params, source, target):
    """Bahdanau et al. 2015, step by step."""
    width = cfg.d_model
    read = [params["embed"][token] * np.sqrt(width) for token in source]
    for p in layers_of(params["encoder_blocks"], cfg.encoder_layers):
        normed = [reference_norm(cfg.norm, x, p["norm"]["scale"]) for x in read]
        out = np.zeros((len(source), 2, width // 2))
        for r, order in enumerate([range(len(source)), reversed(range(len(source)))]):
            h, c = np.zeros((2, width // 2))
            for j in order:
                gates = products(normed[j], p["input"][:, r]) + products(h, p["recurrent"][r]) + p["bias"][r]
                h, c = lstm(gates, c)
                out[j, r] = h
        read = [x + y.reshape(-1) for x, y in zip(read, out, strict=True)]
    notes = [reference_norm(cfg.norm, x, params["encoder_norm"]["scale"]) for x in read]

    p, above = params["decoder"], layers_of(params.get("decoder_blocks", {}), cfg.num_layers - 1)
    states = [(np.tanh(notes[0] @ params["start"]), np.zeros(width))] + [tuple(np.zeros((2, width))) for _ in above]
    logits = []
    for token in target:
        x = params["embed"][token] * np.sqrt(width)
        s, c = states[0]
        energies = np.array([p["score"] @ np.tanh(s @ p["query"] + h @ params["keys"]) for h in notes])
        context = sum(a * h for a, h in zip(softmax(energies), notes, strict=True))
        gates = products(reference_norm(cfg.norm, x, p["norm"]["scale"]), p["input"]) + products(s, p["recurrent"])
        states[0] = lstm(gates + products(context, p["context"]) + p["bias"], c)
        x = x + states[0][0] + context @ p["out"]
        for i, q in enumerate(above, 1):
            y = reference_norm(cfg.norm, x, q["norm"]["scale"])
            gates = products(y, q["input"]) + products(states[i][0], q["recurrent"]) + q["bias"]
            states[i] = lstm(gates, states[i][1])
            x = x + states[i][0]
        x = reference_norm(cfg.norm, x, params["norm"]["scale"])
        logits.append(x @ (params["embed"].T if cfg.tie_embeddings else params["head"]))
    return np.stack(logits)


def reference(cfg, params, source, target):
    """Logits of one row's target, T-P x V."""
    return (reference_transformer if cfg.family == "encoder_decoder" else reference_recurrent)(
        cfg, params, source, target
    )


@every_model
def test_logits_equal_the_reference(cfg):
    """The model is the equations of its papers; a decoder that looks at the wrong side still trains, only worse."""
    params, tokens_BxT = random_params(cfg), random_tokens()
    logits_BxTxV = run(cfg, params, tokens_BxT)
    assert logits_BxTxV.dtype == jnp.float32
    assert logits_BxTxV.shape == (B, T - P, VOCAB)
    exact = in_float64(params)
    assert_close(logits_BxTxV, np.stack([reference(cfg, exact, row[:P], row[P:]) for row in tokens_BxT]), 2e-5)


@every_model
def test_the_source_is_seen_whole_and_the_target_never_ahead(cfg):
    """Every token of the source moves every prediction; one of the target moves its own and those after it."""
    params, tokens_BxT = random_params(cfg), random_tokens()
    before = np.asarray(run(cfg, params, tokens_BxT))
    for t in range(T):
        moved_BxT = (np.asarray(run(cfg, params, change_token(tokens_BxT, t))) != before).any(-1)
        expected = np.arange(T - P) >= t - P
        np.testing.assert_array_equal(moved_BxT, np.broadcast_to(expected, moved_BxT.shape))


def padded(cfg, tokens_BxT, room, more, filler):
    """(tokens, segments, prefix) with `room` more positions before the source and `more` behind the target."""
    fill = functools.partial(np.pad, pad_width=((0, 0), (room, more)))
    return fill(tokens_BxT, constant_values=filler), fill(np.zeros_like(tokens_BxT), constant_values=1), P + room


@every_model
@pytest.mark.parametrize("filler", [0, 5])
def test_padding_is_invisible(cfg, filler):
    """To rounding, whatever it is filled with: a row's neighbours in a batch decide how much it is padded."""
    params, tokens_BxT = random_params(cfg), random_tokens()
    tokens, segments, prefix = padded(cfg, tokens_BxT, 3, 2, filler)
    logits = run(cfg, params, tokens, segments, prefix=prefix)
    assert_close(logits[:, : T - P], run(cfg, params, tokens_BxT), 1e-6)


@every_model
@pytest.mark.parametrize("room", [0, 2])
def test_decoding_with_a_cache_equals_the_full_pass(cfg, room):
    """The source is read once and kept; what the model says must not depend on how the rest was fed."""
    params, tokens_BxT = random_params(cfg), random_tokens()
    expected_BxTxV = run(cfg, params, tokens_BxT)
    tokens, segments, prefix = padded(cfg, tokens_BxT, room, 0, 3)
    for chunks in [(1,) * (T - P), (3, 1, 1)]:
        cache, logits, end = families.init_cache(cfg, B, T + room, prefix), [], prefix
        for i, chunk in enumerate(chunks):
            start, end = 0 if i == 0 else end, end + chunk
            first = (segments[:, :end] if room else None, cache, None, prefix) if i == 0 else (None, cache, None, 0)
            step_BxCxV, cache = run(cfg, params, tokens[:, start:end], *first)
            logits.append(step_BxCxV)
        assert_close(np.concatenate(logits, axis=1), expected_BxTxV, 2e-5)


@functools.partial(jax.jit, static_argnums=(0, 5))
def gradient(cfg, params, tokens_BxT, targets_BxT, segment_BxT=None, prefix=P):
    def loss(params):
        log_p_BxTxV = jax.nn.log_softmax(families.apply(cfg, params, tokens_BxT, segment_BxT, prefix=prefix))
        return -jnp.take_along_axis(log_p_BxTxV[:, : T - P], targets_BxT[:, :, None], axis=-1).mean()

    return jax.grad(loss)(params)


@every_model
@pytest.mark.parametrize("room", [0, 2])
def test_gradients_equal_finite_differences(cfg, room):
    """The float32 gradient against central differences of the float64 reference, which knows of no padding."""
    params, tokens_BxT, targets_BxT = random_params(cfg), random_tokens(0), random_tokens(1, (B, T - P))
    tokens, segments, prefix = padded(cfg, tokens_BxT, room, room, 3)

    def loss_of(params) -> float:
        rows = zip(tokens_BxT, targets_BxT, strict=True)
        return float(np.mean([mean_nll(reference(cfg, params, row[:P], row[P:]), targets) for row, targets in rows]))

    grads = gradient(cfg, params, tokens, targets_BxT, segments if room else None, prefix)
    assert_gradient(grads, loss_of, params, h=1e-5, tolerance=3e-5, least=1e-7)


@every_model
def test_greedy_text_is_that_of_the_full_forward_pass(cfg):
    """One compiled loop generates for all families; here it encodes first."""
    params, text_BxT = random_params(cfg), random_tokens(5, (B, P + 2))
    fast = sampling.generate(
        cfg, params, jnp.asarray(text_BxT), jax.random.key(0), num_tokens=4, temperature=0, prefix=P
    )
    for _ in range(4):
        best_B = np.asarray(run(cfg, params, text_BxT)[:, -1].argmax(-1), np.int32)
        text_BxT = np.concatenate([text_BxT, best_B[:, None]], axis=1)
    np.testing.assert_array_equal(fast, text_BxT[:, P + 2 :])


@pytest.mark.parametrize(
    "cfg",
    [
        pytest.param(cfg, marks=() if name in ("modern", "bahdanau") else pytest.mark.slow)
        for name, cfg in MODELS.items()
    ],
    ids=MODELS,
)
def test_init_is_deterministic_and_in_scale(cfg):
    """Same config and seed, same bits; the first logits are of the order of one."""
    cfg = replace(cfg, vocab_size=64, d_model=64, d_ff=128)
    init = jax.jit(functools.partial(families.init, cfg))
    params, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert not np.array_equal(params["embed"], other["embed"])
    assert 0.3 < np.std(run(cfg, params, random_tokens(0, (4, 12)))) < 3


@every_model
def test_dropout_and_bfloat16(cfg):
    """Dropout is off without a key and drawn from it; bfloat16 is off by its rounding alone, and logits are float32."""
    params, tokens_BxT = random_params(cfg), random_tokens()
    plain, dropped = run(cfg, params, tokens_BxT), replace(cfg, dropout=0.25)
    np.testing.assert_array_equal(plain, run(dropped, params, tokens_BxT))
    first, again, other = (run(dropped, params, tokens_BxT, dropout_key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    half = run(replace(cfg, dtype="bfloat16"), params, tokens_BxT)
    assert half.dtype == jnp.float32
    assert 2**-10 < np.sqrt(np.square(plain - half).mean() / np.square(plain).mean()) < 0.06


@every_model
def test_logical_axes_name_every_dimension(cfg):
    """A mesh shards by these names: one too few, or on the wrong dimension, and it shards something else."""
    cfg = replace(cfg, d_model=20, num_heads=2, d_ff=28, num_layers=3, num_encoder_layers=3)
    sizes = {"vocab": {VOCAB}, "layers": {2, 3}, "embed": {10, 20}, "state": {10, 20}, "mlp": {28}, "positions": {8}}
    sizes |= {"gates": {4}, "directions": {2}, "heads": {2}, "kv": {1, 2}, "head": {10}}
    shapes = jax.eval_shape(functools.partial(families.init, cfg), jax.random.key(0))
    axes = families.logical_axes(cfg)
    assert jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, PartitionSpec)) == jax.tree.structure(shapes)

    def check(leaf, spec):
        assert len(leaf.shape) == len(spec)
        assert all(size in sizes[name] for size, name in zip(leaf.shape, spec, strict=True))

    jax.tree.map(check, shapes, axes)


@pytest.mark.parametrize("family", ["transformer", "lstm", "rnn", "feedforward"])
def test_families_without_an_encoder_read_the_same_rows(family):
    """Their logits begin after the prefix too, and padding around the document is invisible to them, with a cache as without."""
    cfg = replace(BASE, family=family, ngram_order=4)
    params, tokens_BxT = random_params(cfg), random_tokens()
    whole = run(cfg, params, tokens_BxT, prefix=0)
    np.testing.assert_array_equal(run(cfg, params, tokens_BxT), whole[:, P:])
    tokens, segments, prefix = padded(cfg, tokens_BxT, 3, 2, 5)
    assert_close(run(cfg, params, tokens, segments, prefix=prefix)[:, : T - P], whole[:, P:], 1e-6)
    cache, end = families.init_cache(cfg, B, T + 3), prefix + 2
    first, cache = run(cfg, params, tokens[:, :end], segments[:, :end], cache, prefix=prefix)
    second, _ = run(cfg, params, tokens[:, end : T + 3], None, cache, prefix=0)
    assert_close(np.concatenate([first, second], axis=1), whole[:, P:], 2e-5)


def test_settings_without_a_meaning_are_refused():
    """Each in one line, which says what would do."""
    encoder = replace(BASE, family="encoder_decoder", vocab_size=256)
    for make, message in [
        (lambda: Config(model=encoder), "reads data.prefix tokens with its encoder: give it, for instance 64"),
        (lambda: Config(model=encoder, data=Data(prefix=8, document_mask=True)), "document_mask has no meaning"),
        (lambda: replace(encoder, window=4), "model.window is of the causal family"),
        (lambda: replace(BASE, family="seq2seq_rnn", d_model=15), "try 16"),
        (lambda: Data(prefix=128), r"must lie in \[0, 127\]"),
        (lambda: Data(source="pairs", files=("x.tsv",)), "needs data.prefix, the room of the source; try 64"),
        (lambda: Data(source="pairs", prefix=8, files=("x.tsv",), document_mask=True), "one pair a row"),
        (lambda: families.apply(encoder, {}, random_tokens()), "prefix must be 1 or more"),
    ]:
        with pytest.raises(BadInput, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)
