"""The Transformer against its own mathematics in NumPy float64, and against what a language model must never do.

Parameters are random throughout: those of `init` hold zeros and ones, behind which most mistakes hide.
"""

import functools
import itertools
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
    path_name,
    random_params,
    random_tokens,
    reference_mlp,
    reference_norm,
    reference_rotation,
    run,
)

from llm_jax import parts
from llm_jax.config import Model
from llm_jax.models import transformer
from llm_jax.models.families import apply, init, init_cache, logical_axes
from llm_jax.models.transformer import Cache
from llm_jax.settings import BadInput

BASE = Model(vocab_size=VOCAB, num_layers=2, d_model=16, num_heads=4, d_ff=24, max_context=16)
VARIANTS = {
    "default": BASE,
    "gpt2": replace(BASE, norm="layernorm", positions="learned", mlp="gelu", qk_norm=False),
    "llama": replace(BASE, mlp="swiglu", num_kv_heads=2, qk_norm=False, tie_embeddings=False, rope_theta=500.0),
    "gemma": replace(BASE, mlp="gelu", num_kv_heads=1, head_dim=6, logit_softcap=2.0, window=3),
    "vaswani": replace(BASE, norm="layernorm", norm_position="post", positions="sinusoidal", tie_embeddings=False),
    "post, rotary, window": replace(BASE, norm_position="post", mlp="swiglu", num_kv_heads=2, window=4, num_layers=1),
    "learned, window, scanned": replace(BASE, positions="learned", tie_embeddings=False, window=3, scan_layers=True),
    "sinusoidal, odd heads": replace(
        BASE, positions="sinusoidal", norm="layernorm", mlp="swiglu", num_kv_heads=1, head_dim=5, logit_softcap=9.0
    ),
}
pytestmark = pytest.mark.usefixtures("quick_compilation")  # nine tenths of this file is compiling
every_variant = pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
windowed = pytest.mark.parametrize(
    "cfg", [cfg for cfg in VARIANTS.values() if cfg.window], ids=[name for name in VARIANTS if VARIANTS[name].window]
)


# The reference: one row at a time, one head and one position at a time, in float64.


def reference_attention(cfg: Model, p, x_TxD):
    out_TxD = np.zeros_like(x_TxD)
    for n in range(cfg.num_heads):
        group = n // (cfg.num_heads // cfg.kv_heads)
        q, k, v = x_TxD @ p["q"][:, n], x_TxD @ p["k"][:, group], x_TxD @ p["v"][:, group]
        if cfg.qk_norm:
            q, k = (reference_norm("rmsnorm", x, p[f"{name}_norm"]["scale"]) for x, name in ((q, "q"), (k, "k")))
        if cfg.positions == "rotary":
            q, k = reference_rotation(q, cfg.rope_theta), reference_rotation(k, cfg.rope_theta)
        for t in range(len(x_TxD)):
            first = 0 if cfg.window is None else max(0, t + 1 - cfg.window)
            weight = np.exp(k[first : t + 1] @ q[t] / np.sqrt(cfg.head_width))
            out_TxD[t] += weight @ v[first : t + 1] / weight.sum() @ p["out"][n]
    return out_TxD


def reference(cfg: Model, params, tokens_T) -> np.ndarray:
    """Logits of one row, TxV."""
    x_TxD = params["embed"][tokens_T] * np.sqrt(cfg.d_model)
    position_T = np.arange(len(tokens_T))
    if cfg.positions == "learned":
        x_TxD = x_TxD + params["positions"][position_T] * cfg.d_model**0.5
    elif cfg.positions == "sinusoidal":
        half = cfg.d_model // 2
        angle = np.outer(position_T, 1 / 10_000 ** (np.arange(half) / half))
        x_TxD = x_TxD + np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    for p in layers_of(params["blocks"], cfg.num_layers):
        norm1, norm2 = (functools.partial(reference_norm, cfg.norm, scale=p[f"norm{i}"]["scale"]) for i in (1, 2))
        if cfg.norm_position == "pre":
            x_TxD = x_TxD + reference_attention(cfg, p["attention"], norm1(x_TxD))
            x_TxD = x_TxD + reference_mlp(cfg, p["mlp"], norm2(x_TxD))
        else:
            x_TxD = norm1(x_TxD + reference_attention(cfg, p["attention"], x_TxD))
            x_TxD = norm2(x_TxD + reference_mlp(cfg, p["mlp"], x_TxD))
    if cfg.norm_position == "pre":
        x_TxD = reference_norm(cfg.norm, x_TxD, params["norm"]["scale"])
    logits_TxV = x_TxD @ (params["embed"].T if cfg.tie_embeddings else params["head"])
    return logits_TxV if cfg.logit_softcap is None else cfg.logit_softcap * np.tanh(logits_TxV / cfg.logit_softcap)


