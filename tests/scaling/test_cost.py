"""Counts against the real parameter tree, and FLOPs against what XLA is asked to multiply."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from llm_jax import parts
from llm_jax.config import Experts, Media, Model
from llm_jax.models import families, moe
from llm_jax.models.media import Items
from scaling import cost

MODELS = {
    "default": Model(num_layers=3, d_model=48, num_heads=4),
    "scanned": Model(num_layers=3, d_model=48, num_heads=4, scan_layers=True),
    "llama": Model(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, mlp="swiglu", tie_embeddings=False),
    "gpt2": Model(
        num_layers=2, d_model=32, num_heads=2, head_dim=24, d_ff=56, mlp="gelu", positions="learned", qk_norm=False
    ),
    "post": Model(num_layers=2, d_model=32, norm_position="post", norm="layernorm", positions="sinusoidal"),
    "mixtral": Model(num_layers=2, d_model=32, mlp="swiglu", experts=Experts(number=8, per_token=2)),
    "deepseek": Model(
        num_layers=3,
        d_model=24,
        scan_layers=True,
        experts=Experts(number=12, per_token=3, shared=2, granularity=4, gate="sigmoid", balance="bias"),
    ),
    "window, in blocks": Model(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, window=4),
    "window that divides no row": Model(num_layers=2, d_model=32, window=5),
    "lstm": Model(family="lstm", num_layers=3, d_model=24),
    "rnn, untied": Model(family="rnn", num_layers=2, d_model=40, tie_embeddings=False, scan_layers=True),
    "feedforward": Model(family="feedforward", d_model=24, d_ff=56, ngram_order=4),
    "feedforward, direct": Model(family="feedforward", d_model=24, ngram_order=2, direct_connections=True),
}
VASWANI = Model(
    family="encoder_decoder", norm_position="post", norm="layernorm", positions="sinusoidal", mlp="relu", qk_norm=False
)
MODELS |= {
    "vaswani": replace(VASWANI, num_layers=2, d_model=32),
    "encoder-decoder": replace(
        VASWANI, num_layers=2, num_encoder_layers=3, num_kv_heads=1, mlp="swiglu", norm_position="pre", qk_norm=True
    ),
    "encoder-decoder, learned": Model(
        family="encoder_decoder", d_model=32, positions="learned", tie_embeddings=False, scan_layers=True
    ),
    "bahdanau": Model(family="seq2seq_rnn", num_layers=1, num_encoder_layers=2, d_model=32),
    "seq2seq_rnn": Model(family="seq2seq_rnn", num_layers=3, d_model=32, tie_embeddings=False, scan_layers=True),
}
SEES = Media(kind="image", items=2, size=8, patch=4, num_layers=3, d_model=24, num_heads=3)
HEARS = Media(kind="audio", frames=8, mel_bins=6, num_layers=2, d_model=16)
MODELS |= {
    "seeing": Model(num_layers=2, d_model=32, media=SEES),
    "seeing, experts": Model(num_layers=2, d_model=32, experts=Experts(number=4), media=SEES, qk_norm=False),
    "hearing": Model(num_layers=2, d_model=32, tie_embeddings=False, scan_layers=True, media=HEARS),
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
CONTEXT, PREFIX = 16, 4


@pytest.fixture(autouse=True)
def unpadded(monkeypatch):
    """Rows of a dropless mixture without those that fill up its blocks: they are how it is computed, and not the model."""
    monkeypatch.setattr(moe, "block_rows", lambda choices, number: 1)


def products(jaxpr, times=1):
    """(FLOPs, numbers of the result) of every matrix product of a jaxpr, those of loops and calls as often as they run."""
    for eqn in jaxpr.eqns:
        runs = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        if (
            eqn.primitive.name == "cond"
        ):  # one program a platform, alike but for how the gradients of a mixture's blocks are added up
            yield from min((list(products(branch.jaxpr, runs)) for branch in eqn.params["branches"]), key=sum_of_flops)
            continue
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner, runs)
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            left, result = eqn.invars[0].aval.shape, eqn.outvars[0].aval.size
            yield times * 2 * result * math.prod(left[axis] for axis in contract), times * result


def run(model, params, tokens_1xT):
    media = None
    if model.media.kind != "none":
        media = Items(jnp.ones((1, model.media.items, *model.media.shape), model.media.dtype), tokens_1xT == 7)
    return families.apply(model, params, tokens_1xT, prefix=PREFIX, media=media)


def sum_of_flops(found) -> int:
    return sum(flops for flops, _ in found)


def program(function, model):
    """The jaxpr of function(params, tokens_1xT) at the model's shapes."""
    params = jax.eval_shape(functools.partial(families.init, model), jax.random.key(0))
    return jax.make_jaxpr(function)(params, jax.ShapeDtypeStruct((1, CONTEXT), jnp.int32)).jaxpr


