"""One description of a model from which everything is counted: its arrays and matrix products, a `Part` each.

Parameters, FLOPs under each convention (scaling/cost.py), the learning-rate rule and `llm-jax explain` all read this list; tests
hold it to the parameter tree and to the program. No JAX here: counting needs no device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from llm_jax.config import Model
from llm_jax.settings import BadInput, did_you_mean

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
    """Share of it that one token of a row uses: less than 1 for the experts of a mixture; for an encoder, the share of the row that
    it reads, and for a decoder the rest. Of an encoder of media, its positions over those of the row, which may be more than 1."""

    @property
    def params(self) -> int:
        """Of all layers."""
        return self.times * math.prod(self.shape) if self.stored else 0

    @property
    def flops(self) -> int:
        """Of the products of one forward pass, a token and all layers: a multiplication and an addition each. A look-up has none.

        Where an encoder and a decoder share a row, a token is one of the whole row: the row's FLOPs over its length, to the nearest one.
        """
        if self.kind not in ("matrices", "attention", "head"):
            return 0
        return round(self.active * 2 * self.times * math.prod(self.shape))


def parts(model: Model, context: int, prefix: int = 0) -> tuple[Part, ...]:
    """All parts, in the order of the forward pass, of rows of `context` tokens. The first `prefix` are an encoder's if there is one."""
    if model.encodes:
        return _ENCODERS[model.family](model, context, prefix)
    return _FAMILIES[model.family](model, context)


def num_params(model: Model) -> int:
    """All parameters; a tied embedding counts once."""
    return sum(part.params for part in parts(model, 1))


def num_params_active(model: Model, context: int = 1, prefix: int = 0) -> int:
    """Those that one token uses: N of the training cost C = 6 N D. Fewer than all for a mixture of experts, and where an encoder and a
    decoder share a row, the mean over its tokens."""
    return sum(round(part.active * part.params) for part in parts(model, context, prefix))


def num_params_matrices(model: Model) -> int:
    """The matrices of the blocks alone: N of Kaplan et al. 2020, without embeddings, head, positions, norms and biases."""
    return sum(part.params for part in parts(model, 1) if part.kind == "matrices")


def num_params_media(model: Model) -> int:
    """Those of the encoder of media, without the projector."""
    return sum(part.params for part in parts(model, 1) if part.name.startswith("media/encoder/"))


def frozen(model: Model, freeze: Iterable[str]) -> tuple[str, ...]:
    """The names of the arrays that train.freeze names by the beginnings of their paths, whole steps of a path each.

    Raises BadInput for a beginning that no array of the model has, with the nearest one that is there.
    """
    names = [part.name for part in parts(model, 1) if part.stored]
    steps = {"/".join(name.split("/")[:i]) for name in names for i in range(1, name.count("/") + 2)}
    for beginning in freeze:
        if beginning not in steps:
            raise BadInput(f'train.freeze "{beginning}" begins no path of a parameter{did_you_mean(beginning, steps)}')
    return tuple(name for name in names if begins(name, freeze))


def begins(path: str, freeze: Iterable[str]) -> bool:
    """Whether the path of an array begins with one of the paths given, in whole steps."""
    return any(path == one or path.startswith(f"{one}/") for one in freeze)


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
    branches = (
        _attention("blocks/attention", model, model.num_layers, context),
        _experts(model) if model.experts.number else _mlp("blocks/mlp/", model, model.num_layers, model.ff_width),
    )
    found = [*_media(model, context), *_inputs(model), *_block("blocks", model, model.num_layers, *branches)]
    return (*found, *([_norm("norm", model)] if model.norm_position == "pre" else []), _head(model))


def _inputs(model: Model) -> list[Part]:
    learned = Part("positions", "positions", (model.max_context, model.d_model), model.d_model)
    return [_embedding(model), *([learned] if model.positions == "learned" else [])]


