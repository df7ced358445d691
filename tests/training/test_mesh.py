"""Many devices: the same losses on every mesh, shards that really are shards, checkpoints that any mesh reads.

A reduction over the wrong axis trains on, only worse: so meshes are held to one device at rounding, over steps whose errors would add up.
"""

import functools
import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import axes
from llm_jax.config import Config, Data, Experts, Mesh, Model, Train, trunk_key
from llm_jax.data import prepare
from llm_jax.kernels import cross_entropy, norm
from llm_jax.models import attention, families
from llm_jax.settings import BadInput, fingerprint, override
from llm_jax.training import loop, losses, programs
from llm_jax.training import mesh as meshes
from llm_jax.training.metrics import read_metrics
from llm_jax.training.optimizer import matrices
from llm_jax.training.step import init_state, one_replica, replicate

pytestmark = [
    pytest.mark.usefixtures("mixed_dtypes", "quick_compilation"),
    pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices; tests/conftest.py simulates them on a CPU"),
]
STEPS, ROWS, CONTEXT = 4, 16, 16
DENSE = Model(vocab_size=256, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, scan_layers=True)
MIXED = replace(
    DENSE, num_layers=1, mlp="swiglu", experts=Experts(number=4, per_token=2, shared=1, granularity=2, z_weight=0.1)
)
# With an epsilon as large as gradients are, AdamW does not hide one that is off by a factor.
TRAIN = Train(
    tokens_per_step=ROWS * CONTEXT, tokens=10**6, peak_lr=1e-2, warmup_steps=1, steps_per_call=STEPS, epsilon=1e-2
)


def config(model: Model = DENSE, mesh: Mesh = Mesh(), **train) -> Config:  # noqa: B008 (frozen)
    return Config(model, Data(context=CONTEXT), replace(TRAIN, **train), mesh)


def trained(cfg: Config):
    """Losses and gradient norms of some steps on random tokens, and the parameters after them, on the mesh of cfg."""
    mesh = meshes.make(cfg)
    call, init_opt = programs.compiled_call(cfg.model, programs.program(cfg.train), 0, mesh)
    params = programs.placed(start(cfg.model), cfg.model, mesh)
    state = programs.placed(init_state(params, init_opt, 0), cfg.model, mesh)
    if cfg.train.compile == "pmap":
        state = replicate(state, list(mesh.devices.flat))
    tokens = np.random.default_rng(0).integers(0, 256, (STEPS, ROWS, CONTEXT + 1)).astype(np.int32)
    tokens[:, :, ::2] = 7  # something to learn
    batches = {"tokens": tokens}
    if cfg.data.document_mask:
        batches["segments"] = (np.cumsum(tokens[..., :-1] < 40, -1)).astype(np.int32)
    state, metrics = call(state, batches, np.full(STEPS, 1e-2, np.float32), STEPS)
    if cfg.train.compile == "pmap":
        state = one_replica(state)
    return jax.device_get((metrics, state.params))


@functools.cache
def start(model: Model):
    return jax.device_get(jax.jit(functools.partial(families.init, model))(jax.random.key(1)))


@functools.cache
def on_one_device(cfg: Config):
    return trained(replace(cfg, mesh=Mesh(data=1), train=replace(cfg.train, compile="jit")))


def assert_agrees(cfg: Config, tolerance: float = 2e-5):
    """Every metric of every step, and every parameter after them."""
    (found, params), (wanted, wanted_params) = trained(cfg), on_one_device(replace(cfg, mesh=Mesh(data=1)))
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=tolerance, atol=1e-6, err_msg=name)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), params, wanted_params)


MESHES = {
    "data 8": (DENSE, Mesh()),
    "fsdp 4, tensor 2": (DENSE, Mesh(data=1, fsdp=4, tensor=2)),
    "data 2, fsdp 2, sequence 2": pytest.param(DENSE, Mesh(fsdp=2, sequence=2), marks=pytest.mark.slow),
    "data 2, expert 4": pytest.param(MIXED, Mesh(expert=4), marks=pytest.mark.slow),
    "fsdp 2, expert 2, tensor 2": (MIXED, Mesh(data=1, fsdp=-1, expert=2, tensor=2)),
}


@pytest.mark.parametrize(("model", "mesh"), MESHES.values(), ids=MESHES)
def test_a_mesh_trains_as_one_device_does(model, mesh):
    """Losses, gradient norms, routers and parameters over several steps."""
    assert_agrees(config(model, mesh))


