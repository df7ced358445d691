"""Next-token prediction: its loss, and its evaluation on the fixed held-out set."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.config import Data, Model, Train
from llm_jax.data.pipeline import EvalSet, segments
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.models import families, ngram
from llm_jax.models.media import Items
from llm_jax.models.moe import rebalance
from llm_jax.parts import begins
from llm_jax.training import mesh as meshes
from llm_jax.training.losses import cross_entropy, routing_loss, token_nll
from llm_jax.training.optimizer import trained
from llm_jax.training.step import AdjustFn, LossFn

EVAL_ROWS = 16
"""Rows of one forward pass of the evaluation."""


def make_batch(
    tokens_BxT: np.ndarray, tokenizer: Tokenizer, data: Data, items_BxIx: np.ndarray | None = None
) -> dict[str, Any]:
    """What the loss reads, from rows of context + 1 tokens and their media; more leading axes are allowed. "weights" are of the targets
    after the prefix, where they are not all 1: 0 where a row of pairs is padding, which is a document of its own, and where a row
    with media is padding or a placeholder: the loss is of the text alone.
    """
    batch: dict[str, Any] = {"tokens": tokens_BxT}
    if items_BxIx is not None:
        at_BxT = tokens_BxT == tokenizer.media
        text_BxT = ~at_BxT & (tokens_BxT != tokenizer.pad)
        media = Items(items_BxIx, at_BxT[..., :-1])
        return batch | {"media": media, "weights": text_BxT[..., data.prefix + 1 :].astype(np.float32)}
    if data.source == "pairs":
        padding_BxT = tokens_BxT == tokenizer.pad
        weights_BxT = (~padding_BxT[..., data.prefix + 1 :]).astype(np.float32)
        return batch | {"segments": padding_BxT[..., :-1].astype(np.int32), "weights": weights_BxT}
    return batch | {"segments": segments(tokens_BxT, tokenizer.bos)} if data.document_mask else batch


def _targets(batch: dict[str, jax.Array], prefix: int) -> tuple[jax.Array, jax.Array]:
    """(targets_BxT, weights_BxT) after the prefix: of the inputs from there on, the tokens behind them."""
    targets_BxT = batch["tokens"][:, prefix + 1 :]
    weights_BxT = batch.get("weights")
    return targets_BxT, jnp.ones(targets_BxT.shape, jnp.float32) if weights_BxT is None else weights_BxT


def _held(params: Any, freeze: tuple[str, ...]) -> Any:
    """The parameters, without a gradient for those that train.freeze names: nobody computes it then."""
    return jax.tree.map(lambda x, trained: x if trained else jax.lax.stop_gradient(x), params, trained(params, freeze))


def loss_fn(model: Model, train: Train, prefix: int = 0) -> LossFn:
    """loss(params, batch, key) of `make_batch`'s batches, by the settings of losses in `train`; see LossFn."""

    def loss(params: Any, batch: dict[str, Any], key: jax.Array):
        logits_BxTxV, routing = families.apply_training(
            model,
            _held(params, train.freeze),
            batch["tokens"][:, :-1],
            batch.get("segments"),
            key if model.dropout else None,
            prefix,
            batch.get("media"),
        )
        targets_BxT, weights_BxT = _targets(batch, prefix)
        # What the head's product gave, before it was made float32: half the bytes in bfloat16.
        logits_BxTxV = logits_BxTxV.astype(model.dtype)
        total, sums = cross_entropy(logits_BxTxV, targets_BxT, weights_BxT, train.z_loss, train.label_smoothing)
        if not routing:
            return total, sums
        added, more = routing_loss(model.experts, routing)
        return total + added, sums | more

    return loss


