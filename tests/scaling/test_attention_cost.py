"""experiments/attention_cost.py: what it does where memory ends, and its exponents."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from llm_jax.config import Model
from scaling import drawing

PATH = Path(__file__).resolve().parents[2] / "experiments" / "attention_cost.py"
TINY = (Model(num_layers=1, d_model=16, num_heads=2), 64, (16, 32))


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Nearly all of this file is compiling."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("attention_cost", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SECONDS", 0.0)
    return module


@pytest.mark.slow
@pytest.mark.usefixtures("mixed_dtypes")
def test_a_family_ends_where_memory_does_and_the_others_go_on(script, monkeypatch, capsys):
    """Full attention is there to run out of memory: what was measured before must be kept, and the reason told."""
    limits = iter([1e12, 0.0, 1e12, 1e12])
    measure = script.measure
    monkeypatch.setattr(
        script, "measure", lambda model, context, tokens, _, plain: measure(model, context, tokens, next(limits), plain)
    )
    families = script.families
    monkeypatch.setattr(script, "families", lambda full: dict(list(families(full).items())[::2]))
    found = script.run(TINY)
    full, lstm = found["families"].values()
    assert [point["context"] for point in full["points"]] == [16]
    assert full["stopped"]["context"] == 32
    assert "GiB of 0.0" in full["stopped"]["reason"]
    assert [point["context"] for point in lstm["points"]] == [16, 32]
    assert lstm["stopped"] is None
    assert all(point["steps"] == script.STEPS for point in lstm["points"])
    assert all(point["rows"] * point["context"] == 64 for point in lstm["points"])
    assert lstm["n_params"] == pytest.approx(full["n_params"], rel=0.15)
    assert "stopped: needs" in capsys.readouterr().out
    with drawing.style():
        plot = script.draw(found)
    drawn = [line for line in plot.figure.axes[0].get_lines() if len(line.get_xdata()) == 2]
    seconds = [point["seconds_per_token"] for point in lstm["points"]]
    np.testing.assert_allclose(drawn[0].get_ydata(), np.array(seconds) * 1e6, err_msg="microseconds")


def test_the_exponent_is_the_slope_at_the_end(script):
    """Small contexts are dominated by what does not grow; a line through all of them would hide the square."""
    contexts = [16, 32, 256, 512, 1024, 2048]
    fit = script.exponent(contexts, [5.0, 5.0, *(3e-7 * c**1.5 for c in contexts[2:])])
    assert fit["value"] == pytest.approx(1.5)
    assert fit["high"] - fit["low"] == pytest.approx(0, abs=1e-6)
    rng = np.random.default_rng(0)
    noisy = [script.exponent(contexts, [c**1.5 * np.exp(0.1 * rng.normal()) for c in contexts]) for _ in range(400)]
    inside = np.mean([fit["low"] <= 1.5 <= fit["high"] for fit in noisy])
    assert inside == pytest.approx(0.95, abs=0.035), "three standard errors of a share over 400 draws"
    assert script.exponent([16, 32], [1.0, 2.0]) is None
