"""The gradient of RMSNorm and LayerNorm in one kernel: by the input, by the scale, and added to that of a residual stream.

XLA writes the product of gradient and normalised input out in float32 for the sum over rows, and adds the residual stream's gradient
in a pass of its own. Here each array is read and written once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec

from llm_jax import axes, kernels

EPSILON = 1e-6
NUMBERS = 1024
"""Of one load, 32 a thread of the one warp that is a program: all sums over a row stay within it."""
MOST_LOADS = 16
"""Of one program, which adds up the scale's gradient over them. Fewer where there are not rows for PROGRAMS of them."""
PROGRAMS = 2048


def plain(x: jax.Array, scale: jax.Array, kind: str) -> jax.Array:
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm without bias over the last axis, in float32, in the dtype of x."""
    y = x.astype(jnp.float32)
    if kind == "layernorm":
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPSILON)
    return (y * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)


def norm(x: jax.Array, scale: jax.Array, kind: str) -> jax.Array:
    """As `plain`."""
    return _normed(x, scale, kind, False) if kernels.pay_for(x) else plain(x, scale, kind)


def fork(x: jax.Array, scale: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """(x, norm of x): where a branch leaves the residual stream, whose two gradients are then added in the kernel."""
    return _forked(x, scale, kind, False) if kernels.pay_for(x) else (x, plain(x, scale, kind))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _normed(x: jax.Array, scale: jax.Array, kind: str, interpret: bool) -> jax.Array:
    return plain(x, scale, kind)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _forked(x: jax.Array, scale: jax.Array, kind: str, interpret: bool) -> tuple[jax.Array, jax.Array]:
    return x, plain(x, scale, kind)


def _backward(kind, interpret, residuals, grad, stream=None):
    x, scale = residuals
    arrays = (x, grad) if stream is None else (x, grad, stream)
    spread = axes.spec(("rows", "sequence", "heads")[: x.ndim - 1], x.shape)

    def part(scale, *arrays):
        x_MxD, grad_MxD, *stream_MxD = (array.reshape(-1, array.shape[-1]) for array in arrays)
        dx_MxD, dscale = gradient(x_MxD, grad_MxD, scale, kind, stream_MxD[0] if stream_MxD else None, interpret)
        return dx_MxD.reshape(arrays[0].shape), axes.total(dscale, spread)

    return axes.local(part, (PartitionSpec(), *len(arrays) * (spread,)), (spread, PartitionSpec()))(scale, *arrays)


_normed.defvjp(lambda x, scale, kind, _: (plain(x, scale, kind), (x, scale)), _backward)
_forked.defvjp(
    lambda x, scale, kind, _: ((x, plain(x, scale, kind)), (x, scale)),
    lambda kind, interpret, residuals, both: _backward(kind, interpret, residuals, both[1], both[0]),
)


def gradient(
    x_MxD: jax.Array,
    grad_MxD: jax.Array,
    scale_D: jax.Array,
    kind: str,
    stream_MxD: jax.Array | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(dx_MxD, dscale_D) of `plain` for the gradient `grad_MxD` of its output; a `stream_MxD` is added to dx."""
    arrays = [x_MxD, grad_MxD, *([] if stream_MxD is None else [stream_MxD])]
    total, width = x_MxD.shape
    columns = pl.next_power_of_2(width)
    rows = max(1, NUMBERS // columns)
    loads = min(MOST_LOADS, pl.cdiv(total, rows * PROGRAMS))
    programs = pl.cdiv(total, rows * loads)
    of_rows = pl.BlockSpec((rows * loads, width), lambda p: (p, 0))
    dx_MxD, partial_PxD = pl.pallas_call(
        functools.partial(_kernel, kind=kind, shape=(rows, columns), loads=loads, total=total),
        grid=(programs,),
        in_specs=[pl.BlockSpec((width,), lambda p: (0,)), *len(arrays) * [of_rows]],
        out_specs=[of_rows, pl.BlockSpec((None, width), lambda p: (p, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(x_MxD.shape, x_MxD.dtype),
            jax.ShapeDtypeStruct((programs, width), jnp.float32),
        ],
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
        name=f"{kind}_gradient",
    )(scale_D, *arrays)
    return dx_MxD, partial_PxD.sum(0)


def _kernel(scale_ref, x_ref, grad_ref, *others, kind, shape, loads, total):
    *stream_ref, dx_ref, partial_ref = others
    rows, columns = shape
    width = x_ref.shape[1]
    first = pl.program_id(0) * rows * loads
    column_ = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    row_ = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    one_row = jax.lax.iota(jnp.int32, columns)
    scale_ = triton.load(scale_ref.at[one_row], mask=one_row < width, other=0.0).astype(jnp.float32)
    scale_ = jnp.broadcast_to(scale_[None, :], shape)

    def mean(value_):
        return jnp.broadcast_to((value_.sum(1) / width)[:, None], shape)

    def one(i, sum_):
        where = (i * rows + row_, column_)
        inside_ = (column_ < width) & (first + where[0] < total)
        x_, grad_, *stream_ = (
            triton.load(ref.at[where], mask=inside_, other=0.0).astype(jnp.float32)
            for ref in (x_ref, grad_ref, *stream_ref)
        )
        if kind == "layernorm":
            x_ = jnp.where(inside_, x_ - mean(x_), 0.0)
        deviation_ = jax.lax.rsqrt(mean(x_ * x_) + EPSILON)
        y_ = x_ * deviation_
        slope_ = grad_ * scale_
        dx_ = slope_ - y_ * mean(slope_ * y_)
        if kind == "layernorm":
            dx_ -= mean(slope_)
        dx_ = sum(stream_, deviation_ * dx_)
        triton.store(dx_ref.at[where], dx_.astype(dx_ref.dtype), mask=inside_)
        return sum_ + grad_ * y_

    sum_ = jax.lax.fori_loop(0, loads, one, jnp.zeros(shape, jnp.float32))
    triton.store(partial_ref.at[one_row], sum_.sum(0), mask=one_row < width)
