"""Schedules and AdamW."""

import numpy as np
import optax
import pytest

from llm_jax.config import Train
from llm_jax.training import optimizer


def rates(num_steps=1000, **train):
    cfg = Train(peak_lr=1e-2, warmup_steps=train.pop("warmup_steps", 100), **train)
    return optimizer.learning_rates(cfg, num_steps, np.arange(num_steps))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("final_lr", [0.0, 0.1])
def test_the_last_step_has_the_final_rate(schedule, final_lr):
    """A loss read before the rate has decayed is not that budget's loss."""
    r = rates(schedule=schedule, final_lr=final_lr)
    assert r[-1] == pytest.approx(final_lr * 1e-2, abs=1e-9)
    assert r.max() == pytest.approx(1e-2)
    assert r[0] == pytest.approx(1e-4)
    np.testing.assert_allclose(r[:100], 1e-4 * np.arange(1, 101), rtol=1e-3 if schedule == "wsd" else 0.03)
    after = r[np.argmax(r) :]
    assert (np.diff(after) <= 1e-9).all()


def test_cosine_is_optax_cosine():
    """Against the library's own, half-way through and elsewhere; ours counts a step later, so that the last one reaches the end."""
    ours = rates(num_steps=500, warmup_steps=0, schedule="cosine", final_lr=0.1)
    theirs = optax.cosine_decay_schedule(1e-2, 500, alpha=0.1)
    np.testing.assert_allclose(ours, [theirs(t + 1) for t in range(500)], rtol=1e-5)


def test_wsd_knows_nothing_of_the_horizon_before_its_cooldown():
    """Runs of several lengths share a trunk for this reason alone."""
    short, long = (rates(num_steps=n, schedule="wsd", decay_fraction=0.2) for n in (500, 1000))
    np.testing.assert_array_equal(short[:400], long[:400])
    assert (short[100:400] == np.float32(1e-2)).all()
    assert short[400] < 1e-2
    assert optimizer.cooldown_start(Train(schedule="wsd", decay_fraction=0.2), 500) == 400
    np.testing.assert_allclose(short[400:], 1e-2 * (1 - np.sqrt((np.arange(100) + 1) / 100)), atol=1e-8)


def test_rates_of_a_part_are_those_of_the_whole():
    """They are computed a call at a time, also after a restart in the middle."""
    cfg = Train(peak_lr=3e-3, warmup_steps=10, schedule="cosine")
    whole = optimizer.learning_rates(cfg, 77, np.arange(77))
    parts = [optimizer.learning_rates(cfg, 77, np.arange(a, min(a + 8, 77))) for a in range(0, 77, 8)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_warmup_longer_than_the_run_stays_below_the_peak():
    assert rates(num_steps=50, warmup_steps=100, schedule="cosine").max() <= 0.5e-2 + 1e-9


def test_adamw_against_the_formula(mixed_dtypes):
    """Loshchilov and Hutter 2019, written out in NumPy: bias correction, decoupled decay on matrices, none on norm scales and biases."""
    cfg = Train(beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, clip_norm=1e9)
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 4)).astype(np.float32), "scale": np.ones((2, 4), np.float32)}
    params["head_bias"] = params["bias"] = np.ones((2, 4, 3), np.float32)
    chain = optimizer.adamw(cfg)
    state = chain.init(params)
    m = {k: np.zeros(v.shape) for k, v in params.items()}
    v = {k: np.zeros(p.shape) for k, p in params.items()}
    for t in range(1, 6):
        grads = {k: rng.normal(size=p.shape).astype(np.float32) for k, p in params.items()}
        updates, state = chain.update(grads, state, params)
        for k in params:
            m[k] = 0.9 * m[k] + 0.1 * grads[k]
            v[k] = 0.95 * v[k] + 0.05 * grads[k].astype(np.float64) ** 2
            expected = -(m[k] / (1 - 0.9**t)) / (np.sqrt(v[k] / (1 - 0.95**t)) + 1e-8) - (
                0.1 * params[k] if k == "w" else 0
            )
            np.testing.assert_allclose(updates[k], expected, rtol=2e-5, atol=1e-6)


def test_clipping_bounds_the_global_norm(mixed_dtypes):
    """Without it, one bad batch moves every second moment."""
    grads = {"w": np.full((10, 10), 5.0, np.float32)}
    clipped, _ = optax.clip_by_global_norm(Train().clip_norm).update(grads, optax.EmptyState())
    assert float(optax.tree.norm(clipped)) == pytest.approx(1.0, rel=1e-5)


def test_inverse_square_root_is_equation_3_of_vaswani_et_al():
    """d_model^-1/2 min(step^-1/2, step warmup^-3/2), steps from 1; whatever the horizon, and never zero."""
    d_model, warmup = 64, 40
    cfg = Train(schedule="inverse_sqrt", peak_lr=(d_model * warmup) ** -0.5, warmup_steps=warmup)
    step = np.arange(1, 1001)
    expected = d_model**-0.5 * np.minimum(step**-0.5, step * warmup**-1.5)
    np.testing.assert_allclose(optimizer.learning_rates(cfg, 1000, step - 1), expected, rtol=1e-6)
    np.testing.assert_allclose(optimizer.learning_rates(cfg, 100, step[:100] - 1), expected[:100], rtol=1e-6)
