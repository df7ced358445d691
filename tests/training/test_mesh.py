"""Many devices: the same losses on every mesh, shards that really are shards, checkpoints that any mesh reads.

A reduction over the wrong axis trains on, only worse: so meshes are held to one device at rounding, over steps whose errors would add up.
"""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from llm_jax.config import Config, Data, Experts, Mesh, Model, Train, trunk_key
from llm_jax.models import families
from llm_jax.settings import BadInput, fingerprint, override
from llm_jax.training import loop
from llm_jax.training import mesh as meshes
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
    call, init_opt = loop.compiled_call(cfg.model, loop.program(cfg.train), 0, mesh)
    params = loop._placed(start(cfg.model), cfg.model, mesh)
    state = loop._placed(init_state(params, init_opt, 0), cfg.model, mesh)
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
    "data 2, fsdp 2, sequence 2": (DENSE, Mesh(fsdp=2, sequence=2)),
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


def test_every_device_has_its_part_of_the_state_alone():
    """Else fsdp saves nothing: bytes a device of parameters and of both moments of Adam, from the moment they are made."""
    cfg = config(MIXED, Mesh(data=1, fsdp=2, expert=2, tensor=2))
    mesh = meshes.make(cfg)
    state = loop.abstract_state(cfg.model, loop.program(cfg.train))
    params = loop._compiled_init(cfg.model, mesh)(jax.random.key(1))
    _, init_opt = loop.compiled_call(cfg.model, loop.program(cfg.train), 0, mesh)
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
    mesh, train = meshes.make(cfg), loop.program(cfg.train)
    state = loop.abstract_state(cfg.model, train)
    state = meshes.with_shardings(state, meshes.state_shardings(mesh, cfg.model, state))
    batches = {
        "tokens": jax.ShapeDtypeStruct((STEPS, ROWS, CONTEXT + 1), "int32", sharding=meshes.batch_sharding(mesh))
    }
    call, _ = loop.compiled_call(cfg.model, train, 0, mesh)
    text = call.lower(
        state, batches, jax.ShapeDtypeStruct((STEPS,), "float32"), jax.ShapeDtypeStruct((), "int32")
    ).as_text()
    assert '@mesh = <["data"=2, "fsdp"=4, "expert"=1, "sequence"=1, "tensor"=1]>' in text


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
