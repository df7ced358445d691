"""The compiled programs of a run: its initial state, and its calls of several steps, alone and joined; also ahead of any data or device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from llm_jax import axes, kernels
from llm_jax.config import Config, Model, Train
from llm_jax.data import pipeline
from llm_jax.data.prepare import Prepared
from llm_jax.models import families
from llm_jax.settings import BadInput
from llm_jax.training import mesh as meshes
from llm_jax.training import pretrain
from llm_jax.training.optimizer import adamw
from llm_jax.training.step import (
    REPLICAS,
    Replicas,
    TrainState,
    init_state,
    make_joined_call,
    make_replica_call,
    make_train_call,
    make_train_step,
)


@functools.lru_cache
def compiled_call(model: Model, train: Train, prefix: int, mesh: Mesh | None = None):
    """(call, init_opt) of step.make_train_call on a mesh, or on the one device of its arguments: one compilation for all trials of a
    shape, as the settings that do not change the program are reset before they reach here."""
    optimizer, pmapped = adamw(train), train.compile == "pmap"
    step = _step(model, train, prefix, mesh)
    options = _options(model, mesh)
    if mesh is None:
        return make_train_call(step, train.steps_per_call, **options), jax.jit(optimizer.init)
    shardings = _shardings(model, train, mesh)
    init_opt = jax.jit(optimizer.init, out_shardings=shardings[0].opt_state)
    if pmapped:
        return make_replica_call(step, train.steps_per_call, list(mesh.devices.flat)), init_opt
    options |= {"in_shardings": shardings, "out_shardings": (shardings[0], shardings[-1])}
    return make_train_call(step, train.steps_per_call, **options), init_opt


@functools.lru_cache
def joined_call(model: Model, train: Train, prefix: int, mesh: Mesh, trials: int):
    """step.make_joined_call of so many trials of one shape."""
    state, batches, rates, whole = _shardings(model, train, mesh)
    options = _options(model, mesh)
    options |= {"in_shardings": (trials * (state,), trials * (batches,), trials * (rates,), whole)}
    options |= {"out_shardings": trials * ((state, whole),)}
    return make_joined_call(_step(model, train, prefix, mesh), train.steps_per_call, **options)


def _step(model: Model, train: Train, prefix: int, mesh: Mesh | None):
    """The step as it is traced for this mesh."""
    loss_fn, adjust = pretrain.loss_fn(model, train, prefix), pretrain.adjust_fn(model, train.freeze)
    # Products give gradients in the model's dtype, of one microbatch. Of looked-up rows each device's sum is rounded to it.
    dtype = model.dtype if train.grad_accumulation == 1 else "float32"
    replicas = Replicas("data", dtype, train.freeze, _swap(mesh)) if _replicated(model, mesh) else None
    if train.compile == "pmap":
        replicas = Replicas(REPLICAS, dtype, train.freeze)
    step = make_train_step(loss_fn, adamw(train), train.grad_accumulation, adjust, replicas)
    if train.compile == "pmap":
        return step

    def on_rows(*args):
        whole = PartitionSpec()
        return axes.local(step, (whole, PartitionSpec("data"), whole), whole)(*args)

    return meshes.traced(mesh, on_rows if replicas else step)


def _replicated(model: Model, mesh: Mesh | None) -> bool:
    """Whether each device has a whole replica that meets the others in sums alone; experts are balanced over all rows, and dropout draws
    for all of them at once."""
    copies = mesh is not None and mesh.size > 1 and mesh.axis_names == ("data",)
    return copies and not model.experts.number and not model.dropout


NVLINKED = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
"""GPUs whose pairs reach each other's memory; of others XLA would have to be asked, and cannot. Timed on both."""


def _swap(mesh: Mesh | None) -> bool:
    """Whether replicas are two GPUs of one process that are known to reach each other's memory."""
    devices = [] if mesh is None else list(mesh.devices.flat)
    linked = [(one.process_index, one.device_kind) for one in devices if one.device_kind in NVLINKED]
    return len(devices) == len(linked) == 2 and len(set(linked)) == 1


def _options(model: Model, mesh: Mesh | None) -> dict[str, Any]:
    options = dict(meshes.traced(mesh, kernels.compiler_options)(model.d_model))
    if mesh is not None and mesh.devices.flat[0].platform == "gpu" and _replicated(model, mesh):
        options["xla_gpu_all_reduce_combine_threshold_bytes"] = "1048576"  # small ones; large ones would be copied
        # Each gradient leaves when it is ready, beside the products of the others. One by one, which is XLA's default, all of them wait
        # for the last product: 17 GiB more at 1.3 B parameters.
        options["xla_gpu_experimental_parallel_collective_overlap_limit"] = "16"
        options |= {"xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY"} if _swap(mesh) else {}
    return {"compiler_options": options or None}


def _shardings(model: Model, train: Train, mesh: Mesh) -> tuple[Any, ...]:
    """Of the state, the batches, the learning rates and the number of steps of a call."""
    state, whole = meshes.state_shardings(mesh, model, abstract_state(model, train)), meshes.replicated(mesh)
    return state, meshes.batch_sharding(mesh), whole, whole


