"""Sweeps on a Ray cluster of simulated nodes on this machine. Needs the extra `ray`; see make test-launchers."""

import contextlib
import itertools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from scaling import leases, ledger

cluster_utils = pytest.importorskip("ray.cluster_utils", reason='needs Ray: pip install "llm_jax[ray]"')
pytestmark = pytest.mark.slow

EXPERIMENT = '''"""Four trials of some seconds each, with more checkpoints than they need."""
from llm_jax.config import Data, Model, Train
from scaling.experiment import Experiment, axis, product

experiment = Experiment(
    model=Model(num_layers=1, num_heads=1, dropout=0.1),
    data=Data(source="files", files=("corpus/*",), context=32, eval_tokens=1024, val_fraction=0.2),
    train=Train(tokens_per_step=64, peak_lr=1e-2, steps_per_call=8, warmup_steps=2, checkpoint_every=128),
    axes=product(axis("model.d_model", [16, 24]), axis("train.tokens", [64 * 3000, 64 * 4000])),
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
    """[(trial, its last attempt)] of trials that are being trained, past a checkpoint that this attempt has saved whole."""
    found = []
    for path in (folder / "trials").glob("*"):
        attempts = leases.attempts(path)
        if (
            not (attempts and "started" in attempts[-1] and leases.held(attempts[-1]))
            or (path / "result.json").exists()
        ):
            continue
        with contextlib.suppress(FileNotFoundError):  # a checkpoint that is removed meanwhile
            saved = [one.stat().st_mtime for one in path.glob("checkpoints/*/commit_success.txt")]
            if max(saved, default=0.0) > attempts[-1]["started"]:
                found.append((path.name, attempts[-1]))
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_workers_and_the_head_die(tmp_path, corpus):
    """A worker killed in the middle of a trial, then the head and all nodes in the middle of others, and started again at their address:
    nothing lost, nothing run twice, and the table is that of a sweep here, bit for bit."""
    (tmp_path / "exp.py").write_text(EXPERIMENT)
    head = {"num_cpus": 0, "gcs_server_port": free_port()}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "RAY_ADDRESS": cluster.address}
    folder = tmp_path / "there"
    command = [sys.executable, "-m", "scaling.cli", "sweep", "exp.py", "--run"]
    on_ray = [*command, "there", "--launcher", "ray"]
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        with open(tmp_path / "log", "w") as log:
            sweep = subprocess.Popen(on_ray, cwd=tmp_path, env=env, stdout=log, stderr=log)
        trial, attempt = wait_for(lambda: under_way(folder), sweep)[0]
        assert attempt["pid"] != sweep.pid
        os.kill(attempt["pid"], signal.SIGKILL)
        wait_for(lambda: len(leases.attempts(ledger.trial_folder(folder, trial))) > 1, sweep)
        wait_for(lambda: list(folder.rglob("result.json")) and under_way(folder), sweep)
        for node in (*cluster.worker_nodes, cluster.head_node):
            cluster.remove_node(node, allow_graceful=False)
        assert sweep.wait(300) == 75, (tmp_path / "log").read_text()
        assert "told to leave by the loss of the Ray cluster" in (tmp_path / "log").read_text()
        results = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
        assert 0 < len(results) < 4

        cluster.add_node(**head)
        assert cluster.address == env["RAY_ADDRESS"]
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        done = subprocess.run(on_ray, cwd=tmp_path, env=env, timeout=600, capture_output=True, text=True)
    finally:
        cluster.shutdown()
    assert done.returncode == 0, done.stderr
    subprocess.run([*command, "here"], cwd=tmp_path, env=env, check=True, stdout=subprocess.DEVNULL)
    assert {path: path.stat().st_mtime_ns for path in results} == results
    assert ledger.sha256(folder) == ledger.sha256(tmp_path / "here")
    assert (folder / "table.csv").read_bytes() == (tmp_path / "here" / "table.csv").read_bytes()
    attempts = {row["id"]: leases.attempts(ledger.trial_folder(folder, row["id"])) for row in ledger.rows(folder)}
    for of_trial in attempts.values():
        for one, after in itertools.pairwise(of_trial):
            assert one.get("ended", one["beat"]) <= after["started"]
    assert attempts[trial][-1]["from_step"] >= 128, "from a checkpoint"


LONG = '''"""A trial of more than a minute, with a checkpoint every two seconds or so."""
from llm_jax.config import Data, Model, Train
from scaling.experiment import Experiment, axis

