"""Trials side by side on one device: what is joined is what each would have done alone, and nobody waits for one that does not come."""

import functools
import threading
import time

import jax
import numpy as np
import pytest

from llm_jax.config import Model, Train
from llm_jax.models import families
from llm_jax.training import pretrain
from llm_jax.training.lanes import PATIENCE_SECONDS, Lanes
from llm_jax.training.optimizer import adamw
from llm_jax.training.step import init_state, make_joined_call, make_train_call, make_train_step

MODEL = Model(num_layers=1, d_model=32, num_heads=1, vocab_size=32, dropout=0.1)


def alone(state, batches, rates, n):
    return ("alone", state, batches, rates, n), "metrics"


def joined(states, batches, rates, n):
    return tuple((("joined", *each, n), "metrics") for each in zip(states, batches, rates, strict=True))


def lane(lanes, program, calls, found, start=None, delay=0.0):
    """A thread that makes `calls`, each (name, n), and appends what came of them to `found`."""

    def run():
        with lanes.join(program, alone, joined) as call:
            if start:
                start.wait()
            for name, n in calls:
                time.sleep(delay)
                found.append(call(name, f"batches of {name}", f"rates of {name}", n)[0])

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_two_of_one_program_are_joined_and_each_gets_its_own(monkeypatch):
    """A result handed to the other lane would be another trial's parameters."""
    monkeypatch.setattr("llm_jax.training.lanes.PATIENCE_SECONDS", 30)  # a busy machine
    lanes, start, found = Lanes(), threading.Barrier(2), ([], [])
    threads = [lane(lanes, "program", [(f"{k}{i}", 8) for i in range(20)], found[k], start) for k in range(2)]
    for thread in threads:
        thread.join()
    for k in range(2):
        assert [one[1:] for one in found[k]] == [
            (f"{k}{i}", f"batches of {k}{i}", f"rates of {k}{i}", 8) for i in range(20)
        ]
        assert {one[0] for one in found[k][:-1]} == {"joined"}
    assert lanes.joined >= 38


@pytest.mark.parametrize("programs,numbers", [(("a", "b"), (8, 8)), (("a", "a"), (8, 3))])
def test_other_programs_and_other_numbers_of_steps_are_not_joined(programs, numbers):
    """One compiled call takes the same number of steps of both."""
    lanes, start, found = Lanes(), threading.Barrier(2), ([], [])
    threads = [lane(lanes, programs[k], [(str(k), numbers[k])], found[k], start) for k in range(2)]
    for thread in threads:
        thread.join()
    assert [one[0][0] for one in found] == ["alone", "alone"]
    assert [one[0][-1] for one in found] == list(numbers)
    assert lanes.joined == 0


def test_one_that_evaluates_is_not_waited_for():
    """A lane that saves for seconds must not stop the other."""
    lanes, found = Lanes(), []
    with lanes.join("program", alone, joined):  # a trial that makes no call
        began = time.monotonic()
        lane(lanes, "program", [("a", 8), ("b", 8)], found).join()
    assert [one[0] for one in found] == ["alone", "alone"]
    assert 2 * PATIENCE_SECONDS <= time.monotonic() - began < 2 * PATIENCE_SECONDS + 2


def test_one_that_leaves_lets_the_other_go(monkeypatch):
    """At once, and not when its patience is at an end."""
    monkeypatch.setattr("llm_jax.training.lanes.PATIENCE_SECONDS", 60.0)
    lanes, found = Lanes(), []
    with lanes.join("program", alone, joined):
        waiting = lane(lanes, "program", [("a", 8)], found)
        time.sleep(0.2)
        assert not found
    waiting.join(10)
    assert found[0][0] == "alone"


def test_a_joined_call_that_fails_fails_for_both(monkeypatch):
    """The one that offered its state must not try again alone: the state is donated."""
    monkeypatch.setattr("llm_jax.training.lanes.PATIENCE_SECONDS", 30)  # a busy machine
    lanes, start, found = Lanes(), threading.Barrier(2), []

    def fails(*_):
        raise RuntimeError("out of memory")

    def run():
        with lanes.join("program", alone, fails) as call:
            start.wait()
            try:
                found.append(call("state", "batches", "rates", 8))
            except RuntimeError as error:
                found.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["out of memory"] * 2


def test_a_joined_call_is_the_calls_it_joins(mixed_dtypes, quick_compilation):
    """States, batches, rates and dropout of two trials do not mix; also where both stop early."""
    cfg = Train()
    step = make_train_step(pretrain.loss_fn(MODEL, cfg), adamw(cfg))
    rng = np.random.default_rng(0)

    init, init_opt = jax.jit(functools.partial(families.init, MODEL)), jax.jit(adamw(cfg).init)

    def trials():
        return tuple(init_state(init(jax.random.key(seed)), init_opt, seed) for seed in range(2))

    batches = tuple({"tokens": rng.integers(0, 32, (4, 2, 9)).astype(np.int32)} for _ in range(2))
    rates = tuple(np.full(4, rate, np.float32) for rate in (1e-2, 1e-3))
    together = make_joined_call(step, 4)(trials(), batches, rates, 3)
    one = make_train_call(step, 4)
    for each, (state, metrics) in zip(zip(trials(), batches, rates, strict=True), together, strict=True):
        expected = one(*each, 3)
        np.testing.assert_allclose(metrics["nll"], expected[1]["nll"], rtol=1e-6)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected[0]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
