"""Kernels against their plain forms, forwards and backwards; interpreted where there is no GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import kernels
from llm_jax.kernels import cross_entropy, norm, splash
from llm_jax.models import attention
from llm_jax.training import losses

INTERPRET = jax.default_backend() == "cpu"
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


@pytest.fixture(autouse=True)
def plain_losses(monkeypatch):
    """What kernels are held to never runs one, where there is a GPU."""
    monkeypatch.setattr(kernels, "used", lambda: False)


def normal(seed: int, shape: tuple[int, ...], dtype: str = "float32", deviation: float = 1.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0, deviation, shape), dtype)


def relative(found: jax.Array, wanted: jax.Array) -> float:
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("rmsnorm", "bfloat16"),
        ("layernorm", "float32"),
        pytest.param("rmsnorm", "float32", marks=pytest.mark.slow),
        pytest.param("layernorm", "bfloat16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("rows", "width"), [(37, 48), (5, 1024), (100, 64), (3, 1500)])
def test_gradients_of_norms(kind, dtype, rows, width):
    """By the input, where a residual stream's is added or not, and by the scale; at widths and numbers of rows that fill no block."""
    x, grad, stream = (normal(seed, (rows, width), dtype) for seed in range(3))
    scale = normal(3, (width,))
    exact = [array.astype(jnp.float32) for array in (x, grad, stream)]
    _, back = jax.vjp(lambda x, scale: norm.plain(x, scale, kind), exact[0], scale)
    dx, dscale = back(exact[1])
    for added, wanted in ((None, dx), (stream, dx + exact[2])):
        found, of_scale = norm.gradient(x, grad, scale, kind, added, INTERPRET)
        assert found.dtype == x.dtype
        assert relative(found, wanted) < TOLERANCE[dtype]
        assert relative(of_scale, dscale) < TOLERANCE[dtype]


def test_norms_and_forks_have_the_gradients_of_the_plain_form():
    x, scale = normal(0, (4, 6, 48)), normal(1, (48,))
    stream, grad = normal(2, x.shape), normal(3, x.shape)

    def through(normed, fork):
        def value(x, scale):
            same, branch = fork(x, scale, "layernorm")
            return (same * stream).sum() + (branch * grad).sum() + (normed(x, scale, "rmsnorm") * stream).sum()

        return jax.value_and_grad(value, (0, 1))(x, scale)

    found = through(lambda *a: norm._normed(*a, INTERPRET), lambda *a: norm._forked(*a, INTERPRET))
    wanted = through(norm.plain, lambda x, *a: (x, norm.plain(x, *a)))
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert relative(mine, theirs) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.1, 1e-3)])
@pytest.mark.parametrize("vocab", [300, 256, 5000, 50_304])
def test_cross_entropy_and_its_gradient(vocab, label_smoothing, z_loss, dtype):
    """At vocabularies that fill no block, with rows that do not count, and with logits as large as those of a model that is sure."""
    logits = normal(0, (1, 5, vocab), dtype, deviation=8.0).at[0, 0, 7].set(60.0)
    targets = jnp.asarray([[7, 1, 2, vocab - 1, 7]], jnp.int32)
    weights = jnp.asarray([[1.0, 0.0, 1.0, 0.5, 1.0]], jnp.float32)
    flat = targets[0], weights[0]

    def fused(logits):
        return cross_entropy.summed(logits[0], *flat, label_smoothing, z_loss, INTERPRET)

    def plain(logits):
        total, sums = losses.cross_entropy(logits, targets, weights, z_loss, label_smoothing)
        return total, sums["nll"]

    (total, nll), grad = jax.value_and_grad(fused, has_aux=True)(logits)
    (plain_total, plain_nll), plain_grad = jax.value_and_grad(plain, has_aux=True)(logits)
    assert total == pytest.approx(float(plain_total), rel=1e-5)
    assert nll == pytest.approx(float(plain_nll), rel=1e-5)
    assert grad.dtype == logits.dtype
    assert relative(grad, plain_grad) < TOLERANCE[dtype]
    assert not np.asarray(grad[0, 1], np.float32).any()


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_attention_within_documents(causal):
    """Forwards and by queries, keys and values, with documents that end anywhere, one that is a block and one token of another."""
    dtype, (rows, length, heads, kv_heads, width) = (
        ("float32", (2, 256, 2, 1, 40)) if INTERPRET else ("bfloat16", (4, 1024, 12, 4, 64))
    )
    q, k, v, grad = (
        normal(seed, (rows, length, n, width), dtype) for seed, n in enumerate((heads, kv_heads, kv_heads, heads))
    )
    ends = np.array([[0, 1, 128], [37, 90, length - 3]] * (rows // 2))
    segments = jnp.asarray((np.arange(length)[None, :, None] >= ends[:, None, :]).sum(-1), jnp.int32)

    def through(attend, arrays):
        out, pull_back = jax.vjp(attend, *arrays)
        return out, *pull_back(grad.astype(out.dtype))

    found = through(lambda q, k, v: attention.attend_segments(q, k, v, segments, causal, INTERPRET), (q, k, v))
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    wanted = through(lambda q, k, v: attention.attend_plain(q, k, v, segment_BxT=segments, causal=causal), exact)
    for mine, plain in zip(found, wanted, strict=True):
        assert relative(mine, plain) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("window", "causal", "documents"),
    [(None, True, True), (100, True, True), pytest.param(None, True, False, marks=pytest.mark.slow)],
)
def test_the_kernel_of_a_tpu_attends_as_the_plain_form_does(monkeypatch, window, causal, documents):
    """Forwards and backwards, over several blocks and documents of uneven lengths, two query heads a key head: no TPU is asked here, and
    a mask that is off by one would train on."""
    monkeypatch.setattr(splash, "BLOCKS", (128,))
    q, k, v, grad = (normal(seed, (1, 256, heads, 64)) for seed, heads in enumerate((2, 1, 1, 2)))
    segment_BxT = jnp.asarray(np.repeat([0, 1, 2, 3], [100, 1, 27, 128])[None], jnp.int32) if documents else None

    def gradients(attend):
        y, back = jax.vjp(attend, q, k, v)
        return y, *back(grad)

    found = jax.jit(
        lambda: gradients(lambda q, k, v: splash.attend(q, k, v, segment_BxT, window, causal, interpret=True))
    )()
    wanted = gradients(
        lambda q, k, v: attention.attend_plain(q, k, v, window=window, segment_BxT=segment_BxT, causal=causal)
    )
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) < 1e-6


def test_kernels_are_those_of_the_devices_that_a_program_is_for():
    """A program that is compiled here for a TPU must not take this machine's kernels, nor this machine's programs a TPU's."""
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    there = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    assert kernels.platform() == jax.default_backend()
    assert not splash.serves(256, 256, 64)
    with jax.sharding.use_abstract_mesh(there):
        assert kernels.platform() == "tpu"
        assert splash.serves(256, 256, 64)
        assert not splash.serves(256, 512, 64) and not splash.serves(200, 200, 64) and not splash.serves(256, 256, 32)
    assert kernels.platform() == jax.default_backend()
