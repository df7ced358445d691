"""Mixtures of experts against a plain loop over experts, and against what routing must never do.

A kernel that is fast and slightly wrong trains on, only worse: the loop is here so that none gets in.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from numerics import VOCAB, B, T, assert_close, change_token, decode, random_params, random_tokens, run

from llm_jax import parts
from llm_jax.config import Experts, Model, Train
from llm_jax.models import families, moe
from llm_jax.models.moe import mixture
from llm_jax.settings import BadInput
from llm_jax.training import pretrain
from llm_jax.training.losses import routing_loss
from llm_jax.training.optimizer import adamw
from llm_jax.training.step import init_state, make_train_call, make_train_step

WIDE = Experts(number=8, per_token=2)
VARIANTS = {
    "mixtral": WIDE,
    "switch": Experts(number=4, per_token=1, normalize=False, capacity_factor=1.25),
    "deepseek": Experts(number=8, per_token=3, shared=2, granularity=2, gate="sigmoid", balance="bias"),
    "expert choice": Experts(number=4, per_token=2, routing="expert", balance="none"),
    "one expert": Experts(number=1, per_token=1, normalize=False, balance="none"),
}
SMALL = Model(vocab_size=VOCAB, num_layers=2, d_model=16, num_heads=4, d_ff=24)

every_variant = pytest.mark.parametrize("experts", VARIANTS.values(), ids=VARIANTS)
slow = pytest.mark.slow


def layer(model: Model, seed: int = 0) -> moe.Params:
    """Parameters of one layer, all random; the router's so that scores are neither even nor one expert's alone."""
    shapes = jax.eval_shape(functools.partial(families.init, replace(model, num_layers=1)), jax.random.key(0))
    rng = np.random.default_rng(seed)
    size = {"router": 1.5, "router_bias": 0.1}
    return {
        name: jnp.asarray(rng.normal(size=leaf.shape[1:]) * size.get(name, 1.0) / leaf.shape[-2] ** 0.5, jnp.float32)
        for name, leaf in shapes["blocks"]["mlp"].items()
    }


def activations(tokens: int, width: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(tokens, width)), jnp.float32)


def loop_over_experts(model: Model, params: moe.Params, x_MxD: jax.Array, kept_MxE=None) -> jax.Array:
    """The reference: every expert on every token in float32, weighted by the router where it was chosen, by zero elsewhere."""
    experts = model.experts
    x_MxD, params = x_MxD.astype(jnp.float32), jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    logits_MxE = jnp.matmul(x_MxD, params["router"], precision="highest")
    score_MxE = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}[experts.gate](logits_MxE)
    ranked_MxE = score_MxE + params.get("router_bias", jnp.zeros(experts.number))[None, :]
    least_Mx1 = jnp.sort(ranked_MxE, axis=-1)[:, -experts.per_token][:, None]
    weight_MxE = jnp.where(ranked_MxE >= least_Mx1, score_MxE, 0)
    if experts.normalize and experts.routing == "token":
        weight_MxE = weight_MxE / weight_MxE.sum(-1, keepdims=True)
    if kept_MxE is not None:
        weight_MxE = jnp.where(kept_MxE, weight_MxE, 0)

    def mlp(kernels):
        h = x_MxD @ kernels["up"]
        h = jax.nn.silu(x_MxD @ kernels["gate"]) * h if model.mlp == "swiglu" else jax.nn.relu(h) ** 2
        return h @ kernels["down"]

    def add_expert(y_MxD, one):
        weight_M, kernels = one
        return y_MxD + weight_M[:, None] * mlp(kernels), None

    shared = {name.removeprefix("shared_"): leaf for name, leaf in params.items() if name.startswith("shared_")}
    y_MxD = mlp(shared) if shared else jnp.zeros_like(x_MxD)
    routed = {name: params[name] for name in ("up", "gate", "down") if name in params}
    return jax.lax.scan(add_expert, y_MxD, (weight_MxE.T, routed))[0]


LARGE = Model(
    num_layers=1,
    d_model=32,
    d_ff=64,
    mlp="swiglu",
    experts=Experts(number=64, per_token=6, granularity=4, gate="sigmoid", balance="bias"),
)


def uneven(params: moe.Params) -> moe.Params:
    """Nobody chooses expert 3 and nearly everybody expert 5, whatever they score."""
    return params | {"router_bias": params["router_bias"].at[3].set(-9.0).at[5].set(0.8)}


run_layer = jax.jit(mixture, static_argnums=(0, 3))


def undecided_apart(model: Model, params: moe.Params, tokens: int, spare: int = 200) -> jax.Array:
    """Activations whose k-th score is clear of the next: which of two equal experts is chosen is up to rounding."""
    x_MxD = np.asarray(activations(tokens + spare, model.d_model).astype(model.dtype), np.float64)
    score_MxE = 1 / (1 + np.exp(-x_MxD @ np.asarray(params["router"], np.float64))) + np.asarray(params["router_bias"])
    ranked_MxE = np.sort(score_MxE, axis=-1)[:, ::-1]
    k = model.experts.per_token
    clear_M = np.flatnonzero(ranked_MxE[:, k - 1] - ranked_MxE[:, k] > 1e-5)
    return jnp.asarray(x_MxD[clear_M[:tokens]], model.dtype)


@pytest.mark.parametrize("product", ["grouped_product", pytest.param("ragged_product", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_dropless_equals_the_loop_at_a_large_shape(monkeypatch, product, dtype, tolerance):
    """8,192 tokens, 64 experts, top-6, from no token to nearly all of them an expert: outputs, and gradients of all that has one.

    In bfloat16 the loop reads the same rounded numbers and computes in float32.
    """
    monkeypatch.setattr(moe, "grouped_product", getattr(moe, product))
    model = replace(LARGE, dtype=dtype)
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), layer(model))
    params = uneven({**rounded, "router": layer(model)["router"]})
    x_MxD = undecided_apart(model, params, 8192)
    toward_MxD = activations(8192, 32, seed=2)

    def value(function, params, x_MxD):
        y_MxD = function(params, x_MxD)
        return (y_MxD.astype(jnp.float32) * toward_MxD).sum(), y_MxD

    def ours(params, x_MxD):
        return run_layer(model, params, x_MxD, True)[0]

    grads = [
        jax.jit(jax.grad(functools.partial(value, function), argnums=(0, 1), has_aux=True))(params, x_MxD)
        for function in (ours, functools.partial(loop_over_experts, model))
    ]
    load_E = run_layer(model, params, x_MxD, True)[1]["load"]
    assert load_E[3] == 0
    assert load_E[5] > 0.9 * 8192
    assert load_E.sum() == 6 * len(x_MxD) == 6 * 8192
    jax.tree.map(functools.partial(assert_close, tolerance=tolerance), *grads)
    assert grads[0][1].dtype == dtype


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_both_ways_to_add_up_blocks(dtype, tolerance):
    """CPUs run the one and accelerators the other: also where an expert has no block, or nearly all.

    XLA's CPU compiler has no product of bfloat16 into float32, which is all that the other needs.
    """
    expert_P = jnp.asarray([0] * 140 + [2] * 3 + [3], jnp.int32)
    by_block_PxDxF = activations(144, 35).reshape(144, 5, 7).astype(dtype)
    plain_PxDxF, plain_P = np.asarray(by_block_PxDxF, np.float64), np.asarray(expert_P)
    expected = np.stack([plain_PxDxF[plain_P == e].sum(0) for e in range(5)])
    for way in (moe.sum_multiplied, moe.sum_scattered) if dtype == "float32" else (moe.sum_scattered,):
        found = way(by_block_PxDxF, expert_P, 5)
        assert found.dtype == jnp.float32
        assert_close(found, expected, tolerance)


@every_variant
@pytest.mark.parametrize("mlp", ["relu2", "swiglu"])
def test_every_variant_equals_the_loop(experts, mlp):
    """As evaluation and generation read it: without a capacity, and tokens that choose, whoever did in training."""
    model = replace(SMALL, experts=experts, mlp=mlp)
    params, x_MxD = layer(model), activations(37, 16)
    assert_close(run_layer(model, params, x_MxD, False)[0], loop_over_experts(model, params, x_MxD), 1e-5)


def test_capacity_that_drops_nothing_is_dropless():
    """Two ways of execution, one model: outputs and gradients."""
    model = replace(SMALL, experts=replace(WIDE, capacity_factor=4.0))  # room for every token at every expert
    params, x_MxD, toward_MxD = layer(model), activations(64, 16), activations(64, 16, seed=2)

    def value(model, params, x_MxD):
        y_MxD, routing = run_layer(model, params, x_MxD, True)
        return (y_MxD * toward_MxD).sum(), routing

    found, expected = (
        jax.grad(functools.partial(value, one), argnums=(0, 1), has_aux=True)(params, x_MxD)
        for one in (model, replace(model, experts=WIDE))
    )
    assert found[1]["dropped"] == 0
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), found, expected)


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0])
def test_capacity_drops_the_choices_beyond_it_and_keeps_the_earliest(factor):
    """Which tokens an expert drops is part of the model that trains: by position, and so never by what comes later."""
    experts = Experts(number=4, per_token=2, capacity_factor=factor)
    model = replace(SMALL, experts=experts)
    params, x_MxD = layer(model), activations(40, 16)
    expert_MxJ, _ = moe.choose(experts, jax.nn.softmax(x_MxD @ params["router"]), None)
    room, kept_MxE = [int(np.ceil(factor * 2 * 40 / 4))] * 4, np.zeros((40, 4), bool)
    for m, chosen in enumerate(np.asarray(expert_MxJ)):
        for e in chosen:
            kept_MxE[m, e] = room[e] > 0
            room[e] -= 1
    y_MxD, routing = run_layer(model, params, x_MxD, True)
    assert routing["dropped"] == (80 - kept_MxE.sum()) / 2
    assert routing["dropped"] > 0
    assert_close(y_MxD, loop_over_experts(model, params, x_MxD, kept_MxE), 1e-5)


def test_experts_that_choose_take_their_best_tokens():
    """Zhou et al. 2022, eqs. 1 and 2: each expert the k M / E tokens of the highest scores for it; outputs and gradients."""
    model = replace(SMALL, experts=Experts(number=4, per_token=1, routing="expert", balance="none"))
    params, x_MxD, toward_MxD = layer(model), activations(40, 16), activations(40, 16, seed=2)

    def plain(params, x_MxD):
        score_MxE, y_MxD = jax.nn.softmax(x_MxD @ params["router"]), jnp.zeros_like(x_MxD)
        for e in range(4):
            least = jnp.sort(score_MxE[:, e])[-40 // 4]
            weight_M = jnp.where(score_MxE[:, e] >= least, score_MxE[:, e], 0)
            y_MxD += weight_M[:, None] * (jax.nn.relu(x_MxD @ params["up"][e]) ** 2 @ params["down"][e])
        return (y_MxD * toward_MxD).sum(), y_MxD

    def ours(params, x_MxD):
        y_MxD, routing = run_layer(model, params, x_MxD, True)
        np.testing.assert_array_equal(routing["load"], np.full(4, 10.0))
        return (y_MxD * toward_MxD).sum(), y_MxD

    found, expected = (jax.grad(f, argnums=(0, 1), has_aux=True)(params, x_MxD) for f in (ours, plain))
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), found, expected)
    chosen_M = (np.asarray(expected[1]) != 0).any(-1)
    assert int(run_layer(model, params, x_MxD, True)[1]["dropped"]) == (~chosen_M).sum() > 0


def test_what_a_router_tells_of_itself():
    """Against the formulas in NumPy: Switch's eq. 4, ST-MoE's eq. 5, and the entropy of the scores."""
    model = replace(SMALL, experts=WIDE)
    params, x_MxD = layer(model), activations(40, 16)
    routing = run_layer(model, params, x_MxD, True)[1]
    logits = np.asarray(x_MxD, np.float64) @ np.asarray(params["router"], np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-logits, axis=-1)[:, :2]
    load = np.bincount(chosen.ravel(), minlength=8)
    np.testing.assert_array_equal(routing["load"], load)
    assert float(routing["balance"]) == pytest.approx(40 * 8 * (load / 80 * p.mean(0)).sum(), rel=1e-5)
    assert float(routing["router_z"]) == pytest.approx((np.log(np.exp(logits).sum(-1)) ** 2).sum(), rel=1e-5)
    assert float(routing["entropy"]) == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)
    even = run_layer(model, params | {"router": jnp.zeros_like(params["router"])}, x_MxD, True)[1]
    assert float(even["entropy"]) == pytest.approx(40 * np.log(8), rel=1e-6)
    assert float(even["balance"]) == pytest.approx(40, rel=1e-6)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), routing)
    total, sums = routing_loss(replace(WIDE, aux_weight=0.5, z_weight=0.25), stacked)
    assert float(total) == pytest.approx(3 * (0.5 * float(routing["balance"]) + 0.25 * float(routing["router_z"])))
    assert float(sums["router_entropy"]) == pytest.approx(1.5 * float(routing["entropy"]))
    assert routing_loss(replace(WIDE, balance="none", z_weight=0.0), stacked)[0] == 0


def test_the_router_computes_in_float32():
    """Scores that differ by a thousandth are equal in bfloat16, and which expert is chosen would be its rounding's."""
    model = replace(SMALL, experts=Experts(number=2, per_token=1, normalize=False), dtype="bfloat16")
    params = layer(model) | {"router": jnp.stack([jnp.full(16, 1.0), jnp.full(16, 1.001)], axis=1)}
    x_MxD = jnp.ones((4, 16), jnp.bfloat16)
    np.testing.assert_array_equal(run_layer(model, params, x_MxD, True)[1]["load"], [0, 4])
    np.testing.assert_array_equal(run_layer(model, params, -x_MxD, True)[1]["load"], [4, 0])


