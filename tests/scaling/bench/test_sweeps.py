"""The benchmark of sweeps counts what a user waits for, and runs the same trials on both sides."""

import pytest

from llm_jax.data import prepare
from llm_jax.settings import BadInput
from scaling import cli, experiment
from scaling.bench import sweeps
from scaling.launchers import local

TINY = """
from llm_jax.config import Data, Mesh, Model, Synthetic, Train
from scaling.experiment import Experiment

experiment = Experiment(
    model=Model(num_layers=2, d_model=16, num_heads=2),
    data=Data(source="synthetic", context=32, eval_tokens=1024, synthetic=Synthetic(documents=200)),
    train=Train(tokens_per_step=256, steps_per_call=8),
    mesh=Mesh(data=1),
    axes=tuple({"model.d_model": d, "train.tokens": t} for d in (16, 24) for t in (2_560, 5_120)),
)
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return path


def test_trials_an_hour_by_hand(path, monkeypatch):
    """A sweep of 4 trials in 20 s is 720 an hour; 10 s for a process each are 360 of them. Two GPUs have twice the peak of one."""
    calls = []
    trials = experiment.trials(experiment.load(path)[0])

    def timed(path, folder, axes):
        calls.append(list(axes))
        chosen = [t for t in trials if [w for n, v in t.point.items() for w in ("--axis", n, str(v))] == list(axes)]
        rows = {
            t.id: {"loss": 2.0 + bool(axes) / 100, "seconds": 3.0, "hardware": "1 x NVIDIA H100 on vm"}
            for t in chosen or trials
        }
        return (10.0 if axes else 20.0), rows

    monkeypatch.setattr(prepare, "prepare", lambda config: None)
    monkeypatch.setattr(sweeps, "_timed", timed)
    monkeypatch.setattr(local, "devices", lambda: ("gpu", ["0", "1"]))
    found = sweeps.bench_sweep(path, 2)
    assert calls[0] == []
    assert calls[1:] == [["--axis", "model.d_model", str(d), "--axis", "train.tokens", "2560"] for d in (16, 24)]
    assert (found["sweep_per_hour"], found["alone_per_hour"], found["ratio"]) == (720, 360, 2)
    assert (found["shapes"], found["training_seconds"]) == (2, 12)
    assert found["loss_difference"] == pytest.approx(0.005)
    assert found["tokens_per_second"] == 2 * (2_560 + 5_120) / 20
    assert found["mfu"] == pytest.approx(sum(t.counts["C_flops"] for t in trials) / 20 / (2 * 989.4e12), rel=1e-3)
    assert "x 2.00" in sweeps.describe(found)
    assert "TFLOP/s (h100" in sweeps.describe(found)
    assert "TFLOP/s" not in sweeps.describe(found | {"mfu": None, "peak_flops": None})


def test_bad_input_is_refused_before_anything_runs(path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "prepare", lambda config: pytest.fail("prepared"))
    for number in (0, 5):
        with pytest.raises(BadInput, match=r"--alone must lie in \[1, 4\]"):
            sweeps.bench_sweep(path, number)
    assert cli.main(["bench", "swep", str(path)]) == 2
    assert 'did you mean "bench sweep"' in capsys.readouterr().err


@pytest.mark.slow
def test_both_sides_train_the_same_trials_to_the_same_bits(path):
    """On a CPU a trial's bits do not depend on what ran beside it."""
    found = sweeps.bench_sweep(path, 1)
    assert found["loss_difference"] == 0
    assert found["alone_seconds"] < found["sweep_seconds"]
    assert found["training_seconds"] < found["sweep_seconds"]
