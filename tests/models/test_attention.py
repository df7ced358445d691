"""The plain attention, which faster kernels are held against, is itself held against loops over heads and positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models.attention import attend, attend_plain, attend_window, attention_mask

B, T, H = 2, 7, 6
compiled = jax.jit(attend, static_argnames="window")
SEGMENT_BxT = np.array([[1, 1, 1, 2, 2, 3, 0], [5, 5, 5, 5, 5, 5, 5]], np.int32)


def arrays(seed: int, num_heads: int, kv_heads: int, num_keys: int, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = (B, T, num_heads, H), (B, num_keys, kv_heads, H), (B, num_keys, kv_heads, H)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def sees(query: int, key: int, window: int | None, segment_T: np.ndarray | None, offset: int) -> bool:
    near = 0 <= query + offset - key < (window or np.inf)
    return near and (segment_T is None or segment_T[query] == segment_T[key])


def loops(q, k, v, window=None, segment_BxT=None, offset=0) -> np.ndarray:
    """Attention in float64, one query of one head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        segment_T = None if segment_BxT is None else segment_BxT[b]
        keys = [s for s in range(k.shape[1]) if sees(t, s, window, segment_T, offset)]
        score = np.array([q[b, t, n] @ k[b, s, n // group] for s in keys]) / np.sqrt(q.shape[3])
        weight = np.exp(score - score.max()) / np.exp(score - score.max()).sum()
        out[b, t, n] = sum(w * v[b, s, n // group] for w, s in zip(weight, keys, strict=True))
    return out


CASES = {
    "multi-head": {"num_heads": 4, "kv_heads": 4},
    "grouped-query": {"num_heads": 4, "kv_heads": 2},
    "multi-query, window of 3": {"num_heads": 4, "kv_heads": 1, "window": 3},
    "window of itself alone": {"num_heads": 2, "kv_heads": 2, "window": 1},
    "window wider than the row": {"num_heads": 2, "kv_heads": 2, "window": 99},
    "documents": {"num_heads": 2, "kv_heads": 2, "segment_BxT": SEGMENT_BxT},
    "documents in a window": {"num_heads": 4, "kv_heads": 2, "segment_BxT": SEGMENT_BxT, "window": 2},
    "a cache with room": {"num_heads": 4, "kv_heads": 2, "num_keys": 12, "offset": 3},
    "a cache, window, full": {"num_heads": 4, "kv_heads": 2, "num_keys": 12, "offset": 5, "window": 4},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attend_equals_loops(case):
    """Who attends to whom, the scale 1/sqrt(H) and which heads pair: what a fast kernel must match too."""
    case = dict(case)
    q, k, v = arrays(0, case.pop("num_heads"), case.pop("kv_heads"), case.pop("num_keys", T))
    np.testing.assert_allclose(compiled(q, k, v, **case), loops(q, k, v, **case), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("window", "segment_BxT", "offset", "num_keys"),
    [
        (None, None, None, T),
        (3, None, None, T),
        (None, SEGMENT_BxT, None, T),
        (2, SEGMENT_BxT, None, T),
        (None, None, 2, T + 2),
        (2, None, 4, T + 6),
    ],
)
def test_mask_is_true_exactly_where_a_query_may_look(window, segment_BxT, offset, num_keys):
    """One entry too many leaks the answer into training; one too few loses context. Both train without complaint."""
    mask = np.asarray(attention_mask(T, num_keys, window, segment_BxT, offset))
    rows = 1 if segment_BxT is None else B
    assert mask.shape == (rows, 1, 1, T, num_keys)
    for b, t, s in np.ndindex(rows, T, num_keys):
        assert mask[b, 0, 0, t, s] == sees(t, s, window, None if segment_BxT is None else segment_BxT[b], offset or 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_large_scores_pick_one_value_and_stay_finite(dtype):
    """Without the maximum subtracted exp overflows at a score of 89, and early training reaches that."""
    q, k, v = arrays(1, 2, 2, T, dtype)
    q = q * dtype(1e4)
    scores = np.einsum("btnh,bsnh->bnts", np.asarray(q, np.float64), np.asarray(k, np.float64)) / np.sqrt(H)
    assert np.abs(scores).max() > 1e4
    scores[:, :, ~np.tri(T, dtype=bool)] = -np.inf
    picked_BxNxT = scores.argmax(-1)
    expected = np.asarray(v, np.float32)[np.arange(B)[:, None, None], picked_BxNxT, np.arange(2)[None, :, None]]
    out, grads = jax.jit(jax.value_and_grad(lambda q: attend(q, k, v).astype(jnp.float32).sum()))(q)
    assert np.isfinite(out)
    assert np.isfinite(np.asarray(grads, np.float32)).all()
    np.testing.assert_allclose(np.asarray(compiled(q, k, v), np.float32), expected.transpose(0, 2, 1, 3), rtol=1e-6)


def test_positions_beyond_the_filled_cache_have_no_influence():
    """A cache is allocated once for the longest answer; what lies beyond `offset` + T is left over from nothing."""
    q, k, v = arrays(2, 4, 2, 12)
    stale_k, stale_v = (x.at[:, 3 + T :].set(1e4) for x in (k, v))
    out = compiled(q, k, v, offset=3)
    np.testing.assert_array_equal(compiled(q, stale_k, stale_v, offset=3), out)
    assert not np.array_equal(compiled(q, stale_k, stale_v, offset=4), out)


def test_a_query_that_sees_nothing_is_finite():
    """Padding rows of a cache may see no key at all; a NaN there spreads through the sum of the loss."""
    q, k, v = arrays(3, 2, 2, T)
    assert np.isfinite(compiled(q, k, v, offset=-3)).all()


def test_bfloat16_stays_within_its_rounding():
    """Half-width attention is only as wrong as its roundings, each of which is at most 2^-8 of what it rounds."""
    q, k, v = arrays(4, 4, 2, T, jnp.bfloat16)
    out, expected = compiled(q, k, v), loops(q, k, v)
    assert out.dtype == jnp.bfloat16
    scores = np.einsum("btkgh,bskh->bkgts", np.asarray(q, np.float64).reshape(B, T, 2, 2, H), np.asarray(k, np.float64))
    # Scores are rounded twice, with the scaled query and as a sum. An error e of a score moves its weight, and by the
    # normalisation that of all others, by a factor exp(e). Weights and output are rounded once each.
    bound = 2**-8 * (2 * 2 * np.abs(scores).max() / np.sqrt(H) + 2) * np.abs(np.asarray(v, np.float64)).max()
    assert 0 < np.abs(np.asarray(out, np.float64) - expected).max() < bound


# Uneven documents: ends inside of blocks, at their edges and across several; one id comes back, which no packer writes.
UNEVEN_BxT = np.array(
    [np.repeat([1, 2, 3, 4, 5], [1, 9, 2, 4, 8]), np.repeat([7, 8, 7, 0, 9], [4, 4, 5, 10, 1])], np.int32
)


@pytest.mark.parametrize(
    ("window", "segment_BxT"),
    [
        (4, UNEVEN_BxT),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, None), (4, None), (8, None))),
        *(pytest.param(window, UNEVEN_BxT, marks=pytest.mark.slow) for window in (1, 8)),
    ],
    ids=lambda case: (
        f"window {case}" if isinstance(case, int) else "no segments" if case is None else "uneven documents"
    ),
)
def test_blocks_of_a_window_equal_the_plain_product(window, segment_BxT):
    """Blocks are where a window goes wrong unseen: a query at an edge that misses a key, or sees one too many, still trains."""
    rng = np.random.default_rng(5)
    q, k, v, dy = (jnp.asarray(rng.normal(size=(2, 24, heads, H)), jnp.float32) for heads in (4, 2, 2, 4))

    def value_and_grads(attention):
        out, pull_back = jax.vjp(lambda q, k, v: attention(q, k, v, window=window, segment_BxT=segment_BxT), q, k, v)
        return out, *pull_back(dy)

    for ours, plain in zip(value_and_grads(attend_window), value_and_grads(attend_plain), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        attend_window(q, k, v, window=window, segment_BxT=segment_BxT), loops(q, k, v, window, segment_BxT), atol=1e-5
    )


def test_blocks_of_a_window_never_form_the_square():
    """The reason for blocks: FLOPs as compiled grow with T x window, those of the plain product with T x T."""

    def flops(attention, num_keys):
        x = jnp.zeros((1, num_keys, 2, H))
        return jax.jit(lambda x: attention(x, x, x, window=8)).lower(x).compile().cost_analysis()["flops"]

    assert flops(attend, 512) == flops(attend_window, 512)
    assert flops(attend_window, 512) == pytest.approx(4 * flops(attend_window, 128), rel=0.05)
    assert flops(attend_plain, 512) > 12 * flops(attend_plain, 128)


def test_the_gpus_kernel_is_asked_for_what_it_can_do_alone(monkeypatch):
    """A mask as an array makes it three times slower, and what it does not know it would leave out: those go the plain way."""
    asked = []
    monkeypatch.setattr("llm_jax.kernels.used", lambda: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **settings: asked.append(settings) or q)
    q, k, v = (jnp.zeros((B, T, 9, 64), jnp.bfloat16) for _ in range(3))
    attend(q, k, v)
    attend(q, k, v, window=3)
    attend(q, k, v, causal=False)
    assert [(one["is_causal"], one["local_window_size"]) for one in asked] == [
        (True, None),
        (True, (2, 0)),
        (False, None),
    ]
    assert all(one["implementation"] == "cudnn" for one in asked)
    attend(q, k, v, offset=jnp.int32(0))
    attend(q, k, v, visible_BxS=jnp.ones((B, T), bool))
    attend(*(x.astype(jnp.float32) for x in (q, k, v)))
    attend(*(jnp.zeros((B, T, 9, 129), jnp.bfloat16) for _ in range(3)))
    small = jnp.zeros((B, T, 8, 64), jnp.bfloat16)
    attend(small, small[:, :5], small[:, :5])  # as of a decoder to its source
    assert len(asked) == 3


def test_documents_have_a_kernel_of_their_own_on_a_gpu(monkeypatch):
    """A mask of documents as an array takes T x T float32 a head, and cuDNN is given none; what the kernel cannot do goes the plain way."""
    asked = []
    monkeypatch.setattr("llm_jax.kernels.used", lambda: True)
    monkeypatch.setattr("llm_jax.kernels.attention.attend", lambda q, k, v, segments, *how: asked.append(how) or q)
    q, k = jnp.zeros((1, 40, 4, 64), jnp.bfloat16), jnp.zeros((1, 40, 2, 64), jnp.bfloat16)
    segments = jnp.zeros((1, 40), jnp.int32)
    attend(q, k, k, segment_BxT=segments)
    attend(q, k, k, segment_BxT=segments, window=10)
    attend(q, k, k, segment_BxT=segments, causal=False)
    attend(
        q, k, k, window=10
    )  # without documents, as the model is small: cuDNN's first run would disturb another trial
    assert asked == [(True, None), (True, 10), (False, None), (True, 10)]
    attend(q, k, k, segment_BxT=segments, offset=jnp.int32(0))
    attend(q[:, :20], k, k, segment_BxT=segments)
    attend(*(x.astype(jnp.float32) for x in (q, k, k)), segment_BxT=segments)
    assert len(asked) == 4