def adjust_fn(model: Model, freeze: tuple[str, ...] = ()) -> AdjustFn | None:
    """What a step changes without a gradient: the routers' bias where it balances the experts; None for all other models."""
    if not (model.experts.number and model.experts.balance == "bias") or begins("blocks/mlp/router_bias", freeze):
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
def _compiled_nll(model: Model, prefix: int, mesh: Mesh | None):
    def nll(params: Any, batches: dict[str, Any]) -> jax.Array:
        def rows(batch):
            inputs_BxT, segment_BxT = batch["tokens"][:, :-1], batch.get("segments")
            logits_BxTxV = families.apply(
                model, params, inputs_BxT, segment_BxT, prefix=prefix, media=batch.get("media")
            )
            targets_BxT, weights_BxT = _targets(batch, prefix)
            return (token_nll(logits_BxTxV, targets_BxT)[0] * weights_BxT).sum(-1)

        return jax.lax.map(rows, batches)

    return jax.jit(meshes.traced(mesh, nll), out_shardings=meshes.replicated(mesh) if mesh is not None else None)


def _held_out_batches(held_out: EvalSet, tokenizer: Tokenizer, data: Data, mesh: Mesh | None) -> dict[str, Any]:
    """Batches of EVAL_ROWS rows, or of one for each device that has rows of its own; the last is filled up with zeros."""
    across = math.prod(mesh.shape[axis] for axis in meshes.rows_of(mesh)) if mesh is not None else 1
    at_once = -(-EVAL_ROWS // across) * across
    rows, width = held_out.tokens_BxT.shape
    padded = np.zeros((-(-rows // at_once) * at_once, width), np.int32)
    padded[:rows] = held_out.tokens_BxT
    items_BxIx = held_out.items_BxIx
    if items_BxIx is not None:
        items_BxIx = np.resize(items_BxIx, (len(padded), *items_BxIx.shape[1:]))
        items_BxIx = items_BxIx.reshape(-1, at_once, *items_BxIx.shape[1:])
    batches = make_batch(padded.reshape(-1, at_once, width), tokenizer, data, items_BxIx)
    return batches if mesh is None else meshes.spread(batches, meshes.batch_sharding(mesh))


def compile_evaluation(
    model: Model, params: Any, held_out: EvalSet, tokenizer: Tokenizer, data: Data, mesh: Mesh | None = None
) -> None:
    """Compiles what `evaluate` runs, of abstract parameters."""
    _compiled_nll(model, data.prefix, mesh).lower(params, _held_out_batches(held_out, tokenizer, data, mesh)).compile()


def evaluate(
    model: Model, params: Any, held_out: EvalSet, tokenizer: Tokenizer, data: Data, mesh: Mesh | None = None
) -> Evaluation:
    """Evaluates on all rows of `held_out`, on the targets after the prefix; on all devices of a mesh, whose processes all take part.

    The standard error treats documents as the independent units (a ratio estimate over clusters, Cochran 1977, section 6.3):
    tokens of one document share its difficulty, and treated as independent they would claim too much.
    """
    rows, width = held_out.tokens_BxT.shape
    if model.counted:
        batch = make_batch(held_out.tokens_BxT, tokenizer, data)
        nll_B = -ngram.token_log_probs(params, batch["tokens"], batch.get("segments"))[:, data.prefix :].sum(-1)
    else:
        batches = _held_out_batches(held_out, tokenizer, data, mesh)
        nll_B = np.asarray(_compiled_nll(model, data.prefix, mesh)(params, batches), np.float64).reshape(-1)[:rows]
    weights_BxT = make_batch(held_out.tokens_BxT, tokenizer, data, held_out.items_BxIx).get("weights")
    tokens_B = np.full(rows, width - 1 - data.prefix) if weights_BxT is None else weights_BxT.sum(-1, dtype=np.float64)
    loss = nll_B.sum() / tokens_B.sum()
    _, cluster_B = np.unique(held_out.document_B, return_inverse=True)
    excess = np.bincount(cluster_B, nll_B - loss * tokens_B)
    clusters = len(excess)
    standard_error = np.sqrt((excess**2).sum() * clusters / max(1, clusters - 1)) / tokens_B.sum()
    num_bytes = int(tokenizer.token_bytes()[held_out.tokens_BxT[:, data.prefix + 1 :]].sum())
    return Evaluation(float(loss), float(standard_error), float(nll_B.sum() / num_bytes / np.log(2)))
