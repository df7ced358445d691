"""What the families of models share: initial values with logical axis names, norms, and the product with an array."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from llm_jax import axes, kernels
from llm_jax.kernels import norm


def normal(axes: tuple[str, ...], fan_in: int) -> nn.initializers.Initializer:
    """Normal of variance 1/fan_in."""
    return nn.with_logical_partitioning(nn.initializers.normal(fan_in**-0.5), axes)


def normal_out(axes: tuple[str, ...], fan_in: int, num_layers: int) -> nn.initializers.Initializer:
    """Of the last matrix of a branch: variance 1 / (2 L fan_in), so that the 2 L branches add up to 1 (GPT-2).

    Zeros, the other usual choice, cost 0.7 to 1.4 % of the loss here (12 seeds of 20 to 170 k parameters).
    """
    return normal(axes, 2 * num_layers * fan_in)


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm without bias, in float32."""

    kind: str
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: jax.Array, fork: bool = False) -> Any:
        """The norm of x; to `fork`, (x, norm of x), where a branch leaves the residual stream: see kernels/norm.py."""
        ones = nn.with_logical_partitioning(nn.initializers.ones_init(), (self.axis,))
        scale: Any = self.param("scale", ones, x.shape[-1:])
        return (norm.fork if fork else norm.norm)(x, scale, self.kind)


def lookup(table_VxD: jax.Array, index: jax.Array, dtype: Any) -> jax.Array:
    """Rows of an embedding, in `dtype`. Cast behind the look-up: the gradient of a row adds up over all its places in a batch, and a sum in
    bfloat16 loses what is less than a 512th of it."""
    return table_VxD[index].astype(dtype)


def embed(table_VxD: jax.Array, tokens_BxT: jax.Array, dtype: Any) -> jax.Array:
    """`lookup` of tokens in an embedding that lies where llm_jax/axes.py says.

    Over fsdp it is gathered in `dtype`, and its gradient, after each device's sum, is scattered so: XLA would move both in float32.
    """
    if axes.size("fsdp") == 1:
        return lookup(axes.constrain(table_VxD, "vocab", None), tokens_BxT, dtype)
    lies = axes.spec(("vocab", "embed"), table_VxD.shape)
    spread = axes.spec(("rows", "sequence"), tokens_BxT.shape)
    of_vocab = axes.spec(("vocab",), table_VxD.shape)

    def local(table_VxD, tokens_BxT):
        whole_VxD = axes.gathered(table_VxD.astype(dtype), lies, "fsdp").astype(table_VxD.dtype)
        if not of_vocab[0]:
            return lookup(whole_VxD, tokens_BxT, dtype)
        vocab = whole_VxD.shape[0]
        at_BxT = tokens_BxT - jax.lax.axis_index(of_vocab[0]) * vocab
        here_BxTx1 = ((at_BxT >= 0) & (at_BxT < vocab))[..., None]
        x_BxTxD = lookup(whole_VxD, jnp.clip(at_BxT, 0, vocab - 1), dtype)
        return axes.total(jnp.where(here_BxTx1, x_BxTxD, dtype.type(0)), of_vocab)

    return axes.local(local, (lies, spread), PartitionSpec(*spread, None))(table_VxD, tokens_BxT)


def project(x: jax.Array, kernel: jax.Array, num_in: int = 1) -> jax.Array:
    """The last `num_in` dimensions of x against the first of the kernel: x[..., in] kernel[in, out] -> [..., out].

    As one product of two matrices: with more dimensions XLA's CPU compiler copies activations into another order to form the
    gradient of the kernel, which took a quarter of a step.
    """
    if axes.size("sequence") > 1:  # rows and positions that are both spread are no longer one dimension
        return jnp.tensordot(x, kernel.astype(x.dtype), num_in)
    width = math.prod(kernel.shape[:num_in])
    flat = x.reshape(-1, width) @ kernel.reshape(width, -1).astype(x.dtype)
    return flat.reshape(*x.shape[: x.ndim - num_in], *kernel.shape[num_in:])


def activate(kind: str, up: jax.Array, gate: jax.Array | None = None) -> jax.Array:
    """The hidden layer of an MLP: GELU (its tanh form), SwiGLU (Shazeer 2020), squared ReLU (So et al. 2021) or ReLU.

    On a GPU the backward pass computes it anew from `up` and `gate`: else XLA writes and reads what its derivative shares with it,
    half as many bytes again.
    """
    function = functools.partial(_activate, kind)
    return jax.checkpoint(function)(up, gate) if kernels.pay_for(up) else function(up, gate)


def _activate(kind: str, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    if kind == "swiglu":
        assert gate is not None
        return jax.nn.silu(gate) * up
    if kind == "gelu":
        return jax.nn.gelu(up)
    return jax.nn.relu(up) if kind == "relu" else jnp.square(jax.nn.relu(up))
