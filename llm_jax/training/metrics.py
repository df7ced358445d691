"""Metrics of a run as JSON lines and TensorBoard events."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_jax import files
from llm_jax.config import Config

if TYPE_CHECKING:  # loads JAX; reading metrics does without
    from llm_jax.training.pretrain import Evaluation


FILE = "metrics.jsonl"


class Metrics:
    """Appends to metrics.jsonl and to TensorBoard's events; a restart at `step` drops the lines that it will write again.

    A bucket has them when they are flushed. Of several processes that train together only the first `writes`.
    """

    def __init__(self, folder: Path, step: int, writes: bool = True):
        from tensorboardX import SummaryWriter

        self.last_loss = math.nan
        self._writes = writes
        if not writes:
            return
        kept = [line for line in _lines(folder) if json.loads(line)["step"] <= step]
        # By lines: a restart from a checkpoint finds the lines of all steps before it, and `status` those of a run under way.
        self._lines = files.Lines(folder / FILE, "".join(kept))
        self._shelf = folder / "tensorboard"
        self._events = SummaryWriter(str(files.here(self._shelf)), purge_step=step + 1, flush_secs=30)

    def write(self, cfg: Config, step: int, n: int, metrics_C: dict[str, Any]) -> int | None:
        """One line for steps `step` to `step + n`: means over them. Returns the first step whose loss is not finite."""
        values = {name: np.asarray(value, np.float64)[:n] for name, value in metrics_C.items()}
        bad = np.flatnonzero(~np.isfinite(values["nll"]))
        self.last_loss = float(values["nll"][bad[0]] if len(bad) else values["nll"].mean())
        line: dict[str, Any] = {"step": step + n, "tokens": (step + n) * int(cfg.train.tokens_per_step)}
        load_CxLxE = values.pop("expert_load", None)
        line |= {"loss" if name == "nll" else name: float(value.mean()) for name, value in values.items()}
        if load_CxLxE is not None:
            line |= _load(load_CxLxE)
        self._write(line)
        return step + int(bad[0]) if len(bad) else None

    def write_evaluation(self, step: int, cfg: Config, evaluation: Evaluation) -> None:
        """One line for an evaluation after `step` steps: its fields, as eval_NAME."""
        line = {"step": step, "tokens": step * int(cfg.train.tokens_per_step)}
        self._write(line | {f"eval_{name}": value for name, value in evaluation._asdict().items()})

    def write_seconds(self, step: int, seconds: float) -> None:
        """Seconds a step of the call that ended with `step`, in TensorBoard alone: the lines are the same bits on every machine."""
        if self._writes:
            self._events.add_scalar("seconds_per_step", seconds, step)

    def _write(self, line: dict[str, Any]) -> None:
        if not self._writes:
            return
        self._lines.write(json.dumps(line))
        for name, value in line.items():
            if name not in ("step", "tokens", "expert_load"):
                self._events.add_scalar(name, value, line["step"])

    def flush(self) -> None:
        """What was written is there for all to read."""
        if self._writes and files.in_bucket(self._shelf):
            self._lines.flush()
            self._events.flush()
            files.copy_files(files.here(self._shelf), self._shelf)

    def close(self) -> None:
        """Closes metrics.jsonl and the events."""
        if not self._writes:
            return
        self.flush()
        self._lines.close()
        self._events.close()


def _lines(folder: Path) -> list[str]:
    """Those written whole, with their ends."""
    try:
        text = files.read_bytes(folder / FILE).decode()
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _load(load_CxLxE: np.ndarray) -> dict[str, Any]:
    """How evenly the experts were chosen, in loads of which 1 is the mean over experts.

    The largest of a step (mean over steps and layers), how many experts nobody chose in all of the steps, and each expert's, LxE.
    """
    relative_CxLxE = load_CxLxE / load_CxLxE.mean(-1, keepdims=True)
    return {
        "expert_load_max": float(relative_CxLxE.max(-1).mean()),
        "experts_unused": int((load_CxLxE.sum(0) == 0).sum()),
        "expert_load": relative_CxLxE.mean(0).round(4).tolist(),
    }


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; one that is being written is left out."""
    return [json.loads(line) for line in _lines(folder)]
