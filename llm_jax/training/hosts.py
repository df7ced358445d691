"""Several processes that train together, one a host: how they find each other, and what they agree on.

All run the same program, step for step. The first of them writes records; all read, train, evaluate and write their part of checkpoints.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
from collections.abc import Mapping
from typing import Any

from llm_jax.settings import BadInput, require

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")


def launcher(env: Mapping[str, str]) -> str | None:
    """Who has started several processes that belong together, and that JAX knows to ask for the others; None where nobody has.

    Slurm (srun of several tasks), Open MPI up to version 4, an indexed Job of Kubernetes, or Cloud TPU.
    """
    if all(name in env for name in SLURM) and int(env["SLURM_NTASKS"]) > 1:
        return "Slurm"
    if "OMPI_MCA_orte_hnp_uri" in env and int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return "Kubernetes"
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ""
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    here = chips and "TPU_SKIP_MDS_QUERY" not in env and "tpu" in (env.get("JAX_PLATFORMS") or "tpu")
    if (
        len(hosts.split(",")) > 1
        or "MEGASCALE_COORDINATOR_ADDRESS" in env
        or (here and importlib.util.find_spec("libtpu"))
    ):
        return "Cloud TPU"
    return None


def connect(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes of a job, before JAX is used: those that the arguments name, or that a launcher has started.

    Without either this process stays alone, as with num_processes=1; one that is joined already, by Ray's JaxTrainer for instance, stays
    so. Raises BadInput for arguments that do not fit each other and for others that cannot be found.
    """
    env = os.environ
    if coordinator and all(name in env for name in OPEN_MPI):  # whose version 5 does not say where its first process is
        num_processes = int(env[OPEN_MPI[0]]) if num_processes is None else num_processes
        process_id = int(env[OPEN_MPI[1]]) if process_id is None else process_id
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if num_processes == 1 and not coordinator:
        return
    if 0 < len(missing) < 3:
        raise BadInput(
            f"--{missing[0]} is missing: --coordinator HOST:PORT, --num_processes and --process_id go together"
        )
    if not missing:
        assert coordinator is not None and num_processes is not None and process_id is not None
        host, _, port = coordinator.rpartition(":")
        require(
            bool(host) and port.isdigit(), f"--coordinator must be HOST:PORT, got {coordinator}; try {coordinator}:8476"
        )
        require(num_processes > 0, f"--num_processes must be positive, got {num_processes}")
        require(
            0 <= process_id < num_processes,
            f"--process_id={process_id} must lie in [0, {num_processes - 1}]: --num_processes={num_processes}",
        )
    who = launcher(env)
    if missing and who is None:
        return
    import jax

    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise BadInput(f"the other processes of this job are not found ({who or coordinator}): {said}") from error


def first() -> bool:
    """Whether this process is the one that writes records."""
    import jax

    return jax.process_index() == 0


def agreed(value: Any) -> Any:
    """The first process's value, on all of them; plain JSON. Every process must ask, in the same order."""
    import jax

    if jax.process_count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value if first() else None).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    room = np.zeros(1 << size.bit_length(), np.uint8)  # few sizes, as each is a program
    if first():
        room[: len(text)] = text
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(room))[:size]))