@every_variant
def test_logits_equal_the_reference(cfg):
    """The model is the equations of its papers; a wrong scale or a swapped half still trains, only worse."""
    params, tokens_BxT = random_params(cfg), random_tokens()
    logits_BxTxV = run(cfg, params, tokens_BxT)
    assert logits_BxTxV.dtype == jnp.float32
    assert_close(logits_BxTxV, np.stack([reference(cfg, in_float64(params), row) for row in tokens_BxT]))


@pytest.mark.parametrize("name", ["llama", "gemma", "vaswani", "learned, window, scanned"])
def test_gradients_equal_finite_differences(name):
    """The float32 gradient against central differences of the float64 reference."""
    cfg = VARIANTS[name]
    params, tokens_BxT, targets_BxT = random_params(cfg), random_tokens(0), random_tokens(1)

    def loss_of(params) -> float:
        rows = zip(tokens_BxT, targets_BxT, strict=True)
        return float(np.mean([mean_nll(reference(cfg, params, row), targets) for row, targets in rows]))

    assert_gradient(gradient_and_logits(cfg, params, tokens_BxT, targets_BxT)[0], loss_of, params)


def changed_positions(cfg: Model, t: int) -> list[int]:
    """Where the logits differ in any bit once token t differs, in every row."""
    params, tokens_BxT = random_params(cfg), random_tokens()
    before, after = run(cfg, params, tokens_BxT), run(cfg, params, change_token(tokens_BxT, t))
    rows = np.asarray(before != after).any(-1)
    np.testing.assert_array_equal(rows[0], rows[1])
    return np.flatnonzero(rows[0]).tolist()


@every_variant
@pytest.mark.parametrize("t", [0, 4, T - 1])
def test_a_token_moves_no_logits_before_it_and_all_that_see_it(cfg, t):
    """A model that sees ahead reaches any loss. With a window a token reaches num_layers * (window - 1) on."""
    reach = T if cfg.window is None else cfg.num_layers * (cfg.window - 1)
    assert changed_positions(cfg, t) == list(range(t, min(T, t + reach + 1)))


@windowed
def test_windows_are_short_enough_for_these_tests_to_see_their_end(cfg):
    """Guards the test above: with a receptive field as long as the row it would say nothing about windows."""
    assert cfg.num_layers * (cfg.window - 1) < T - 1


packing = pytest.mark.parametrize("name", ["default", "gpt2", "gemma", "vaswani"])


@packing
def test_packed_documents_do_not_see_each_other(name):
    """Changing one document in a packed row must not move another's logits (trl #3728 is the bug this guards)."""
    cfg = VARIANTS[name]
    params, tokens_BxT = random_params(cfg), random_tokens()
    before = np.asarray(run(cfg, params, tokens_BxT, SEGMENT_BxT))
    for number in np.unique(SEGMENT_BxT):
        inside = SEGMENT_BxT == number
        after = np.asarray(run(cfg, params, np.where(inside, (tokens_BxT + 1) % VOCAB, tokens_BxT), SEGMENT_BxT))
        np.testing.assert_array_equal(before[~inside], after[~inside])
        assert (before[inside] != after[inside]).any(-1).all()


