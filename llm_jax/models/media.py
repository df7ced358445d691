"""Encoders of pictures and of sounds, and the projector that makes embeddings of a language model of what they see or hear.

A text holds a placeholder for each of the P embeddings of an item. In their place the language model reads the item, as the tokens of
another language (LLaVA, Liu et al. 2023); text before it does not see it, text behind it does. Parameters are below "media" in the
tree of the model, those of the language model where they are without media.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from llm_jax.config import Model
from llm_jax.models.layers import Norm, activate, normal, project
from llm_jax.models.transformer import recomputed, sinusoids


class Items(NamedTuple):
    """The media of a batch of rows, and where they stand."""

    items_BxIx: jax.Array | np.ndarray
    """Pictures, uint8 BxIxSxSxC, or log-mel spectrograms, float16 BxIxFxM; zeros where a row has fewer."""
    at_BxT: jax.Array | np.ndarray
    """True at placeholders: each takes the next of a row's R = I x P embeddings, in order."""


class Media(nn.Module):
    """From items_BxIx to embeddings_BxRxD, D the width of the language model: an encoder, and the projector of LLaVA-1.5, an MLP of
    two layers with GELU (Liu et al. 2023b, section 3.3)."""

    cfg: Model
    train: bool = False

    @nn.compact
    def __call__(self, items_BxIx: jax.Array) -> jax.Array:
        cfg, (rows, items) = self.cfg, items_BxIx.shape[:2]
        encoder = ImageEncoder if cfg.media.kind == "image" else AudioEncoder
        x_XxPxD = encoder(cfg, self.train, name="encoder")(items_BxIx.reshape(-1, *items_BxIx.shape[2:]))
        x_XxPxD = Projector(cfg, name="projector")(x_XxPxD)
        return x_XxPxD.reshape(rows, items * cfg.media.tokens, cfg.d_model)


class ImageEncoder(nn.Module):
    """The ViT of Dosovitskiy et al. 2021 without a class token: one product for all patches, learned positions, pre-norm blocks."""

    cfg: Model
    train: bool

    @nn.compact
    def __call__(self, pictures_XxSxSxC: jax.Array) -> jax.Array:
        media, width, dtype = self.cfg.media, self.cfg.media.d_model, jnp.dtype(self.cfg.dtype)
        pixels = media.patch**2 * media.channels
        kernel_ZxD: Any = self.param("patch", normal(("pixels", "embed"), pixels), (pixels, width))
        table_PxD: Any = self.param("positions", normal(("positions", "embed"), width), (media.tokens, width))
        x_XxPxD = project(patches(scaled(pictures_XxSxSxC, dtype), media.patch), kernel_ZxD)
        x_XxPxD += (table_PxD.astype(dtype) * dtype.type(width**0.5))[None]
        return blocks(self.cfg, self.train)(x_XxPxD)


class AudioEncoder(nn.Module):
    """The encoder of Whisper (Radford et al. 2022, section 2.2): two convolutions of width 3 with GELU, the second of stride 2,
    sinusoidal positions, pre-norm blocks."""

    cfg: Model
    train: bool

    @nn.compact
    def __call__(self, spectra_XxFxM: jax.Array) -> jax.Array:
        media, width, dtype = self.cfg.media, self.cfg.media.d_model, jnp.dtype(self.cfg.dtype)
        x_XxPxD = spectra_XxFxM.astype(dtype)
        for name, inputs, axis, stride in (("conv1", media.mel_bins, "mel", 1), ("conv2", width, "hidden", 2)):
            kernel: Any = self.param(name, normal(("taps", axis, "embed"), 3 * inputs), (3, inputs, width))
            x_XxPxD = activate("gelu", convolve(x_XxPxD, kernel, stride))
        positions_1xP = jnp.arange(media.tokens, dtype=jnp.int32)[None, :]
        x_XxPxD += sinusoids(positions_1xP, width).astype(dtype)
        return blocks(self.cfg, self.train)(x_XxPxD)


class Projector(nn.Module):
    """x_XxPxD of the encoder's width to that of the language model: two layers with GELU between them."""

    cfg: Model

    @nn.compact
    def __call__(self, x_XxPxD: jax.Array) -> jax.Array:
        wide, width = self.cfg.media.d_model, self.cfg.d_model
        up: Any = self.param("up", normal(("hidden", "mlp"), wide), (wide, width))
        down: Any = self.param("down", normal(("mlp", "embed"), width), (width, width))
        return project(activate("gelu", project(x_XxPxD, up)), down)


def blocks(cfg: Model, train: bool):
    """The Transformer of an encoder as a function of x_XxPxD, to be called inside its module: blocks that see all of an item, and
    the norm behind them."""
    encoder = cfg.media_encoder
    layers = nn.scan(
        recomputed(encoder),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=5 * (nn.broadcast,),
        length=encoder.num_layers,
        unroll=1 if encoder.scan_layers else encoder.num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(encoder, train, causal=False, name="blocks")
    dropout = nn.Dropout(encoder.dropout, deterministic=not train)
    norm = Norm(encoder.norm, name="norm")
    return lambda x_XxPxD: norm(layers(dropout(x_XxPxD), None, None, None, jnp.int32(0), None)[0])


def scaled(pictures: jax.Array, dtype: Any) -> jax.Array:
    """Bytes as numbers in [-1, 1]."""
    return pictures.astype(dtype) / jnp.dtype(dtype).type(127.5) - jnp.dtype(dtype).type(1)


def patches(pictures_XxSxSxC: jax.Array, patch: int) -> jax.Array:
    """XxPxZ: squares of `patch` pixels, row by row as one reads; Z runs over their rows, columns and colours."""
    X, S, _, C = pictures_XxSxSxC.shape
    side = S // patch
    x = pictures_XxSxSxC.reshape(X, side, patch, side, patch, C).swapaxes(2, 3)
    return x.reshape(X, side * side, patch * patch * C)


def convolve(x_XxFxM: jax.Array, kernel_3xMxD: jax.Array, stride: int) -> jax.Array:
    """y[f] = sum over k of x[f stride + k - 1] kernel[k], zeros beyond both ends: as one product of matrices."""
    length = x_XxFxM.shape[1]
    padded = jnp.pad(x_XxFxM, ((0, 0), (1, 1), (0, 0)))
    taps_XxFx3xM = jnp.stack([padded[:, k : k + length : stride] for k in range(3)], axis=2)
    return project(taps_XxFx3xM, kernel_3xMxD, 2)


def place(x_BxTxD: jax.Array, media_BxRxD: jax.Array, at_BxT: jax.Array | np.ndarray) -> jax.Array:
    """x with the next of the row's embeddings at each placeholder. There must be no more placeholders than embeddings."""
    index_BxT = jnp.clip(jnp.cumsum(at_BxT, axis=1, dtype=jnp.int32) - 1, 0, media_BxRxD.shape[1] - 1)
    taken_BxTxD = jnp.take_along_axis(media_BxRxD, index_BxT[..., None], axis=1)
    return jnp.where(at_BxT[..., None], taken_BxTxD.astype(x_BxTxD.dtype), x_BxTxD)
