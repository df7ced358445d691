"""Starting workers: here, on a Ray cluster, or under Slurm.

The ledger is the truth, and a launcher only starts workers, each of which trains trials until none is left. So any number of
them, started by any launchers, from any machines that share the run directory, may die and come back; a second `llm-jax sweep` of the same
run, by whatever launcher, adds workers to those that are there.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_jax import files
from llm_jax.settings import BadInput
from llm_jax.training.preemption import Preempted
from scaling import ledger
from scaling.progress import prepared_data, progress

if TYPE_CHECKING:
    from llm_jax.data.prepare import Prepared

MEMORY_SHARE = 0.9
"""Of a GPU's memory, for all workers on it together."""
RETRIES = 100
"""Of a worker on Ray: each time its node or its process dies, and each time it is told to leave."""
PASSED_ON = ("JAX_", "XLA_", "LLM_JAX_", "LIBTPU_", "NPROC", "PYTHONPATH")
"""Beginnings of environment variables that workers on other machines get from here."""


@dataclass(frozen=True)
class Resources:
    """Of each worker; None: what the launcher finds, one GPU or TPU chip where there are any."""

    gpus: int | None = None
    tpus: int | None = None
    cpus: int | None = None
    hours: float | None = None
    """Of a Slurm job."""

    def __post_init__(self) -> None:
        for name in ("gpus", "tpus", "cpus", "hours"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadInput(f"--{name} must be positive, got {value:g}")
        if self.gpus and self.tpus:
            raise BadInput("a worker has --gpus or --tpus, not both")


def ready(launcher: str) -> None:
    """Raises BadInput where the package that a launcher needs is not installed, or what it starts workers on is not there."""
    package = {"ray": "ray", "slurm": "submitit"}.get(launcher)
    if package and importlib.util.find_spec(package) is None:
        raise BadInput(f'--launcher {launcher} needs {package}; install it with: pip install "llm_jax[{launcher}]"')
    if launcher == "slurm" and not shutil.which("sbatch"):
        raise BadInput("--launcher slurm found no sbatch here; run it where jobs are submitted")
    if launcher == "ray":
        import ray

        env = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), runtime_env={"env_vars": env})
        except ConnectionError:
            raise BadInput(
                "--launcher ray found no cluster; begin one with ray start --head, or give RAY_ADDRESS"
            ) from None


def work(folder: Path, index: int, workers: int) -> None:
    """A worker: `index` of `workers` that began together, on whatever machine.

    Raises BadInput where the run, or its data, are not here; Preempted where a signal told it to leave.
    """
    about = ledger.describe(folder)
    prepared = prepared_data(ledger.base_config(folder))
    if prepared.fingerprint != about["data"]:
        raise BadInput(f"the data on this machine, {prepared.folder}, are not those of {folder}, {about['data']}")
    from scaling import launch  # loads JAX

    launch.work(folder, prepared, index / workers)


# Here


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


def run_here(folder: Path, prepared: Prepared, workers: int | None, resources: Resources) -> None:
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


# Ray


def _work_there(folder: str, index: int, workers: int, cwd: str) -> None:
    if os.path.isdir(cwd):
        os.chdir(cwd)  # paths of data may be relative
    work(files.as_path(folder), index, workers)


def run_on_ray(folder: Path, workers: int | None, resources: Resources) -> None:
    """Trains what is left of a run by tasks of Ray Core, a task a worker, on the cluster that `ready` connected to.

    A task whose process or node dies, or is told to leave, is started again, wherever there is room. `folder` must be there on all
    nodes. Raises BadInput where workers fail, and Preempted where the cluster goes away: the same command goes on.
    """
    import ray

    there = ray.cluster_resources()
    kind = (
        "GPU"
        if resources.gpus
        else "TPU"
        if resources.tpus
        else next((k for k in ("GPU", "TPU") if there.get(k)), "CPU")
    )
    each = (resources.gpus or resources.tpus or 1) if kind != "CPU" else resources.cpus or 1
    workers = workers or max(1, int(there.get(kind, 0) // each))
    # A process serves one worker: JAX keeps the devices that it has found.
    asked: dict[str, Any] = {"max_retries": RETRIES, "retry_exceptions": [Preempted], "max_calls": 1}
    asked |= {"num_cpus": resources.cpus or 1}
    asked |= {"num_gpus": each} if kind == "GPU" else {"resources": {"TPU": each}} if kind == "TPU" else {}
    task = ray.remote(**asked)(_work_there)
    run, cwd = str(files.absolute(folder)), os.getcwd()
    running = [task.remote(run, index, workers, cwd) for index in range(workers)]
    failed = ""
    try:
        with progress("sweep", 1.0, "") as update:
            while running:
                done, running = ray.wait(running, timeout=5.0)
                for one in done:
                    try:
                        ray.get(one)
                    except (ray.exceptions.RayTaskError, ray.exceptions.WorkerCrashedError) as error:
                        failed = str(error).strip().splitlines()[-1]
                update(*_so_far(folder))
    except ray.exceptions.RayError as error:
        raise Preempted(f"by the loss of the Ray cluster: {str(error).splitlines()[0]}") from error
    finally:
        ray.shutdown()
    if failed and _so_far(folder)[0] < 1:
        raise BadInput(f"workers on Ray failed, the last one by {failed}")


def _so_far(folder: Path) -> tuple[float, str]:
    """The share of a run's FLOPs that has ended, and in words."""
    trials = ledger.trials(folder)
    ended = [trial for trial in trials if ledger.status(folder, trial.id) in ledger.ENDED]
    costs = [sum(max(1.0, trial.counts["C_flops"]) for trial in some) for some in (ended, trials)]
    return costs[0] / costs[1], f"{len(ended)} of {len(trials)} trials"


# Slurm


class SlurmWorker:
    """What submitit runs in a job: a worker that has itself started again when it is told to leave."""

    def __call__(self, folder: str, index: int, workers: int, env: Mapping[str, str]) -> None:
        os.environ |= env
        try:
            work(files.as_path(folder), index, workers)
        except Preempted:
            signal.raise_signal(signal.SIGUSR2)  # submitit's handler: puts the job back into the queue, and exits
            raise

    def checkpoint(self, *args: Any) -> Any:
        """What submitit starts later in place of this: the same, as all that counts is in the run directory."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, *args)


def submit_to_slurm(
    folder: Path, workers: int | None, resources: Resources, sbatch: Sequence[str] = (), cluster: str = "slurm"
) -> list[Any]:
    """Submits an array of jobs, a worker each, and returns submitit's jobs at once; logs go to RUN/slurm.

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
    if resources.gpus:
        executor.update_parameters(gpus_per_node=resources.gpus)
    workers = workers or 1
    env = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    run = str(files.absolute(folder))
    with executor.batch():
        return [executor.submit(SlurmWorker(), run, i, workers, env) for i in range(workers)]
