"""Kernels against their plain forms, forwards and backwards; interpreted where there is no GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax import kernels
from llm_jax.kernels import attention as documents
from llm_jax.kernels import cross_entropy, norm, splash
from llm_jax.models import attention
from llm_jax.training import losses

INTERPRET = jax.default_backend() == "cpu"
H100 = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
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


def test_what_pays_is_judged_by_the_part_of_a_device(monkeypatch):
    """A batch that leaves one cache is eight parts on eight devices, each of which stays in its own."""
    monkeypatch.setattr(kernels, "used", lambda: True)
    large = jax.ShapeDtypeStruct((8, kernels.CACHE_BYTES // 8), jnp.bfloat16)
    assert kernels.pay_for(large)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((8,), ("data",))):
        assert not kernels.pay_for(large)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((8,), ("tensor",))):  # which has all rows
        assert kernels.pay_for(large)


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


@pytest.mark.parametrize(
    ("causal", "window", "heads", "width"),
    [
        (True, None, (4, 2), 40),
        pytest.param(True, 100, (2, 2), 64, marks=pytest.mark.slow),
        pytest.param(False, None, (2, 2), 128, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("numbered", ["in order", "anyhow"])
def test_attention_within_documents(causal, window, heads, width, numbered):
    """Forwards and by queries, keys and values, with documents that end anywhere, one token alone, a length that fills no block, and ids
    that come back: blocks are left out by what a block's ids say."""
    dtype, rows, length = ("float32", 2, 200) if INTERPRET else ("bfloat16", 4, 1000)
    shapes = ((rows, length, n, width) for n in (heads[0], heads[1], heads[1], heads[0]))
    q, k, v, grad = (normal(seed, shape, dtype) for seed, shape in enumerate(shapes))
    ends = np.array([[0, 1, 128], [37, 90, length - 3]] * (rows // 2))
    ids = (np.arange(length)[None, :, None] >= ends[:, None, :]).sum(-1)
    segments = jnp.asarray(ids if numbered == "in order" else ids % 2, jnp.int32)

    def through(attend, arrays):
        out, pull_back = jax.vjp(attend, *arrays)
        return out, *pull_back(grad.astype(out.dtype))

    kernel = through(lambda *qkv: documents.attend(*qkv, segments, causal, window, INTERPRET), (q, k, v))
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    mask = {"segment_BxT": segments, "causal": causal, "window": window}
    wanted = through(lambda *qkv: attention.attend_plain(*qkv, **mask), exact)
    for mine, plain in zip(kernel, wanted, strict=True):
        assert mine.dtype == dtype
        assert relative(mine, plain) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("window", "causal", "packed"),
    [(None, True, True), (100, True, True), pytest.param(None, True, False, marks=pytest.mark.slow)],
)
def test_the_kernel_of_a_tpu_attends_as_the_plain_form_does(monkeypatch, window, causal, packed):
    """Forwards and backwards, over several blocks and documents of uneven lengths, two query heads a key head: no TPU is asked here, and
    a mask that is off by one would train on."""
    monkeypatch.setattr(splash, "BLOCKS", (128,))
    q, k, v, grad = (normal(seed, (1, 256, heads, 64)) for seed, heads in enumerate((2, 1, 1, 2)))
    segment_BxT = jnp.asarray(np.repeat([0, 1, 2, 3], [100, 1, 27, 128])[None], jnp.int32) if packed else None

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


@pytest.mark.parametrize(("window", "packed"), [(None, True), (100, False)])
def test_the_kernel_of_a_tpu_over_parts_of_the_queries(monkeypatch, window, packed):
    """Each device of mesh.sequence has some queries and all keys: a mask that forgot where its queries begin would train on, worse."""
    monkeypatch.setattr(splash, "BLOCKS", (128,))
    monkeypatch.setattr(splash, "serves", splash.fits)
    monkeypatch.setattr(splash, "make", functools.partial(splash.make, interpret=True))
    plain = attention.attend_plain
    monkeypatch.setattr(attention, "attend_plain", None)
    q, k, v, grad = (normal(seed, (2, 512, heads, 64)) for seed, heads in enumerate((4, 2, 2, 4)))
    segment_BxT = jnp.asarray(np.repeat([0, 1, 2, 3], [200, 1, 100, 211])[None].repeat(2, 0)) if packed else None
    mask: dict = {"window": window, "segment_BxT": segment_BxT}

    def gradients(attend):
        y, back = jax.vjp(lambda *qkv: attend(*qkv, **mask), q, k, v)
        return y, *back(grad)

    mesh = jax.make_mesh((2, 2, 2), ("data", "sequence", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        spread = NamedSharding(mesh, PartitionSpec("data", "sequence", "tensor"))
        found = jax.jit(lambda: gradients(attention.attend), out_shardings=spread)()
    for one, other in zip(found, gradients(plain), strict=True):
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


def test_blocks_of_other_documents_are_left_out():
    """What the kernel is for: of a row of short documents it reads each block's neighbours and not all blocks."""
    ids = jnp.arange(512)[None] // 40
    first, last = documents._reach(ids)
    assert first.tolist() == [[0, 0, 1, 2, 3, 5, 5, 6]]
    assert last.tolist() == [[1, 2, 3, 4, 4, 6, 7, 7]]
    first, last = documents._reach(ids % 2)
    assert first.tolist() == [8 * [0]]
    assert last.tolist() == [8 * [7]]


@pytest.mark.skipif(not INTERPRET, reason="programs are lowered for this backend anyway")
def test_kernels_are_lowered_for_gpus_where_there_is_none(monkeypatch):
    """Interpreted they may do what Triton cannot. This much of the way to a GPU needs none."""
    bf16, ids = jnp.bfloat16, jax.ShapeDtypeStruct((2, 1000), jnp.int32)
    q, k = (jax.ShapeDtypeStruct((2, 1000, heads, 40), bf16) for heads in (4, 2))
    x, scale = jax.ShapeDtypeStruct((8, 100, 768), bf16), jax.ShapeDtypeStruct((768,), jnp.float32)
    logits = jax.ShapeDtypeStruct((800, 50_304), bf16)

    def step(q, k, ids, x, scale, logits):
        def value(q, k, x, scale, logits):
            same, branch = norm._forked(x, scale, "layernorm", False)
            total, _ = cross_entropy.summed(logits, ids[0, :800], jnp.ones(800), 0.1, 1e-4)
            attended = documents.attend(q, k, k, ids, True, 100)
            return total + sum(y.astype(jnp.float32).sum() for y in (same, branch, attended))

        return jax.grad(value, argnums=(0, 1, 2, 3, 4))(q, k, x, scale, logits)

    absent = jax.sharding.AbstractMesh(
        (1,), ("one",), abstract_device=H100
    )  # from jax 0.12 on it must be said which GPU
    with jax.sharding.use_abstract_mesh(absent):
        lowered = jax.jit(step).trace(q, k, ids, x, scale, logits).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("cross_entropy", "layernorm_gradient", "forward_kernel", "queries_kernel", "keys_kernel"):
        assert name in lowered


@pytest.mark.skipif(INTERPRET, reason="cuDNN is for GPUs")
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    ("length", "window", "causal"), [(1024, None, True), (1000, None, True), (1024, 256, True), (1024, None, False)]
)
def test_cudnn_attention(length, window, causal, width, monkeypatch):
    """Forwards and by queries, keys and values, at the shapes of training; a length that fills no block."""
    shapes = ((4, length, heads, width) for heads in (12, 4, 4, 12))
    q, k, v, grad = (normal(seed, shape, "bfloat16") for seed, shape in enumerate(shapes))

    def through(attend, arrays):
        out, pull_back = jax.vjp(lambda q, k, v: attend(q, k, v, window=window, causal=causal), *arrays)
        return out, *pull_back(grad.astype(out.dtype))

    wanted = through(attention.attend_plain, (x.astype(jnp.float32) for x in (q, k, v)))
    monkeypatch.setattr(kernels, "used", lambda: True)
    for mine, plain in zip(through(attention.attend, (q, k, v)), wanted, strict=True):
        assert mine.dtype == jnp.bfloat16
        assert relative(mine, plain) < TOLERANCE["bfloat16"]
