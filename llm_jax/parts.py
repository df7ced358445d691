"""One description of a model from which everything is counted: its arrays and matrix products, a `Part` each.

Parameters, FLOPs under each convention (scaling/cost.py), the learning-rate rule and `llm-jax explain` all read this list; tests
hold it to the parameter tree and to the program. No JAX here: counting needs no device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from llm_jax.config import Model

Kind = Literal["embedding", "positions", "matrices", "attention", "norm", "bias", "head"]
"""matrices are those of the blocks: N of Kaplan et al. 2020. attention has no parameters: its products are of activations."""


@dataclass(frozen=True)
class Part:
    """An array of parameters, a matrix product, or most often both: the product of a token's activations with the array."""

    name: str
    """Its path in the tree of parameters, where it is there."""
    kind: Kind
    shape: tuple[int, ...]
    """Of the array; without one, of the product: heads x positions x width."""
    outputs: int
    """Numbers that it gives a token: what the backward pass keeps of it where elementwise functions are recomputed."""
    times: int = 1
    """Layers that have one of their own."""
    stored: bool = True
    """False where its array is another part's, as of a tied head, or none."""
    active: float = 1.0
    """Share of it that one token uses: less than 1 for the experts of a mixture."""

    @property
    def params(self) -> int:
        """Of all layers."""
        return self.times * math.prod(self.shape) if self.stored else 0

    @property
    def flops(self) -> int:
        """Of the products of one forward pass, a token and all layers: a multiplication and an addition each. A look-up has none."""
        if self.kind not in ("matrices", "attention", "head"):
            return 0
        return round(self.active * 2 * self.times * math.prod(self.shape))


def parts(model: Model, context: int) -> tuple[Part, ...]:
    """All parts, in the order of the forward pass, with `context` positions attended to."""
    return _FAMILIES[model.family](model, context)


def num_params(model: Model) -> int:
    """All parameters; a tied embedding counts once."""
    return sum(part.params for part in parts(model, 1))


def num_params_active(model: Model) -> int:
    """Those that one token uses: N of the training cost C = 6 N D. Fewer than all for a mixture of experts alone."""
    return sum(round(part.active * part.params) for part in parts(model, 1))


def num_params_matrices(model: Model) -> int:
    """The matrices of the blocks alone: N of Kaplan et al. 2020, without embeddings, head, positions, norms and biases."""
    return sum(part.params for part in parts(model, 1) if part.kind == "matrices")


def flops(counted: Iterable[Part], *kinds: Kind) -> int:
    """Of the products of one forward pass, a token; of some kinds alone where any are named."""
    return sum(part.flops for part in counted if not kinds or part.kind in kinds)


def _matrix(name: str, inputs: int, outputs: tuple[int, ...], times: int = 1, kind: Kind = "matrices") -> Part:
    return Part(name, kind, (inputs, *outputs), math.prod(outputs), times)


def _embedding(model: Model) -> Part:
    return Part("embed", "embedding", (model.vocab_size, model.d_model), model.d_model)


def _head(model: Model) -> Part:
    shape = (model.d_model, model.vocab_size)
    return Part("head", "head", shape, model.vocab_size, stored=not model.tie_embeddings)


def _norm(name: str, model: Model, times: int = 1) -> Part:
    return Part(f"{name}/scale", "norm", (model.d_model,), model.d_model, times)


def _transformer(model: Model, context: int) -> tuple[Part, ...]:
    layers, width = model.num_layers, model.d_model
    heads, kv_heads, head = model.num_heads, model.kv_heads, model.head_width
    found = [_embedding(model)]
    if model.positions == "learned":
        found.append(Part("positions", "positions", (model.max_context, width), width))
    norm1, norm2 = (_norm(f"blocks/norm{i}", model, layers) for i in (1, 2))
    pre = model.norm_position == "pre"
    found += [norm1] if pre else []
    found += [
        _matrix(f"blocks/attention/{name}", width, (number, head), layers)
        for name, number in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    ]
    if model.qk_norm:
        found += [
            Part(f"blocks/attention/{name}_norm/scale", "norm", (head,), number * head, layers)
            for name, number in (("q", heads), ("k", kv_heads))
        ]
    # The full square of positions, as it is published, though a causal kernel needs half.
    square = (heads, context, head)
    found += [
        Part("blocks/attention/scores", "attention", square, heads * context, layers, stored=False),
        Part("blocks/attention/values", "attention", square, heads * head, layers, stored=False),
        Part("blocks/attention/out", "matrices", (heads, head, width), width, layers),
        norm2 if pre else norm1,
        *(_experts(model) if model.experts.number else _mlp(model, "blocks/mlp/", model.ff_width)),
        _norm("norm", model) if pre else norm2,
    ]
    return (*found, _head(model))


def _mlp(model: Model, prefix: str, hidden: int) -> list[Part]:
    ins = ("up", "gate") if model.mlp == "swiglu" else ("up",)
    found = [_matrix(prefix + name, model.d_model, (hidden,), model.num_layers) for name in ins]
    return [*found, _matrix(f"{prefix}down", hidden, (model.d_model,), model.num_layers)]


def _experts(model: Model) -> list[Part]:
    mixture, layers = model.experts, model.num_layers
    number, used = mixture.number, mixture.per_token
    found = [_matrix("blocks/mlp/router", model.d_model, (number,), layers)]
    if mixture.balance == "bias":
        found.append(Part("blocks/mlp/router_bias", "bias", (number,), 0, layers))
    found += [
        replace(part, shape=(number, *part.shape), outputs=used * part.outputs, active=used / number)
        for part in _mlp(model, "blocks/mlp/", model.expert_width)
    ]
    return found + (_mlp(model, "blocks/mlp/shared_", mixture.shared * model.expert_width) if mixture.shared else [])


def _recurrent(model: Model, context: int) -> tuple[Part, ...]:
    layers, width = model.num_layers, model.d_model
    gates = (4 if model.family == "lstm" else 1, width)
    return (
        _embedding(model),
        _norm("blocks/norm", model, layers),
        _matrix("blocks/input", width, gates, layers),
        Part("blocks/bias", "bias", gates, 0, layers),
        _matrix("blocks/recurrent", width, gates, layers),
        _norm("norm", model),
        _head(model),
    )


def _feedforward(model: Model, context: int) -> tuple[Part, ...]:
    seen, hidden, vocab = model.ngram_order - 1, model.ff_width, model.vocab_size
    found = (
        replace(_embedding(model), outputs=seen * model.d_model),
        Part("hidden", "matrices", (seen, model.d_model, hidden), hidden),
        Part("bias", "bias", (hidden,), 0),
        _matrix("head", hidden, (vocab,), kind="head"),
        Part("head_bias", "bias", (vocab,), 0),
    )
    direct = Part("direct", "head", (seen, model.d_model, vocab), vocab)
    return (*found, direct) if model.direct_connections else found


def _ngram(model: Model, context: int) -> tuple[Part, ...]:
    """None: its size is the number of counts, which the data decides, and it multiplies no matrices."""
    return ()


_FAMILIES: dict[str, Callable[[Model, int], tuple[Part, ...]]] = {
    "transformer": _transformer,
    "lstm": _recurrent,
    "rnn": _recurrent,
    "feedforward": _feedforward,
    "ngram": _ngram,
}