experiment = Experiment(
    model=Model(num_layers=4, d_model=128, num_heads=2),
    data=Data(source="files", files=("corpus/*",), context=128, eval_tokens=1024, val_fraction=0.2),
    train=Train(tokens_per_step=1024, peak_lr=1e-3, steps_per_call=4, warmup_steps=2, checkpoint_every=16),
    axes=axis("train.tokens", [1024 * 600]),
)
'''


def test_the_head_alone_dies(tmp_path, corpus):
    """And is started again at once, at its address: it knows neither the nodes nor the sweep from before. The nodes end
    by themselves, and the sweep with one line and status 75; on new nodes the same command goes on."""
    (tmp_path / "exp.py").write_text(LONG)
    head = {"num_cpus": 0, "gcs_server_port": free_port()}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "RAY_ADDRESS": cluster.address}
    command = [sys.executable, "-m", "scaling.cli", "sweep", "exp.py", "--run", "run", "--launcher", "ray"]
    try:
        node = cluster.add_node(num_cpus=1)
        with open(tmp_path / "log", "w") as log:
            sweep = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
        wait_for(lambda: under_way(tmp_path / "run"), sweep)
        cluster.remove_node(cluster.head_node, allow_graceful=False)
        cluster.add_node(**head)
        assert cluster.address == env["RAY_ADDRESS"]
        assert sweep.wait(300) == 75, (tmp_path / "log").read_text()
        assert "told to leave by the loss of the Ray cluster" in (tmp_path / "log").read_text()
        while node.any_processes_alive():  # which also has the kernel forget its daemon: a worker lives until then
            time.sleep(0.1)
        cluster.add_node(num_cpus=1)
        done = subprocess.run(command, cwd=tmp_path, env=env, timeout=600, capture_output=True, text=True)
    finally:
        cluster.shutdown()
    assert done.returncode == 0, done.stderr
    (row,) = ledger.rows(tmp_path / "run")
    assert row["status"] == "done"
    before, after = leases.attempts(ledger.trial_folder(tmp_path / "run", row["id"]))
    assert before.get("ended", before["beat"]) <= after["started"]
    assert after["from_step"] >= 16, "from a checkpoint"


TOGETHER = '''"""A short trial and a longer one."""
from llm_jax.config import Data, Model, Train
from scaling.experiment import Experiment, axis

