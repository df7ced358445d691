"""Checkpoints through Orbax: a training state, the data iterator, and a small note, at numbered steps of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grain.python as grain
import jax
import orbax.checkpoint as ocp
from absl import logging

logging.set_verbosity(logging.ERROR)  # Orbax reports every file


class Checkpoints:
    """The steps saved in one folder; a step that a kill left half-written does not count. Close it to wait for the last save."""

    def __init__(self, folder: Path, keep: int | None = 1):
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True),
        )

    def steps(self) -> list[int]:
        """Those saved whole, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, iterator: grain.DatasetIterator) -> None:
        """Copies the state to the host before it returns; writes behind."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.PyGrainCheckpointSave(iterator))
        self._manager.save(step, args=items, force=True)

    def restore(self, step: int, like: Any, iterator: grain.DatasetIterator | None = None) -> Any:
        """The state saved at `step`, on the devices of `like` (arrays or shapes); the iterator is set to where it was."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = {"state": ocp.args.StandardRestore(abstract)}
        if iterator is not None:
            items["data"] = grain.PyGrainCheckpointRestore(iterator)
        return self._manager.restore(step, args=ocp.args.Composite(**items))["state"]

    def close(self) -> None:
        """Returns when the last save is on disk."""
        self._manager.close()
