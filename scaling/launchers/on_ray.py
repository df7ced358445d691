"""Workers as tasks of Ray Core; or as groups of tasks, one a host, whose processes train a trial together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_jax import files
from llm_jax.settings import BadInput
from llm_jax.training import hosts
from llm_jax.training.preemption import Preempted
from scaling import leases, ledger
from scaling.launchers import RETRIES, Resources, work
from scaling.progress import progress

POLL_SECONDS = 5.0
GONE_SECONDS = 30.0
"""Without the head, or Ray's daemon here, after which a sweep gives up its cluster. Ray itself ends a process that lost the head after 60,
with no status of ours. The daemon ends half a minute after the head was started again: that one does not know it."""
SLICES = {"v5e": "v5litepod", "tpu7x": "v7x"}
"""Ray's names of TPU versions, where they are others than ours."""
WORKER_ID = "ray.io/tpu-worker-id"
"""Ray's label of a host of a slice: its number there, which is its process's number in JAX too."""


def run(folder: Path, workers: int | None, resources: Resources) -> None:
    """Trains what is left of a run on the cluster that `ready` connected to.

    A worker whose process or node dies, or is told to leave, is started again, wherever there is room; one of several hosts as a whole.
    `folder` must be there on all nodes. Raises BadInput where workers fail, and Preempted where the cluster goes away: the same
    command goes on.
    """
    import ray

    try:
        failed = asyncio.run(_run(folder, workers, resources))
    except ray.exceptions.RayError as error:
        raise Preempted(f"by the loss of the Ray cluster: {str(error).splitlines()[0]}") from error
    finally:
        ray.shutdown()
    if failed and _so_far(folder)[0] < 1:
        raise BadInput(f"workers on Ray failed, the last one by {failed}")


