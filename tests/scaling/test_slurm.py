"""Slurm jobs through submitit, whose executor for this machine stands in for Slurm. Needs the extra `slurm`; see make test-launchers."""

import os
import signal
import subprocess
import sys
import time

import pytest

from llm_jax.data import prepare
from llm_jax.settings import BadInput, override
from llm_jax.training.metrics import read_metrics
from scaling import experiment, launchers, leases, ledger
from scaling.experiment import Experiment, axis
from scaling.launchers import Resources, on_slurm

submitit = pytest.importorskip("submitit", reason='needs submitit: pip install "llm_jax[slurm]"')


@pytest.fixture
def run(tiny, tmp_path):
    """Two folders of the same two trials, and their data."""
    return make(tiny, tmp_path, 1200)


def make(tiny, tmp_path, steps):
    cfg = override(tiny, {"train.tokens": 64 * steps, "train.warmup_steps": 2, "train.checkpoint_every": 100_000})
    small = Experiment(cfg.model, cfg.data, cfg.train, axes=axis("train.seed", [0, 1]))
    prepared = prepare.prepare(cfg)
    for name in ("here", "there"):
        ledger.create(tmp_path / name, "small", "", small, experiment.trials(small), prepared)
    return tmp_path


@pytest.mark.slow
def test_a_job_that_is_told_to_leave_goes_back_into_the_queue(run, monkeypatch):
    """The signal that submitit has Slurm send: saved at the next call, requeued with what it needs, and done by the job started again."""
    monkeypatch.setenv("XLA_FLAGS", "")
    folder = run / "there"
    (job,) = on_slurm.submit(folder, 1, Resources(hours=0.5), cluster="local")
    trial = None
    while not trial:
        assert not job.done(), job.stderr()
        going = [p for p in (folder / "trials").glob("*") if any(line["step"] > 100 for line in read_metrics(p))]
        trial = going[0] if going else None
        time.sleep(0.1)
    (attempt,) = leases.attempts(trial)
    os.kill(attempt["pid"], signal.SIGUSR2)
    job.wait()  # in place of Slurm, a controller starts a job again that asks for it
    first, second = leases.attempts(trial)
    assert 100 < first["step"] < 1200
    assert second["from_step"] == first["step"]
    assert first["pid"] != second["pid"]
    assert "Requeued job" in job.stdout()
    here = [sys.executable, "-m", "scaling.cli", "work", str(run / "here"), "0", "1"]
    subprocess.run(here, check=True)
    assert ledger.sha256(folder) == ledger.sha256(run / "here")


TASK = """
import signal, sys
from scaling.launchers.on_slurm import SlurmWorker
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))  # submitit's own asks Slurm to requeue, and exits
SlurmWorker()(sys.argv[1], 0, 1, {})
"""


@pytest.mark.slow
def test_a_job_of_two_nodes(tiny, tmp_path):
    """Its tasks find each other by what srun says, and train as one; Slurm's signal to either makes both save and leave."""
    run = make(tiny, tmp_path, 300)
    folder = run / "there"
    told = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}

    def start():
        ranks = [told | {"SLURM_PROCID": str(i), "SLURM_LOCALID": "0", "XLA_FLAGS": ""} for i in range(2)]
        command = [sys.executable, "-c", TASK, str(folder)]
        return [subprocess.Popen(command, env=os.environ | env, stderr=subprocess.PIPE, text=True) for env in ranks]

    tasks = start()
    while not (going := [p for p in (folder / "trials").glob("*") if any(x["step"] > 100 for x in read_metrics(p))]):
        assert all(task.poll() is None for task in tasks), [task.communicate() for task in tasks]
        time.sleep(0.1)
    tasks[1].send_signal(signal.SIGUSR2)
    said = [task.communicate(timeout=120)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [75, 75], said
    tasks = start()
    said = [task.communicate(timeout=300)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    first, second = leases.attempts(going[0])
    assert 100 < first["step"] < 300
    assert second["from_step"] == first["step"], "saved when it was told"
    here = [sys.executable, "-m", "scaling.cli", "work", str(run / "here"), "0", "1"]
    subprocess.run(here, check=True, env=os.environ | {"XLA_FLAGS": ""})
    losses = [[row["loss"] for row in ledger.rows(run / name)] for name in ("here", "there")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_what_sbatch_is_asked_for(tmp_path, monkeypatch):
    """The script that submitit writes for Slurm, with a stand-in for sbatch: an array, requeued, with the resources of the flags."""
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f"#!/bin/sh\ncat $1 > {tmp_path}/script\necho Submitted batch job 77\n")
    sbatch.chmod(0o755)
    for name in ("srun", "squeue", "sacct"):
        (tmp_path / "bin" / name).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    launchers.ready("slurm", Resources())
    resources = Resources(gpus=2, cpus=6, hours=1.5, hosts=4)
    jobs = on_slurm.submit(tmp_path / "run", 3, resources, ["partition=a100", "account=lab"])
    assert [job.job_id for job in jobs] == ["77_0", "77_1", "77_2"]
    script = (tmp_path / "script").read_text()
    asked = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert {"array=0-2%3", "time=90", "gpus-per-node=2", "cpus-per-task=6", "requeue", "signal=USR2@90"} <= asked
    assert {"nodes=4", "ntasks-per-node=1"} <= asked
    assert {"partition=a100", "account=lab", "open-mode=append"} <= asked
    with pytest.raises(BadInput, match="NAME=VALUE"):
        on_slurm.submit(tmp_path / "run", 3, resources, ["a100"])