@packing
def test_a_packed_document_reads_as_it_would_alone(name):
    """Positions restart with the document, so that packing is bookkeeping and no part of the experiment."""
    cfg = VARIANTS[name]
    params, tokens_BxT = random_params(cfg), random_tokens()
    packed_BxTxV = np.asarray(run(cfg, params, tokens_BxT, SEGMENT_BxT))
    for row, number in [(0, 1), (0, 2), (1, 7), (1, 3), (1, 4)]:
        document_T = tokens_BxT[row, SEGMENT_BxT[row] == number]
        assert_close(packed_BxTxV[row, SEGMENT_BxT[row] == number], reference(cfg, in_float64(params), document_T))


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_scanned_and_unrolled_layers_are_one_model(name):
    """A checkpoint does not know which of the two trained it: same first parameters, same logits, same gradients."""
    unrolled = VARIANTS[name]
    scanned = replace(unrolled, scan_layers=True)
    params, tokens_BxT, targets_BxT = random_params(unrolled), random_tokens(0), random_tokens(1)
    drawn = jax.jit(transformer.Transformer(unrolled).init)(jax.random.key(0), tokens_BxT)
    jax.tree.map(np.testing.assert_array_equal, initialise(unrolled, jax.random.key(0)), nn.meta.unbox(drawn)["params"])
    scanned_grads, scanned_logits = gradient_and_logits(scanned, params, tokens_BxT, targets_BxT)
    unrolled_grads, unrolled_logits = gradient_and_logits(unrolled, params, tokens_BxT, targets_BxT)
    assert_close(scanned_logits, unrolled_logits, 1e-6)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), scanned_grads, unrolled_grads)


@pytest.mark.parametrize(
    ("recompute", "scan", "products"), [("elementwise", False, 0), ("hidden", False, 2), ("block", True, None)]
)
def test_what_is_computed_anew_changes_memory_alone(recompute, scan, products):
    """The same gradients, and of matrix products just those done again that the setting gives up: SwiGLU's two a layer for the hidden
    layer. In a scanned block they cannot be told by counting."""
    cfg = replace(VARIANTS["llama"], num_layers=1, scan_layers=scan)
    params, tokens_BxT, targets_BxT = random_params(cfg), random_tokens(0), random_tokens(1)
    lighter = replace(cfg, recompute=recompute)
    wanted, _ = gradient_and_logits(cfg, params, tokens_BxT, targets_BxT)
    found, _ = gradient_and_logits(lighter, params, tokens_BxT, targets_BxT)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), found, wanted)
    if products is not None:
        programs = [
            str(
                jax.make_jaxpr(functools.partial(gradient_and_logits.__wrapped__, one))(params, tokens_BxT, targets_BxT)
            )
            for one in (cfg, lighter)
        ]
        plain, more = (program.count("dot_general[") for program in programs)
        attention = 2  # the plain form's, between which is the softmax; cuDNN's kernel keeps what it needs
        assert more - plain == products + attention


@pytest.mark.parametrize("name", ["default", "gpt2", "gemma", "vaswani", "learned, window, scanned"])
def test_decoding_with_a_cache_equals_the_full_pass(name):
    """What a model says must not depend on how its prompt was fed: token by token, or in chunks and then steps."""
    cfg = VARIANTS[name]
    params, tokens_BxT = random_params(cfg), random_tokens()
    expected_BxTxV = run(cfg, params, tokens_BxT)
    for chunks in [(1,) * T, (4, 4, 1), (4, 1, 1, 1, 1, 1)]:
        assert_close(decode(cfg, params, tokens_BxT, chunks, init_cache(cfg, B, 12)), expected_BxTxV)


@pytest.mark.parametrize("name", ["default", "gemma"])
def test_what_lies_in_the_unfilled_cache_has_no_influence(name):
    """A cache may be handed on from one prompt to the next with its length set back to 0, stale entries and all."""
    cfg = VARIANTS[name]
    params, tokens_BxT = random_params(cfg), random_tokens()
    fresh = init_cache(cfg, B, 12)
    stale = Cache(jnp.full_like(fresh.k_LxBxSxKxH, 1e4), jnp.full_like(fresh.v_LxBxSxKxH, -1e4), fresh.length)
    chunks = (4, 4, 1)
    np.testing.assert_array_equal(
        decode(cfg, params, tokens_BxT, chunks, stale), decode(cfg, params, tokens_BxT, chunks, fresh)
    )


