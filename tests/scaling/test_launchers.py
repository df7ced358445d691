"""Workers here: each has devices of its own, and any may die."""

import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest

from llm_jax.data import prepare
from llm_jax.settings import BadInput, override
from llm_jax.training.metrics import read_metrics
from scaling import cli, experiment, launchers, leases, ledger
from scaling.experiment import Experiment, axis
from scaling.launchers import Resources, local, on_ray


def gpus(workers, ids, resources=Resources()):  # noqa: B008
    return [local.environment(i, workers, "gpu", ids, resources) for i in range(workers)]


def test_each_worker_sees_its_own_gpus():
    """Two on one GPU would halve each other's speed beside one that is idle; ids stay those that this process was given."""
    assert gpus(2, ["0", "1"]) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert gpus(1, ["0", "1"]) == [{}], "one worker has them all"
    pairs = gpus(2, ["4", "5", "6", "7"], Resources(gpus=2))
    assert [one["CUDA_VISIBLE_DEVICES"] for one in pairs] == ["4,5", "6,7"]
    assert local.default_workers("gpu", ["4", "5", "6", "7"], Resources(gpus=2)) == 2
    assert local.default_workers("gpu", ["0", "1", "2"], Resources()) == 3
    assert local.default_workers("cpu", [], Resources()) == 1


def test_workers_share_the_memory_of_a_gpu(monkeypatch):
    """JAX takes three quarters of it for the first process, and the second fails."""
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    shared = gpus(4, ["0", "1"])
    assert [one["CUDA_VISIBLE_DEVICES"] for one in shared] == ["0", "1", "0", "1"]
    assert {one["XLA_PYTHON_CLIENT_MEM_FRACTION"] for one in shared} == {"0.450"}
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.2")
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in gpus(4, ["0", "1"])[0]


def test_tpu_chips_have_one_process():
    chips = [str(i) for i in range(8)]
    one = local.environment(3, 8, "tpu", chips, Resources())
    assert one["TPU_VISIBLE_CHIPS"] == "3"
    assert one["TPU_CHIPS_PER_PROCESS_BOUNDS"] == one["TPU_PROCESS_BOUNDS"] == "1,1,1"
    four = local.environment(1, 2, "tpu", chips, Resources(tpus=4))
    assert four == {"TPU_VISIBLE_CHIPS": "4,5,6,7"}
    with pytest.raises(BadInput, match="chips for 8"):
        local.environment(0, 9, "tpu", chips, Resources())
    with pytest.raises(BadInput, match="there are 8 here"):
        local.environment(0, 1, "tpu", chips, Resources(tpus=16))


