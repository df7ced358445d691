"""Workers on this machine: each is a process, and has devices of its own."""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_jax import files
from llm_jax.settings import BadInput
from llm_jax.training.preemption import Preempted
from scaling.launchers import Resources

if TYPE_CHECKING:
    from llm_jax.data.prepare import Prepared

MEMORY_SHARE = 0.9
"""Of a GPU's memory, for all workers on it together."""


def devices() -> tuple[str, list[str]]:
    """ "gpu" or "tpu" and the ids that JAX will find here, or "cpu" and none. Asks the machine and not JAX, which would take them."""
    asked = os.environ.get("JAX_PLATFORMS", "").split(",")
    if not {"", "gpu", "cuda"}.isdisjoint(asked) and _installed("jax_cuda13_plugin", "jax_cuda12_plugin"):
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            ids = [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
        else:
            ids = [str(i) for i in range(_count_gpus())]
        if ids:
            return "gpu", ids
    if not {"", "tpu"}.isdisjoint(asked) and _installed("libtpu"):
        if "TPU_VISIBLE_CHIPS" in os.environ:
            ids = [name for name in os.environ["TPU_VISIBLE_CHIPS"].split(",") if name]
        else:
            ids = [str(i) for i in range(len([*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]))]
        if ids:
            return "tpu", ids
    return "cpu", []


def _installed(*packages: str) -> bool:
    return any(importlib.util.find_spec(package) for package in packages)


def _count_gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def default_workers(kind: str, ids: Sequence[str], resources: Resources) -> int:
    """One for each device, or for each group of devices that one worker has; one on a CPU."""
    return max(1, len(ids) // (resources.gpus or resources.tpus or 1)) if kind != "cpu" else 1


def environment(index: int, workers: int, kind: str, ids: Sequence[str], resources: Resources) -> dict[str, str]:
    """What a worker's environment must have so that it sees its own devices alone, beside others on this machine.

    One worker sees them all. More workers than GPUs share them and their memory. BadInput where there are too few.
    """
    each = resources.gpus or resources.tpus
    if each and each > len(ids):
        raise BadInput(f"--{'gpus' if resources.gpus else 'tpus'} {each}: there are {len(ids)} here")
    if kind == "cpu" or (workers == 1 and not each):
        return {}
    each = each or 1
    groups = len(ids) // each
    mine = ids[index % groups * each :][:each]
    if kind == "tpu":
        if workers > groups:
            raise BadInput(f"--workers {workers}: a TPU chip has one process, and there are chips for {groups}")
        found = {"TPU_VISIBLE_CHIPS": ",".join(mine)}
        if each < 4:  # of a host; see the JAX issue 14977 and Ray's tpu.py
            bounds = {1: "1,1,1", 2: "1,2,1"}.get(each)
            if bounds is None:
                raise BadInput(f"--tpus {each}: a worker can have 1, 2 or 4 chips of a host, or all")
            found |= {"TPU_CHIPS_PER_PROCESS_BOUNDS": bounds, "TPU_CHIPS_PER_HOST_BOUNDS": bounds}
            found |= {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_HOST_BOUNDS": "1,1,1"}
        return found
    found = {"CUDA_VISIBLE_DEVICES": ",".join(mine)}
    if (beside := math.ceil(workers / groups)) > 1 and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        found["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{MEMORY_SHARE / beside:.3f}"
    return found


def share_cpus(index: int, workers: int) -> None:
    """Keeps this process to its share of the processors, before JAX starts its threads.

    Small models train no faster on two cores than on one, so that workers that keep out of each other's way are twice as fast.
    """
    cpus = sorted(os.sched_getaffinity(0))
    if 1 < workers <= len(cpus):
        os.sched_setaffinity(0, cpus[index::workers])


def run(folder: Path, prepared: Prepared, workers: int | None, resources: Resources) -> None:
    """Trains what is left of a run in this process, the first worker, and others beside it, which write to RUN/worker-K.log
    (files.here).

    Each ends with the run. Where this process is told to leave it tells the others, and raises Preempted when they have left.
    """
    kind, ids = devices()
    workers = workers or default_workers(kind, ids, resources)
    environments = [environment(index, workers, kind, ids, resources) for index in range(workers)]
    others, logs = [], files.here(folder)
    logs.mkdir(parents=True, exist_ok=True)
    for index in range(1, workers):
        with open(logs / f"worker-{index}.log", "w") as log:
            command = [sys.executable, "-m", "scaling.cli", "work", str(folder), str(index), str(workers)]
            env = os.environ | environments[index]
            others.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env))
    share_cpus(0, workers)
    os.environ |= environments[0]
    from scaling import launch  # loads JAX, which has not looked for devices yet

    try:
        launch.work(folder, prepared)
    except Preempted:
        for other in others:
            other.send_signal(signal.SIGTERM)
        raise
    finally:
        ended = [other.wait() for other in others]
    for index, status in enumerate(ended, 1):
        if status:
            print(f"llm-jax: worker {index} ended with status {status}; see {logs}/worker-{index}.log", file=sys.stderr)
