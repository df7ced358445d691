"""Sweeps on a Ray cluster of simulated nodes on this machine. Needs the extra `ray`; see make test-launchers."""

import itertools
import os
import signal
import subprocess
import sys
import time

import pytest

from scaling import leases, ledger

pytest.importorskip("ray", reason='needs Ray: pip install "llm_jax[ray]"')
pytestmark = pytest.mark.slow

EXPERIMENT = '''"""Four trials of some seconds each, with more checkpoints than they need."""
from llm_jax.config import Data, Model, Train
from scaling.experiment import Experiment, axis, product

experiment = Experiment(
    model=Model(num_layers=1, num_heads=1, dropout=0.1),
    data=Data(source="files", files=("corpus/*",), context=32, eval_tokens=1024, val_fraction=0.2),
    train=Train(tokens_per_step=64, peak_lr=1e-2, steps_per_call=8, warmup_steps=2, checkpoint_every=128),
    axes=product(axis("model.d_model", [16, 24]), axis("train.tokens", [64 * 1200, 64 * 1600])),
)
'''


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        assert process.poll() is None, f"the sweep ended with {process.returncode}"
        time.sleep(0.1)
    return found


def under_way(folder):
    """[(trial, its last attempt)] of trials that are being trained, past their first checkpoint."""
    found = []
    for path in (folder / "trials").glob("*"):
        attempts = leases.attempts(path)
        live = attempts and leases.held(attempts[-1]) and not (path / "result.json").exists()
        if live and list((path / "checkpoints").glob("[0-9]*")):
            found.append((path.name, attempts[-1]))
    return found


def test_workers_and_the_head_die(tmp_path, corpus):
    """A worker killed in the middle of a trial, then the whole cluster gone in the middle of others: nothing lost, nothing run twice,
    and the table is that of a sweep here, bit for bit."""
    from ray.cluster_utils import Cluster

    (tmp_path / "exp.py").write_text(EXPERIMENT)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "scaling.cli", "sweep", "exp.py", "--run"]
    subprocess.run([*command, "here"], cwd=tmp_path, env=env, check=True, stdout=subprocess.DEVNULL)
    folder = tmp_path / "there"
    command += ["there", "--launcher", "ray"]

    def cluster():
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        for _ in range(2):
            found.add_node(num_cpus=1)
        return found

    first = cluster()
    try:
        env["RAY_ADDRESS"] = first.address
        with open(tmp_path / "log", "w") as log:
            sweep = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
        trial, attempt = wait_for(lambda: under_way(folder), sweep)[0]
        assert attempt["pid"] != sweep.pid
        os.kill(attempt["pid"], signal.SIGKILL)
        wait_for(lambda: len(leases.attempts(ledger.trial_folder(folder, trial))) > 1, sweep)
        wait_for(lambda: list(folder.rglob("result.json")) and under_way(folder), sweep)
    finally:
        first.shutdown()  # the head and its nodes
    assert sweep.wait(180) == 75, (tmp_path / "log").read_text()
    assert "told to leave by the loss of the Ray cluster" in (tmp_path / "log").read_text()
    results = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    assert 0 < len(results) < 4

    second = cluster()
    try:
        env["RAY_ADDRESS"] = second.address
        done = subprocess.run(command, cwd=tmp_path, env=env, timeout=300, capture_output=True, text=True)
    finally:
        second.shutdown()
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in results} == results
    assert ledger.sha256(folder) == ledger.sha256(tmp_path / "here")
    assert (folder / "table.csv").read_bytes() == (tmp_path / "here" / "table.csv").read_bytes()
    attempts = {row["id"]: leases.attempts(ledger.trial_folder(folder, row["id"])) for row in ledger.rows(folder)}
    for of_trial in attempts.values():
        for one, after in itertools.pairwise(of_trial):
            assert one.get("ended", one["beat"]) <= after["started"]
    assert attempts[trial][-1]["from_step"] >= 128, "from a checkpoint"


def test_no_cluster(tmp_path, corpus):
    """One line, status 2, nothing written."""
    (tmp_path / "exp.py").write_text(EXPERIMENT)
    command = [sys.executable, "-m", "scaling.cli", "sweep", "exp.py", "--run", "run", "--launcher", "ray"]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "found no cluster" in done.stderr
    assert not (tmp_path / "run").exists()
