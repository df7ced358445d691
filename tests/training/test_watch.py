"""The watch: calls that take too long are named, nothing else is, and all time is accounted for."""

import contextlib
import json
import os
import time

import pytest

from llm_jax.data import prepare
from llm_jax.settings import override
from llm_jax.training import loop, programs
from llm_jax.training import watch as watching
from llm_jax.training.watch import Watch

pytestmark = pytest.mark.usefixtures("mixed_dtypes", "quick_compilation")


class Clock:
    """Time as the test says."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def __getattr__(self, name):
        return getattr(time, name)


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(watching, "time", found)
    monkeypatch.setattr(watching, "GUARD_SECONDS", 0.005)
    return found


def guarded():
    """The guard has looked a few times."""
    time.sleep(0.1)


def run_calls(watch, clock, seconds, n=8):
    for each in seconds:
        watch.enter("data")
        watch.dispatch(n, hidden=True)
        clock.now += each
        guarded()
        watch.finish()


def test_a_call_of_ten_times_the_median_is_named(clock):
    """While it runs, so that a hang is seen, once and again at twice the time; and when it has ended, with what it took."""
    said = []
    with contextlib.closing(Watch("trial x", said.append)) as watch:
        watch.begin(0)
        run_calls(watch, clock, [300.0, *[0.5] * 5])
        assert said == []
        watch.enter("data")
        watch.dispatch(8, hidden=True)
        for _ in range(4):
            clock.now += 4.0
            guarded()
        watch.finish()
        run_calls(watch, clock, [4.9])
    assert [line.split(":")[0] for line in said] == ["hang? trial x on " + os.uname().nodename] * 2 + ["slow"]
    assert "steps 48 to 56 have been running for 8.0 s, where the median of the run is 0.5 s" in said[0]
    assert "for 16.0 s" in said[1]
    assert "steps 48 to 56 took 16.0 s" in said[2]
    assert [one["step"] for one in watch.snapshot()["slow"]] == [56]


def test_no_false_alarm(clock):
    """Compilation, evaluation, a slow checkpoint or slow data are no hang of a step; milliseconds are nobody's concern."""
    said = []
    with contextlib.closing(Watch("", said.append)) as watch:
        watch.begin(0)
        run_calls(watch, clock, [1000.0, *[0.01] * 20, 4.9])
        for phase in ("evaluation", "checkpoint", "data"):
            watch.enter(phase)
            clock.now += 500
            guarded()
        run_calls(watch, clock, [0.01] * 3)
    assert said == []


def test_phases_add_up_to_the_wall_time(clock):
    """What the first call takes beyond the others is compilation; data count only where the device waited for them."""
    with contextlib.closing(Watch("", print)) as watch:
        clock.now += 7
        watch.begin(32)
        run_calls(watch, clock, [60.0, 2.0, 2.0])
        watch.enter("data")
        clock.now += 3
        watch.dispatch(8, hidden=True)
        clock.now += 1
        watch.finish()
        watch.enter("data")
        clock.now += 5
        watch.dispatch(8, hidden=False)
        clock.now += 2
        watch.finish()
        watch.enter("evaluation")
        clock.now += 11
        found = watch.snapshot()
    assert found["seconds"] == {"start": 7, "compile": 58, "step": 12, "data": 5, "evaluation": 11}
    assert sum(found["seconds"].values()) == clock.now - 100
    assert (found["from_step"], found["step"]) == (32, 72)


def test_a_hang_names_the_host_that_is_gone(clock, tmp_path):
    """All hosts of a model wait for the slowest, so that the time of a call says nothing: their beats do."""
    said = []
    with contextlib.closing(Watch("", said.append, beats=tmp_path, process=0, processes=3)) as watch:
        watch.begin(0)
        run_calls(watch, clock, [0.5] * 7)
        for process, age, step in ((1, 90, 48), (2, 0, 40)):
            path = tmp_path / f"{process}.json"
            path.write_text(json.dumps({"host": f"tpu-{process}", "step": step, "phase": "data"}))
            os.utime(path, (time.time() - age,) * 2)
        watch.dispatch(8, hidden=True)
        clock.now += 20
        guarded()
        watch.finish()
    told = said[0].split("; ")
    assert "process 1 on tpu-1 has been silent for 9" in told[1]
    assert told[2] == "process 2 on tpu-2 is behind, at step 40 in data"
    assert len(told) == 3


def test_a_training_step_that_hangs_is_named(tiny, tmp_path, monkeypatch, capfd):
    """In a real run: the tenth call stands still for a second and a half. Nothing else of the run is named, its compilation neither."""
    cfg = override(tiny, {"train.tokens": 6400, "train.checkpoint_every": 24, "train.warmup_steps": 5})
    call, init = programs.compiled_call(cfg.model, programs.program(cfg.train), 0)
    calls = []

    def stalls(*args):
        calls.append(1)
        if len(calls) == 10:
            time.sleep(1.5)
        return call(*args)

    monkeypatch.setattr(watching, "LEAST_SECONDS", 1.0)
    monkeypatch.setattr(programs, "compiled_call", lambda *_: (stalls, init))
    loop.train(cfg, prepare.prepare(cfg), tmp_path / "run")
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("llm-jax: ")]
    assert [line.split("steps")[1][:10] for line in lines] == [" 72 to 80 "] * len(lines)
    assert any(line.startswith("llm-jax: hang?") for line in lines)
    assert lines[-1].startswith("llm-jax: slow")