# Whole models.


run_training = jax.jit(families.apply_training, static_argnums=0)


@every_variant
@pytest.mark.parametrize("t", [0, 4, T - 1])
def test_a_token_moves_no_logits_before_it(experts, t):
    """What is evaluated and generated from is causal, also where experts chose in training: else its loss is of no language model."""
    model = replace(SMALL, experts=experts)
    params, tokens_BxT = random_params(model), random_tokens()
    before, after = run(model, params, tokens_BxT), run(model, params, change_token(tokens_BxT, t))
    rows = np.asarray(before != after).any(-1)
    assert np.flatnonzero(rows.any(0)).tolist() == list(range(t, T))


@pytest.mark.parametrize(("name", "looks_ahead"), [("mixtral", False), ("switch", False), ("expert choice", True)])
def test_who_looks_ahead_in_training(name, looks_ahead):
    """Tokens that choose never do, not by what they drop either; experts that choose do, as the config says of them."""
    model = replace(SMALL, experts=replace(VARIANTS[name], per_token=1, normalize=False))
    if name == "switch":
        model = replace(model, experts=replace(model.experts, capacity_factor=0.5))
    params, tokens_1xT = random_params(model), random_tokens(shape=(1, 32))
    before, routing = run_training(model, params, tokens_1xT)
    assert (name == "mixtral") == (float(routing["dropped"].sum()) == 0)
    changed = [run_training(model, params, change_token(tokens_1xT, t))[0] for t in range(16, 32)]
    moved = [np.flatnonzero(np.asarray(before != after).any((0, 2))).min() - t for t, after in enumerate(changed, 16)]
    assert (min(moved) < 0) == looks_ahead


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "deepseek" else slow) for n in VARIANTS])
def test_decoding_with_a_cache_equals_the_full_pass(name):
    """A token's experts are its own affair: neither the batch nor how the prompt was fed changes them."""
    model = replace(SMALL, experts=VARIANTS[name])
    params, tokens_BxT = random_params(model), random_tokens()
    expected_BxTxV = run(model, params, tokens_BxT)
    for chunks in [(1,) * T, (4, 4, 1)]:
        assert_close(decode(model, params, tokens_BxT, chunks, families.init_cache(model, B, 12)), expected_BxTxV)
    assert_close(run(model, params, tokens_BxT[:1]), expected_BxTxV[:1], 1e-5)