def _block(name: str, model: Model, layers: int, *branches: list[Part]) -> list[Part]:
    """Residual branches, each behind its norm, or before it."""
    found: list[Part] = []
    for i, branch in enumerate(branches, 1):
        norm = [_norm(f"{name}/norm{i}", model, layers)]
        found += norm + branch if model.norm_position == "pre" else branch + norm
    return found


def in_blocks(window: int, positions: int) -> bool:
    """Whether a row is attended to in blocks of the window, each of which sees two of them (models/attention.py)."""
    return positions > 2 * window and positions % window == 0


def _attention(name: str, model: Model, layers: int, positions: int) -> list[Part]:
    """To `positions` of as many as there are: the full square, as it is published, though a causal kernel needs half. With a window
    the products of its blocks, where it is computed in blocks."""
    heads, kv_heads, head = model.num_heads, model.kv_heads, model.head_width
    numbers = {"q": heads, "k": kv_heads, "v": kv_heads}
    found = [_matrix(f"{name}/{of}", model.d_model, (number, head), layers) for of, number in numbers.items()]
    if model.qk_norm:
        found += [Part(f"{name}/{of}_norm/scale", "norm", (head,), numbers[of] * head, layers) for of in ("q", "k")]
    attended = 2 * model.window if model.window and in_blocks(model.window, positions) else positions
    square = (heads, attended, head)
    return [
        *found,
        Part(f"{name}/scores", "attention", square, heads * attended, layers, stored=False),
        Part(f"{name}/values", "attention", square, heads * head, layers, stored=False),
        Part(f"{name}/out", "matrices", (heads, head, model.d_model), model.d_model, layers),
    ]


def _mlp(name: str, model: Model, layers: int, hidden: int) -> list[Part]:
    """`name` is what the names of its arrays begin with."""
    ins = ("up", "gate") if model.mlp == "swiglu" else ("up",)
    found = [_matrix(name + of, model.d_model, (hidden,), layers) for of in ins]
    return [*found, _matrix(f"{name}down", hidden, (model.d_model,), layers)]


def _experts(model: Model) -> list[Part]:
    mixture, layers = model.experts, model.num_layers
    number, used = mixture.number, mixture.per_token
    found = [_matrix("blocks/mlp/router", model.d_model, (number,), layers)]
    if mixture.balance == "bias":
        found.append(Part("blocks/mlp/router_bias", "bias", (number,), 0, layers))
    found += [
        replace(part, shape=(number, *part.shape), outputs=used * part.outputs, active=used / number)
        for part in _mlp("blocks/mlp/", model, layers, model.expert_width)
    ]
    return found + (
        _mlp("blocks/mlp/shared_", model, layers, mixture.shared * model.expert_width) if mixture.shared else []
    )


def _media(model: Model, context: int) -> list[Part]:
    """The encoder of media and its projector: what they do for all items of a row, shared among its tokens."""
    media = model.media
    if media.kind == "none":
        return []
    encoder, share, name, width = (
        model.media_encoder,
        media.items * media.tokens / context,
        "media/encoder",
        media.d_model,
    )
    if media.kind == "image":
        patch = _matrix(f"{name}/patch", media.patch**2 * media.channels, (width,))
        table = Part(f"{name}/positions", "positions", (media.tokens, width), width)
        stem = _shared([patch, table], share)
    else:
        first = Part(f"{name}/conv1", "matrices", (3, media.mel_bins, width), width)
        second = Part(f"{name}/conv2", "matrices", (3, width, width), width)
        stem = [*_shared([first], 2 * share), *_shared([second], share)]
    blocks = _block(
        f"{name}/blocks",
        encoder,
        media.num_layers,
        _attention(f"{name}/blocks/attention", encoder, media.num_layers, media.tokens),
        _mlp(f"{name}/blocks/mlp/", encoder, media.num_layers, encoder.ff_width),
    )
    projector = [
        _matrix("media/projector/up", width, (model.d_model,)),
        _matrix("media/projector/down", model.d_model, (model.d_model,)),
    ]
    return [*stem, *_shared([*blocks, _norm(f"{name}/norm", encoder), *projector], share)]


