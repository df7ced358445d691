"""Counts against the real parameter tree, and FLOPs against what XLA is asked to multiply."""

import functools

import jax
import jax.numpy as jnp
import pytest

from llm_jax.config import Model
from llm_jax.models import transformer
from scaling import cost

MODELS = [
    Model(num_layers=3, d_model=48, num_heads=4),
    Model(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, mlp="swiglu", tie_embeddings=False),
    Model(num_layers=2, d_model=32, num_heads=2, head_dim=24, d_ff=56, mlp="gelu", positions="learned", qk_norm=False),
]


def product_flops(jaxpr) -> int:
    """2 x multiplications of every matrix product of a jaxpr, those of loops and calls included."""
    total = 0
    for eqn in jaxpr.eqns:
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * product_flops(inner)
        if eqn.primitive.name == "dot_general":
            contract, _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            size = 2 * eqn.outvars[0].aval.size
            for axis in contract[0]:
                size *= left[axis]
            total += size
    return total


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scan", [False, True])
def test_the_full_count_is_that_of_the_program(model, scan):
    """Every matrix product of the forward pass, times three for training, and nothing left out or counted twice."""
    import dataclasses

    model = dataclasses.replace(model, scan_layers=scan)
    context = 16
    params = jax.eval_shape(functools.partial(transformer.init, model), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, context), jnp.int32)
    jaxpr = jax.make_jaxpr(functools.partial(transformer.apply, model))(params, tokens)
    assert 3 * product_flops(jaxpr.jaxpr) == context * cost.flops_per_token(model, context)["full"]


def test_the_published_counts_of_gpt2_small():
    """124 M parameters and 85 M in the blocks; Kaplan et al. 2020 give 6 N a token and 2 n_layer n_ctx d_model of attention forward."""
    gpt2 = Model(
        vocab_size=50257,
        num_layers=12,
        d_model=768,
        num_heads=12,
        mlp="gelu",
        positions="learned",
        max_context=1024,
        qk_norm=False,
    )
    assert gpt2.num_params_matrices == 84_934_656
    assert gpt2.num_params == 124_337_664  # the published 124,439,808 less 102,144 biases
    per_token = cost.flops_per_token(gpt2, 1024)
    assert per_token["with_attention"] == 6 * 84_934_656 + 3 * 2 * 2 * 12 * 1024 * 768


def test_large_runs_do_not_overflow():
    """6 N D of a 70 B model on 15 T tokens is 6.3e24, beyond 64 bits."""
    assert cost.flops_6nd(70_000_000_000, 15_000_000_000_000) == pytest.approx(6.3e24)
    counts = cost.counts(Model(num_layers=80, d_model=8192, num_heads=64), 8192, 15_000_000_000_000)
    assert all(value > 1e24 for name, value in counts.items() if name.startswith("C_"))
