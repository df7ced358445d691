"""A worker with lanes: trials side by side on one device."""

import functools
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

from llm_jax import files
from llm_jax.components import Media
from llm_jax.config import Config, Data, Model
from llm_jax.data import prepare
from llm_jax.models import families
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
        train=replace(tiny.train, warmup_steps=2, checkpoint_every=64, steps_per_call=4, tokens=10_240),
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
        files.write_json(ledger.trial_folder(folder, trial.id) / "result.json", {"status": "failed"})

    monkeypatch.setattr(launch, "run_trial", pretend)
    monkeypatch.setattr(launch.ledger, "write_table", lambda folder: None)
    launch.work(folder, prepared, lanes=2)
    assert all(len(at_once) == 1 for at_once in together if at_once & large)
    assert any(len(at_once) == 2 for at_once in together)


@pytest.mark.parametrize("family", ["transformer", "encoder_decoder"])
@pytest.mark.parametrize(("heads", "context", "beside"), [(8, 1024, True), (9, 1024, False), (8, 1536, False)])
def test_no_trial_that_shares_a_gpu_asks_for_cudnn(family, heads, context, beside, monkeypatch):
    """Where a program runs cuDNN's attention for the first time, XLA loses what another thread starts meanwhile."""
    asked = []
    monkeypatch.setattr("llm_jax.kernels.used", lambda: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *_, **__: asked.append(q.shape) or q)
    model = Model(family=family, d_model=128, num_heads=heads, head_dim=64, num_layers=1, dtype="bfloat16")
    prefix, data = 0, Data(context=context)
    if family == "encoder_decoder":
        prefix = context // 4
        data = Data(source="pairs", files=("x.tsv",), context=context, prefix=prefix)
    assert launch.fits_beside(SimpleNamespace(config=Config(model, data))) == beside
    params = jax.eval_shape(functools.partial(families.init, model), jax.random.key(0))
    ids = jax.ShapeDtypeStruct((2, context), "int32")
    jax.eval_shape(lambda params, ids: families.apply_training(model, params, ids, None, None, prefix), params, ids)
    assert bool(asked) != beside


def test_an_encoder_of_media_may_be_what_needs_the_whole_gpu():
    model = Model(d_model=128, num_heads=2, media=Media("image", d_model=64))
    data = Data(source="media", files=("digits.jsonl",))
    assert launch.fits_beside(SimpleNamespace(config=Config(model, data)))
    large = replace(model, media=replace(model.media, d_model=576))
    assert not launch.fits_beside(SimpleNamespace(config=Config(large, data)))


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
