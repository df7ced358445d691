"""Parameters and training FLOPs under each published convention, in exact integers or float64: 6 N D overflows 64 bits.

A multiplication and an addition are two FLOPs; the backward pass costs twice the forward. All of these are stored with each trial.
"""

from __future__ import annotations

from llm_jax.config import Model


def flops_6nd(n_params: float, d_tokens: float) -> float:
    """C = 6 N D (Kaplan et al. 2020, section 2.1; Hoffmann et al. 2022), whichever N is given."""
    return 6.0 * float(n_params) * float(d_tokens)


def attention_flops_per_token(model: Model, context: int) -> int:
    """Training FLOPs a token of the two products of attention with the full square of positions, as they are published
    (Kaplan et al. 2020, Table 1; Hoffmann et al. 2022, Appendix F), though a causal kernel needs half."""
    return 3 * 2 * 2 * model.num_layers * context * model.num_heads * model.head_width


def flops_per_token(model: Model, context: int) -> dict[str, int]:
    """Training FLOPs a token by convention.

    `6N`: total N with a tied embedding once; `6N_matrices`: N of Kaplan et al., without embeddings or head; `with_attention`: that
    and attention; `full`: every matrix product of the forward pass times three, the head included and the look-up of the embedding
    not; `hoffmann`: Appendix F, which also counts the embedding as a product and the softmax.
    """
    attention = attention_flops_per_token(model, context)
    head = 6 * model.vocab_size * model.d_model
    softmax = 3 * 3 * model.num_layers * model.num_heads * context
    return {
        "6N": 6 * model.num_params,
        "6N_matrices": 6 * model.num_params_matrices,
        "with_attention": 6 * model.num_params_matrices + attention,
        "full": 6 * model.num_params_matrices + attention + head,
        "hoffmann": 6 * model.num_params_matrices + attention + softmax + 2 * head,
    }


def counts(model: Model, context: int, d_tokens: int) -> dict[str, float]:
    """The columns of a ledger's row."""
    per_token = flops_per_token(model, context)
    return {
        "N_params": model.num_params,
        "N_non_embedding": model.num_params_matrices,
        "D_tokens": d_tokens,
        "C_flops": flops_6nd(model.num_params, d_tokens),
        **{
            f"C_{name}": float(per_token[name]) * float(d_tokens)
            for name in ("6N_matrices", "with_attention", "full", "hoffmann")
        },
    }