@functools.lru_cache
def abstract_state(model: Model, train: Train) -> TrainState:
    """The shapes of a run's state."""
    params = jax.eval_shape(functools.partial(families.init, model), jax.random.key(0))
    return jax.eval_shape(lambda params: init_state(params, adamw(train).init, 0), params)


@functools.lru_cache
def compiled_init(model: Model, mesh: Mesh | None = None):
    """The jitted init(key) -> parameters of a model, each device of a mesh making its own part."""
    # Runs once: on a CPU, half of its compilation would be spent on making it fast.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    init, shardings = functools.partial(families.init, model), None
    if mesh is not None:  # no device ever has parameters that are not its own
        shardings = meshes.state_shardings(mesh, model, jax.eval_shape(init, jax.random.key(0)))
    return jax.jit(init, compiler_options=options, out_shardings=shardings)


def first_state(cfg: Config, mesh: Mesh, init_opt: Callable[[Any], Any]) -> TrainState:
    """The state before the first step, each device making its own part."""
    params = compiled_init(cfg.model, mesh)(jax.random.key(cfg.train.seed))
    return placed(init_state(params, init_opt, cfg.train.seed), cfg.model, mesh)


def placed(tree: Any, model: Model, mesh: Mesh) -> Any:
    """Parameters or a state, where they belong on the mesh."""
    return jax.device_put(tree, meshes.state_shardings(mesh, model, tree))


def key(cfg: Config) -> tuple[Any, ...]:
    """What the compiled programs of a run depend on."""
    data = cfg.data
    shape = (cfg.rows_per_step, data.context, data.prefix, data.eval_tokens, data.document_mask)
    return cfg.model, program(cfg.train), cfg.mesh, *shape


def program(train: Train) -> Train:
    """The settings of `train` that the compiled step depends on; horizon, rate, schedule and seed reach it as arguments."""
    optimizer = ("beta1", "beta2", "epsilon", "weight_decay", "clip_norm")
    names = (*optimizer, "z_loss", "label_smoothing", "grad_accumulation", "steps_per_call", "freeze", "compile")
    return Train(**{name: getattr(train, name) for name in names})


def compile_ahead(cfg: Config, prepared: Prepared, joined: bool = False) -> None:
    """Compiles what loop.train runs for a resolved `cfg`, with `joined` also what lanes do, without running it; loop.train then compiles
    none of it again. Any thread may."""
    mesh = meshes.make(cfg)
    key = (cfg.model, program(cfg.train), cfg.data.prefix, mesh)
    compiled_init(cfg.model, mesh).lower(jax.random.key(0)).compile()
    state = _state_shapes(cfg, mesh)
    step = next(pipeline.train_iterator(prepared, cfg.data.context, cfg.rows_per_step, cfg.data.shuffle_seed))
    rows_C = {name: np.broadcast_to(x, (cfg.train.steps_per_call, *x.shape)) for name, x in step.items()}
    batches = pretrain.make_batch(rows_C["tokens"], prepared.tokenizer(), cfg.data, rows_C.get("media"))
    arguments = (state, batches, np.zeros(cfg.train.steps_per_call, np.float32))
    if cfg.train.compile == "jit":
        compiled_call(*key)[0].lower(*arguments, 1).compile()
    if joined:
        joined_call(*key, 2).lower(*((one, one) for one in arguments), 1).compile()
    held_out = pipeline.eval_set(prepared, cfg.data.context, cfg.data.eval_tokens)
    pretrain.compile_evaluation(cfg.model, state.params, held_out, prepared.tokenizer(), cfg.data, mesh)


def lower(cfg: Config, mesh: Mesh) -> jax.stages.Lowered:
    """The compiled call of loop.train for a resolved `cfg` on a mesh of devices that need not be there, lowered and not compiled. Raises
    BadInput for models that have no training step, and for those with media, whose batches only data can tell."""
    if cfg.model.counted:
        raise BadInput(f"model.family={cfg.model.family} is counted, not trained: there is no step to compile")
    if cfg.model.media.kind != "none":
        raise BadInput("steps with media are not compiled ahead; give model.media.kind=none and data.source=stdlib")
    call, _ = compiled_call(cfg.model, program(cfg.train), cfg.data.prefix, mesh)
    return call.lower(*arguments(cfg, mesh))


def arguments(cfg: Config, mesh: Mesh) -> tuple[Any, ...]:
    """Shapes and shardings of what the call takes: state, batches of CxBx..., learning rates and the number of steps."""
    rows, data = (cfg.train.steps_per_call, cfg.rows_per_step), cfg.data
    batches = {"tokens": ((*rows, data.context + 1), "int32")}
    if data.source == "pairs" or data.document_mask:
        batches["segments"] = ((*rows, data.context), "int32")
    if data.source == "pairs":
        batches["weights"] = ((*rows, data.context - data.prefix), "float32")
    spread, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)
    return (
        _state_shapes(cfg, mesh),
        {name: jax.ShapeDtypeStruct(*one, sharding=spread) for name, one in batches.items()},
        jax.ShapeDtypeStruct(rows[:1], "float32", sharding=whole),
        jax.ShapeDtypeStruct((), "int32", sharding=whole),
    )


def _state_shapes(cfg: Config, mesh: Mesh) -> TrainState:
    shapes = abstract_state(cfg.model, program(cfg.train))
    return meshes.with_shardings(shapes, meshes.state_shardings(mesh, cfg.model, shapes))