@pytest.mark.parametrize("name", ["mixtral", "switch", "deepseek"])
def test_scanned_and_unrolled_layers_route_alike(name):
    """And the same bits a second time: what a router did must not depend on how the program was written."""
    model = replace(SMALL, experts=VARIANTS[name])
    params, tokens_BxT = random_params(model), random_tokens()
    logits, routing = run_training(model, params, tokens_BxT)
    jax.tree.map(np.testing.assert_array_equal, (logits, routing), run_training(model, params, tokens_BxT))
    scanned = run_training(replace(model, scan_layers=True), params, tokens_BxT)
    assert_close(scanned[0], logits, 1e-6)
    np.testing.assert_array_equal(scanned[1]["load"], routing["load"])
    assert routing["load"].shape == (2, model.experts.number)


AXES = {"layers": 3, "expert": 8, "embed": 20, "mlp": 12, "heads": 4, "kv": 4, "head": 5, "vocab": VOCAB}


def test_logical_axes_name_every_dimension():
    """Experts are spread over devices by the name "expert"."""
    model = replace(SMALL, num_layers=3, d_model=20, positions="learned", max_context=7, experts=VARIANTS["deepseek"])
    model = replace(model, experts=replace(model.experts, shared=1))
    shapes = jax.eval_shape(functools.partial(families.init, model), jax.random.key(0))["blocks"]
    axes = families.logical_axes(model)["blocks"]
    jax.tree.map(
        lambda leaf, spec: np.testing.assert_equal(leaf.shape, tuple(AXES[name] for name in spec)), shapes, axes
    )
    assert axes["mlp"]["up"] == PartitionSpec("layers", "expert", "embed", "mlp")
    assert axes["mlp"]["router_bias"] == PartitionSpec("layers", "expert")


