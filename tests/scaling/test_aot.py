"""The training step compiled for TPU slices that are not there. What needs libtpu is skipped without it."""

import importlib.util
import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llm_jax import ladder
from llm_jax.config import Config, Data, Experts, Mesh, Model, Train
from llm_jax.data import prepare
from llm_jax.settings import BadInput
from llm_jax.training import loop, programs
from llm_jax.training import mesh as meshes
from scaling import cli, hardware
from scaling.aot import footprint, hlo, search, slices

needs_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='needs libtpu: pip install "llm_jax[tpu]"'
)
MODEL = Model(vocab_size=256, num_layers=3, d_model=256, num_heads=4, mlp="swiglu", scan_layers=True, dtype="bfloat16")
MIXED = replace(MODEL, experts=Experts(number=4, per_token=2))
CONTEXT = 256


def config(model: Model = MODEL, mesh: Mesh = Mesh(fsdp=4), rows: int = 16, **train) -> Config:  # noqa: B008 (frozen)
    train = Train(tokens_per_step=rows * CONTEXT, steps_per_call=2, **train)
    return ladder.resolve(Config(model, Data(context=CONTEXT), train, mesh))


def shapes(tree):
    return jax.tree.map(lambda x: (np.shape(x), np.dtype(getattr(x, "dtype", np.int32))), tree)


@needs_devices
@pytest.mark.usefixtures("mixed_dtypes", "quick_compilation")
@pytest.mark.parametrize("documents", [False, True])
def test_what_is_compiled_ahead_is_what_a_run_calls(tiny, documents, monkeypatch, tmp_path):
    """Else memory and time would be those of another program."""
    cfg = replace(tiny, mesh=Mesh(data=1, fsdp=2), data=replace(tiny.data, document_mask=documents))
    cfg = ladder.resolve(replace(cfg, train=replace(tiny.train, tokens=64 * 8)))
    make = programs.compiled_call

    class Called(Exception):
        pass

    def spy(*given):
        def call(*args):
            raise Called(shapes(args))

        return call, make(*given)[1]

    monkeypatch.setattr(programs, "compiled_call", spy)
    with pytest.raises(Called) as called:
        loop.train(cfg, prepare.prepare(cfg), tmp_path)
    monkeypatch.undo()
    assert called.value.args[0] == shapes(programs.arguments(cfg, meshes.make(cfg)))


@needs_devices
def test_collectives_and_traffic_count_every_turn_of_a_loop():
    """A compiler's own analysis counts the body of a scan once, which for 80 layers is 80 times too little."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    kernels = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=spread)
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))

    def layers(kernels, x):
        def layer(x, kernel):
            whole = jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, PartitionSpec()))
            return jnp.tanh(x @ whole), None

        return jax.lax.scan(layer, x, kernels)[0]

    program, entry = hlo.parse(jax.jit(layers).lower(kernels, x).compile().as_text())
    (gather,) = hlo.collectives(program, entry)
    assert (gather.kind, gather.size, gather.group, gather.times) == ("all-gather", 64 * 64 * 4, 8, 5)
    assert gather.received == 5 * 64 * 64 * 4 * 7 / 8
    least = 5 * 64 * 64 * 4 * (1 / 8 + 1 + 1)  # a shard read, the whole written, and read by the product
    assert least <= hlo.traffic(program, entry) < 4 * least


TPU_HLO = """
%condition.1 (p.1: (s32[], f32[8,128])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(12)
  %p.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %constant.1), direction=LT
}

%all-reduce-scatter.1 (input.1: bf16[1024,1024]) -> bf16[256,1024] {
  %input.1 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-reduce(%input.1), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add.1
  ROOT %dynamic-slice.1 = bf16[256,1024]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={256,1024}
}

%body.1 (p.2: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p.2 = (s32[]{:T(128)}, /*index=1*/f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x.1 = bf16[1024,1024]{1,0:T(8,128)(2,1)} custom-call(%p.2), custom_call_target="x"
  %fusion.1 = bf16[256,1024]{1,0:T(8,128)(2,1)} fusion(%x.1), kind=kCustom, calls=%all-reduce-scatter.1
  %all-gather.1 = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-gather(%fusion.1), replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}
  ROOT %t.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%p.2, %p.2)
}

