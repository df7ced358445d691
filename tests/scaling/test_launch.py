"""A worker with lanes: trials side by side on one device."""

import dataclasses
import threading
import time

import jax
import pytest

from llm_jax.data import prepare
from llm_jax.training.lanes import Lanes
from llm_jax.training.preemption import Preempted
from scaling import experiment, launch, ledger
from scaling.experiment import Experiment, axis, product

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def mixed_dtypes_in_all_threads():
    """Standard promotion, for optax; conftest's `mixed_dtypes` holds in its own thread."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def run(tiny, tmp_path):
    """make(name) -> the folder of a run of four trials of one shape, and its data."""
    trials = Experiment(
        model=tiny.model,
        data=tiny.data,
        train=dataclasses.replace(tiny.train, warmup_steps=2, checkpoint_every=64, steps_per_call=4, tokens=10_240),
        mesh=tiny.mesh,
        axes=product(axis("train.peak_lr", [1e-2, 3e-3]), axis("train.seed", [0, 1])),
    )
    prepared = prepare.prepare(trials.config)

    def make(name):
        ledger.create(tmp_path / name, name, "", trials, experiment.trials(trials), prepared)
        return tmp_path / name, prepared

    return make


def test_lanes_train_what_one_after_the_other_does(run, monkeypatch):
    """Each trial once, to the loss that it has alone; and the calls of two of one shape are joined indeed."""
    folder, prepared = run("one")
    launch.work(folder, prepared, lanes=1)
    expected = {row["id"]: row["loss"] for row in ledger.rows(folder)}
    made = []
    monkeypatch.setattr(launch, "Lanes", lambda: made.append(Lanes()) or made[-1])
    folder, prepared = run("two")
    launch.work(folder, prepared, lanes=2)
    rows = ledger.rows(folder)
    assert {row["id"]: row["loss"] for row in rows} == pytest.approx(expected, rel=1e-5)
    assert {row["attempts"] for row in rows} == {1}
    assert {row["hardware"].endswith("2 trials at a time") for row in rows} == {True}, "tokens a second are of both"
    assert made[0].joined > 0
    assert (folder / "table.csv").exists()


def test_a_large_trial_has_the_device_to_itself(run, monkeypatch):
    """Two of them need twice its memory."""
    folder, prepared = run("run")
    large = set(sorted(trial.id for trial in ledger.trials(folder))[2:])  # after the small ones, as is their way
    monkeypatch.setattr(launch, "fits_beside", lambda trial: trial.id not in large)
    running, together = set(), []

    def pretend(folder, trial, *_):
        running.add(trial.id)
        together.append(set(running))
        time.sleep(0.3)
        running.remove(trial.id)
        (ledger.trial_folder(folder, trial.id) / "result.json").write_text('{"status": "failed"}')

    monkeypatch.setattr(launch, "run_trial", pretend)
    monkeypatch.setattr(launch.ledger, "write_table", lambda folder: None)
    launch.work(folder, prepared, lanes=2)
    assert all(len(at_once) == 1 for at_once in together if at_once & large)
    assert any(len(at_once) == 2 for at_once in together)


def test_an_error_in_one_lane_ends_the_others_too(run, monkeypatch):
    """What they have done is saved, and the error is the one that is told."""
    folder, prepared = run("run")
    trains, left = threading.Event(), threading.Event()

    def fails(folder, trial, prepared, branches, report, lease, told, lanes):
        if threading.current_thread() is threading.main_thread():
            trains.wait(30)
            raise OSError("no space left on device")
        trains.set()
        while not told():
            time.sleep(0.01)
        left.set()
        raise Preempted("at step 8 of 20")

    monkeypatch.setattr(launch, "run_trial", fails)
    with pytest.raises(OSError, match="no space left"):
        launch.work(folder, prepared, lanes=2)
    assert left.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane")]
