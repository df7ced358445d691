"""Told to leave by SIGTERM: saved at the next call, status 75, and the next start goes on to the same bits."""

import signal
import socket
import subprocess
import sys
import time

import pytest

from llm_jax.config import Config
from llm_jax.data import prepare
from llm_jax.settings import override
from llm_jax.training import loop, preemption
from llm_jax.training.checkpoint import Checkpoints
from llm_jax.training.metrics import read_metrics
from scaling import experiment, ledger
from scaling.experiment import Experiment, axis

pytestmark = pytest.mark.usefixtures("mixed_dtypes")


@pytest.fixture
def cfg(tiny) -> Config:
    """Without a checkpoint of its own but the last one."""
    changes = {"train.tokens": 64 * 800, "train.checkpoint_every": 100_000, "model.dropout": 0.1}
    return override(tiny, changes | {"train.warmup_steps": 5})


def test_signals_come_back_to_what_they_did():
    """Outside of training SIGTERM ends the process as ever: nothing is lost there, and nobody would ask."""
    signals = (*preemption.SIGNALS, signal.SIGINT)
    before = [signal.getsignal(number) for number in signals]
    with preemption.noticed() as told:
        assert not told()
        signal.raise_signal(signal.SIGTERM)
        assert told()
    assert [signal.getsignal(number) for number in signals] == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_in_a_finalizer_is_not_lost():
    """Python forgets what is raised there, and the run would go on."""

    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with preemption.noticed() as told:
            it = Finalized()
            del it
            with pytest.raises(KeyboardInterrupt):
                told()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)  # elsewhere it is raised where it comes
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_saves_at_the_call_under_way(cfg, tmp_path):
    """At the end of the call after the one that it fell into; parameters, data, dropout and metrics go on from there."""
    cfg = override(cfg, {"train.tokens": 64 * 100})
    prepared = prepare.prepare(cfg)

    def signal_at_40(step, total, loss):
        if step == 40:
            signal.raise_signal(signal.SIGTERM)

    with preemption.noticed() as told, pytest.raises(preemption.Preempted, match="at step 48 of 100"):
        loop.train(cfg, prepared, tmp_path / "cut", progress=signal_at_40, told=told)
    assert Checkpoints(tmp_path / "cut" / "checkpoints").steps() == [48]
    again, whole = (loop.train(cfg, prepared, tmp_path / name) for name in ("cut", "whole"))
    assert (again.loss, again.bits_per_byte) == (whole.loss, whole.bits_per_byte)
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")


@pytest.mark.slow
def test_a_worker_told_to_leave_exits_with_75(cfg, tmp_path):
    """A real process and a real signal, twice; the run makes no checkpoint of its own, so that only the signal's can be found."""
    prepared = prepare.prepare(cfg)
    alone = Experiment(cfg.model, cfg.data, cfg.train, axes=axis("train.seed", [3]))
    trial = experiment.trials(alone)[0]
    folders = [tmp_path / name for name in ("cut", "whole")]
    for folder in folders:
        ledger.create(folder, "alone", "", alone, [trial], prepared)
    cut, whole = (ledger.trial_folder(folder, trial.id) for folder in folders)
    command = [sys.executable, "-m", "scaling.cli", "work", str(folders[0]), "0", "1"]
    saved = [0]
    for _ in range(2):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            while not any(line["step"] > saved[-1] for line in read_metrics(cut)):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            said = process.stderr.read()
        assert process.returncode == preemption.EXIT_STATUS == 75
        saved.append(Checkpoints(cut / "checkpoints").steps()[-1])
        assert f"told to leave at step {saved[-1]} of 800" in said
    assert 0 < saved[1] < saved[2] < 800
    assert ledger.status(folders[0], trial.id) == "stopped", "free at once: no lease is left to run out"
    subprocess.run(command, check=True)
    command[-3] = str(folders[1])
    subprocess.run(command, check=True)
    assert (cut / "result.json").read_bytes() == (whole / "result.json").read_bytes()
    assert read_metrics(cut) == read_metrics(whole)
    assert ledger.sha256(folders[0]) == ledger.sha256(folders[1])


ASK = """
import sys, time
import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from llm_jax.training import preemption
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
with preemption.noticed() as told:
    print("ready", flush=True)
    for call in range(1000):
        multihost_utils.process_allgather(jnp.ones(1))  # as a call of steps does, this keeps them together
        time.sleep(0.01)
        if told():
            print(call, told(), flush=True)
            break
"""


@pytest.mark.slow
def test_all_processes_are_told_at_the_same_call():
    """One of two gets the signal: each saves its part of the state, and parts of two different steps would be of no use."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", ASK, address]
    processes = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(2)]
    try:
        for process in processes:
            while process.stdout.readline() != "ready\n":  # Gloo prints too
                assert process.poll() is None
        time.sleep(0.5)
        processes[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=60)[0].splitlines()[-1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert said[0] == said[1]
    call, still = said[0].split()
    assert 0 < int(call) < 999
    assert still == "True", "asked again, they still are: JAX itself says so once"
