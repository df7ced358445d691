"""AdamW and its learning-rate schedules."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax

from llm_jax.config import Train
from llm_jax.parts import begins


def learning_rates(cfg: Train, num_steps: int, steps: np.ndarray) -> np.ndarray:
    """Learning rate of each of `steps` (counted from 0) of a run of `num_steps`, float32, computed on the host.

    Linear warm-up to the peak at step `warmup_steps`; then `cosine` or `linear` to final_lr x peak, reached with the last step,
    or `wsd`: the peak until the last `decay_fraction` of the run, which cools down as 1 - sqrt (Haegele et al. 2024, eq. 1).
    Until that cool-down wsd knows nothing of the horizon, so that runs of several lengths share it. `inverse_sqrt` never does: after
    the warm-up it falls as 1 / sqrt(step), which is Vaswani et al. 2017, eq. 3, where the peak is (d_model warmup_steps)^-1/2.
    """
    t = np.asarray(steps, np.float64)
    warmup = np.minimum(1.0, (t + 1) / max(1, int(cfg.warmup_steps)))
    if cfg.schedule == "inverse_sqrt":
        share = np.minimum(1.0, np.sqrt(max(1, int(cfg.warmup_steps)) / (t + 1)))
        return (float(cfg.peak_lr) * warmup * share).astype(np.float32)
    start = cooldown_start(cfg, num_steps) if cfg.schedule == "wsd" else min(int(cfg.warmup_steps), num_steps)
    # The last step, num_steps - 1, has progress 1: a loss read before the rate has decayed is not that budget's loss.
    progress = np.clip((t + 1 - start) / max(1, num_steps - start), 0.0, 1.0)
    if cfg.schedule == "cosine":
        share = 0.5 * (1 + np.cos(np.pi * progress))
    elif cfg.schedule == "linear":
        share = 1 - progress
    else:
        share = 1 - np.sqrt(progress)
    return (float(cfg.peak_lr) * warmup * (cfg.final_lr + (1 - cfg.final_lr) * share)).astype(np.float32)


def cooldown_start(cfg: Train, num_steps: int) -> int:
    """First step of the cool-down of a wsd run: until then it is the trunk that longer runs pass through too."""
    return num_steps - max(1, round(cfg.decay_fraction * num_steps))


def adamw(cfg: Train) -> optax.GradientTransformation:
    """Clipped AdamW (Loshchilov and Hutter 2019) at learning rate 1: the step multiplies by the rate of the schedule.

    It keeps nothing for parameters that train.freeze names, and passes on their gradient, which the loss makes zero.
    """
    optimizer = optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.scale_by_adam(b1=cfg.beta1, b2=cfg.beta2, eps=cfg.epsilon),
        optax.add_decayed_weights(cfg.weight_decay, mask=matrices),
        optax.scale(-1.0),
    )
    return optax.masked(optimizer, lambda params: trained(params, cfg.freeze)) if cfg.freeze else optimizer


def trained(params: Any, freeze: tuple[str, ...]) -> Any:
    """A tree like `params`: False for those that train.freeze names by the beginning of their path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not begins(jax.tree_util.keystr(path, simple=True, separator="/"), freeze), params
    )


def matrices(params: Any) -> Any:
    """A tree like `params`: False for scales and biases."""
    # By name: scales of norms and biases are stacked over layers and so have two dimensions as well.
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith(("scale", "bias")), params)
