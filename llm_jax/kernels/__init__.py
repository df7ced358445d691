"""Kernels for GPUs, written in Pallas for Triton, of what XLA does with more passes over memory than are needed.

Each has its plain form beside it, which every other backend runs and which tests hold the kernel to, interpreted on a CPU.
"""

import jax


def used() -> bool:
    """Whether programs traced now run the kernels: on a GPU."""
    return jax.default_backend() == "gpu"
