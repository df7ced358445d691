"""Starting workers: here, on a Ray cluster, or under Slurm.

The ledger is the truth, and a launcher only starts workers, each of which trains trials until none is left. So any number of
them, started by any launchers, from any machines that share the run directory, may die and come back; a second `llm-jax sweep` of the same
run, by whatever launcher, adds workers to those that are there.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from llm_jax.settings import BadInput
from scaling import hardware, ledger
from scaling.progress import prepared_data

RETRIES = 100
"""Of a worker on Ray: each time its node or its process dies, and each time it is told to leave."""
PASSED_ON = ("JAX_", "XLA_", "LLM_JAX_", "LIBTPU_", "NPROC", "PYTHONPATH")
"""Beginnings of environment variables that workers on other machines get from here."""


@dataclass(frozen=True)
class Resources:
    """Of each worker, on each of its hosts; None: what the launcher finds, one GPU or TPU chip where there are any."""

    gpus: int | None = None
    tpus: int | None = None
    cpus: int | None = None
    hours: float | None = None
    """Of a Slurm job."""
    hosts: int | None = None
    """Whose processes train a trial together."""
    topology: str | None = None
    """A TPU slice, such as v5e:4x4, in place of hosts and chips."""

    def __post_init__(self) -> None:
        for name in ("gpus", "tpus", "cpus", "hours", "hosts"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadInput(f"--{name} must be positive, got {value:g}")
        if self.gpus and self.tpus:
            raise BadInput("a worker has --gpus or --tpus, not both")
        if self.topology:
            hardware.tpu_slice(self.topology)
            if other := next((name for name in ("hosts", "tpus", "gpus") if getattr(self, name)), None):
                raise BadInput(
                    f"--topology {self.topology} says how many hosts and chips there are; leave out --{other}"
                )

    @property
    def together(self) -> bool:
        """Whether a worker is several processes, one a host."""
        return (self.hosts or 1) > 1 or self.topology is not None


def passed_on() -> dict[str, str]:
    """What of this environment workers on other machines have too."""
    return {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}


def ready(launcher: str, resources: Resources) -> None:
    """Raises BadInput where the package that a launcher needs is not installed, or what it starts workers on is not there, or is not of
    the kind that is asked for."""
    if resources.topology and launcher != "ray":
        raise BadInput(f"--topology is for --launcher ray; on --launcher {launcher} nobody would find the slice")
    if resources.together and launcher == "local":
        raise BadInput(
            "--hosts is for --launcher ray or slurm; here, start the command on each host, with --coordinator"
        )
    package = {"ray": "ray", "slurm": "submitit"}.get(launcher)
    if package and importlib.util.find_spec(package) is None:
        raise BadInput(f'--launcher {launcher} needs {package}; install it with: pip install "llm_jax[{launcher}]"')
    if launcher == "slurm" and not shutil.which("sbatch"):
        raise BadInput("--launcher slurm found no sbatch here; run it where jobs are submitted")
    if launcher == "ray":
        import ray

        try:
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), runtime_env={"env_vars": passed_on()})
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
