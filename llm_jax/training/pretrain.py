"""Next-token prediction: its loss, and its evaluation on the fixed held-out set."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import Model
from llm_jax.data.pipeline import EvalSet, segments
from llm_jax.models import families, ngram
from llm_jax.models.moe import rebalance
from llm_jax.training.losses import cross_entropy, routing_loss, token_nll
from llm_jax.training.step import AdjustFn, LossFn

EVAL_ROWS = 16
"""Rows of one forward pass of the evaluation."""


def make_batch(tokens_BxT: np.ndarray, bos: int, document_mask: bool) -> dict[str, np.ndarray]:
    """What the loss reads, from rows of context + 1 tokens; more leading axes are allowed."""
    batch = {"tokens": tokens_BxT}
    return batch | {"segments": segments(tokens_BxT, bos)} if document_mask else batch


def loss_fn(model: Model, z_loss: float) -> LossFn:
    """loss(params, batch, key) of `make_batch`'s batches; see LossFn."""

    def loss(params: Any, batch: dict[str, jax.Array], key: jax.Array):
        inputs_BxT, targets_BxT = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        logits_BxTxV, routing = families.apply_training(
            model, params, inputs_BxT, batch.get("segments"), key if model.dropout else None
        )
        total, sums = cross_entropy(logits_BxTxV, targets_BxT, jnp.ones(targets_BxT.shape, jnp.float32), z_loss)
        if not routing:
            return total, sums
        added, more = routing_loss(model.experts, routing)
        return total + added, sums | more

    return loss


def adjust_fn(model: Model) -> AdjustFn | None:
    """What a step changes without a gradient: the routers' bias where it balances the experts; None for all other models."""
    if not (model.experts.number and model.experts.balance == "bias"):
        return None

    def adjust(params: Any, sums: dict[str, jax.Array]) -> Any:
        blocks = params["blocks"]
        bias_LxE = rebalance(model.experts, blocks["mlp"]["router_bias"], sums["expert_load"])
        return {**params, "blocks": {**blocks, "mlp": {**blocks["mlp"], "router_bias": bias_LxE}}}

    return adjust


class Evaluation(NamedTuple):
    """Loss in nats a token, its standard error over documents, and bits a byte of UTF-8."""

    loss: float
    standard_error: float
    bits_per_byte: float


@functools.lru_cache
def _compiled_nll(model: Model):
    @jax.jit
    def nll(params: Any, batches: dict[str, jax.Array]) -> jax.Array:
        def rows(batch):
            logits_BxTxV = families.apply(model, params, batch["tokens"][:, :-1], batch.get("segments"))
            return token_nll(logits_BxTxV, batch["tokens"][:, 1:])[0].sum(-1)

        return jax.lax.map(rows, batches)

    return nll


def evaluate(
    model: Model, params: Any, held_out: EvalSet, token_bytes: np.ndarray, bos: int, document_mask: bool
) -> Evaluation:
    """Evaluates on all rows of `held_out`.

    The standard error treats documents as the independent units (a ratio estimate over clusters, Cochran 1977, section 6.3):
    tokens of one document share its difficulty, and treated as independent they would claim too much.
    """
    rows, width = held_out.tokens_BxT.shape
    if model.counted:
        batch = make_batch(held_out.tokens_BxT, bos, document_mask)
        nll_B = -ngram.token_log_probs(params, batch["tokens"], batch.get("segments")).sum(-1)
    else:
        padded = np.zeros((-(-rows // EVAL_ROWS) * EVAL_ROWS, width), np.int32)
        padded[:rows] = held_out.tokens_BxT
        batches = make_batch(padded.reshape(-1, EVAL_ROWS, width), bos, document_mask)
        nll_B = np.asarray(_compiled_nll(model)(params, batches), np.float64).reshape(-1)[:rows]
    tokens_B = np.full(rows, width - 1)
    loss = nll_B.sum() / tokens_B.sum()
    _, cluster_B = np.unique(held_out.document_B, return_inverse=True)
    excess = np.bincount(cluster_B, nll_B - loss * tokens_B)
    clusters = len(excess)
    standard_error = np.sqrt((excess**2).sum() * clusters / max(1, clusters - 1)) / tokens_B.sum()
    num_bytes = int(token_bytes[held_out.tokens_BxT[:, 1:]].sum())
    return Evaluation(float(loss), float(standard_error), float(nll_B.sum() / num_bytes / np.log(2)))