def test_cache_is_in_the_dtype_of_the_computation():
    """A float32 cache under bfloat16 doubles the memory that bounds the batch of a rollout."""
    cfg = replace(VARIANTS["llama"], dtype="bfloat16")
    cache = init_cache(cfg, 3, 8)
    assert cache.k_LxBxSxKxH.shape == cache.v_LxBxSxKxH.shape == (2, 3, 8, 2, 4)
    assert cache.k_LxBxSxKxH.dtype == jnp.bfloat16
    after = jax.eval_shape(functools.partial(apply, cfg), random_params(cfg), random_tokens(0, (3, 2)), None, cache)[1]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)


def test_more_tokens_than_positions_are_refused():
    """Out of range, JAX reads the last row of a table and writes over the end of a cache without a word."""
    learned = VARIANTS["gpt2"]
    too_long = random_tokens(0, (1, learned.max_context + 1))
    with pytest.raises(BadInput, match=r"17 tokens exceed the learned positions; model\.max_context=16"):
        apply(learned, random_params(learned), too_long)
    with pytest.raises(BadInput, match=r"17 tokens exceed the learned positions; model\.max_context=16"):
        init_cache(learned, 1, 17)
    with pytest.raises(BadInput, match="17 tokens exceed the cache; it has 8 positions"):
        apply(BASE, random_params(BASE), too_long, None, init_cache(BASE, 1, 8))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries_are_multi_head_with_heads_repeated(kv_heads):
    """Grouped-query attention saves cache and changes nothing else; one key/value head is multi-query attention."""
    cfg = replace(BASE, num_kv_heads=kv_heads)
    params = random_params(cfg)
    attention = params["blocks"]["attention"]
    repeated = {name: jnp.repeat(attention[name], BASE.num_heads // kv_heads, axis=2) for name in ("k", "v")}
    multi_head = {**params, "blocks": {**params["blocks"], "attention": {**attention, **repeated}}}
    tokens_BxT = random_tokens()
    assert attention["k"].shape[2] == kv_heads
    assert_close(run(cfg, params, tokens_BxT), run(BASE, multi_head, tokens_BxT))


def test_softcap_bounds_the_logits():
    """|logits| stay below the cap however large the weights; they are cap * tanh(free / cap)."""
    cfg = VARIANTS["gemma"]
    params = random_params(cfg)
    params = {**params, "embed": 5 * params["embed"]}
    capped, free = (run(c, params, random_tokens()) for c in (cfg, replace(cfg, logit_softcap=None)))
    assert np.abs(free).max() > 10 * cfg.logit_softcap
    assert np.abs(capped).max() <= cfg.logit_softcap
    assert_close(capped, cfg.logit_softcap * np.tanh(np.asarray(free) / cfg.logit_softcap))


@pytest.mark.parametrize("name", ["default", "vaswani"])
def test_bfloat16_is_near_float32(name):
    """Computing in bfloat16 changes the logits by its rounding and no more; parameters and logits remain float32.

    Each rounding adds an independent relative error of at most 2^-8, evenly spread: 2^-8 / sqrt(3) in root mean square.
    A signal passes about 25 of them a layer (weights, norms, projections, rotation, scores, sums); 55 in two layers
    give sqrt(55) * 2^-8 / sqrt(3) = 1.7 %, and twice that leaves room for branches that amplify.
    """
    cfg = VARIANTS[name]
    half = replace(cfg, dtype="bfloat16")
    params, tokens_BxT = random_params(cfg), random_tokens(0)
    exact, rounded = run(cfg, params, tokens_BxT), run(half, params, tokens_BxT)
    assert rounded.dtype == jnp.float32
    error = np.sqrt(np.square(exact - rounded).mean() / np.square(exact).mean())
    assert 2**-10 < error < 0.034
    assert jax.eval_shape(functools.partial(init, half), jax.random.key(0)) == jax.eval_shape(lambda: params)
    grads = jax.eval_shape(functools.partial(gradient_and_logits, half), params, tokens_BxT, tokens_BxT)[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


DROPPING = replace(BASE, dropout=0.25, vocab_size=BASE.d_model, tie_embeddings=False, num_heads=2, scan_layers=True)


def test_dropout_is_off_without_a_key_and_drawn_from_the_key():
    """An evaluation under dropout measures another model; a resumed step must draw the numbers it would have drawn."""
    params, tokens_BxT = random_params(DROPPING), random_tokens(3, (64, T)) % DROPPING.vocab_size
    plain = run(DROPPING, params, tokens_BxT)
    np.testing.assert_array_equal(plain, run(replace(DROPPING, dropout=0.0), params, tokens_BxT))
    first, again, other = (run(DROPPING, params, tokens_BxT, dropout_key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, plain)


def test_dropout_masks_differ_between_embedding_and_layers():
    """One mask for all layers, which a scan without split keys gives, would drop whole channels of the residual stream.

    With the identity as head, a logit is zero exactly where the residual stream is. Silencing all branches shows the
    mask of the embedding; silencing all but one shows that one's, at the channels that the embedding left empty.
    """
    params, tokens_BxT = random_params(DROPPING), random_tokens(3, (64, T)) % DROPPING.vocab_size
    params = {**params, "head": jnp.eye(DROPPING.d_model)}
    branches = [
        (*last, layer) for last in (("attention", "out"), ("mlp", "down")) for layer in range(DROPPING.num_layers)
    ]

    def empty(loud):
        heard = jax.tree.map(lambda p: p, params)  # a copy of the dicts
        for name, last, layer in branches:
            if (name, last, layer) != loud:
                heard["blocks"][name][last] = heard["blocks"][name][last].at[layer].set(0.0)
        return np.asarray(run(DROPPING, heard, tokens_BxT, dropout_key=jax.random.key(0)) == 0)

    embedding = empty(None)
    masks = [empty(branch)[embedding] for branch in branches]
    sigma = np.sqrt(0.25 * 0.75 / embedding.sum())
    assert abs(embedding.mean() - 0.25) < 5 * sigma
    for mask in masks:
        assert abs(mask.mean() - 0.25) < 5 * sigma
    for one, other in itertools.combinations(masks, 2):
        assert abs((one & other).mean() - 0.25**2) < 5 * sigma  # independent of each other


@functools.partial(jax.jit, static_argnums=0)
def added_by_block(train, block, x_BxTxD, key):
    """What the branches of a block add to its input."""
    angles = transformer.rotation(jnp.arange(x_BxTxD.shape[1], dtype=jnp.int32)[None, :], DROPPING)
    module, rngs = transformer.Block(DROPPING, train), {"dropout": key} if train else {}
    return module.apply({"params": block}, x_BxTxD, None, angles, None, jnp.int32(0), rngs=rngs)[0] - x_BxTxD


@pytest.mark.parametrize("silent", [("mlp", "down"), ("attention", "out")])
def test_dropout_preserves_the_mean_of_each_branch(silent):
    """What is kept is scaled by 1 / (1 - p), so that the deterministic pass is the average over masks."""
    block, (name, last), draws = jax.tree.map(lambda p: p[0], random_params(DROPPING)["blocks"]), silent, 1000
    block[name][last] = jnp.zeros_like(block[name][last])
    x_BxTxD = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, DROPPING.d_model)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), draws)
    expected = np.asarray(added_by_block(False, block, x_BxTxD, keys[0]))
    sampled = np.stack([added_by_block(True, block, x_BxTxD, key) for key in keys])
    assert (sampled.std(0) > 0).all()
    error = np.abs(sampled.mean(0) - expected)
    assert (error < 5 * np.abs(expected) * np.sqrt(0.25 / 0.75 / draws) + 1e-6).all()


AXES = {
    "vocab": "vocab_size",
    "positions": "max_context",
    "layers": "num_layers",
    "embed": "d_model",
    "heads": "num_heads",
    "kv": "kv_heads",
    "head": "head_width",
    "mlp": "ff_width",
}


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma", "vaswani"])
def test_logical_axes_name_every_dimension(name):
    """A mesh shards by these names: one too few, or on the wrong dimension, and it shards something else."""
    cfg = replace(VARIANTS[name], d_model=20, num_layers=3, head_dim=6, max_context=17)
    shapes = jax.eval_shape(functools.partial(init, cfg), jax.random.key(0))
    axes = logical_axes(cfg)
    assert jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, PartitionSpec)) == jax.tree.structure(shapes)

    def check(path, leaf, spec):
        assert leaf.shape == tuple(getattr(cfg, AXES[name]) for name in spec), path_name(path)
        assert (spec[0] == "layers") == (path_name(path).split("/")[0] == "blocks")

    jax.tree_util.tree_map_with_path(check, shapes, axes)