@every_model
def test_the_full_count_is_that_of_the_program(model):
    """Every matrix product of the forward pass, and nothing left out or counted twice; the same for what the products put out."""
    found = list(products(program(functools.partial(run, model), model)))
    counted = parts.parts(model, CONTEXT, PREFIX)
    assert sum(flops for flops, _ in found) == CONTEXT * parts.flops(counted)
    put_out = sum(part.times * part.outputs for part in counted if part.flops)
    assert sum(result for _, result in found) == CONTEXT * put_out


@every_model
def test_training_costs_three_forward_passes(model):
    """The factor in 6 N D: the backward pass multiplies twice as much, for the gradient of each input and of each array."""

    def loss(params, tokens_BxT):
        return run(model, params, tokens_BxT).sum()

    found = sum(flops for flops, _ in products(program(jax.grad(loss), model)))
    # But for the pixels or the spectrum, which need no gradient.
    stems = [part for part in parts.parts(model, CONTEXT) if part.name.endswith(("/patch", "/conv1"))]
    assert found + CONTEXT * parts.flops(stems) == CONTEXT * cost.flops_per_token(model, CONTEXT, PREFIX)["full"]


@every_model
def test_parts_are_the_tree_of_parameters(model):
    """By name and shape, so that a table of parts shows the model that trains, and N is its number of parameters."""
    shapes = jax.eval_shape(functools.partial(families.init, model), jax.random.key(0))
    tree = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    stored = [part for part in parts.parts(model, CONTEXT) if part.stored]
    layers = {part.name: (part.times,) if "blocks/" in part.name else () for part in stored}
    assert tree == {part.name: layers[part.name] + part.shape for part in stored}
    assert parts.num_params(model) == sum(math.prod(shape) for shape in tree.values())


def test_the_published_counts_of_mixtral():
    """Mixtral 8x7B (Jiang et al. 2024): 47 B parameters of which a token uses 13 B, and C = 6 N D of those (46.7 and 12.9 B)."""
    mixtral = Model(
        vocab_size=32_000,
        num_layers=32,
        d_model=4096,
        num_heads=32,
        num_kv_heads=8,
        d_ff=14_336,
        mlp="swiglu",
        tie_embeddings=False,
        qk_norm=False,
        experts=Experts(number=8, per_token=2),
    )
    assert parts.num_params(mixtral) == 46_702_792_704
    assert parts.num_params_active(mixtral) == 12_879_925_248
    counts = cost.counts(mixtral, 4096, 10**12)
    assert counts["C_flops"] == 6e12 * 12_879_925_248
    assert (counts["N_params"], counts["N_active"]) == (46_702_792_704, 12_879_925_248)
    assert (counts["num_experts"], counts["granularity"], counts["sparsity"]) == (8, 1, 0.75)
    idle = 32 * 6 * 3 * 4096 * 14_336
    assert counts["C_6N_matrices"] == 6e12 * (parts.num_params_matrices(mixtral) - idle)


def test_a_dense_model_is_all_active():
    """It is one expert in the laws of mixtures, and its row says so."""
    counts = cost.counts(MODELS["llama"], CONTEXT, 1000)
    assert counts["N_active"] == counts["N_params"]
    assert (counts["num_experts"], counts["granularity"], counts["sparsity"]) == (1, 1, 0)


