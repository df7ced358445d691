"""Workers as jobs of Slurm, through submitit."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_jax import files
from llm_jax.settings import BadInput
from llm_jax.training import hosts
from llm_jax.training.preemption import Preempted
from scaling.launchers import RETRIES, Resources, passed_on, work


class SlurmWorker:
    """What submitit runs in a job: a worker that has itself started again when it is told to leave."""

    def __call__(self, folder: str, index: int, workers: int, env: Mapping[str, str]) -> None:
        os.environ |= env
        try:
            if hosts.launcher(os.environ) == "Slurm":  # has started a task on each of several nodes
                hosts.connect()
            work(files.as_path(folder), index, workers)
        except Preempted:
            signal.raise_signal(signal.SIGUSR2)  # submitit's handler: puts the job back into the queue, and exits
            raise

    def checkpoint(self, *args: Any) -> Any:
        """What submitit starts later in place of this: the same, as all that counts is in the run directory."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, *args)


def submit(
    folder: Path, workers: int | None, resources: Resources, sbatch: Sequence[str] = (), cluster: str = "slurm"
) -> list[Any]:
    """Submits an array of jobs, a worker each, and returns submitit's jobs at once; logs go to RUN/slurm (files.here).

    `sbatch` are more options of it, NAME=VALUE. Slurm sends SIGUSR2 90 s before the end of a job's time, and SIGTERM when it preempts
    one: either way the worker saves and its job goes back into the queue.
    """
    import submitit

    options = {}
    for one in sbatch:
        name, equals, value = one.partition("=")
        if not (name and equals):
            raise BadInput(f'--sbatch takes NAME=VALUE, such as partition=gpu, got "{one}"')
        options[name.lstrip("-").replace("-", "_")] = value
    executor = submitit.AutoExecutor(
        folder=files.here(folder) / "slurm", cluster=cluster, slurm_max_num_timeout=RETRIES
    )
    executor.update_parameters(
        name=f"llm-jax {folder.name}",
        timeout_min=max(1, math.ceil(60 * (resources.hours or 24.0))),
        cpus_per_task=resources.cpus or 4,
        slurm_additional_parameters=options | {"requeue": True, "open_mode": "append"},
    )
    if resources.hosts:
        executor.update_parameters(nodes=resources.hosts, tasks_per_node=1)
    if resources.gpus:
        executor.update_parameters(gpus_per_node=resources.gpus)
    workers = workers or 1
    env = passed_on()
    run = str(files.absolute(folder))
    with executor.batch():
        return [executor.submit(SlurmWorker(), run, i, workers, env) for i in range(workers)]