def test_active_parameters_are_those_of_the_dense_model_with_k_experts_as_its_mlp():
    """N of 6 N D: Mixtral's 2 of 8 experts and its router; what is idle costs memory and no FLOPs."""
    model = replace(SMALL, mlp="swiglu", experts=WIDE)
    dense = replace(SMALL, mlp="swiglu", d_ff=2 * 24)
    router = 2 * 16 * 8
    assert parts.num_params_active(model) == parts.num_params(dense) + router
    assert parts.num_params(model) == parts.num_params(replace(SMALL, mlp="swiglu", d_ff=8 * 24)) + router
    assert parts.num_params_active(dense) == parts.num_params(dense)
    fine = replace(model, experts=Experts(number=16, per_token=4, shared=2, granularity=2))
    assert parts.num_params_active(fine) == parts.num_params(replace(SMALL, mlp="swiglu", d_ff=3 * 24)) + 2 * router


# Balance.


def steps(model: Model, params, tokens_CxBxT, rate: float):
    cfg = Train()
    loss_fn, adjust = pretrain.loss_fn(model, Train()), pretrain.adjust_fn(model)
    count = len(tokens_CxBxT)
    call = make_train_call(make_train_step(loss_fn, adamw(cfg), 1, adjust), count)
    state = init_state(params, adamw(cfg).init, 0)
    # The state is donated: its caller keeps the parameters.
    state = jax.tree.map(jnp.array, state)
    return call(state, {"tokens": tokens_CxBxT}, np.full(count, rate, np.float32), count)


