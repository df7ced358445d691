"""One dial: `depth` sets the shape; then N and D set horizon, batch, learning rate and warm-up.

The constants of the rules were fitted on one grid: 91 cells of 11 shapes (10 k to 406 k parameters), budgets of 3e10 to 3e12 FLOPs
and batches of 256 to 2,048 tokens, each at six learning rates (1e-3 to 32e-3) and two beta2, on bytes of the standard library's
sources with context 128, AdamW, cosine to zero. Beyond that range they extrapolate: look at the basin before a large run.

They were fitted on Transformers. Other families, at budgets of 2e10 and 1e11 FLOPs (12 k to 58 k parameters, 0.13 M to 1.3 M tokens,
context 64, one seed), at a quarter, half, one, two and four times that rate: the best of them was twice the rate for the LSTM (three
cells, 0.5 to 1.6 % below the loss at the rate itself) and for the feed-forward model (two cells, 0.7 and 1.7 %), the rate itself
or half of it for the RNN (three cells, 0.2 % at most). Hence RATE_FACTORS. The rule of the batch was not looked at again.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from llm_jax.config import RULE, Config
from llm_jax.parts import frozen, num_params_active
from llm_jax.settings import BadInput

TOKENS_PER_PARAM = 20
"""Hoffmann et al. 2022, Table 3: compute-optimal for their data; the default horizon where none is given."""


RATE_FACTORS = {"lstm": 1.8, "feedforward": 1.8}
"""Of the Transformers' learning rate, for families whose best is elsewhere: the lowest points of parabolas through the three best
rates of each cell lie at factors of 1.7, 1.7 and 2.1 for the LSTM, 1.6 and 2.1 for feedforward, 0.7, 1.0 and 1.0 for the RNN."""


@dataclass(frozen=True)
class Ladder:
    """The shapes of a family: width grows in proportion to depth, so that each rung is the one below, scaled (Kaplan et al. 2020,
    section 3.1: the aspect matters little, but it must not jump between rungs)."""

    aspect: int = 64
    """d_model a layer."""
    head_dim: int = 64
    """Wanted; heads divide the width, and there is one where the width is smaller."""
    num_heads: int | None = None
    """The same number of heads on every rung, instead of a width of each: for rungs narrower than a head or two."""

    def shape(self, depth: float) -> dict[str, int]:
        """Overrides of a Config for one rung. Depth may be a fraction: the width follows it, and the layers are the next whole number.

        Two layers at least: with one, a model cannot copy from its context by induction (Olsson et al. 2022), and rungs must not
        differ in kind.
        """
        if depth < 1:
            raise BadInput(f"depth must be at least 1, got {depth}")
        width = max(8, 8 * round(self.aspect * depth / 8))
        heads = self.num_heads or max(1, round(width / self.head_dim))
        while width % heads:
            heads -= 1
        return {"model.num_layers": max(2, math.ceil(depth)), "model.d_model": width, "model.num_heads": heads}


def tokens_per_step(tokens: float, context: int, grad_accumulation: int) -> int:
    """The batch grows as the square root of the horizon: 384 tokens for a million, at least two rows.

    Measured at the best learning rate of each cell of the grid above: the best batch grew as D^0.75..0.98 with D alone (N to the
    power of -0.2..-0.15 was within its error); this rule, with the rate below, stays within 0.6 % of the best loss on average and
    1.9 % at worst. Twice the batch costs 1 % of the loss and four times 3 %, most where D is small. The power is between those
    of Bergsma et al. 2025 («Power Lines», 0.4) and Li et al. 2025 («Step Law», 0.57).
    """
    unit = context * grad_accumulation
    return unit * max(2 if grad_accumulation == 1 else 1, round(384 * (tokens / 1e6) ** 0.5 / unit))


def peak_lr(n_params: float, tokens: float, batch_tokens: float, family: str = "transformer") -> float:
    """0.008 (N / 1e5)^(-1/3) (D / 1e6)^(-1/4) (batch / 512)^0.6 times the family's factor, to four digits.

    Fitted on the 69 cells of the grid whose best rate was not at its edge: powers -0.35 +- 0.02, -0.22 +- 0.02, 0.59 +- 0.03 and
    0.0079, residual 17 %. Within a cell this costs 0.24 % of the loss on average; erring high is cheaper than erring low.
    """
    rate = 0.008 * (n_params / 1e5) ** (-1 / 3) * (tokens / 1e6) ** -0.25 * (batch_tokens / 512) ** 0.6
    return float(f"{rate * RATE_FACTORS.get(family, 1.0):.4g}")


def warmup_steps(n_params: float, batch_tokens: float, num_steps: int) -> int:
    """As many tokens as parameters, and at most a fifth of the run (Porian et al. 2024, section 3.3)."""
    return max(1, min(round(n_params / batch_tokens), num_steps // 5))


def resolve(cfg: Config) -> Config:
    """A copy in which every "rule" is a number, in order: horizon, batch, learning rate, warm-up.

    Raises BadInput where train.freeze names no parameter, and where a rule has no size to go by.
    """
    if cfg.train.freeze:
        frozen(cfg.model, cfg.train.freeze)
    train, n = cfg.train, num_params_active(cfg.model, cfg.data.context, cfg.data.prefix)
    if cfg.model.counted:
        if train.tokens == RULE:
            raise BadInput("model.family=ngram has no size before it is counted; give train.tokens a number")
        # Read by nobody: one pass over the tokens.
        train = dataclasses.replace(train, peak_lr=1.0, warmup_steps=0)
    tokens = TOKENS_PER_PARAM * n if train.tokens == RULE else int(train.tokens)
    batch = train.tokens_per_step
    if batch == RULE:
        batch = tokens_per_step(tokens, cfg.data.context, train.grad_accumulation)
    batch = int(batch)
    steps = max(1, round(tokens / batch))
    rate = peak_lr(n, tokens, batch, cfg.model.family) if train.peak_lr == RULE else train.peak_lr
    warmup = warmup_steps(n, batch, steps) if train.warmup_steps == RULE else train.warmup_steps
    settled = dataclasses.replace(train, tokens=steps * batch, tokens_per_step=batch, peak_lr=rate, warmup_steps=warmup)
    return dataclasses.replace(cfg, train=settled)