experiment = Experiment(
    model=Model(num_layers=1, d_model=32),
    data=Data(source="files", files=("corpus/*",), context=32, eval_tokens=1024, val_fraction=0.2),
    train=Train(tokens_per_step=256, peak_lr=1e-2, steps_per_call=8, warmup_steps=5, checkpoint_every=16),
    axes=axis("train.tokens", [256 * 16, 256 * 800]),
)
'''


def members(folder):
    """The processes of groups that run in a folder, {pid}."""
    found = set()
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"_work_together" in (path / "cmdline").read_bytes() and os.readlink(path / "cwd") == str(folder):
                found.add(int(path.name))
    return found


def test_a_trial_of_two_hosts(tmp_path, corpus):
    """One process on each of two nodes trains as one process does, to rounding; where either dies both begin again, from the last
    checkpoint, and end with the bits of a group that nothing happened to."""
    (tmp_path / "exp.py").write_text(TOGETHER)
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "RAY_ADDRESS": cluster.address}
    command = [sys.executable, "-m", "scaling.cli", "sweep", "exp.py", "--run"]
    killed = []
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        whole = [*command, "whole", "--launcher", "ray", "--hosts", "2"]
        done = subprocess.run(whole, cwd=tmp_path, env=env, timeout=600, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "there"
        with open(tmp_path / "log", "w") as log:
            together = [*command, "there", "--launcher", "ray", "--hosts", "2"]
            sweep = subprocess.Popen(together, cwd=tmp_path, env=env, stdout=log, stderr=log)
        short, long = [row["id"] for row in ledger.rows(tmp_path / "whole")]
        for first in (False, True):
            attempt = wait_for(lambda: dict(under_way(folder)).get(long), sweep)
            now = members(tmp_path)
            assert len(now) == 2
            assert attempt["pid"] in now
            killed.append(attempt["pid"] if first else (now - {attempt["pid"]}).pop())
            os.kill(killed[-1], signal.SIGKILL)
            wait_for(lambda now=now: not members(tmp_path) & now, sweep)
        assert sweep.wait(600) == 0, (tmp_path / "log").read_text()
    finally:
        cluster.shutdown()
    subprocess.run([*command, "here"], cwd=tmp_path, env=env, check=True, stdout=subprocess.DEVNULL)
    assert ledger.sha256(folder) == ledger.sha256(tmp_path / "whole")
    losses = {name: {row["id"]: row["loss"] for row in ledger.rows(tmp_path / name)} for name in ("here", "there")}
    assert losses["there"][short] == pytest.approx(losses["here"][short], rel=1e-5)
    assert losses["there"][long] == pytest.approx(losses["here"][long], rel=1e-3)
    for one in (short, long):
        parts = list((ledger.trial_folder(folder, one) / "checkpoints").glob("*/state/ocdbt.process_*"))
        assert len(parts) == 2, "each process writes its own part"
    attempts = leases.attempts(ledger.trial_folder(folder, long))
    assert len({one["pid"] for one in attempts}) == len(attempts) == 3
    assert attempts[-1]["from_step"] >= 16, "from a checkpoint"


def test_a_trial_of_a_slice(tmp_path, corpus, monkeypatch):
    """Nodes as Ray labels those of a v4 slice of two hosts are one worker, whose first process is that of host 0, as libtpu has it."""
    (tmp_path / "exp.py").write_text(TOGETHER.replace(", 256 * 800", ""))
    monkeypatch.setenv("TPU_NAME", "my-slice")  # as the metadata of a TPU machine has it
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "RAY_ADDRESS": cluster.address}
    command = [sys.executable, "-m", "scaling.cli", "sweep", "exp.py", "--run", "run", "--launcher", "ray"]
    slice_of = {"ray.io/tpu-slice-name": "my-slice", "ray.io/tpu-pod-type": "v4-16", "ray.io/tpu-topology": "2x2x2"}
    try:
        for worker in ("1", "0"):
            resources = {"TPU": 4} | ({"TPU-v4-16-head": 1} if worker == "0" else {})
            node = cluster.add_node(num_cpus=1, resources=resources, labels=slice_of | {"ray.io/tpu-worker-id": worker})
        monkeypatch.delenv("TPU_NAME")  # else Ray labels this one so too
        cluster.add_node(num_cpus=1, resources={"TPU": 4})  # no part of it
        with open(tmp_path / "log", "w") as log:
            sweep = subprocess.Popen(
                [*command, "--topology", "v4:2x2x2"], cwd=tmp_path, env=env, stdout=log, stderr=log
            )
        path = wait_for(lambda: [*tmp_path.glob("run/trials/*/attempt-1.json")], sweep)[0]
        (attempt,) = wait_for(lambda: [one for one in leases.attempts(path.parent) if "pid" in one], sweep)
        parent = int(pathlib.Path(f"/proc/{attempt['pid']}/stat").read_text().rpartition(")")[2].split()[1])
        assert parent in [one.process.pid for one in node.all_processes["raylet"]]
        assert sweep.wait(600) == 0, (tmp_path / "log").read_text()
    finally:
        cluster.shutdown()
    assert len(list(path.parent.glob("checkpoints/*/state/ocdbt.process_*"))) == 2


def test_a_group_that_fails_by_itself(tmp_path, corpus):
    """An error that would come again is told, in one line, and not tried a hundred times: here, a kind of device that is not there."""
    (tmp_path / "exp.py").write_text(TOGETHER)
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    env = os.environ | {"JAX_PLATFORMS": "tpu", "RAY_ADDRESS": cluster.address}
    command = [
        sys.executable,
        "-m",
        "scaling.cli",
        "sweep",
        "exp.py",
        "--run",
        "run",
        "--launcher",
        "ray",
        "--hosts",
        "2",
    ]
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        done = subprocess.run(command, cwd=tmp_path, env=env, timeout=600, capture_output=True, text=True)
    finally:
        cluster.shutdown()
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("llm-jax: workers on Ray failed, the last one by ") == 1


def test_no_cluster(tmp_path, corpus):
    """One line, status 2, nothing written."""
    (tmp_path / "exp.py").write_text(EXPERIMENT)
    command = [sys.executable, "-m", "scaling.cli", "sweep", "exp.py", "--run", "run", "--launcher", "ray"]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "found no cluster" in done.stderr
    assert not (tmp_path / "run").exists()