def test_replicas_through_pmap_train_as_one_device_does():
    """Gradients, weights and losses are added up before the one division, as in one batch; rows count by their weight."""
    assert_agrees(config(compile="pmap", grad_accumulation=2))


def test_two_replicas_that_swap_gradients_train_as_those_that_sum_them(monkeypatch):
    """What two GPUs do, here on two CPU devices, to the bit: of two summands the order is nothing."""
    cfg = config(mesh=Mesh(data=2))
    summed = trained(cfg)
    monkeypatch.setattr(programs, "_swap", lambda mesh: True)
    programs.compiled_call.cache_clear()
    text = programs.lower(cfg, meshes.make(cfg)).as_text()
    assert text.count('"stablehlo.collective_permute"') == 7  # the matrices
    jax.tree.map(np.testing.assert_array_equal, trained(cfg), summed)
    programs.compiled_call.cache_clear()


def test_only_linked_gpus_of_one_process_swap():
    """Others sum by NCCL, which finds a way between any two; a copy into memory that is out of reach ends a run."""

    def swap(*devices):
        devices = [SimpleNamespace(device_kind=kind, process_index=process) for kind, process in devices]
        return programs._swap(SimpleNamespace(devices=np.array(devices)))

    h200, other = ("NVIDIA H200", 0), ("NVIDIA GeForce RTX 4090", 0)
    assert swap(h200, h200)
    assert not any(
        (swap(h200), swap(h200, ("NVIDIA H200", 1)), swap(other, other), swap(*4 * [h200]), programs._swap(None))
    )


def test_every_device_has_its_part_of_the_state_alone():
    """Else fsdp saves nothing: bytes a device of parameters and of both moments of Adam, from the moment they are made."""
    cfg = config(MIXED, Mesh(data=1, fsdp=2, expert=2, tensor=2))
    mesh = meshes.make(cfg)
    state = programs.abstract_state(cfg.model, programs.program(cfg.train))
    params = programs.compiled_init(cfg.model, mesh)(jax.random.key(1))
    _, init_opt = programs.compiled_call(cfg.model, programs.program(cfg.train), 0, mesh)
    matrices = {"embed": 4, "blocks/attention/q": 4, "blocks/mlp/up": 8, "blocks/mlp/down": 8, "blocks/mlp/router": 4}
    for tree in (params, init_opt(params)):
        total = sum(x.nbytes for x in jax.tree.leaves(tree))
        for device in jax.devices():
            held = sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device)
            assert total / 8 < held < total / 5
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            for end, parts in matrices.items():
                if name == end or name.endswith(("mu/" + end, "nu/" + end)):
                    assert leaf.addressable_shards[0].data.size * parts == leaf.size, name
    assert jax.tree.structure(meshes.state_shardings(mesh, cfg.model, state)) == jax.tree.structure(state)


def test_a_program_for_devices_that_are_not_there():
    """Shapes lower as arrays do: what an ahead-of-time compiler is given for a topology."""
    cfg = config(mesh=Mesh(fsdp=4))
    mesh, train = meshes.make(cfg), programs.program(cfg.train)
    state = programs.abstract_state(cfg.model, train)
    state = meshes.with_shardings(state, meshes.state_shardings(mesh, cfg.model, state))
    batches = {
        "tokens": jax.ShapeDtypeStruct((STEPS, ROWS, CONTEXT + 1), "int32", sharding=meshes.batch_sharding(mesh))
    }
    call, _ = programs.compiled_call(cfg.model, train, 0, mesh)
    text = call.lower(
        state, batches, jax.ShapeDtypeStruct((STEPS,), "float32"), jax.ShapeDtypeStruct((), "int32")
    ).as_text()
    assert '@mesh = <["data"=2, "fsdp"=4]>' in text


def test_nothing_is_summed_over_an_axis_of_one_device():
    """What is computed on each device's part has its derivatives summed over the axes that do not spread them: with axes of one in the
    mesh, the program copied all queries, keys and values of each layer."""
    cfg = config(mesh=Mesh(data=1, fsdp=8))
    mesh = meshes.make(cfg)
    assert mesh.axis_names == ("fsdp",)
    assert meshes.make(config(), jax.devices()[:1]).axis_names == ("data",)
    lowered = programs.lower(cfg, mesh).as_text()
    assert "manual_computation" in lowered
    assert "all_reduce" not in lowered  # those of the gradients are added when it is compiled


