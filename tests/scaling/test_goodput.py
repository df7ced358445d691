"""Goodput: every second of a trial is in one phase, and steps taken twice count once."""

import re

import pytest

from llm_jax.data import prepare
from llm_jax.settings import override
from scaling import content, experiment, goodput, launch, ledger
from scaling.experiment import Experiment, axis

pytestmark = pytest.mark.usefixtures("mixed_dtypes", "quick_compilation")


def attempt(started, end, from_step=None, reached=0, **seconds):
    told = {} if from_step is None else {"from_step": from_step, "step": reached, "seconds": seconds}
    return {"started": started, "beat": end} | told


def test_steps_taken_again_are_lost():
    """Killed at step 150 with a checkpoint of 100: a third of what the first attempt trained is paid for twice."""
    first = attempt(0.0, 100.0, 0, 150, start=10.0, compile=15.0, step=75.0)
    second = attempt(120.0, 200.0, 100, 200, start=5.0, compile=15.0, step=50.0, evaluation=10.0)
    found = goodput.of_attempts([first, second])
    assert found == {"step": 100, "start": 15, "compile": 30, "evaluation": 10, "lost": 25, "waiting": 20}
    assert sum(found.values()) == 200
    assert goodput.share(found) == 0.5


def test_an_attempt_that_trained_nothing_is_lost():
    """Killed before its first step, or in the gap between two beats: its time is not hidden, nor that of the one before it changed."""
    first = attempt(0.0, 10.0, 0, 50, step=10.0)
    found = goodput.of_attempts([first, attempt(20.0, 25.0), attempt(25.0, 35.0, 25, 75, step=10.0)])
    assert found == {"step": 15, "lost": 10, "waiting": 10}
    assert goodput.of_attempts([attempt(0.0, 3.0)]) == {}, "nothing is known of a model that is counted"
    assert goodput.share({}) is None


def test_a_run_knows_where_its_time_went(tiny, tmp_path):
    """In the rows, which status prints, and in the report; in the table and its hash never, which are the same bits everywhere."""
    cfg = override(tiny, {"train.tokens": 64 * 64, "train.warmup_steps": 2})
    small = Experiment(cfg.model, cfg.data, cfg.train, axes=axis("train.seed", [0, 1, 2]))
    prepared = prepare.prepare(cfg)
    folder = tmp_path / "run"
    ledger.create(folder, "small", "", small, experiment.trials(small), prepared)
    launch.work(folder, prepared)
    for row in ledger.rows(folder):
        assert row["attempts"] == 1
        assert 0 < row["goodput"] < 1
        assert row["time"]["step"] == pytest.approx(row["goodput"] * sum(row["time"].values()))
        assert {"start", "evaluation", "checkpoint"} <= set(row["time"])
    compile_seconds = [row["time"].get("compile", 0) for row in ledger.rows(folder)]
    # Two others, as one may wait a second for the machine; a call that is slow for that is no compilation.
    assert max(compile_seconds) > 10 * min(compile_seconds), "the others have the shape of the first"
    assert not {"goodput", "time", "attempts"} & set((folder / "table.csv").read_text().splitlines()[0].split(","))
    page = content.write_report(folder)[0].read_text()
    assert re.search(r"Where the time went</h2><p>Goodput [\d.]+ %", page)