def test_devices_are_those_that_jax_would_find(monkeypatch):
    """Ids come from the environment where it has them; JAX_PLATFORMS=cpu means no GPU, and so does a JAX without its plugin."""
    monkeypatch.setattr(local, "_installed", lambda *packages: "jax_cuda13_plugin" in packages)
    monkeypatch.setattr(local, "_count_gpus", lambda: 2)
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local.devices() == ("gpu", ["0", "1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert local.devices() == ("gpu", ["3"])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert local.devices() == ("cpu", [])


@pytest.mark.parametrize("launcher,package", [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_extra_is_one_line(launcher, package, tmp_path, capsys, monkeypatch):
    """And says what to install; nothing is written before."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    status = cli.main(["sweep", "experiments/quickstart.py", "--run", str(tmp_path / "run"), "--launcher", launcher])
    said = capsys.readouterr().err
    assert status == 2
    assert said.count("\n") == 1
    assert f'pip install "llm_jax[{launcher}]"' in said
    assert not (tmp_path / "run").exists()


def test_workers_begin_where_their_neighbours_do():
    """They share that node's compiled programs; groups have their hosts on different nodes."""
    nodes = [{"NodeID": name, "Resources": {"CPU": 8.0, "GPU": gpus}} for name, gpus in (("a", 2.0), ("b", 1.0))]
    nodes.append({"NodeID": "head", "Resources": {"CPU": 4.0}})
    assert on_ray.rooms(nodes, {"CPU": 1, "GPU": 1}) == ["a", "a", "b"]
    assert on_ray.rooms(nodes, {"CPU": 4}) == ["a", "a", "b", "b", "head"]
    assert on_ray.groups_at_once(nodes, {"CPU": 1, "GPU": 1}, Resources(hosts=2)) == 1
    assert on_ray.groups_at_once(nodes, {"CPU": 4}, Resources(hosts=2)) == 2
    assert on_ray.groups_at_once(nodes, {"CPU": 4}, Resources(hosts=4)) == 0


@pytest.mark.parametrize(
    "words,message",
    [
        (["--hosts", "2"], "--hosts is for --launcher ray or slurm"),
        (["--hosts", "0", "--launcher", "ray"], "--hosts must be positive"),
        (["--topology", "v5e:4x4"], "--topology is for --launcher ray"),
        (["--topology", "v5e:4x5", "--launcher", "ray"], 'did you mean "v5e:4x4"'),
        (["--topology", "v5e:4x4", "--tpus", "4", "--launcher", "ray"], "leave out --tpus"),
    ],
)
def test_hosts_that_nobody_would_start(words, message, tmp_path, capsys):
    """One line, status 2, nothing written: a trial that waits for hosts that never come is found out an hour later."""
    status = cli.main(["sweep", "experiments/quickstart.py", "--run", str(tmp_path / "run"), *words])
    said = capsys.readouterr().err
    assert status == 2
    assert said.count("\n") == 1
    assert message in said
    assert not (tmp_path / "run").exists()


def create(folder, tiny):
    cfg = override(tiny, {"train.tokens": 64 * 800, "train.warmup_steps": 2, "train.checkpoint_every": 100_000})
    small = Experiment(cfg.model, cfg.data, cfg.train, axes=axis("train.seed", [0, 1]))
    prepared = prepare.prepare(cfg)
    ledger.create(folder, "small", "", small, experiment.trials(small), prepared)
    return prepared


def test_a_worker_with_other_data_trains_nothing(tiny, tmp_path, corpus):
    """On another machine, files of the same name may hold something else: its losses would be of no use in the table."""
    create(tmp_path / "run", tiny)
    (corpus / "00.txt").write_text("Something else.\n" * 200)
    with pytest.raises(BadInput, match="are not those of"):
        launchers.work(tmp_path / "run", 0, 1)
    assert not list(tmp_path.rglob("attempt-*"))


RUN = """
import sys
from pathlib import Path
from llm_jax.training.preemption import Preempted
from scaling import launchers, ledger
from scaling.launchers import local
folder = Path(sys.argv[1])
try:
    local.run(folder, launchers.prepared_data(ledger.base_config(folder)), 2, launchers.Resources())
except Preempted:
    sys.exit(75)
"""


def start(folder):
    """A sweep by two workers, when both train; and their attempts."""
    sweep = subprocess.Popen([sys.executable, "-c", RUN, str(folder)], stderr=subprocess.PIPE, text=True)
    while True:
        lasts = [leases.attempts(path)[-1:] for path in (folder / "trials").glob("*")]
        live = [one[0] for one in lasts if one and leases.held(one[0])]
        if len({one["pid"] for one in live}) == 2:
            return sweep, live
        assert sweep.poll() is None
        time.sleep(0.05)


@pytest.mark.slow
def test_a_worker_dies(tiny, tmp_path):
    """The other takes over what the dead one began, and the sweep says so."""
    folder = tmp_path / "run"
    create(folder, tiny)
    sweep, live = start(folder)
    os.kill(next(one["pid"] for one in live if one["pid"] != sweep.pid), signal.SIGKILL)
    said = sweep.communicate(timeout=120)[1]
    assert sweep.returncode == 0
    assert "worker 1 ended with status -9" in said
    assert [row["status"] for row in ledger.rows(folder)] == ["done", "done"]
    assert sorted(row["attempts"] for row in ledger.rows(folder)) == [1, 2]


@pytest.mark.slow
def test_all_are_told_to_leave(tiny, tmp_path):
    """The first tells the others, and exits when all have saved: a machine that goes away waits for one process only."""
    folder = tmp_path / "run"
    create(folder, tiny)
    sweep, live = start(folder)
    while not any(read_metrics(one["path"].parent) for one in live):
        time.sleep(0.05)
    sweep.send_signal(signal.SIGTERM)
    sweep.communicate(timeout=60)
    assert sweep.returncode == 75
    assert "told to leave" in (folder / "worker-1.log").read_text()
    for path in (folder / "trials").glob("*"):
        assert all("ended" in one for one in leases.attempts(path))
        left = not (path / "result.json").exists()
        assert not left or list((path / "checkpoints").glob("[0-9]*")), "saved, though train.checkpoint_every is far"
