"""Cross-entropy and its gradient by the logits in one kernel, a row of logits a program.

XLA reads the logits three times for the loss and once more for the gradient. Here the loss is summed up in the forward pass, the row
is read again, from the L2 cache as far as it is still there, and its gradient is written over it: two to three passes over the memory
of the largest array of a training step and not five. So only where the gradient is wanted; evaluation has the plain form in losses.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from llm_jax import axes

LEAST = -1e30
"""Stands for no logit: finite, so that no difference of two of them is NaN."""
SHORT = 2**14
BLOCKS = {True: (2048, 4), False: (4096, 16)}
"""By whether a row has at most SHORT logits: logits of one load, and warps of a program. The largest logit and the sum are kept for each
place of a block and joined at the end: the warps need not wait for each other at every load."""


def _kernel(
    logits_ref, target_ref, weight_ref, nll_ref, lse_ref, mean_ref, grad_ref, *, block, label_smoothing, z_loss
):
    vocab = logits_ref.shape[0]
    target, weight = target_ref[0], weight_ref[0]
    # Before the sums, where all warps wait for each other: the one that has this logit overwrites it as soon as they are through.
    picked = triton.load(logits_ref.at[target]).astype(jnp.float32)
    place_ = jax.lax.iota(jnp.int32, block)

    def load(i, policy):
        column_ = i * block + place_
        inside_ = column_ < vocab if vocab % block else None
        other = LEAST if vocab % block else None
        logit_ = triton.load(logits_ref.at[column_], mask=inside_, other=other, eviction_policy=policy)
        return column_, inside_, logit_.astype(jnp.float32)

    def add(i, carry):
        largest_, total_, every_ = carry
        _, inside_, logit_ = load(i, "evict_last")
        new_ = jnp.maximum(largest_, logit_)
        total_ = total_ * jnp.exp(largest_ - new_) + jnp.exp(logit_ - new_)
        if label_smoothing:
            every_ += logit_ if inside_ is None else jnp.where(inside_, logit_, 0.0)
        return new_, total_, every_

    zeros_ = jnp.zeros((block,), jnp.float32)
    start = (jnp.full((block,), LEAST, jnp.float32), zeros_, zeros_)
    largest_, total_, every_ = jax.lax.fori_loop(0, pl.cdiv(vocab, block), add, start)
    largest = largest_.max()
    lse = largest + jnp.log((total_ * jnp.exp(largest_ - largest)).sum())
    nll_ref[0] = lse - picked
    lse_ref[0] = lse
    mean_ref[0] = every_.sum() / vocab
    # d/dlogits of w ((1 - e) nll + e mean_v(-log p_v) + z lse^2)
    slope = weight * (1 + 2 * z_loss * lse)
    smooth = weight * (label_smoothing / vocab)

    def write(i, _):
        column_, inside_, logit_ = load(i, "evict_first")
        grad_ = slope * jnp.exp(logit_ - lse) - smooth
        grad_ -= jnp.where(column_ == target, weight * (1 - label_smoothing), 0.0)
        triton.store(grad_ref.at[column_], grad_.astype(grad_ref.dtype), mask=inside_)
        return _

    jax.lax.fori_loop(0, pl.cdiv(vocab, block), write, jnp.int32(0))


def nll_and_gradient(
    logits_MxV: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(nll_M, logsumexp_M, mean_M, gradient_MxV): float32 sums a row, and the gradient of losses.cross_entropy by the logits in their
    dtype, in their memory where nothing else reads them. mean_M is of the logits, and of use with label smoothing alone.
    """
    rows, vocab = logits_MxV.shape
    block, num_warps = BLOCKS[vocab <= SHORT]
    block = min(block, pl.next_power_of_2(vocab))
    row, number = pl.BlockSpec((None, vocab), lambda m: (m, 0)), pl.BlockSpec((1,), lambda m: (m,))
    column = jax.ShapeDtypeStruct((rows,), jnp.float32)

    return pl.pallas_call(
        functools.partial(_kernel, block=block, label_smoothing=label_smoothing, z_loss=z_loss),
        grid=(rows,),
        in_specs=[row, number, number],
        out_specs=[number, number, number, row],
        out_shape=[column, column, column, jax.ShapeDtypeStruct(logits_MxV.shape, logits_MxV.dtype)],
        input_output_aliases={0: 3},
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=1),
        name="cross_entropy",
    )(logits_MxV, targets_M, weights_M)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def summed(
    logits_MxV: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
    label_smoothing: float,
    z_loss: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(sum of the loss, sum of weights x nll) of losses.cross_entropy. Only the first has a gradient, and by the logits alone."""
    return _forward(logits_MxV, targets_M, weights_M, label_smoothing, z_loss, interpret)[0]


def _forward(logits_MxV, targets_M, weights_M, label_smoothing, z_loss, interpret):
    settings = {"label_smoothing": label_smoothing, "z_loss": z_loss, "interpret": interpret}
    rows = axes.spec(("rows",), targets_M.shape)
    kernel = axes.local(functools.partial(nll_and_gradient, **settings), (rows, rows, rows), (rows, rows, rows, rows))
    nll_M, lse_M, mean_M, gradient_MxV = kernel(logits_MxV, targets_M, weights_M)
    nll = (nll_M * weights_M).sum()
    total = (1 - label_smoothing) * nll
    if label_smoothing:
        total += label_smoothing * ((lse_M - mean_M) * weights_M).sum()
    if z_loss:
        total += z_loss * (jnp.square(lse_M) * weights_M).sum()
    return (total, nll), gradient_MxV


def _backward(label_smoothing, z_loss, interpret, gradient_MxV, cotangents):
    # Of a sum that is minimised the cotangent is the constant 1, and XLA drops the product.
    return gradient_MxV * cotangents[0].astype(gradient_MxV.dtype), None, None


summed.defvjp(_forward, _backward)
