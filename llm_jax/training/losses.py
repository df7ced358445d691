"""Losses as sums with their weights, so that microbatches and hosts can be added before the one division."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llm_jax import axes, kernels
from llm_jax.config import Experts
from llm_jax.kernels import cross_entropy as fused


def token_nll(logits_BxTxV: jax.Array, targets_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of each target in nats, and logsumexp(logits), both float32 and BxT."""
    logits_BxTxV = logits_BxTxV.astype(jnp.float32)
    lse_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1)
    # A comparison and not a gather, whose gradient is a scatter: slow on a CPU, in no fixed order on a GPU.
    vocab_1x1xV = jnp.arange(logits_BxTxV.shape[-1], dtype=targets_BxT.dtype)[None, None, :]
    picked_BxT = jnp.where(vocab_1x1xV == targets_BxT[..., None], logits_BxTxV, 0).sum(-1)
    return lse_BxT - picked_BxT, lse_BxT


def cross_entropy(
    logits_BxTxV: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum over tokens of w ((1 - e) nll + e mean_v(-log p_v) + z_loss logsumexp^2), e the label smoothing (Szegedy et al. 2016,
    section 7), with {"nll", "weight"}: the sums of w nll, neither smoothed nor with the z-term, and of w.

    The z-term keeps the softmax normaliser near 1 (Chowdhery et al. 2022, section 5).
    """
    # The kernel reads whole rows of logits, whose rows of tokens lie side by side.
    if kernels.used() and axes.size("tensor", "sequence") == 1:
        flat = logits_BxTxV.reshape(-1, logits_BxTxV.shape[-1]), targets_BxT.reshape(-1), weights_BxT.reshape(-1)
        total, nll = fused.summed(*flat, label_smoothing, z_loss)
        return total, {"nll": nll, "weight": weights_BxT.sum()}
    nll_BxT, lse_BxT = token_nll(logits_BxTxV, targets_BxT)
    sums = {"nll": (nll_BxT * weights_BxT).sum(), "weight": weights_BxT.sum()}
    total = sums["nll"]
    if label_smoothing:
        even_BxT = lse_BxT - logits_BxTxV.astype(jnp.float32).mean(-1)
        total = (1 - label_smoothing) * total + label_smoothing * (even_BxT * weights_BxT).sum()
    if z_loss:
        total = total + z_loss * (jnp.square(lse_BxT) * weights_BxT).sum()
    return total, sums


def routing_loss(experts: Experts, routing: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What the routers of all layers add to the sum over tokens, and sums to report, from `moe.Routing` stacked over layers.

    The balancing loss of Switch (Fedus et al. 2021, eq. 4) and the z-loss of ST-MoE (Zoph et al. 2022, eq. 5) are added for each
    layer, as published. Reported are means over layers, and "expert_load", LxE: the choices of each expert.
    """
    aux_weight = experts.aux_weight if experts.balance == "aux" else 0.0
    total = aux_weight * routing["balance"].sum() + experts.z_weight * routing["router_z"].sum()
    names = {"balance": "balance_loss", "router_z": "router_z", "entropy": "router_entropy", "dropped": "dropped"}
    return total, {"expert_load": routing["load"], **{name: routing[key].mean() for key, name in names.items()}}