@pytest.mark.parametrize(("accumulation", "dtype"), [(1, "bf16"), (2, "f32")])
def test_replicas_exchange_each_gradient_once_a_step(accumulation, dtype):
    """In the dtype of its product, the tied embedding's two gradients as one; not for each layer, nor for each microbatch."""
    cfg = config(replace(DENSE, dtype="bfloat16"), Mesh(data=8), grad_accumulation=accumulation)
    text = programs.lower(cfg, meshes.make(cfg)).as_text()
    sums = re.findall(r'"stablehlo\.all_reduce".*?\) : \(tensor<((?:\d+x)*)(\w+)>\)', text, re.DOTALL)
    params = programs.abstract_state(cfg.model, programs.program(cfg.train)).params
    wanted = [(leaf.shape, dtype if matrix else "f32") for leaf, matrix in leaves_of_both(params, matrices(params))]
    found = [(tuple(map(int, shape.split("x")[:-1])), kind) for shape, kind in sums]
    assert sorted(found) == sorted([*wanted, ((), "f32"), ((), "f32")])  # and the sums of losses and weights


def test_replicas_exchange_nothing_of_what_is_frozen():
    """Its gradients are zeros."""
    cfg = config(mesh=Mesh(data=8), freeze=("blocks",))
    text = programs.lower(cfg, meshes.make(cfg)).as_text()
    assert text.count('"stablehlo.all_reduce"') == 4  # embedding, last norm, losses, weights


def leaves_of_both(*trees):
    return zip(*map(jax.tree.leaves, trees), strict=True)


def test_rounded_gradients_of_replicas_are_those_of_one_device():
    """In bfloat16, of steps without momentum: what the exchange rounds is less than what the products do."""
    for accumulation in (1, 2):
        cfg = config(replace(DENSE, dtype="bfloat16"), Mesh(data=8), grad_accumulation=accumulation)
        assert_agrees(cfg, 2e-2)


@pytest.mark.parametrize(
    ("names", "shape", "wanted"),
    [
        (("embed", "mlp"), (64, 96), ("fsdp", "tensor")),
        (("mlp", "embed"), (96, 64), (("tensor", "fsdp"), None)),
        (("layers", "expert", "mlp", "embed"), (2, 4, 96, 64), (None, "expert", ("tensor", "fsdp"), None)),
        (("heads", "head", "embed"), (6, 16, 64), ("tensor", None, "fsdp")),
        (("heads", "head", "embed"), (5, 16, 63), (None, None, None)),
        (("vocab", "embed"), (50_257, 64), (None, "fsdp")),
        (("rows", "sequence", "mlp"), (16, 32, 96), (("data", "fsdp", "expert"), None, "tensor")),
    ],
)
def test_where_dimensions_lie(names, shape, wanted):
    """Parameters lie on fsdp by their first dimension that it divides; activations have no fsdp but for rows."""
    sizes = {"data": 1, "fsdp": 4, "expert": 2, "tensor": 2}
    found = axes.spec(names, shape, sizes | ({"data": 2} if "rows" in names else {}))
    assert found == jax.sharding.PartitionSpec(*wanted)


def test_gradients_of_experts_are_summed_and_spread_in_one():
    """Over fsdp, where a sum that every device has whole is twice the bytes."""
    cfg = config(MIXED, mesh=Mesh(data=1, fsdp=4, expert=2))
    assert programs.lower(cfg, meshes.make(cfg)).as_text().count("reduce_scatter") >= 3  # up, gate, down


def test_an_embedding_travels_in_the_dtype_of_the_computation():
    """Of 4 bytes an entry, it was a tenth of what a device of a slice received in a step; both ways, and not whole."""
    cfg = config(replace(DENSE, dtype="bfloat16"), Mesh(data=1, fsdp=4, tensor=2))
    text = programs.lower(cfg, meshes.make(cfg)).as_text()
    gathered = re.findall(r"stablehlo.all_gather.*-> (tensor<\S+>)", text)
    assert gathered == ["tensor<128x32xbf16>"]  # of 256 rows, half are of the other side of tensor
    scattered = re.findall(r'"stablehlo.reduce_scatter".*?-> (tensor<\S+>)', text, re.DOTALL)
    assert scattered == ["tensor<32x32xbf16>"]


