"""Checkpoints through Orbax: a training state at numbered steps of a folder, for any mesh. Where the data is follows from the step."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from llm_jax import files
from llm_jax.training import hosts

logging.set_verbosity(logging.ERROR)  # Orbax reports every file


_ORBAX = threading.RLock()
"""Orbax numbers what it does under way once a process: saves of two folders at a time take each other's numbers, and fail."""
_latest: Checkpoints | None = None
"""Whose save may be under way."""


class Checkpoints:
    """The steps saved in one folder; a step that a kill left half-written does not count. Close it to wait for the last save."""

    def __init__(self, folder: Path, keep: int | None = 1):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        with _ORBAX:
            self._manager = ocp.CheckpointManager(files.absolute(folder), options=options)

    def steps(self) -> list[int]:
        """Those saved whole, ascending, as the first of several processes sees them."""
        return hosts.agreed(sorted(self._manager.all_steps()))

    def save(self, step: int, state: Any) -> None:
        """Copies the state to the host before it returns; writes behind. Every process writes its own part."""
        global _latest
        with _ORBAX:
            if _latest not in (None, self):
                _latest._manager.wait_until_finished()
            _latest = self
            self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)), force=True)

    def restore(self, step: int, like: Any) -> Any:
        """The state saved at `step`, lying as `like` does (arrays, or shapes with shardings), whatever mesh has saved it."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        with _ORBAX:
            return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))[
                "state"
            ]

    def close(self) -> None:
        """Returns when the last save is on disk."""
        global _latest
        with _ORBAX:
            _latest = None if _latest is self else _latest  # first: an error here is not the next one's
            self._manager.close()
