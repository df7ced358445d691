"""A benchmark is worth what it compares with: the other side must be done right, and both must find the same."""

import json

import numpy as np
import pytest
from simulated import CHINCHILLA, runs

from scaling import accelerated, cli, solver, uncertainty
from scaling.bench import fits
from scaling.fit import fit


def test_the_published_loop_minimises_what_ours_does():
    """A slower or another objective on the other side would make ours look fast for nothing."""
    table = runs(noise=0.01)
    result = fit(CHINCHILLA, table, fits.OBJECTIVE)
    loss = fits.Published(*(np.log(table.column(name)) for name in ("N_params", "D_tokens", "loss")))
    weights = np.arange(15.0)
    assert loss.value(result.theta, np.ones(15)) == pytest.approx(result.value, rel=1e-12)
    for theta in result.theta, result.theta * 1.02, np.array([25.0, 0.0, -1.0, 0.0, 2.0]):
        value, gradient = loss.value_and_gradient(theta, weights)
        assert value == pytest.approx(loss.value(theta, weights), rel=1e-12)
        moves = 1e-7 * np.eye(5)
        slopes = [(loss.value(theta + move, weights) - loss.value(theta - move, weights)) / 2e-7 for move in moves]
        np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-7)


def test_autograd_is_the_same_gradient():
    """The published way, where it is installed."""
    pytest.importorskip("autograd")
    table = runs(noise=0.01)
    loss = fits.Published(*(np.log(table.column(name)) for name in ("N_params", "D_tokens", "loss")))
    value, gradient = loss.gradients()["by autograd"]
    theta, weights = np.array([4.0, 4.0, -0.5, 0.3, 0.4]), np.arange(15.0)
    assert value(theta, weights) == pytest.approx(loss.value(theta, weights), rel=1e-12)
    np.testing.assert_allclose(gradient(theta, weights), loss.value_and_gradient(theta, weights)[1], rtol=1e-9)


def test_the_grid_is_that_of_the_paper():
    """Hoffmann et al. 2022, appendix D.3: 4,500 starts."""
    assert fits.STARTS_SxP.shape == (4500, 5)
    assert len(np.unique(fits.STARTS_SxP, axis=0)) == 4500
    np.testing.assert_array_equal(fits.STARTS_SxP.max(0), [25, 25, 1, 2, 2])


def small(**kinds):
    table = fits.simulated()
    starts = fits.STARTS_SxP[np.random.default_rng(1).choice(4500, 30, replace=False)]
    return fits.measure(table, "simulated", starts_SxP=starts, resamples=40, many=50, sample=(20, 8), **kinds)


def test_both_sides_find_the_same_and_what_was_scaled_up_is_said():
    """Seconds are for all tasks; ours are divided into SciPy's by each gradient; no answer of ours is the worse one."""
    found = small()
    starts, boots = found["multistart"], found["bootstrap"]
    assert (starts["scipy"]["timed"], starts["scipy"]["of"]) == (20, 30)
    assert (boots["scipy"]["timed"], boots["scipy"]["of"]) == (8, 40)
    for gradient in ("by hand", "by differences"):
        ratio = starts["scipy"]["seconds"][gradient] / starts["fit"]["seconds"]
        assert starts["fit"]["faster"][gradient] == pytest.approx(ratio)
    assert starts["never_above"]
    assert boots["never_above"]
    assert boots["lower"]["scipy"] == 0
    for by in boots["percentiles"].values():
        np.testing.assert_allclose(by["ours"], by["scipy"], rtol=0.05)
    text = fits.describe(found)
    assert "timed 20 of 30" in text
    assert "timed 8 of 40" in text
    assert small(full=True)["bootstrap"]["scipy"]["timed"] == 40


def test_the_command_line(capsys, tmp_path):
    """A subject that is none gets one line with the nearest, as do rows of no table."""
    assert cli.main(["bench", "fitt"]) == 2
    assert 'did you mean "bench fit"' in capsys.readouterr().err
    assert cli.main(["bench", "fit", "--where", "loss > 2"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert cli.main(["bench", "fit", str(tmp_path / "none.csv")]) == 2


def test_json_is_one_object(capsys, monkeypatch):
    """Programs read it: numbers only, and the accelerator's part where there is none is null."""
    measured = small()
    monkeypatch.setattr(fits, "measure", lambda table, name, full, note: measured)
    assert cli.main(["bench", "fit", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 240
    assert found["accelerator"] is None


def test_many_bootstraps_go_to_the_accelerator_and_find_the_same(monkeypatch):
    """The benchmark's third row is the public path. JAX on the CPU stands in for a GPU."""
    monkeypatch.setattr(accelerated, "available", lambda: True)
    calls = []
    minimise = accelerated.minimise
    monkeypatch.setattr(accelerated, "minimise", lambda *args: calls.append(len(args[1])) or minimise(*args))
    table = fits.simulated()
    result = fit(CHINCHILLA, table)
    plain = uncertainty.bootstrap(result, table, 60)
    assert not calls
    monkeypatch.setattr(uncertainty, "ACCELERATED_FROM", 50)
    fast = uncertainty.bootstrap(result, table, 60)
    assert calls == [60]
    np.testing.assert_allclose(fast.theta_SxP, plain.theta_SxP, rtol=1e-4)
    found = small()["accelerator"]
    assert found["bootstraps"] == 50
    assert found["largest_difference"] < 1e-7  # both stop at steps that promise less than 1e-8


def test_the_memory_trick_and_the_threads_change_no_answer(monkeypatch):
    """Chunks on one core or several, large or small, are the same problems: the same bits."""
    table = fits.simulated()
    result = fit(CHINCHILLA, table)
    monkeypatch.setattr(solver, "cores", lambda: 3)
    monkeypatch.setattr(solver, "CHUNK", 12_000)
    several = uncertainty.bootstrap(result, table, 64)
    monkeypatch.setattr(solver, "cores", lambda: 1)
    one = uncertainty.bootstrap(result, table, 64)
    np.testing.assert_array_equal(one.theta_SxP, several.theta_SxP)
