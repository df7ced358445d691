"""A benchmark is believed for what it divides by: the counts behind its figures."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from llm_jax import parts
from llm_jax.config import Config, Data, Experts, Mesh, Model, Train
from llm_jax.settings import BadInput, override
from scaling import cli
from scaling.bench import training
from scaling.experiment import Ladder, trial

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = Config(
    Model(num_layers=1, d_model=16, num_heads=2), Data(context=8), Train(tokens_per_step=16, steps_per_call=2)
)


def test_model_flops_are_those_of_the_convention():
    """6 N + 12 L D S, in the shape for which PaLM's appendix B writes it down; of experts, the active parameters."""
    model = Model(num_layers=3, d_model=48, num_heads=4)
    cfg = replace(SMALL, model=model, data=Data(context=32), train=Train())
    assert training.model_flops(cfg) == 6 * parts.num_params(model) + 12 * 3 * 48 * 32
    mixture = replace(model, experts=Experts(8, 2))
    sparse = training.model_flops(replace(cfg, model=mixture))
    assert sparse == 6 * parts.num_params_active(mixture, 32) + 12 * 3 * 48 * 32
    assert sparse < 6 * parts.num_params(mixture)


@pytest.mark.parametrize("lanes", [1, 2])
def test_figures_of_a_step_follow_from_each_other(lanes, mixed_dtypes, monkeypatch):
    """Of lanes, the tokens of all of them are counted."""
    monkeypatch.setattr(training, "ROUNDS", 3)
    monkeypatch.setattr(
        training, "_product_seconds", lambda: (2 * training.MATRIX**3 / 1e9, 2 * training.MATRIX**3 / 2e9)
    )
    cfg = trial(SMALL, Ladder(), {}).config
    found = training.bench_train(cfg, lanes)
    assert found["fastest"] <= found["seconds_per_step"] <= found["slowest"]
    assert found["tokens_per_second"] == pytest.approx(lanes * 16 / found["seconds_per_step"])
    assert found["mfu"] == pytest.approx(found["tokens_per_second"] * found["flops_per_token"] / 1e9)
    assert found["cpu_mfu"] == pytest.approx(
        lanes * 16 * found["flops_per_token"] / found["cpu_seconds_per_step"] / 2e9
    )
    assert found["memory_bytes"] > 3 * 4 * parts.num_params(cfg.model), "parameters and two moments"
    assert 0 < found["loss"] < 10
    assert "NumPy" in training.describe(found)


@pytest.mark.parametrize("several", [{"mesh.data": 1, "mesh.fsdp": 2}, {"train.compile": "pmap"}])
def test_a_mesh_trains_the_same_rows(several, mixed_dtypes, monkeypatch):
    """What is timed on several devices is the step of one, spread; without a mesh one device is timed, whatever others there are."""
    monkeypatch.setattr(training, "ROUNDS", 1)
    cfg = trial(SMALL, Ladder(), {}).config
    alone, spread = (training.bench_train(one) for one in (cfg, override(cfg, several)))
    assert (alone["devices"], spread["devices"]) == (1, 2)
    assert spread["loss"] == pytest.approx(alone["loss"], rel=2e-5)
    assert f"2 x {spread['device']}" in training.describe(spread)


def test_a_mesh_beside_its_devices_alone(mixed_dtypes, monkeypatch):
    """Each on as many rows as it has of the mesh's; the ratio is of tokens a second, whatever the axes spread."""
    monkeypatch.setattr(training, "ROUNDS", 1)
    cfg = override(trial(SMALL, Ladder(), {}).config, {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2})
    found = training.bench_train(cfg, alone=True)
    assert [one["device"] for one in found["alone"]] == [f"cpu:{i}" for i in range(4)]
    for one in found["alone"]:
        assert one["rows"] * 2 == found["rows"]
        assert one["tokens_per_second"] == pytest.approx(one["rows"] * 8 / one["seconds_per_step"])
        assert one["speedup"] == pytest.approx(found["tokens_per_second"] / one["tokens_per_second"])
    slowest = min(one["tokens_per_second"] for one in found["alone"])
    assert f"x {found['tokens_per_second'] / slowest:.3f} of" in training.describe(found)


def test_queued_rounds_are_from_end_to_end(monkeypatch):
    """By a clock of its own: a device of calls of two steps and 0.2 s, and a host that takes 0.1 s between rounds."""
    now = free = 0.0
    monkeypatch.setattr(training.time, "perf_counter", lambda: now)

    class Steps:
        """Metrics of a call, which ends at a given time."""

        def __init__(self, ends):
            self.ends = ends

        def __array__(self, *_, **__):
            nonlocal now
            now = max(now, self.ends)
            return np.zeros(2)

    def dispatch():
        nonlocal free
        free = max(free, now) + 0.2
        return {"nll": Steps(free)}

    for kind, wanted in ((training.queued, 0.1), (training.waited, 0.1)):
        round_ = kind(dispatch)
        round_()
        now += 0.1  # hidden by the call that runs, or between two that do not
        assert round_()[0] == pytest.approx(wanted)
    now += 0.3  # longer than a call: the device has waited
    round_ = training.queued(dispatch)
    round_()
    now += 0.3
    assert round_()[0] == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("kind", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12)]
)
def test_a_device_finds_its_peak(kind, peak):
    """By its name in the data sheet; the more particular of two that fit."""
    assert training.peak_flops(kind, [])[0] == peak


def test_an_unknown_device_has_no_utilisation():
    """A wrong peak would print a plausible percentage; none at all is not a number, and null in JSON."""
    assert math.isnan(training.peak_flops("Quantum 9000", [])[0])


def test_what_has_no_step_is_refused(capsys):
    with pytest.raises(BadInput, match="ngram is counted"):
        training.bench_train(replace(SMALL, model=Model(family="ngram")))
    with pytest.raises(BadInput, match="lanes share one device"):
        training.bench_train(replace(SMALL, mesh=Mesh(data=2)), lanes=2)
    with pytest.raises(BadInput, match="--alone is beside several devices"):
        training.bench_train(SMALL, alone=True)
    assert cli.main(["bench", "trian"]) == 2
    assert 'did you mean "bench train"' in capsys.readouterr().err


def test_json_is_one_object(capsys, monkeypatch):
    monkeypatch.setattr(
        training, "bench_train", lambda cfg, lanes, alone: {"d_model": cfg.model.d_model, "mfu": float("nan")}
    )
    assert cli.main(["bench", "train", "--model.d_model", "32", "--model.num_heads", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"d_model": 32, "mfu": None}
