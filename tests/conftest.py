"""Four simulated CPU devices, and JAX as strict as it goes: ranks do not broadcast and dtypes do not mix unasked.

The environment must stand before jax is imported for the first time, hence the order of this file. Nothing is written
to disk, so that pytest-xdist may run it in several processes.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "16")  # jax < 0.12 deadlocks with more simulated devices than threads
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

REPO = Path(__file__).resolve().parents[1]
SHARED_DATA = REPO.parent / "shared" / "data"


@pytest.fixture
def mixed_dtypes() -> Iterator[None]:
    """Standard dtype promotion, for tests that step an optimizer: optax.adamw raises beta to the power of an int32."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """shared_data("corpus") is that path in the data folder beside the checkout; skips the test where there is none."""

    def locate(name: str) -> Path:
        path = SHARED_DATA / name
        if not path.exists():
            pytest.skip(f"needs {path}, the data folder beside the checkout")
        return path

    return locate
