"""Chips by name, with their published rates; TPU slices; and compute budgets: FLOPs from device-hours or money. Prices are the user's
to give."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import Any

from llm_jax.settings import BadInput, did_you_mean

PEAK_FLOPS = {
    # NVIDIA's data sheets print tensor rates with 2:4 sparsity from Ada and Hopper on; half of that is the dense rate.
    "a100": 312e12,
    "l4": 121e12,
    "l40s": 362e12,
    "h100": 989e12,  # SXM
    "h100-pcie": 756e12,
    "h200": 989e12,
    "b200": 2.25e15,  # HGX
    "gb200": 2.5e15,  # one of its two GPUs
    "mi300x": 1307e12,  # AMD's data sheet
    "trainium2": 667e12,  # AWS's Neuron documentation
    # Google's Cloud TPU documentation, "peak compute per chip (bf16)"; a v3 or v4 chip is two cores.
    "tpu-v3": 123e12,
    "tpu-v4": 275e12,
    "tpu-v5e": 197e12,
    "tpu-v5p": 459e12,
    "tpu-v6e": 918e12,
    "tpu-v7": 2307e12,
}
"""Dense bf16 FLOP/s of one chip at its boost clock, a multiplication and an addition being two."""


@dataclass(frozen=True)
class Slice:
    """What a device of a TPU slice has, and which slices there are."""

    chip: str
    """Its name in PEAK_FLOPS."""
    hbm_bytes: int
    """That a program may use, as libtpu 0.0.42 says where one needs more; some of the chip's memory is its own."""
    hbm_bandwidth: float
    """Bytes a second."""
    ici_bandwidth: float
    """Bytes a second that it receives from its neighbours, over all links together."""
    shapes: tuple[str, ...]
    """Of chips."""
    devices_per_chip: int = 1
    options: tuple[tuple[str, Any], ...] = ()
    """That libtpu wants beside the name."""


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_GIB = 2**30
SLICES = {
    # Google's Cloud TPU documentation, a page a version, "key chip specifications". Bandwidth between chips is half of what newer pages
    # call bidirectional: 1,600, 4,800, 3,200, 2,400 and 4,800 Gbit/s each way; v4's is six links of 50 GB/s (Jouppi et al. 2023).
    "v4": Slice("tpu-v4", int(30.75 * _GIB), 1200e9, 300e9, _CUBES, options=(("chip_config_name", "megacore"),)),
    "v5e": Slice("tpu-v5e", int(15.75 * _GIB), 819e9, 200e9, _FLAT),
    "v5p": Slice("tpu-v5p", int(95.74 * _GIB), 2765e9, 600e9, _CUBES),
    "v6e": Slice("tpu-v6e", int(31.25 * _GIB), 1638e9, 400e9, _FLAT),
    # Two devices a chip, which share 192 GiB, 7,380 GB/s and 600 GB/s each way.
    "tpu7x": Slice("tpu-v7", int(94.75 * _GIB), 3690e9, 300e9, _CUBES, devices_per_chip=2),
}
"""By the name that a topology begins with, as in v5e:16x16."""


def tpu_slice(topology: str) -> Slice:
    """What `topology` is made of. Raises BadInput, with the nearest, for one that there is not."""
    version, _, shape = topology.lower().partition(":")
    if version not in SLICES:
        near = difflib.get_close_matches(version, SLICES, n=1, cutoff=0.3) or ["v5e"]
        shape = shape if shape in SLICES[near[0]].shapes else SLICES[near[0]].shapes[0]
        raise BadInput(
            f'--topology "{topology}" is no TPU slice; did you mean "{near[0]}:{shape}"? Versions: {", ".join(SLICES)}'
        )
    shapes = SLICES[version].shapes
    if shape not in shapes:
        wanted = math.prod(int(n) for n in re.findall(r"\d+", shape)[:3]) or 1
        near_shape = min(shapes, key=lambda one: abs(math.log(math.prod(map(int, one.split("x"))) / wanted)))
        raise BadInput(
            f'--topology "{topology}" is no TPU slice; did you mean "{version}:{near_shape}"? Of {version}: {", ".join(shapes)}'
        )
    return SLICES[version]


@dataclass(frozen=True)
class Budget:
    """Training compute, and what it means on a chip where one is named."""

    compute: float
    """FLOPs by C = 6 N D."""
    chip: str | None = None
    mfu: float | None = None
    """Model FLOPs utilisation: 6 N D over the peak times the time (Chowdhery et al. 2022, appendix B)."""
    device_hours: float | None = None
    price: float | None = None
    """In the currency of the price per hour."""


def budget(
    compute: float | None = None,
    price: float | None = None,
    device_hours: float | None = None,
    chip: str | None = None,
    price_per_hour: float | None = None,
    mfu: float = 0.4,
) -> Budget:
    """The budget from exactly one of compute (FLOPs), price and device_hours; the other two follow where chip and price_per_hour
    are known. BadInput for none or two of them, for what one of them lacks, and for an unknown chip."""
    given = {"compute": compute, "price": price, "device_hours": device_hours}
    named = [f"--{name}" for name, value in given.items() if value is not None]
    if len(named) != 1:
        got = f"; got {' and '.join(named)}" if named else ""
        raise BadInput(f"give one budget: --compute FLOPS, --price MONEY or --device_hours HOURS{got}")
    for name, value in {**given, "price_per_hour": price_per_hour}.items():
        if value is not None and not 0 < value < math.inf:
            raise BadInput(f"--{name} must be positive and finite, got {value:g}")
    if not 0 < mfu <= 1:
        raise BadInput(f"--mfu is a share of the peak in (0, 1], such as 0.4; got {mfu:g}")
    if price is not None and price_per_hour is None:
        raise BadInput("--price needs --price_per_hour, what one chip costs an hour")
    if chip is None:
        if needs := "--price_per_hour" if price_per_hour is not None else named[0] if compute is None else "":
            raise BadInput(f"{needs} needs --chip; valid: {', '.join(PEAK_FLOPS)}")
        assert compute is not None
        return Budget(compute)
    if chip.lower() not in PEAK_FLOPS:
        raise BadInput(f'--chip "{chip}" is not known{did_you_mean(chip.lower(), PEAK_FLOPS)}')
    an_hour = PEAK_FLOPS[chip.lower()] * 3600 * mfu
    if price is not None and price_per_hour is not None:
        device_hours = price / price_per_hour
    hours = device_hours if device_hours is not None else (compute or 0.0) / an_hour
    cost = hours * price_per_hour if price_per_hour is not None else None
    return Budget(
        compute=compute if compute is not None else hours * an_hour,
        chip=chip.lower(),
        mfu=mfu,
        device_hours=hours,
        price=cost,
    )