def _shared(found: Iterable[Part], share: float) -> list[Part]:
    """The parts of what reads `share` of the tokens of a row."""
    return [dataclasses.replace(part, active=share, outputs=round(share * part.outputs)) for part in found]


def _encoder_decoder(model: Model, context: int, prefix: int) -> tuple[Part, ...]:
    encoded, layers, read = model.encoder_layers, model.num_layers, context - prefix
    source, target = prefix / context, read / context
    pre = model.norm_position == "pre"
    encoder = _block(
        "encoder_blocks",
        model,
        encoded,
        _attention("encoder_blocks/attention", model, encoded, prefix),
        _mlp("encoder_blocks/mlp/", model, encoded, model.ff_width),
    )
    cross = _attention("decoder_blocks/cross", model, layers, prefix)
    # Its keys and values are of the source, and stand before the decoder.
    keys = [part for part in cross if part.name.split("/")[2] in ("k", "k_norm", "v")]
    decoder = _block(
        "decoder_blocks",
        model,
        layers,
        _attention("decoder_blocks/attention", model, layers, read),
        [part for part in cross if part not in keys],
        _mlp("decoder_blocks/mlp/", model, layers, model.ff_width),
    )
    return (
        *_inputs(model),
        *_shared([*encoder, *([_norm("encoder_norm", model)] if pre else []), *keys], source),
        *_shared([*decoder, *([_norm("norm", model)] if pre else []), _head(model)], target),
    )


def _seq2seq(model: Model, context: int, prefix: int) -> tuple[Part, ...]:
    layers, width, half = model.encoder_layers, model.d_model, model.d_model // 2
    gates, both = (4, width), (2, 4, half)
    encoder = [
        _norm("encoder_blocks/norm", model, layers),
        _matrix("encoder_blocks/input", width, both, layers),
        Part("encoder_blocks/bias", "bias", both, 0, layers),
        Part("encoder_blocks/recurrent", "matrices", (2, half, 4, half), math.prod(both), layers),
        _norm("encoder_norm", model),
        _matrix("keys", width, (width,)),
    ]
    attended = (prefix, width)
    decoder = [
        _norm("decoder/norm", model),
        _matrix("decoder/input", width, gates),
        Part("decoder/bias", "bias", gates, 0),
        _matrix("decoder/query", width, (width,)),
        Part("decoder/score", "bias", (width,), 0),
        Part("decoder/scores", "attention", attended, prefix, stored=False),
        Part("decoder/values", "attention", attended, width, stored=False),
        _matrix("decoder/context", width, gates),
        _matrix("decoder/recurrent", width, gates),
        _matrix("decoder/out", width, (width,)),
    ]
    if model.num_layers > 1:
        decoder += _recurrent_blocks("decoder_blocks", model, model.num_layers - 1)
    return (
        _embedding(model),
        *_shared(encoder, prefix / context),
        *_shared([_matrix("start", width, (width,))], 1 / context),
        *_shared([*decoder, _norm("norm", model), _head(model)], 1 - prefix / context),
    )


def _recurrent(model: Model, context: int) -> tuple[Part, ...]:
    blocks = _recurrent_blocks("blocks", model, model.num_layers)
    return (_embedding(model), *blocks, _norm("norm", model), _head(model))


def _recurrent_blocks(name: str, model: Model, layers: int) -> list[Part]:
    gates = (1 if model.family == "rnn" else 4, model.d_model)
    return [
        _norm(f"{name}/norm", model, layers),
        _matrix(f"{name}/input", model.d_model, gates, layers),
        Part(f"{name}/bias", "bias", gates, 0, layers),
        _matrix(f"{name}/recurrent", model.d_model, gates, layers),
    ]


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
_ENCODERS: dict[str, Callable[[Model, int, int], tuple[Part, ...]]] = {
    "encoder_decoder": _encoder_decoder,
    "seq2seq_rnn": _seq2seq,
}
