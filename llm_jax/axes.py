"""Names of dimensions, and the axes of a device mesh that each is spread over: the one table, and how models read it.

Programs are traced inside of `jax.sharding.use_abstract_mesh`, which training/mesh.py enters; models find the mesh there, so that a
model is the same function with a mesh and without. XLA spreads all that it can spread itself, by the shardings of arguments and by
`constrain`. What it cannot, kernels and what has to exchange rows, runs on each device's part by `local`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

ROWS = ("data", "fsdp", "expert")
"""Each device of these has rows of its own: tokens are independent but for attention, so that experts and shards of parameters
cost no device its share of the other work (GShard, Lepikhin et al. 2020; ZeRO, Rajbhandari et al. 2020)."""
RULES: dict[str | None, tuple[str, ...]] = {
    "rows": ROWS,
    "sequence": ("sequence",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert",),
}
"""By logical name; rows and sequence are of activations, the others of parameters (families.logical_axes), and of activations where a
product leaves them so. A dimension of another name is whole on every device: embed, layers, positions, head, taps, state, ..."""
FSDP = ("embed", "vocab", "heads", "mlp")
"""A parameter with "embed" lies on fsdp by its first dimension of these names that the axis divides: rows then are what is gathered and
scattered. Of columns, XLA leaves every TPU the whole sum: twice the bytes."""


def spec(names: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int] | None = None) -> PartitionSpec:
    """Where an array of such dimensions lies on a mesh of `sizes`, the current one without. A dimension stays whole that its axes do not
    divide, or whose axes an earlier one has."""
    sizes = dict(mesh().shape) if sizes is None else sizes
    found: list[tuple[str, ...] | None] = []
    used: set[str] = set()
    for name, length in zip(names, shape, strict=False):
        axes = tuple(axis for axis in RULES.get(name, ()) if sizes.get(axis, 1) > 1)
        fits = axes and not used & set(axes) and length % math.prod(sizes[axis] for axis in axes) == 0
        used |= set(axes) if fits else set()
        found.append(axes if fits else None)
    if "embed" in names and (fsdp := sizes.get("fsdp", 1)) > 1:
        for i, (name, length) in enumerate(zip(names, shape, strict=False)):
            if name in FSDP and length % (fsdp * math.prod(sizes[axis] for axis in found[i] or ())) == 0:
                found[i] = (*(found[i] or ()), "fsdp")
                break
    return PartitionSpec(*found)


def mesh() -> Any:
    """The abstract mesh of the program being traced; empty without one, on a single device, and inside of `local`."""
    current = jax.sharding.get_abstract_mesh()
    empty = current.size == 1 or bool(current.manual_axes)
    return jax.sharding.AbstractMesh((), ()) if empty else current


def size(*axes: str) -> int:
    """Devices along these axes of the current mesh; 1 without one."""
    return math.prod(mesh().shape.get(axis, 1) for axis in axes)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """x, lying where the table says; x itself without a mesh."""
    if mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape))


def _over(part: Any) -> tuple[str, ...]:
    """The axes of a dimension of a PartitionSpec."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def total(x: Any, spread: PartitionSpec) -> Any:
    """Inside of `local`: x summed over the axes that an argument is spread over."""
    over = [axis for part in spread for axis in _over(part)]
    return jax.lax.psum(x, over) if over else x


def gathered(x: jax.Array, spread: PartitionSpec, axis: str) -> jax.Array:
    """Inside of `local`: x, spread so, whole along this axis. Its derivative is summed and spread in one."""
    for dimension, part in enumerate(spread):
        if axis in _over(part):
            x = jax.lax.all_gather(x, axis, axis=dimension, tiled=True)
    return x


def local(f: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """f on each device's part of its arguments; f itself without a mesh. What `out_specs` do not spread over an axis must be equal along
    it, summed in f for instance; a derivative sums up over the axes that `in_specs` do not spread an argument over."""
    if mesh().empty:
        return f
    return jax.shard_map(f, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=False)