ENTRY %main.1 (p.3: f32[8,128]) -> f32[8,128] {
  %p.3 = f32[8,128]{1,0:T(8,128)} parameter(0), sharding={replicated}
  %alone.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%p.3), replica_groups={{0},{1}}, to_apply=%add.1
  %all-reduce.2 = f32[8,128]{1,0:T(8,128)} all-reduce(%p.3), replica_groups=[2,4]<=[8], to_apply=%add.1
  ROOT %while.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%p.3), condition=%condition.1, body=%body.1
}
"""


def test_the_text_that_a_tpus_compiler_writes():
    """Its three ways to write groups, its fusion that is a reduce-scatter, and loops whose end stands in their condition alone."""
    found = {one.kind: one for one in hlo.collectives(*hlo.parse(TPU_HLO))}
    assert found == {
        "all-reduce": hlo.Collective("all-reduce", 8 * 128 * 4, 4, 1),
        "reduce-scatter": hlo.Collective("reduce-scatter", 2 * 2**20, 4, 12),
        "all-gather": hlo.Collective("all-gather", 2 * 2**20, 4, 12),
    }
    assert found["all-reduce"].received == 2 * 8 * 128 * 4 * 3 / 4


@needs_devices
@pytest.mark.parametrize(("model", "mesh"), [(MODEL, Mesh(fsdp=4)), (MIXED, Mesh(fsdp=2, expert=2, tensor=2))])
def test_the_reckoned_state_is_what_a_device_has(model, mesh):
    """Within the vectors, which stay whole: else a plan that fits on paper does not."""
    cfg = config(model, mesh)
    there = meshes.make(cfg)
    state = programs.arguments(cfg, there)[0]
    held = sum(
        np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves((state.params, state.opt_state))
    )
    assert footprint.footprint(cfg, meshes.sizes_of(there)).state == pytest.approx(held, rel=0.03)


def test_what_is_computed_again():
    """Whole blocks: all of their products but the last, which nothing behind it needs."""
    sizes = dict.fromkeys(meshes.NAMES, 1)
    of = {
        name: footprint.extra_flops(config(replace(MODEL, recompute=name)), sizes, kernel=True)
        for name in slices.RECOMPUTE
    }
    per_matrix = 2 * 3 * 256 * MODEL.ff_width
    assert of["nothing"] == of["elementwise"] == 0
    assert of["hidden"] == 2 * per_matrix
    assert of["block"] == 2 * per_matrix + 2 * 3 * 4 * 256 * 256 + 2 * 2 * 3 * 256 * CONTEXT
    assert (
        footprint.extra_flops(config(replace(MODEL, recompute="elementwise")), sizes, kernel=False)
        == 2 * 3 * 256 * CONTEXT
    )
    full = replace(MIXED, recompute="nothing")
    assert footprint.extra_flops(config(full), sizes | {"expert": 4}, kernel=True) == 3 * 3 * 2 * per_matrix


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "v5x:4x4"], r'--topology "v5x:4x4" is no TPU slice; did you mean "v5[ep]:'),
        (["--topology", "v5e:4x5"], r'is no TPU slice; did you mean "v5e:4x4"'),
        (["--topology", "v5p"], r'is no TPU slice; did you mean "v5p:2x2x1"'),
        (["--topology", "v5e:4x4"], r'which is not installed: pip install "llm_jax\[tpu\]"'),
    ],
)
def test_what_aot_refuses_in_one_line(words, message, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["aot", *words]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert re.search(message, said)


@pytest.fixture
def libtpu(monkeypatch):
    """The environment that the verb would set, for this test alone."""
    for name, value in slices.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slices, "prepare", lambda: None)
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    with jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update("jax_exec_time_optimization_effort", 0.0)


@needs_libtpu
@needs_devices
@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        (MODEL, Mesh(fsdp=4)),
        pytest.param(MODEL, Mesh(fsdp=2, tensor=2), marks=pytest.mark.slow),
        pytest.param(MIXED, Mesh(fsdp=2), marks=pytest.mark.slow),
        pytest.param(MIXED, Mesh(expert=4), marks=pytest.mark.slow),
    ],
)
def test_a_tpus_program_takes_what_a_cpus_takes(model, mesh, libtpu):
    """Shapes, types and shardings of all arguments: a run on a slice is fed as a run here is."""
    cfg = config(model, mesh)
    lowered = {
        name: programs.lower(cfg, meshes.make(cfg, devices))
        for name, devices in (("tpu", slices.devices("v5e:2x4")), ("cpu", jax.devices()))
    }
    assert shapes(lowered["tpu"].args_info) == shapes(lowered["cpu"].args_info)
    took = {
        name: [sharding.spec for sharding in jax.tree.leaves(one.compile().input_shardings)]
        for name, one in lowered.items()
    }
    assert took["tpu"] == took["cpu"]
    assert any("fsdp" in str(spec) or "expert" in str(spec) for spec in took["tpu"])
    assert "tpu_custom_call" in lowered["tpu"].as_text() and "tpu_custom_call" not in lowered["cpu"].as_text()


@needs_libtpu
@pytest.mark.slow
def test_aot_tells_what_fits(libtpu, tmp_path, capsys):
    """The whole verb, and a batch that does not fit: exit status 1, and overrides with which it does."""
    path = tmp_path / "small.py"
    path.write_text(
        "from llm_jax.config import *\nfrom scaling.experiment import Experiment\n"
        "experiment = Experiment(Model(vocab_size=1024, num_layers=2, d_model=256, num_heads=2, scan_layers=True, dtype='bfloat16'),"
        " Data(tokenizer='bpe', context=256), Train(tokens_per_step=2**14, steps_per_call=1))"
    )
    words = ["aot", str(path), "--topology", "v5e:2x2", "--quick", "--json"]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and 0 < found["peak_bytes"] < found["hbm_bytes"]
    assert found["attention"] == "splash" and found["step_seconds_roofline"] > 0 and found["flops"] > 0
    assert found["collectives"]["all-reduce"]["bytes"] > 0
    assert cli.main([*words, "--train.tokens_per_step", str(2**27)]) == 1
    refused = json.loads(capsys.readouterr().out)
    assert not refused["fits"] and refused["peak_bytes"] > refused["hbm_bytes"]
    changes = [word for name, value in refused["advice"]["overrides"].items() for word in (f"--{name}", str(value))]
    assert cli.main([*words, "--train.tokens_per_step", str(2**27), *changes]) == 0


def test_find_compiles_the_fastest_first_and_nothing_larger_than_what_did_not_fit(monkeypatch):
    """Compiling takes a minute a program on a large slice: hundreds of candidates are ordered by a reckoning, few are compiled."""
    cfg = config(replace(MODEL, num_layers=48, d_model=1024, num_heads=8, vocab_size=32_768), rows=1024)
    cfg = replace(cfg, data=replace(cfg.data, tokenizer="bpe"))
    compiled = []

    def compiler(config, topology, quick):
        reckoned = footprint.footprint(config, meshes.sizes(config, 16))
        compiled.append(reckoned.memory)
        rate = 1 / max(reckoned.seconds(hardware.SLICES["v5e"]).values())
        return {"fits": len(compiled) > 1, "tokens_per_second": rate, "step_seconds_no_overlap": reckoned.memory}

    monkeypatch.setattr(slices, "aot", compiler)
    monkeypatch.setattr(slices, "devices", lambda topology: [None] * 16)
    found = search.find(cfg, "v5e:4x4", tries=2)
    assert len(compiled) == 3 and max(compiled[1:]) < compiled[0]
    assert found["candidates"] > found["reckoned_to_fit"] > 3
    assert found["best"] == max(found["tried"][1:], key=lambda one: one["tokens_per_second"])
    assert found["best"]["overrides"]["train.tokens_per_step"] == 1024 * CONTEXT
    every = list(search.candidates(cfg, 16, batches=[32 * CONTEXT, 64 * CONTEXT]))
    assert {one.config.train.tokens_per_step for one in every} == {32 * CONTEXT, 64 * CONTEXT}
    assert all(np.prod(list(one.sizes.values())) == 16 for one in every)
    with pytest.raises(BadInput, match="no mesh of 16 devices divides 3 rows"):
        search.find(replace(cfg, train=replace(cfg.train, tokens_per_step=3 * CONTEXT)), "v5e:4x4")