@every_variant
def test_parameters_are_counted_without_building_the_model(cfg):
    """Every scaling law is a function of these numbers, and the ladder needs them before anything is compiled."""
    shapes = jax.eval_shape(functools.partial(init, cfg), jax.random.key(0))
    sizes = {path_name(path): leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    assert parts.num_params(cfg) == sum(sizes.values())
    in_blocks = [size for name, size in sizes.items() if name.startswith("blocks") and not name.endswith("scale")]
    assert parts.num_params_matrices(cfg) == sum(in_blocks)


INITIAL = replace(BASE, d_model=64, positions="learned", mlp="swiglu", num_layers=3, scan_layers=True)
initialise = jax.jit(init, static_argnums=0)


def test_init_is_deterministic_and_every_draw_its_own():
    """Same config and seed, same bits; layers that start alike would stay alike in part."""
    params, again, other = (initialise(INITIAL, jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert leaf.dtype == jnp.float32
        if path_name(path).endswith("scale"):
            np.testing.assert_array_equal(leaf, jnp.ones_like(leaf))
        else:
            fan_in = INITIAL.ff_width if path_name(path).endswith("down") else INITIAL.d_model
            branches = 2 * INITIAL.num_layers if path_name(path).endswith(("out", "down")) else 1
            std = (fan_in * branches) ** -0.5
            assert abs(np.std(leaf) - std) < 5 * std / np.sqrt(2 * leaf.size), path_name(path)
            assert not np.array_equal(leaf, functools.reduce(lambda tree, key: tree[key.key], path, other))
            if "blocks" in path_name(path):
                assert not np.array_equal(leaf[0], leaf[1])
    drawn = [leaf.ravel()[:8] for leaf in jax.tree.leaves(params) if np.ptp(leaf) > 0]
    assert len({x.tobytes() for x in map(np.asarray, drawn)}) == len(drawn)


def test_the_first_logits_have_the_same_scale_at_every_depth():
    """The depth of a model is an axis of every sweep: it must not set the scale of what training starts from."""
    spread = []
    for layers in (1, 3, 8):
        cfg = replace(INITIAL, num_layers=layers)
        spread.append(float(np.std(run(cfg, initialise(cfg, jax.random.key(0)), random_tokens()))))
    assert max(spread) < 1.25 * min(spread)
    assert 0.5 < min(spread) < 2


def test_jit_vmap_and_pmap_change_nothing():
    """The model is a pure function: it says the same compiled, over several sets of parameters, over devices."""
    if jax.device_count() < 4:
        pytest.skip(f"needs four devices, there are {jax.device_count()}; tests/conftest.py simulates them on a CPU")
    cfg = replace(BASE, num_layers=1)
    sets = [random_params(cfg, seed) for seed in range(3)]
    tokens_4xBxT = random_tokens(5, (4, B, T))
    expected = [run(cfg, sets[0], tokens_BxT) for tokens_BxT in tokens_4xBxT]
    assert_close(apply(cfg, sets[0], tokens_4xBxT[0]), expected[0], 1e-6)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sets)
    several = jax.jit(jax.vmap(functools.partial(apply, cfg), in_axes=(0, None)))(stacked, tokens_4xBxT[0])
    assert_close(several, np.stack([run(cfg, params, tokens_4xBxT[0]) for params in sets]), 2e-6)
    spread = jax.pmap(functools.partial(apply, cfg), in_axes=(None, 0))(sets[0], tokens_4xBxT)
    assert len(spread.sharding.device_set) == 4
    assert_close(spread, np.stack(expected), 1e-6)
