"""The device mesh of a run, and where everything lies on it.

    mesh = make(cfg)                       a jax Mesh of all devices, or of `devices`, also of some that are not there
    state_shardings(mesh, model, tree)     of parameters, an optimizer's state or a whole TrainState: a tree like `tree` (arrays or shapes)
    batch_sharding(mesh)                   of batches stacked over steps, CxBx...: rows over data, fsdp and expert
    replicated(mesh)                       of scalars, learning rates and metrics
    traced(mesh, f)                        f as models are to be traced for this mesh; see llm_jax/axes.py

    call, init_opt = programs.compiled_call(cfg.model, programs.program(cfg.train), cfg.data.prefix, mesh)

is the jitted training call with these shardings, whose .lower takes shapes as well as arrays: `abstract_state` makes those of the state,
so that a program for a topology that is not there compiles as one that runs. Which axis a dimension lies on is said in llm_jax/axes.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llm_jax import axes
from llm_jax.config import Config, Model
from llm_jax.models import families
from llm_jax.settings import BadInput

NAMES = ("data", "fsdp", "expert", "sequence", "tensor")
"""From the farthest devices to the nearest: tensor exchanges activations in every layer, data gradients once a step."""


def sizes(cfg: Config, count: int, all_of_them: bool = False) -> dict[str, int]:
    """Devices along each axis for a resolved config on `count` devices. Raises BadInput where they do not fit.

    The axis that is -1 takes the rest, as far as there are rows for it; the others stay idle unless `all_of_them` must take part.
    """
    found = {name: asdict(cfg.mesh)[name] for name in NAMES}
    rows = cfg.rows_per_step // cfg.train.grad_accumulation
    rest = next((name for name, size in found.items() if size == -1), None)
    fixed = math.prod(size for size in found.values() if size > 0)
    said = " x ".join(f"{name}={size}" for name, size in found.items() if size > 1) or "data=1"
    if fixed > count or (rest and count % fixed):
        near = max(size for size in range(1, min(fixed, count) + 1) if count % size == 0)
        raise BadInput(f"mesh {said} does not fit {count} devices; nearest product that does: {near}")
    if rest:
        most = count // fixed
        among = math.prod(found[name] for name in axes.ROWS if name != rest)
        fits = [size for size in range(1, most + 1) if rest not in axes.ROWS or rows % (size * among) == 0]
        found[rest] = max(fits, default=most) if rest in axes.ROWS else most
    across = math.prod(found[name] for name in axes.ROWS)
    if rows % across or (all_of_them and math.prod(found.values()) != count):
        if all_of_them:
            across = count // math.prod(found[name] for name in NAMES if name not in axes.ROWS)
        near = max(1, round(rows / across)) * across * cfg.train.grad_accumulation * cfg.data.context
        raise BadInput(
            f"{rows} rows of a microbatch do not divide among {across} devices of mesh.data x fsdp x expert; nearest"
            f" train.tokens_per_step: {near}"
        )
    cfg.check_mesh(found)
    return found


def check(cfg: Config) -> None:
    """Raises BadInput where `make` would."""
    if not cfg.model.counted:
        sizes(cfg, jax.device_count(), jax.process_count() > 1)


def make(cfg: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a resolved config over all devices of all processes, or over `devices`. Raises BadInput where they do not fit.

    Its axes are those of more than one device, "data" where there is none: over an axis of one, a derivative would be "summed" by a
    collective that copies it.
    """
    here = devices is None
    devices = jax.devices() if devices is None else devices
    found = sizes(cfg, len(devices), here and jax.process_count() > 1)
    shape = tuple(found.values())
    devices = list(devices)[: math.prod(shape)]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if (
        slices > 1
    ):  # TPU slices, joined by a slower network: copies or shards of parameters, whichever there are enough of
        outer = "data" if found["data"] % slices == 0 else "fsdp"
        dcn = tuple(slices if name == outer else 1 for name in NAMES)
        inner = tuple(size // across for size, across in zip(shape, dcn, strict=True))
        array = mesh_utils.create_hybrid_device_mesh(inner, dcn, devices, allow_split_physical_axes=True)
    else:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    names = [name for name in NAMES if found[name] > 1] or ["data"]
    array = array.reshape([found[name] for name in names])
    return Mesh(array, names, axis_types=(AxisType.Auto,) * len(names))


def sizes_of(mesh: Mesh) -> dict[str, int]:
    """Devices along each axis, 1 for those that the mesh does not have."""
    return dict.fromkeys(NAMES, 1) | dict(mesh.shape)


def traced(mesh: Mesh | None, f: Callable) -> Callable:
    """f, whose models know of the mesh while they are traced; f itself without one."""

    if mesh is None:
        return f

    @functools.wraps(f)
    def under(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return f(*args)

    return under


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows_of(mesh: Mesh) -> tuple[str, ...]:
    """The axes whose devices have rows of their own."""
    return tuple(name for name in axes.ROWS if name in mesh.axis_names)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays CxBx...: steps, then rows."""
    return NamedSharding(mesh, PartitionSpec(None, rows_of(mesh)))


def state_shardings(mesh: Mesh, model: Model, tree: Any) -> Any:
    """A sharding for each leaf of parameters, an optimizer's state or a TrainState: that of the parameter whose path its own ends with.

    Vectors, such as scales of norms, stay whole, and whatever belongs to no parameter.
    """
    across = dict(mesh.shape)
    named = dict(
        jax.tree_util.tree_leaves_with_path(
            families.logical_axes(model), is_leaf=lambda x: isinstance(x, PartitionSpec)
        )
    )

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        ends = (named[path[start:]] for start in range(len(path)) if path[start:] in named)
        names: tuple[str, ...] = tuple(next(ends, ()))
        matrix = sum(name != "layers" for name in names) > 1 and len(names) == len(leaf.shape)
        return NamedSharding(mesh, axes.spec(names, leaf.shape, across) if matrix else PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Shapes like `tree`, lying so."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def spread(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays that every process has whole, of which each device gets its part."""
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)


def joined(batches: Any, mesh: Mesh, rows: int) -> Any:
    """Batches of CxBx... as the compiled call takes them, of which this process has read the rows that `rows_here` says."""
    if jax.process_count() == 1:
        return batches
    sharding = batch_sharding(mesh)

    def join(x):
        return jax.make_array_from_process_local_data(sharding, x, (x.shape[0], rows, *x.shape[2:]))

    return jax.tree.map(join, batches)


def rows_here(mesh: Mesh, rows: int) -> list[int]:
    """Which rows of a batch of so many this process's devices read, in order."""
    parts = NamedSharding(mesh, PartitionSpec(rows_of(mesh))).addressable_devices_indices_map((rows,))
    return sorted({row for part in parts.values() if part is not None for row in range(rows)[part[0]]})
