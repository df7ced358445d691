"""What a training step needs of a device, reckoned before anything is compiled: FLOPs exactly, memory and bytes moved roughly.

Memory of the four plans in experiments/tpu came out within a sixth of what the compiler found; it orders candidates and says what
to change where a program does not fit, and no more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from llm_jax import parts
from llm_jax.config import Config
from scaling.hardware import PEAK_FLOPS, Slice

STATE_BYTES = 12
"""Of a parameter: itself and both moments of Adam, in float32."""


@dataclass(frozen=True)
class Footprint:
    """Of one device and one optimizer step; bytes and FLOPs."""

    flops: float
    """Of the products that the model needs, forwards and backwards, attention in full."""
    extra_flops: float
    """That are computed again in the backward pass, or on rows of experts that no token has."""
    state: float
    gradients: float
    kept: float
    """Activations of all layers that wait for the backward pass of a microbatch."""
    passing: float
    """Of one layer or the logits, and gathered parameters."""
    hbm_traffic: float
    ici_traffic: float

    @property
    def memory(self) -> float:
        return self.state + self.gradients + self.kept + self.passing

    def seconds(self, chip: Slice) -> dict[str, float]:
        """The least time that each resource needs, all of it at its published rate."""
        return roofline(self.flops + self.extra_flops, self.hbm_traffic, self.ici_traffic, chip)


def roofline(flops: float, hbm_traffic: float, ici_traffic: float, chip: Slice) -> dict[str, float]:
    """Seconds of one device by resource. A step takes at least the largest of them, and their sum where nothing overlaps."""
    return {
        "compute": flops * chip.devices_per_chip / PEAK_FLOPS[chip.chip],
        "hbm": hbm_traffic / chip.hbm_bandwidth,
        "ici": ici_traffic / chip.ici_bandwidth,
    }


def extra_flops(cfg: Config, sizes: Mapping[str, int], kernel: bool) -> int:
    """Of a token, beyond what the model needs: model.recompute, where `kernel` says that attention keeps what it needs, and experts'
    rows that stay empty."""
    model, found = cfg.model, {part.name: part for part in parts.parts(cfg.model, cfg.data.context, cfg.data.prefix)}
    blocks = {name: part.flops for name, part in found.items() if name.startswith("blocks/")}
    again = {
        "nothing": (),
        "elementwise": () if kernel else ("scores",),
        "hidden": ("up", "gate", *(() if kernel else ("scores",))),
        "block": tuple(name.split("/")[-1] for name in blocks if not name.endswith("/down")),
    }[model.recompute]
    extra = sum(flops for name, flops in blocks.items() if name.split("/")[-1] in again)
    experts = model.experts
    if experts.number:
        full = sizes["expert"] > 1 and experts.capacity_factor is None
        filled = experts.number / experts.per_token if full else experts.capacity_factor or 1.0
        routed = sum(blocks[f"blocks/mlp/{name}"] for name in ("up", "gate", "down") if f"blocks/mlp/{name}" in blocks)
        extra += round((filled - 1) * 3 * routed)
    return extra


def footprint(cfg: Config, sizes: Mapping[str, int], kernel: bool = True) -> Footprint:
    """Of a resolved config on a mesh of `sizes`; `kernel` where attention never has the square of positions in memory."""
    model, context, accumulated = cfg.model, cfg.data.context, cfg.train.grad_accumulation
    counted = parts.parts(model, context, cfg.data.prefix)
    devices, fsdp, tensor = math.prod(sizes.values()), sizes["fsdp"], sizes["tensor"]
    number = 2 if model.dtype == "bfloat16" else 4
    tokens = cfg.rows_per_step * context / devices * tensor / accumulated  # of a microbatch, of one device
    experts = sum(part.params for part in counted if part.active < 1)
    whole = (parts.num_params(model) - experts + experts / sizes["expert"]) / tensor  # once gathered
    held = whole / fsdp
    layer = sum(
        part.outputs / (tensor if part.kind == "matrices" else 1)
        for part in counted
        if part.name.startswith("blocks/") and not part.name.endswith("/scores")
    )
    scores = 0 if kernel else sum(part.outputs / tensor for part in counted if part.name.endswith("/scores"))
    of = {
        part.name.split("/")[-1]: part.outputs / tensor
        for part in counted
        if part.name.startswith("blocks/") and part.outputs
    }
    attention = model.d_model + sum(of.get(name, 0) for name in ("q", "k", "v", "values", "out"))
    kept = {
        "nothing": layer + 3 * scores,
        "elementwise": model.d_model + attention + of.get("up", 0) + of.get("gate", 0),
        "hidden": model.d_model + attention,
        "block": model.d_model,
    }[model.recompute]
    logits = tokens * model.vocab_size / tensor
    matrices = parts.num_params_matrices(model) - experts + experts / sizes["expert"]
    gathered = 2 * number * (matrices / tensor / model.num_layers + model.vocab_size * model.d_model / tensor)
    flops = 3 * parts.flops(counted) * cfg.rows_per_step * context / devices
    share = {name: (size - 1) / size for name, size in sizes.items()}
    gathers = 3 * number * whole * share["fsdp"] * accumulated  # twice of parameters, once of gradients
    copies = 2 * number * held * share["data"] * (1 if fsdp == 1 else accumulated)
    summed = 2 * share["tensor"] * 4 * model.num_layers * tokens * model.d_model * number * accumulated
    sent = (model.experts.capacity_factor or model.experts.number) if sizes["expert"] > 1 else 0
    exchanged = 4 * share["expert"] * model.num_layers * tokens * model.d_model * number * accumulated * sent
    return Footprint(
        flops=flops,
        extra_flops=extra_flops(cfg, sizes, kernel) * cfg.rows_per_step * context / devices,
        state=STATE_BYTES * held,
        gradients=4 * held,
        kept=number * tokens * kept * model.num_layers,
        passing=max(2 * number * tokens * (layer + 2 * scores), 4 * logits) + gathered,
        # Parameters, gradient and moments are read and written once; weights three times a microbatch, activations about eight times.
        hbm_traffic=28 * held
        + accumulated
        * (3 * number * whole + 8 * number * tokens * model.num_layers * (layer + scores) + 6 * number * logits),
        ici_traffic=gathers + copies + summed + exchanged,
    )
