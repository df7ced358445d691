"""The ledger: no trial lost, none run twice, whatever is killed."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llm_jax.config import Config
from llm_jax.data import prepare
from llm_jax.settings import BadInput, override, to_dict
from scaling import experiment, launch, ledger
from scaling.experiment import Experiment, axis, product

pytestmark = pytest.mark.usefixtures("mixed_dtypes", "quick_compilation")


@pytest.fixture
def small(tiny):
    return Experiment(
        model=tiny.model,
        data=tiny.data,
        train=replace(tiny.train, warmup_steps=2, checkpoint_every=16),
        mesh=tiny.mesh,
        axes=product(axis("model.d_model", [16, 24]), axis("train.tokens", [1280, 2560])),
    )


def make(folder, small):
    prepared = prepare.prepare(small.config)
    ledger.create(folder, "small", "", small, experiment.trials(small), prepared)
    return prepared


def test_a_sweep_trains_each_trial_once(small, tmp_path):
    prepared = make(tmp_path / "run", small)
    launch.work(tmp_path / "run", prepared)
    rows = ledger.rows(tmp_path / "run")
    assert [row["status"] for row in rows] == ["done"] * 4
    assert all(0 < row["loss"] < 6 and row["loss_se"] > 0 for row in rows)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("result.json")}
    launch.work(tmp_path / "run", prepared)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()), "a second sweep trains nothing"
    header, *lines = (tmp_path / "run" / "table.csv").read_text().splitlines()
    assert {"N_params", "D_tokens", "loss", "C_flops", "seed", "epochs"} <= set(header.split(","))
    assert len(lines) == 4


def test_results_from_before_a_setting_was_there_stay(small, tmp_path):
    """An update that adds a setting must not train a finished sweep again, nor refuse its folder."""
    folder = tmp_path / "run"
    make(folder, small)
    names = {row["id"] for row in ledger.rows(folder)}
    for path in (folder / "experiment.json", *(folder / "trials").glob("*/trial.json")):
        known = json.loads(path.read_text())
        del known["config"]["model"]["logit_softcap"], known["config"]["train"]["z_loss"]
        path.write_text(json.dumps(known))
    make(folder, small)
    assert {row["id"] for row in ledger.rows(folder)} == names
    described = json.loads((folder / "experiment.json").read_text())
    described["config"]["train"]["z_loss"] = 1e-4  # as if that had been its default then
    (folder / "experiment.json").write_text(json.dumps(described))
    with pytest.raises(BadInput, match=r"is 0\.0001 there and 0\.0 here"):
        make(folder, small)


def test_the_table_says_where_a_schedule_ends(small, tmp_path):
    """The warning about losses read before the rate has decayed stands on these columns: inverse_sqrt never decays to zero."""
    both = replace(
        small, axes=axis("train.schedule", ["cosine", "inverse_sqrt"]), train=replace(small.train, tokens=1280)
    )
    make(tmp_path / "run", both)
    ends = {row["schedule"]: row["decay_tokens"] for row in ledger.rows(tmp_path / "run")}
    assert ends == {"cosine": 1280, "inverse_sqrt": math.inf}


def test_a_trial_has_one_holder(small, tmp_path):
    """And none when its holder is gone: on one machine the kernel knows, so that no time-out has to be guessed."""
    folder = tmp_path / "run"
    make(folder, small)
    trial = ledger.trials(folder)[0].id
    code = (
        "import sys, time; from pathlib import Path; from scaling import ledger\n"
        "with ledger.claim(Path(sys.argv[1]), sys.argv[2]) as mine: print(bool(mine), flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(folder), trial]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "True\n"
        assert ledger.status(folder, trial) == "running"
        with ledger.claim(folder, trial) as mine:
            assert not mine
        holder.send_signal(signal.SIGKILL)
    assert ledger.status(folder, trial) == "stopped"
    with ledger.claim(folder, trial) as mine:
        assert mine


def claim_all(folder, ids, queue):
    for one in ids:
        with ledger.claim(Path(folder), one) as mine:
            if mine:
                queue.put((os.getpid(), one))
                (Path(folder) / "trials" / one / "result.json").write_text('{"status": "done"}')


@pytest.mark.slow  # test_leases.py has the races
def test_many_workers_share_the_trials(small, tmp_path):
    """Eight processes at once: every trial is claimed exactly once."""
    folder = tmp_path / "run"
    ids = [f"{i:012x}" for i in range(60)]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=claim_all, args=(str(folder), ids, queue)) for _ in range(8)]
    for worker in workers:
        worker.start()
    claimed = [queue.get(timeout=60)[1] for _ in range(60)]
    for worker in workers:
        worker.join()
    assert sorted(claimed) == ids
    assert queue.empty()


def test_a_run_directory_of_another_config(small, tmp_path):
    """Refused with the first difference and a free name; nothing is written."""
    folder = tmp_path / "run"
    prepared = make(folder, small)
    before = sorted(folder.rglob("*"))
    other = Experiment(
        override(small.config, {"model.dropout": 0.1}).model, small.data, small.train, small.mesh, axes=small.axes
    )
    with pytest.raises(BadInput, match=r"model\.dropout is 0\.0 there and 0\.1 here.*run-2"):
        ledger.create(folder, "small", "", other, experiment.trials(other), prepared)
    assert sorted(folder.rglob("*")) == before
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("")
    with pytest.raises(BadInput, match="is not empty"):
        ledger.create(full, "small", "", small, experiment.trials(small), prepared)
    with pytest.raises(BadInput, match=r'did you mean ".*run"'):
        ledger.describe(tmp_path / "rum")


def test_a_nan_fails_its_trial_and_the_sweep_goes_on(small, tmp_path):
    train = override(small.config, {"train.clip_norm": 1e30, "train.warmup_steps": 0}).train
    axes = product(axis("train.peak_lr", [1e30, 1e-2]), axis("train.tokens", [1280]))
    wild = replace(small, train=train, axes=axes)
    prepared = make(tmp_path / "run", wild)
    launch.work(tmp_path / "run", prepared)
    rows = {row["peak_lr"]: row for row in ledger.rows(tmp_path / "run")}
    assert rows[1e30]["status"] == "failed"
    assert "at step" in rows[1e30]["reason"]
    assert rows[1e-2]["status"] == "done"


def test_trunks_save_compute_and_change_nothing(small, tmp_path):
    """A wsd sweep over horizons: losses equal those of runs on their own, and the steps saved are known."""
    train = override(small.config, {"train.schedule": "wsd", "train.peak_lr": 1e-2}).train
    horizons = replace(small, train=train, axes=axis("train.tokens", [1280, 2560, 5120]))
    prepared = make(tmp_path / "shared", horizons)
    launch.work(tmp_path / "shared", prepared)
    alone = {}
    for tokens in (1280, 2560, 5120):
        one = replace(small, train=train, axes=axis("train.tokens", [tokens]))
        make(tmp_path / str(tokens), one)
        launch.work(tmp_path / str(tokens), prepared)
        alone[tokens] = ledger.rows(tmp_path / str(tokens))[0]
    rows = ledger.rows(tmp_path / "shared")
    assert {row["D_tokens"]: row["loss"] for row in rows} == {tokens: row["loss"] for tokens, row in alone.items()}
    assert [row["first_step"] for row in rows] == [16, 32, 0]


SWEEP = """
import json, sys
from pathlib import Path
from llm_jax.config import Config
from llm_jax.settings import from_dict
from llm_jax.data import prepare
from scaling import launch, ledger
folder = Path(sys.argv[1])
launch.work(folder, prepare.prepare(ledger.base_config(folder)))
"""


def test_kill_9_in_a_sweep_leaves_the_same_ledger(small, tmp_path):
    """Killed a few times at moments spread over the sweep; `make soak` does this with twenty."""
    make(tmp_path / "killed", small)
    make(tmp_path / "whole", small)
    subprocess.run([sys.executable, "-c", SWEEP, str(tmp_path / "whole")], check=True)
    for seconds in (3.0, 4.5):
        with subprocess.Popen([sys.executable, "-c", SWEEP, str(tmp_path / "killed")]) as process:
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
    subprocess.run([sys.executable, "-c", SWEEP, str(tmp_path / "killed")], check=True)
    assert ledger.sha256(tmp_path / "killed") == ledger.sha256(tmp_path / "whole")
    assert (tmp_path / "killed" / "table.csv").read_bytes() == (tmp_path / "whole" / "table.csv").read_bytes()


def test_rows_hold_every_convention(small, tmp_path):
    make(tmp_path / "run", small)
    row = ledger.rows(tmp_path / "run")[0]
    assert row["status"] == "waiting"
    assert {
        "N_params",
        "N_non_embedding",
        "C_flops",
        "C_6N_matrices",
        "C_with_attention",
        "C_full",
        "C_hoffmann",
    } <= set(row)
    assert json.loads((tmp_path / "run" / "experiment.json").read_text())["config"] == json.loads(
        json.dumps(to_dict(small.config))
    )
    assert ledger.base_config(tmp_path / "run") == small.config
    assert isinstance(ledger.base_config(tmp_path / "run"), Config)