def skewed_tokens(count: int) -> np.ndarray:
    """Rows for `count` steps, of tokens as frequent as their number."""
    p_V = np.arange(VOCAB) / np.arange(VOCAB).sum()
    return np.random.default_rng(4).choice(VOCAB, p=p_V, size=(count, 8, 33)).astype(np.int32)


def excess(load_CxLxE: np.ndarray) -> float:
    """How far the most loaded expert of a layer is above the mean, over all of the steps together."""
    load_LxE = load_CxLxE.sum(0)
    return float((load_LxE.max(-1) / load_LxE.mean(-1)).mean() - 1)


@pytest.mark.usefixtures("mixed_dtypes")
@slow
def test_the_bias_balances_the_experts_and_nothing_else_moves():
    """At learning rate 0 the bias alone may move, and it alone must even out the load (Wang et al. 2024, Algorithm 1)."""
    model = replace(SMALL, experts=Experts(number=8, per_token=2, gate="sigmoid", balance="bias", bias_rate=0.02))
    params = jax.jit(functools.partial(families.init, model))(jax.random.key(4))
    params["blocks"]["mlp"]["router"] *= 3
    state, metrics = steps(model, params, skewed_tokens(80), 0.0)
    load_CxLxE = np.asarray(metrics["expert_load"])
    np.testing.assert_allclose(load_CxLxE.sum(-1), 2, rtol=1e-6)
    early, late = excess(load_CxLxE[:3]), excess(load_CxLxE[-30:])
    assert early > 0.3
    assert late < early / 3
    bias_LxE = state.params["blocks"]["mlp"].pop("router_bias")
    before_LxE = params["blocks"]["mlp"].pop("router_bias")
    assert np.abs(before_LxE).max() == 0 < np.abs(bias_LxE).max()
    jax.tree.map(np.testing.assert_array_equal, state.params, params)


def test_the_bias_has_no_gradient_and_no_weight():
    """It moves the choice of experts and not what they weigh: else it would be trained into what it corrects."""
    model = replace(SMALL, experts=VARIANTS["deepseek"])
    params, x_MxD = layer(model), activations(37, 16)
    grads = jax.grad(lambda params: run_layer(model, params, x_MxD, True)[0].sum())(params)
    assert np.abs(grads["router_bias"]).max() == 0 < np.abs(grads["router"]).max()
    raised = params | {"router_bias": params["router_bias"] + 5.0}  # of all alike: nobody's choice changes
    np.testing.assert_array_equal(*(run_layer(model, p, x_MxD, True)[0] for p in (params, raised)))