@pytest.mark.parametrize("name", ["routed", "granularity", "sparsity"])
def test_the_laws_of_mixtures_read_the_columns_of_a_run(name):
    """A run directory's table is fitted as it is: a law's columns are those of the ledger."""
    from scaling.laws import LAWS

    assert set(LAWS[name].columns) <= set(cost.counts(MODELS["mixtral"], CONTEXT, 1000))


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
    assert parts.num_params_matrices(gpt2) == 84_934_656
    assert parts.num_params(gpt2) == 124_337_664  # the published 124,439,808 less 102,144 biases
    per_token = cost.flops_per_token(gpt2, 1024)
    assert per_token["with_attention"] == 6 * 84_934_656 + 3 * 2 * 2 * 12 * 1024 * 768


def test_the_published_count_of_the_base_transformer():
    """Vaswani et al. 2017, table 3: 65 M parameters; 37,000 pieces, without the biases and norms' shifts that are left out here."""
    base = replace(VASWANI, vocab_size=37_000, num_layers=6, d_model=512, num_heads=8)
    attention, mlp = 4 * 512**2, 2 * 512 * 2048
    assert parts.num_params_matrices(base) == 6 * (attention + mlp) + 6 * (2 * attention + mlp)
    assert parts.num_params(base) == 44_040_192 + 37_000 * 512 + 30 * 512
    assert parts.num_params(base) == pytest.approx(65e6, rel=0.035)


def test_a_token_passes_through_encoder_or_decoder():
    """With as much of a row on both sides, N active is half of the blocks: twice the parameters at the cost of a decoder alone
    (Raffel et al. 2020, section 3.2.2), but for the attention to the source."""
    both = Model(family="encoder_decoder", num_layers=3, d_model=48, num_heads=4)
    decoder = Model(num_layers=3, d_model=48, num_heads=4)
    cross = sum(part.params for part in parts.parts(both, 16, 8) if part.name.startswith("decoder_blocks/cross"))
    cross += 3 * 48  # its norms
    assert 2 * (parts.num_params_active(both, 16, 8) - 256 * 48) == 2 * (parts.num_params(decoder) - 256 * 48) + cross
    counts = cost.counts(both, 16, 1000, 8)
    assert counts["N_params"] > 1.7 * counts["N_active"]
    assert counts["C_flops"] == 6 * counts["N_active"] * 1000


def test_the_published_counts_of_a_vit():
    """ViT-B/16 (Dosovitskiy et al. 2021, table 1): 86 M parameters on pictures of 224 x 224, here without biases, class token and head."""
    base = Media(kind="image", size=224, patch=16, num_layers=12, d_model=768, num_heads=12)
    model = Model(qk_norm=False, media=base)
    blocks, stem = 12 * (4 + 8) * 768**2, 16 * 16 * 3 * 768 + 196 * 768
    assert cost.counts(model, 512, 1000)["N_media"] == blocks + stem + 25 * 768
    assert cost.counts(model, 512, 1000)["N_media"] == pytest.approx(86e6, rel=0.01)
    # Its cost is that of 196 tokens a picture, whatever stands around it.
    text = parts.num_params_active(replace(model, media=Media()), 512)
    projector = 768 * 128 + 128 * 128
    assert 512 * (parts.num_params_active(model, 512) - text) == pytest.approx(
        196 * (blocks + stem + projector), rel=1e-3
    )
    assert "N_media" not in cost.counts(MODELS["llama"], CONTEXT, 1000)


def test_large_runs_do_not_overflow():
    """6 N D of a 70 B model on 15 T tokens is 6.3e24, beyond 64 bits."""
    assert cost.flops_6nd(70_000_000_000, 15_000_000_000_000) == pytest.approx(6.3e24)
    counts = cost.counts(Model(num_layers=80, d_model=8192, num_heads=64), 8192, 15_000_000_000_000)
    assert all(value > 1e24 for name, value in counts.items() if name.startswith("C_"))
