"""Four simulated CPU devices, and JAX as strict as it goes: ranks do not broadcast and dtypes do not mix unasked.

The environment must stand before jax is imported for the first time, hence the order of this file. Nothing is written
to disk, so that pytest-xdist may run it in several processes.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "64")  # jax < 0.12 deadlocks where collectives of simulated devices hold all threads
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from llm_jax.config import Config, Data, Mesh, Model, Train

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
pytest.register_assert_rewrite("numerics")  # of tests/models

REPO = Path(__file__).resolve().parents[1]
SHARED_DATA = REPO.parent / "shared" / "data"


@pytest.fixture
def mixed_dtypes() -> Iterator[None]:
    """Standard dtype promotion, for tests that step an optimizer: optax.adamw raises beta to the power of an int32."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """For files that compile many small programs: with XLA's costlier passes off that takes a third less."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """shared_data("corpus") is that path in the data folder beside the checkout; skips the test where there is none."""

    def locate(name: str) -> Path:
        path = SHARED_DATA / name
        if not path.exists():
            pytest.skip(f"needs {path}, the data folder beside the checkout")
        return path

    return locate


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared data and compiled programs of the tests stay away from the user's."""
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


RUSSIAN = "Мороз и солнце; день чудесный! Ещё ты дремлешь, друг прелестный — пора, красавица, проснись.\n"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of small text files, one of them Russian."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(
            "".join(f"{i} bottles of beer, {j} on the wall.\n" for j in range(30)), encoding="utf-8"
        )
    (folder / "стихи.md").write_text(RUSSIAN * 20, encoding="utf-8")
    return folder


@pytest.fixture
def tiny(corpus: Path) -> Config:
    """The smallest model that learns the corpus, in steps of two rows, on one device."""
    return Config(
        model=Model(num_layers=1, d_model=16, num_heads=1),
        data=Data(source="files", files=(f"{corpus}/*",), context=32, eval_tokens=1024, val_fraction=0.2),
        train=Train(tokens_per_step=64, peak_lr=1e-2, steps_per_call=8),
        mesh=Mesh(data=1),
    )
