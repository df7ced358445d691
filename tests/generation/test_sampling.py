"""Sampling: the cache changes nothing, and the draws follow the distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config import Model
from llm_jax.generation import sampling
from llm_jax.models import families

pytestmark = pytest.mark.usefixtures("quick_compilation")
MODEL = Model(num_layers=2, d_model=16, num_heads=2, vocab_size=32)


@pytest.fixture(scope="module")
def params():
    zeros_too = jax.jit(functools.partial(families.init, MODEL))(jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), zeros_too)


@pytest.mark.slow
def test_greedy_tokens_are_those_of_the_full_forward_pass(params):
    """Without a cache, the whole text again for each token: slow, and beyond doubt."""
    prompt = np.asarray([[1, 2, 3], [7, 5, 9]], np.int32)
    fast = sampling.generate(MODEL, params, jnp.asarray(prompt), jax.random.key(0), num_tokens=12, temperature=0)
    text = prompt
    for _ in range(12):
        logits = families.apply(MODEL, params, jnp.asarray(text))
        text = np.concatenate([text, np.asarray(logits[:, -1].argmax(-1), np.int32)[:, None]], axis=1)
    np.testing.assert_array_equal(fast, text[:, 3:])


def test_draws_follow_the_softmax():
    """A chi-squared test at temperature 0.7 on many rows of the same logits."""
    logits = jnp.asarray([0.0, 1.0, 2.0, -1.0, 0.5])
    draws = sampling.sample_token(jnp.tile(logits[None], (20_000, 1)), jax.random.key(1), 0.7, None)
    expected = 20_000 * np.asarray(jax.nn.softmax(logits / 0.7))
    observed = np.bincount(np.asarray(draws), minlength=5)
    assert ((observed - expected) ** 2 / expected).sum() < 18.5, "99.9 % of chi-squared with 4 degrees of freedom"


def test_top_k_draws_only_the_likeliest():
    logits = jnp.tile(jnp.asarray([0.0, 1.0, 2.0, -1.0, 0.5])[None], (500, 1))
    draws = set(np.asarray(sampling.sample_token(logits, jax.random.key(2), 5.0, 2)).tolist())
    assert draws == {1, 2}


def test_the_key_decides(params):
    prompt = jnp.asarray([[1, 2]], jnp.int32)
    a, b, c = (sampling.generate(MODEL, params, prompt, jax.random.key(k), num_tokens=20) for k in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