async def _run(folder: Path, workers: int | None, resources: Resources) -> str:
    """How the last worker failed that did, or nothing. Raises Preempted where the head is gone, RayError where the rest of Ray is."""
    import ray
    from ray.exceptions import RayTaskError, WorkerCrashedError

    nodes = [node for node in ray.nodes() if node["Alive"]]
    bundle = _bundle(nodes, resources)
    where = str(files.absolute(folder)), os.getcwd()
    begun: list[Awaitable[None]]
    if resources.together:
        at_once = groups_at_once(nodes, bundle, resources)
        workers = workers or max(1, at_once)
        if not at_once:
            asked = resources.topology or f"{resources.hosts} nodes, each with {bundle}"
            print(f"llm-jax: the Ray cluster has no {asked}; waiting for them", file=sys.stderr)
        begun = [_group(resources, bundle, (where[0], i, workers, where[1])) for i in range(workers)]
    else:
        homes = rooms(nodes, bundle)
        workers = workers or max(1, len(homes))
        begun = [_alone(bundle, home, (where[0], i, workers, where[1])) for i, home in enumerate(_fill(homes, workers))]
    needed = _needed(nodes)
    failed, seen = "", time.monotonic()
    running = {asyncio.ensure_future(one) for one in begun}
    with progress("sweep", 1.0, "") as update:
        while running:
            done, running = await asyncio.wait(running, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                try:
                    one.result()
                except (RayTaskError, WorkerCrashedError) as error:
                    failed = str(error).strip().splitlines()[-1]
            silent = [address for address in needed if not _answers(address)]
            if not silent:
                seen = time.monotonic()
            elif time.monotonic() - seen > GONE_SECONDS:
                raise Preempted(f"by the loss of the Ray cluster: nothing answers at {silent[0]}")
            update(*_so_far(folder))
    return failed


def _needed(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """HOST:PORT of the cluster's head and of Ray's daemon here. None for Ray's client (ray://), which says itself that it lost them."""
    import ray

    if ray.util.client.ray.is_connected():
        return []
    context = ray.get_runtime_context()
    here = next(node for node in nodes if node["NodeID"] == context.get_node_id())
    return [context.gcs_address, f"{here['NodeManagerAddress']}:{here['NodeManagerPort']}"]


def _answers(address: str) -> bool:
    """Asked without Ray, whose own calls end the process where the head is not the one they know."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
    except OSError:
        return False
    return True


def _so_far(folder: Path) -> tuple[float, str]:
    """The share of a run's FLOPs that has ended, and in words."""
    trials = ledger.trials(folder)
    state = ledger.statuses(folder, [trial.id for trial in trials])
    ended = [trial for trial in trials if state[trial.id] in ledger.ENDED]
    costs = [sum(max(1.0, trial.counts["C_flops"]) for trial in some) for some in (ended, trials)]
    return costs[0] / costs[1], f"{len(ended)} of {len(trials)} trials"


# What a worker has, and where


def _bundle(nodes: Sequence[Mapping[str, Any]], resources: Resources) -> dict[str, float]:
    """Ray's resources of a worker, on each of its hosts."""
    cpus = float(resources.cpus or 1)
    if resources.gpus or resources.tpus:
        return {"CPU": cpus} | ({"GPU": resources.gpus} if resources.gpus else {"TPU": resources.tpus or 1})
    for kind in ("GPU", "TPU"):
        if there := [node["Resources"][kind] for node in nodes if node["Resources"].get(kind)]:
            return {"CPU": cpus, kind: min(there) if resources.together else 1}
    return {"CPU": cpus}


def rooms(nodes: Sequence[Mapping[str, Any]], bundle: Mapping[str, float]) -> list[str]:
    """The node of each worker that has room at once. Neighbours are on one node: they begin with neighbouring trials, whose programs,
    and whose data, are then in that node's caches."""
    return [node["NodeID"] for node in nodes for _ in range(_room(node, bundle))]


def _room(node: Mapping[str, Any], bundle: Mapping[str, float]) -> int:
    return int(min(node["Resources"].get(kind, 0) // each for kind, each in bundle.items()))


def groups_at_once(nodes: Sequence[Mapping[str, Any]], bundle: Mapping[str, float], resources: Resources) -> int:
    """How many groups of hosts have room, each with its hosts on different nodes."""
    if resources.topology:
        from ray.util import tpu

        return tpu.get_num_tpu_slices(*_slice(resources.topology))
    room = [_room(node, bundle) for node in nodes]
    needed = resources.hosts or 1
    return max([n for n in range(1, sum(room) + 1) if sum(min(one, n) for one in room) >= n * needed], default=0)


def _slice(topology: str) -> tuple[str, str]:
    """Ray's topology and version of a slice such as v5e:4x4."""
    version, _, shape = topology.lower().partition(":")
    return shape, SLICES.get(version, version)


def _fill(homes: Sequence[str], workers: int) -> list[str | None]:
    return [*homes[:workers], *[None] * (workers - len(homes))]


# A worker of one host


async def _alone(bundle: Mapping[str, float], home: str | None, args: tuple) -> None:
    """Ray starts it again, at home where there is room: there its data are prepared, and its programs compiled."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    begin = NodeAffinitySchedulingStrategy(home, soft=True, _spill_on_unavailable=True) if home else "DEFAULT"
    task = _task(_work_there, bundle, begin, max_retries=RETRIES, retry_exceptions=[Preempted])
    await task.remote(*args)


def _task(function: Any, bundle: Mapping[str, float], strategy: Any, **options: Any) -> Any:
    """A process serves one task: JAX keeps the devices that it has found."""
    import ray

    asked = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU"), "scheduling_strategy": strategy}
    if "TPU" in bundle:
        asked["resources"] = {"TPU": bundle["TPU"]}
    return ray.remote(max_calls=1, **asked, **options)(function)


def _work_there(folder: str, index: int, workers: int, cwd: str) -> None:
    if os.path.isdir(cwd):
        os.chdir(cwd)  # paths of data may be relative
    work(files.as_path(folder), index, workers)


# A worker of several hosts


async def _group(resources: Resources, bundle: dict[str, float], args: tuple) -> None:
    """One task a host, on nodes that are reserved together. Where one of them dies all are ended, and begin again.

    An error of one may come of another's death; it is taken for its own where the run got no further since they began.
    """
    from ray.exceptions import RayError, RayTaskError

    for left in range(RETRIES, -1, -1):
        before = _steps(files.as_path(args[0]))
        try:
            async with _reserved(resources, bundle) as (places, each):
                coordinator = await _task(_free_address, {"CPU": 0}, places[0]).remote()
                tasks = [_task(_work_together, each, place, max_retries=0) for place in places]
                count = len(tasks)
                await asyncio.gather(*(task.remote(coordinator, count, i, *args) for i, task in enumerate(tasks)))
            return
        except RayTaskError as error:
            if not left or not (isinstance(error, Preempted) or _steps(files.as_path(args[0])) > before):
                raise
        except RayError:
            if not left:
                raise
            await asyncio.sleep(1.0)


@contextlib.asynccontextmanager
async def _reserved(
    resources: Resources, bundle: dict[str, float]
) -> AsyncIterator[tuple[list[Any], dict[str, float]]]:
    """Where the processes of a group run, by their number, and what each has. What still runs there in the end is ended."""
    import ray
    from ray.util import placement_group, placement_group_table, remove_placement_group, tpu
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    with contextlib.ExitStack() as stack:
        if resources.topology:
            found = await _slice_of(tpu, resources)
            stack.callback(found.shutdown)
            group, bundle = found.slice_placement_group, found.bundle_resources
        else:
            group = placement_group([bundle] * (resources.hosts or 1), strategy="STRICT_SPREAD")
            stack.callback(remove_placement_group, group)
        await group.ready()
        node_of = placement_group_table(group)["bundles_to_node_id"]
        labels = {node["NodeID"]: node.get("Labels") or {} for node in ray.nodes()}
        # Else by node: where the nodes are those of before the first process is on its node again, which knows that its lease is over.
        order = sorted(node_of, key=lambda one: (int(labels[node_of[one]].get(WORKER_ID, 0)), node_of[one]))
        yield [PlacementGroupSchedulingStrategy(group, int(one)) for one in order], bundle


async def _slice_of(tpu: Any, resources: Resources) -> Any:
    """A TPU slice, all of it, when one is free."""
    assert resources.topology
    while True:
        with contextlib.suppress(TimeoutError):
            shape, version = _slice(resources.topology)
            asked = {"CPU": float(resources.cpus or 1)}
            return await asyncio.to_thread(tpu.slice_placement_group, shape, version, resources_per_bundle=asked)


def _free_address() -> str:
    """HOST:PORT of this node that the first process can wait at for the others."""
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"


def _work_together(coordinator: str, count: int, number: int, *args: Any) -> None:
    import jax

    hosts.connect(coordinator, count, number)
    _work_there(*args)
    jax.distributed.shutdown()


def _steps(folder: Path) -> int:
    """How far a run is: the steps that its attempts told of, each trial's furthest."""
    attempts = files.for_each(leases.attempts, files.children(folder / "trials"), folder)
    return sum(max((one.get("step", 0) for one in of_trial), default=0) for of_trial in attempts)
