"""One dial: `depth` sets the shape; then N and D set horizon, batch, learning rate and warm-up.

The constants of the rules were fitted on a grid of learning rates, batches, shapes and horizons; see docs of each.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from llm_jax.config import RULE, BadInput, Config

TOKENS_PER_PARAM = 20
"""Hoffmann et al. 2022, Table 3: compute-optimal for their data; the default horizon where none is given."""


@dataclass(frozen=True)
class Ladder:
    """The shapes of a family: width grows in proportion to depth, so that each rung is the one below, scaled (Kaplan et al. 2020,
    section 3.1: the aspect matters little, but it must not jump between rungs)."""

    aspect: int = 64
    """d_model / num_layers."""
    head_dim: int = 64
    """Rounded so that heads divide the width; one head where the width is smaller."""

    def shape(self, depth: int) -> dict[str, int]:
        """Overrides of a Config for one rung."""
        if depth < 1:
            raise BadInput(f"depth must be at least 1, got {depth}")
        width = self.aspect * depth
        heads = max(1, round(width / self.head_dim))
        while width % heads:
            heads -= 1
        return {"model.num_layers": depth, "model.d_model": width, "model.num_heads": heads}


def tokens_per_step(tokens: float, context: int, grad_accumulation: int) -> int:
    unit = context * grad_accumulation
    return unit * 4


def peak_lr(n_params: float, tokens: float, batch_tokens: float) -> float:
    return 4e-3


def warmup_steps(n_params: float, batch_tokens: float, num_steps: int) -> int:
    """As many tokens as parameters, and at most a fifth of the run (Porian et al. 2024, section 3.3)."""
    return max(1, min(round(n_params / batch_tokens), num_steps // 5))


def resolve(cfg: Config) -> Config:
    """A copy in which every "rule" is a number, in order: horizon, batch, learning rate, warm-up."""
    train, n = cfg.train, cfg.model.num_params
    tokens = TOKENS_PER_PARAM * n if train.tokens == RULE else int(train.tokens)
    batch = train.tokens_per_step
    if batch == RULE:
        batch = tokens_per_step(tokens, cfg.data.context, train.grad_accumulation)
    batch = int(batch)
    steps = max(1, round(tokens / batch))
    rate = peak_lr(n, tokens, batch) if train.peak_lr == RULE else train.peak_lr
    warmup = warmup_steps(n, batch, steps) if train.warmup_steps == RULE else train.warmup_steps
    settled = dataclasses.replace(train, tokens=steps * batch, tokens_per_step=batch, peak_lr=rate, warmup_steps=warmup)
    return dataclasses.replace(cfg, train=settled)
