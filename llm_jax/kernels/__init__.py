"""Kernels for GPUs, written in Pallas for Triton, of what XLA does with more passes over memory than are needed.

jax 0.12 says that this backend of Pallas will go, in favour of Mosaic's, which serves Hopper and later alone; hence jax<0.13 in setup.cfg.
Each has its plain form beside it, which every other backend runs and which tests hold the kernel to, interpreted on a CPU.
"""

import jax

from llm_jax import axes

CACHE_BYTES = 2**25
"""An array up to this size stays in a GPU's L2 cache (50 MB on an H100), where passes over it cost next to nothing."""


def platform() -> str:
    """What programs traced now are for, "cpu", "gpu" or "tpu": the devices of their mesh, which need not be here, else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def used() -> bool:
    """Whether programs traced now run the kernels: on a GPU."""
    return platform() == "gpu"


def pay_for(x: jax.Array) -> bool:
    """Whether to save passes over x, activations whose rows and positions a mesh spreads: on a GPU, and where a device's part of it is too
    large for the cache. A smaller one costs the start of kernels, and XLA starts fewer where it may fuse as it likes."""
    return used() and x.size * x.dtype.itemsize > CACHE_BYTES * axes.size(*axes.ROWS, "sequence")


SMALL_WIDTH, SMALL_LENGTH = 512, 1024


def small(width: int, length: int) -> bool:
    """Whether a model of this width on rows of this length leaves so much of a GPU idle that another is trained beside it, by another
    thread of the process. Attention of such a width is not cuDNN's, even alone: while XLA (of jax 0.11) runs a program with that for
    the first time, whatever other threads start is lost or fails."""
    return width <= SMALL_WIDTH and length <= SMALL_LENGTH


def compiler_options(width: int) -> dict[str, str]:
    """XLA's, for the training step of a model of this width: up to SMALL_WIDTH a GPU starts kernels that do not wait for each other side by
    side, as one alone does not fill it. A step takes 10 % less time at a width of 128, 2 % less at 320 and 512, and 20 to 30 % more memory,
    as fewer arrays share theirs."""
    return {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"} if used() and width <= SMALL_WIDTH else {}
