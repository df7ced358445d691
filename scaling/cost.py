"""Parameters and training FLOPs under each published convention, in exact integers or float64: 6 N D overflows 64 bits.

A multiplication and an addition are two FLOPs; the backward pass costs twice the forward. All of these are stored with each trial.

Where FLOPs are counted, N is that of the active parameters, those that a token multiplies with. Of a mixture of experts they are the
router, k of the E experts and the shared ones (Clark et al. 2022, section 2; Abnar et al. 2025, section 2). Of an encoder and a decoder
they are the mean over the tokens of a row, of which each passes through one of the two (so Raffel et al. 2020, section 3.2.2). Likewise
of an encoder of media: its positions in a row times its parameters, over the tokens of the row, media and text.
"""

from __future__ import annotations

from llm_jax.config import Model
from llm_jax.parts import flops, num_params, num_params_active, num_params_matrices, num_params_media, parts


def flops_6nd(n_params: float, d_tokens: float) -> float:
    """C = 6 N D (Kaplan et al. 2020, section 2.1; Hoffmann et al. 2022), whichever N is given."""
    return 6.0 * float(n_params) * float(d_tokens)


def flops_per_token(model: Model, context: int, prefix: int = 0) -> dict[str, int]:
    """Training FLOPs a token by convention, in rows of `context` tokens of which an encoder, if there is one, reads `prefix`.

    `6N`: active N with a tied embedding once; `6N_matrices`: N of Kaplan et al., without embeddings or head; `with_attention`: that
    and the two products of attention with the full square of positions (Kaplan et al. 2020, Table 1), though a causal kernel
    needs half; `full`: every matrix product of the forward pass times three, the head included and the look-up of the embedding
    not; `hoffmann`: Appendix F of Hoffmann et al. 2022, which also counts the embedding as a product and the softmax.
    """
    counted = parts(model, context, prefix)
    matrices = 6 * sum(round(part.active * part.params) for part in counted if part.kind == "matrices")
    products = 3 * flops(counted)
    look_up = 6 * sum(part.params for part in counted if part.kind == "embedding")
    softmax = 3 * 3 * sum(part.times * part.outputs for part in counted if part.name.endswith("/scores"))
    return {
        "6N": 6 * num_params_active(model, context, prefix),
        "6N_matrices": matrices,
        "with_attention": matrices + 3 * flops(counted, "attention"),
        "full": products,
        "hoffmann": products + look_up + softmax,
    }


def counts(model: Model, context: int, d_tokens: int, prefix: int = 0) -> dict[str, float]:
    """The columns of a ledger's row; N_media, of the encoder of media, where there is one. A dense model counts as one expert, of
    granularity 1 and sparsity 0 (Clark et al. 2022)."""
    per_token, active = flops_per_token(model, context, prefix), num_params_active(model, context, prefix)
    experts = model.experts
    return {
        "N_params": num_params(model),
        "N_active": active,
        "N_non_embedding": num_params_matrices(model),
        **({"N_media": num_params_media(model)} if model.media.kind != "none" else {}),
        "D_tokens": d_tokens,
        "num_experts": max(1, experts.number),
        "granularity": experts.granularity if experts.number else 1,
        "sparsity": experts.sparsity,
        "C_flops": flops_6nd(active, d_tokens),
        **{
            f"C_{name}": float(per_token[name]) * float(d_tokens)
            for name in ("6N_matrices", "with_attention", "full", "hoffmann")
        },
    }