def test_the_mesh_is_no_part_of_a_trial():
    """Its results are those of any mesh, and a run goes on with other devices than it began with."""
    cfg = config()
    for changes in ({"mesh.fsdp": 4}, {"mesh.data": 1}, {"train.compile": "pmap"}):
        other = override(cfg, changes)
        assert other != cfg
        assert fingerprint(other) == fingerprint(cfg)
        assert trunk_key(other, "data") == trunk_key(cfg, "data")
    assert fingerprint(override(cfg, {"train.seed": 1})) != fingerprint(cfg)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (DENSE, {"mesh.data": 0}, r"mesh\.data must be positive, or -1 for the rest, got 0"),
        (DENSE, {"mesh.fsdp": -1}, r"mesh\.data and mesh\.fsdp cannot all be -1"),
        (DENSE, {"mesh.tensor": 4}, r"mesh\.tensor=4 does not divide model\.num_kv_heads=2; nearest below: 2"),
        (MIXED, {"mesh.expert": 3}, r"mesh\.expert=3 does not divide model\.experts\.number=4; nearest below: 1"),
        (DENSE, {"mesh.expert": 2}, r"mesh\.expert spreads experts, and model\.experts\.number=0"),
        (DENSE, {"mesh.sequence": 3}, r"mesh\.sequence=3 does not divide data\.context=16"),
        (DENSE, {"mesh.fsdp": 3}, r"mesh fsdp=3 does not fit 8 devices; nearest product that does: 2"),
        (DENSE, {"mesh.data": 16}, r"mesh data=16 does not fit 8 devices; nearest product that does: 8"),
        (
            DENSE,
            {"mesh.data": 3},
            r"16 rows of a microbatch do not divide among 3 devices .* train\.tokens_per_step: 240",
        ),
        (
            DENSE,
            {"mesh.fsdp": 2, "train.compile": "pmap"},
            r"train\.compile=pmap has whole replicas: mesh\.fsdp must be 1",
        ),
        (MIXED, {"train.compile": "pmap"}, r"train\.compile=pmap balances no experts"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(model, changes, message):
    """In one line, with the nearest that fits, before anything is compiled."""
    with pytest.raises(BadInput, match=message):
        meshes.make(override(config(model), changes))


def test_devices_without_rows_stay_idle():
    """The default mesh takes as many devices as have rows: small models run on a large machine as they are."""
    assert dict(meshes.make(config(tokens_per_step=6 * CONTEXT)).shape)["data"] == 6
    assert dict(meshes.make(config(tokens_per_step=7 * CONTEXT), jax.devices()[:4]).shape)["data"] == 1
    with pytest.raises(BadInput, match="7 rows of a microbatch do not divide among 4"):
        meshes.sizes(config(tokens_per_step=7 * CONTEXT), 4, all_of_them=True)


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(tiny, tmp_path):
    """Machines come back with other devices: a checkpoint of any mesh loads on any, and the next step reads the next rows."""
    cfg = override(tiny, {"model.num_heads": 2, "train.tokens": 256 * 24, "train.tokens_per_step": 256})
    cfg = override(cfg, {"train.warmup_steps": 2, "train.peak_lr": 1e-3, "train.checkpoint_every": 8})
    prepared = prepare.prepare(cfg)

    class Stop(Exception):
        pass

    def stop(step, total, loss):
        if step == 16:
            raise Stop

    with pytest.raises(Stop):
        loop.train(override(cfg, {"mesh.fsdp": 4, "mesh.tensor": 2}), prepared, tmp_path / "moved", progress=stop)
    moved = loop.train(override(cfg, {"mesh.data": 2, "mesh.fsdp": 2}), prepared, tmp_path / "moved")
    still = loop.train(cfg, prepared, tmp_path / "still")
    assert moved.loss == pytest.approx(still.loss, rel=1e-5)
    found, wanted = (read_metrics(tmp_path / name) for name in ("moved", "still"))
    assert [line["step"] for line in found] == [line["step"] for line in wanted] == [8, 16, 24, 24]
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


# What XLA cannot spread: each device runs it on its own part, interpreted here.


def under(mesh: Mesh, f, *args):
    """f(*args), traced for a mesh and spread by its rules; rows of the arguments are spread."""
    built = meshes.make(config(MIXED if mesh.expert > 1 else DENSE, mesh))
    return jax.jit(meshes.traced(built, f), out_shardings=meshes.replicated(built))(*args)


def assert_close(found, wanted):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, wanted)


def normals(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("shape", "kind"), [((8, 4, 32), "layernorm"), ((8, 4, 4, 16), "rmsnorm")])
def test_the_norm_kernel_on_a_mesh(shape, kind):
    """The gradient of the scale is a sum over all rows, whichever device has them."""
    x, scale, toward = normals(*shape), 1 + normals(shape[-1], seed=1), normals(*shape, seed=2)

    def value(norm, x, scale):
        return (norm(x, scale) * toward).sum()

    kernel = jax.grad(functools.partial(value, lambda x, scale: norm._normed(x, scale, kind, True)), argnums=(0, 1))
    plain = jax.grad(functools.partial(value, lambda x, scale: norm.plain(x, scale, kind)), argnums=(0, 1))
    assert_close(under(Mesh(fsdp=2, tensor=2), kernel, x, scale), plain(x, scale))
    assert_close(under(Mesh(data=1, sequence=2, expert=4), kernel, x, scale), plain(x, scale))


