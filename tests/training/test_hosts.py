"""Several processes on this machine that train together, over Gloo: one record, checkpoints in parts, the same bits after a kill."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from llm_jax.config import Config
from llm_jax.settings import BadInput, from_dict
from llm_jax.training import hosts, loop, metrics

OPTIONS = {
    "model.num_layers": 1,
    "model.d_model": 32,
    "data.source": "files",
    "data.context": 32,
    "data.eval_tokens": 1024,
    "data.val_fraction": 0.2,
    "train.tokens_per_step": 256,
    "train.peak_lr": 1e-2,
    "train.warmup_steps": 5,
    "train.steps_per_call": 8,
    "train.checkpoint_every": 16,
}


def start(run: Path, corpus: Path, steps: int, processes: int, devices: int, fsdp: int = 2) -> list[subprocess.Popen]:
    """llm-jax train as so many processes of so many simulated devices each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "NPROC": "64"}
    options = {**OPTIONS, "data.files": f"{corpus}/*", "train.tokens": 256 * steps}
    options |= {"mesh.fsdp": min(fsdp, processes * devices), "num_processes": processes}
    if processes > 1:
        options["coordinator"] = f"localhost:{port}"
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "scaling.cli", "train", "--json", "--run", str(run), *words]
    ids = [["--process_id", str(i)] if processes > 1 else [] for i in range(processes)]
    return [
        subprocess.Popen([*command, *own], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for own in ids
    ]


def finish(jobs: list[subprocess.Popen]) -> dict:
    """The one trial that the first process tells of; the others tell nothing."""
    said = [job.communicate(timeout=400)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * len(jobs), said
    assert [text.count('{"trials"') for text in said] == [1] + [0] * (len(jobs) - 1)
    return json.loads(next(line for line in said[0].splitlines() if line.startswith('{"trials"')))["trials"][0]


def folder(run: Path) -> Path:
    return next((run / "trials").iterdir())


def params(run: Path) -> list[np.ndarray]:
    config = from_dict(Config, json.loads((folder(run) / "trial.json").read_text())["config"])
    leaves = jax.tree.leaves(loop.load_params(config, folder(run)))
    return [np.asarray(leaf) for leaf in leaves]


@pytest.mark.parametrize("fsdp", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_two_processes_train_as_one(fsdp, corpus, tmp_path):
    """The same trial: every line of metrics, the held-out loss and the parameters to rounding; one record, two parts of a checkpoint. With
    parameters spread, and by replicas."""
    two = finish(start(tmp_path / "two", corpus, 16, processes=2, devices=2, fsdp=fsdp))
    one = finish(start(tmp_path / "one", corpus, 16, processes=1, devices=1))
    assert two["id"] == one["id"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    lines = [metrics.read_metrics(folder(tmp_path / run)) for run in ("two", "one")]
    assert [line["step"] for line in lines[0]] == [8, 16, 16]
    for found, wanted in zip(*lines, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    for found, wanted in zip(params(tmp_path / "two"), params(tmp_path / "one"), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
    parts = list((folder(tmp_path / "two") / "checkpoints" / "16" / "state").glob("ocdbt.process_*"))
    assert len(parts) == 2, "each process writes its own part"


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_job(corpus, tmp_path):
    """Python's end of the one waits for the others, and they for its part of a sum: the job would stand still for five minutes."""
    jobs = start(tmp_path / "run", corpus, 16 * 1000, processes=2, devices=1)
    while not list((tmp_path / "run").glob("trials/*/metrics.jsonl")):
        assert all(job.poll() is None for job in jobs)
        time.sleep(0.1)
    jobs[1].send_signal(signal.SIGINT)
    began = time.monotonic()
    said = [job.communicate(timeout=200)[0] for job in jobs]
    assert [job.returncode != 0 for job in jobs] == [True, True], said
    assert "stopped" in said[1]
    assert time.monotonic() - began < 150  # the others hear of it from JAX's service, by its heartbeats


@pytest.mark.slow
def test_a_process_killed_and_the_job_started_again(corpus, tmp_path):
    """The others of the job end by themselves, and the same command goes on: to the same bits on the same mesh, to rounding on another."""
    steps = 160
    whole = finish(start(tmp_path / "whole", corpus, steps, processes=2, devices=2))
    for run, processes, devices in (("same", 2, 2), ("other", 1, 4)):
        jobs = start(tmp_path / run, corpus, steps, processes=2, devices=2)
        saved = tmp_path / run / "trials"
        while not list(saved.glob("*/checkpoints/[0-9]*/commit_success.txt")):
            assert all(job.poll() is None for job in jobs), [
                job.communicate()[0] for job in jobs if job.poll() is not None
            ]
            time.sleep(0.02)
        jobs[1].send_signal(signal.SIGKILL)
        for job in jobs:
            job.communicate(timeout=200)
        assert jobs[0].returncode != 0
        assert not (folder(tmp_path / run) / "result.json").exists()
        again = finish(start(tmp_path / run, corpus, steps, processes, devices))
        if run == "same":
            assert (again["loss"], again["bits_per_byte"]) == (whole["loss"], whole["bits_per_byte"])
            for found, wanted in zip(params(tmp_path / run), params(tmp_path / "whole"), strict=True):
                np.testing.assert_array_equal(found, wanted)
            assert metrics.read_metrics(folder(tmp_path / run)) == metrics.read_metrics(folder(tmp_path / "whole"))
        assert again["loss"] == pytest.approx(whole["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "a:1", "process_id": 0}, "--num_processes is missing"),
        ({"num_processes": 2}, "--coordinator is missing"),
        (
            {"coordinator": "a", "num_processes": 2, "process_id": 0},
            "--coordinator must be HOST:PORT, got a; try a:8476",
        ),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, r"--process_id=2 must lie in \[0, 1\]"),
    ],
)
def test_a_job_that_is_half_described_is_refused(given, message):
    """At once and in one line: a process that waits for others that never come is found out an hour later."""
    with pytest.raises(BadInput, match=message):
        hosts.connect(**given)


def test_who_starts_several_processes():
    """By what each launcher sets; a lone task, an interactive shell or a worker of a sweep is joined to nobody."""
    slurm = dict.fromkeys(hosts.SLURM, "2")
    mpi = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "4"}
    assert hosts.launcher(slurm) == "Slurm"
    assert hosts.launcher(mpi) == "Open MPI"
    assert hosts.launcher({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}) == "Kubernetes"
    assert hosts.launcher({"TPU_WORKER_HOSTNAMES": "t1,t2"}) == "Cloud TPU"
    for alone in (
        {},
        {**slurm, "SLURM_NTASKS": "1"},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"},
        {**mpi, "OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
    ):
        assert hosts.launcher(alone) is None