@pytest.mark.usefixtures("mixed_dtypes")
@slow
def test_the_balancing_loss_keeps_every_expert_in_use():
    """Without it routers collapse: the experts chosen first learn first, and are chosen more (Shazeer et al. 2017, section 4)."""
    uneven, unused = {}, {}
    for weight in (0.0, 0.1):
        model = replace(SMALL, experts=Experts(number=8, per_token=2, aux_weight=weight, z_weight=0.0))
        _, metrics = steps(
            model, jax.jit(functools.partial(families.init, model))(jax.random.key(4)), skewed_tokens(100), 3e-3
        )
        load_CxLxE = np.asarray(metrics["expert_load"])[-20:]
        uneven[weight], unused[weight] = excess(load_CxLxE), int((load_CxLxE.sum(0) == 0).sum())
    assert unused[0.0] > 0 == unused[0.1]
    assert uneven[0.1] < uneven[0.0] / 5


# Experts over devices.


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("mixtral", None),
        ("deepseek", 0.5),
        *(
            pytest.param(*case, marks=slow)
            for case in [("mixtral", 1.0), ("mixtral", 0.5), ("deepseek", None), ("deepseek", 1.0)]
        ),
    ],
)
def test_experts_over_devices_equal_experts_on_one(name, factor):
    """The all-to-all brings every choice to its expert and back to its token: outputs, gradients, and what the router tells.

    With a capacity each device drops by its own count: as the plain layer on the rows of that device alone.
    """
    if jax.device_count() < 4:
        pytest.skip(f"needs four devices, there are {jax.device_count()}; tests/conftest.py simulates them on a CPU")
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    model = replace(SMALL, mlp="swiglu", experts=replace(VARIANTS[name], capacity_factor=factor))
    params = layer(model)
    x_BxTxD, toward_BxTxD = activations(8 * 24, 16).reshape(8, 24, 16), activations(8 * 24, 16, 2).reshape(8, 24, 16)

    def spread(params, x_BxTxD):
        y_BxTxD, routing = moe.expert_parallel(model, params, x_BxTxD, mesh)
        return (y_BxTxD * toward_BxTxD).sum() + routing["balance"] + routing["router_z"], (y_BxTxD, routing)

    def plain(params, x_BxTxD):
        quarters = x_BxTxD.reshape(4, -1, 16)
        each = [run_layer(model, params, x_MxD, True) for x_MxD in quarters]
        y_BxTxD = jnp.stack([y_MxD for y_MxD, _ in each]).reshape(x_BxTxD.shape)
        routing = run_layer(model, params, x_BxTxD.reshape(-1, 16), True)[1]
        routing["dropped"] = sum(one["dropped"] for _, one in each)
        return (y_BxTxD * toward_BxTxD).sum() + routing["balance"] + routing["router_z"], (y_BxTxD, routing)

    found, expected = (jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(params, x_BxTxD) for f in (spread, plain))
    assert found[1][0].sharding.spec == PartitionSpec("expert")
    assert (float(found[1][1]["dropped"]) == 0) == (factor is None)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), found, expected)


def test_experts_that_do_not_divide_are_refused():
    """In one line that names the nearest number that would."""
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    model = replace(SMALL, experts=Experts(number=5))
    with pytest.raises(
        BadInput, match=r"model\.experts\.number=5 is no multiple of the mesh axis expert=2; nearest that is: 4"
    ):
        moe.expert_parallel(model, layer(model), jnp.zeros((2, 3, 16)), mesh)
    model = replace(SMALL, experts=VARIANTS["expert choice"])
    with pytest.raises(BadInput, match="not spread over devices"):
        moe.expert_parallel(model, layer(model), jnp.zeros((2, 3, 16)), mesh)


@pytest.mark.usefixtures("mixed_dtypes", "quick_compilation")
def test_the_grouped_matmul_of_a_tpu_equals_the_batched_product():
    """Forwards and backwards, with an expert that has no block, and tiles that no block fills: no TPU is asked here."""
    rng = np.random.default_rng(0)
    x_PxQxD, kernel_ExDxF, grad_PxQxF = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 32, 128), (4, 128, 128), (6, 32, 128))
    )
    expert_P = jnp.asarray([0, 0, 1, 3, 3, 3], jnp.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def through(product):
        y, back = jax.vjp(lambda x, kernel: product(x, kernel, expert_P), x_PxQxD, kernel_ExDxF)
        return y, *back(grad_PxQxF)

    found, wanted = through(functools.partial(moe.tiled_product, interpret=True)), through(moe.grouped_product)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), found, wanted)
    assert not np.asarray(found[2][2]).any()