def test_the_loss_kernel_on_a_mesh(monkeypatch):
    """Each device has whole rows of logits, or the plain form is taken, which reads rows in pieces."""
    logits, targets = normals(8, 4, 40), jnp.asarray(np.random.default_rng(1).integers(0, 40, (8, 4)), jnp.int32)
    weights = jnp.asarray(np.random.default_rng(2).random((8, 4)), jnp.float32)
    summed, calls = cross_entropy.summed, []

    def interpreted(*args):
        calls.append(args[0].shape)
        return summed(*args, True)

    def value(logits):
        return losses.cross_entropy(logits, targets, weights, 1e-2, 0.1)

    wanted = jax.value_and_grad(value, has_aux=True)(logits)
    monkeypatch.setattr(cross_entropy, "summed", interpreted)
    monkeypatch.setattr(losses.kernels, "used", lambda: True)
    monkeypatch.setattr(losses.kernels, "pay_for", lambda x: True)
    kernel = jax.value_and_grad(value, has_aux=True)
    assert_close(under(Mesh(fsdp=2), kernel, logits), wanted)
    assert len(calls) == 1
    assert_close(under(Mesh(tensor=2), kernel, logits), wanted)
    assert_close(under(Mesh(sequence=2), kernel, logits), wanted)
    assert len(calls) == 1


@pytest.mark.parametrize(("kv_heads", "window", "exchanged"), [(1, None, False), (2, 4, False), (4, None, True)])
def test_attention_on_a_mesh(kv_heads, window, exchanged):
    """Rows, heads and queries are spread, and a key that several devices read has the sum of their gradients. Where there are heads for all
    devices of a row, they exchange positions for heads, and none has to gather all keys."""
    q, k, v = normals(4, 16, 4, 8), normals(4, 16, kv_heads, 8, seed=1), normals(4, 16, kv_heads, 8, seed=2)
    toward, segments = normals(4, 16, 4, 8, seed=3), jnp.asarray(np.arange(16) // 6 + np.zeros((4, 1)), jnp.int32)

    def value(attend, segments, q, k, v):
        return (attend(q, k, v, window=window, segment_BxT=segments) * toward).sum()

    for segment_BxT in (None, segments):
        spread, plain = (
            jax.value_and_grad(functools.partial(value, f, segment_BxT), argnums=(0, 1, 2))
            for f in (attention.attend, attention.attend_plain)
        )
        mesh = Mesh(sequence=2, tensor=2)
        assert_close(under(mesh, spread, q, k, v), plain(q, k, v))
        program = meshes.traced(meshes.make(config(mesh=mesh)), jax.make_jaxpr(spread))(q, k, v)
        assert ("all_to_all" in str(program)) == exchanged


@pytest.mark.slow
@pytest.mark.parametrize("family", ["encoder_decoder", "lstm", "seq2seq_rnn", "feedforward"])
def test_every_family_trains_alike_on_a_mesh(tiny, tmp_path, family):
    """One loop for all of them, on any mesh that their settings allow."""
    prefix = 8 if family in ("encoder_decoder", "seq2seq_rnn") else 0
    cfg = override(tiny, {"model.family": family, "data.prefix": prefix, "model.num_heads": 2, "train.peak_lr": 1e-3})
    cfg = override(cfg, {"train.tokens": 256 * 8, "train.tokens_per_step": 256, "train.warmup_steps": 2})
    prepared = prepare.prepare(cfg)
    spread = override(cfg, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    one, many = (loop.train(c, prepared, tmp_path / name) for name, c in (("one", cfg), ("many", spread)))
    assert many.loss == pytest.approx(one.loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"model.recompute": "block", "data.document_mask": True},
        {"model.window": 4, "model.norm_position": "post", "model.tie_embeddings": False, "model.scan_layers": False},
        {"train.grad_accumulation": 2, "model.positions": "learned", "model.mlp": "swiglu"},
    ],
)
def test_variants_of_the_transformer_on_a_mesh(changes):
    """What is recomputed, masked or tied must not depend on where it lies."""
    assert_agrees(override(config(mesh=Mesh(fsdp=2, tensor=2)), changes))
