"""Every setting once: frozen dataclasses, validated. What they share (JSON, overrides, fingerprints) is in settings.py.

Dimension letters in array names, as in `logits_BxTxV` (scaling/ writes parameters and tokens out as n_params, d_tokens):

    B  rows of a batch          D  width of the residual stream     K  key/value heads
    T  positions of a row       F  hidden width of the MLP          G  query heads a key/value head, N // K
    S  positions attended to    V  vocabulary                       H  width of one head
    L  layers                   N  query heads                      C  steps of one compiled call
    E  experts                  M  tokens of all rows, B x T        J  experts that a token goes to
    P  positions of the prefix of a row, which an encoder reads    W  hypotheses of a beam
    I  items of media of a row, each of P tokens of its own        R  embeddings of all of them, I x P

This module imports nothing heavy, so that `llm-jax --help` answers at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from llm_jax.components import Experts, Media, Mesh, Synthetic
from llm_jax.settings import HOW, BadInput, check_types, did_you_mean, fingerprint, given, require, what

RULE: Literal["rule"] = "rule"
"""A setting that follows N and D by the rules of llm_jax/ladder.py."""

SOURCES = ("stdlib", "files", "pairs", "media", "synthetic", "tfds:NAME")


@dataclass(frozen=True)
class Model:
    """A language model of one of several families. A field that a family does not read is said so; it changes nothing there."""

    family: Literal["transformer", "encoder_decoder", "lstm", "rnn", "seq2seq_rnn", "feedforward", "ngram"] = (
        "transformer"
    )
    """transformer is decoder-only; lstm and rnn are recurrent; feedforward is that of Bengio et al. 2003. encoder_decoder is the
    Transformer of Vaswani et al. 2017, seq2seq_rnn the LSTMs with attention of Bahdanau et al. 2015: both read the first
    data.prefix tokens of a row with an encoder and the rest with a decoder.
    ngram is counted, not trained: of this class it reads vocab_size and ngram_order alone."""
    vocab_size: int = 256
    """Rows of the embedding. The tokenizer "bytes" needs 256."""
    num_layers: int = 4
    """Of the decoder where there is an encoder. Not read by feedforward, which has one hidden layer."""
    num_encoder_layers: int | None = None
    """None: num_layers. Read by encoder_decoder and seq2seq_rnn alone."""
    d_model: int = 128
    """Width of the residual stream; of the state in lstm and rnn; of an embedding in feedforward."""
    num_heads: int = 2
    """This, and what follows on heads, positions, MLPs and windows, is read by transformer and encoder_decoder alone, but for d_ff."""
    num_kv_heads: int | None = None
    """Key/value heads: None for multi-head, fewer for grouped-query (Ainslie et al. 2023), 1 for multi-query attention."""
    head_dim: int | None = None
    """None: d_model / num_heads."""
    d_ff: int | None = None
    """Hidden width of the MLP. None: 4 d_model, or 8/3 d_model rounded up to a multiple of 8 for swiglu, which has three matrices.
    Of feedforward, its hidden layer."""
    mlp: Literal["gelu", "swiglu", "relu2", "relu"] = "relu2"
    """relu2 is the squared ReLU of Primer (So et al. 2021), relu that of Vaswani et al. 2017."""
    experts: Experts = field(default_factory=Experts)
    media: Media = field(default_factory=Media)
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Not read by feedforward, which has none."""
    norm_position: Literal["pre", "post"] = "pre"
    """Read by transformer alone; lstm and rnn are pre-norm."""
    positions: Literal["rotary", "learned", "sinusoidal"] = "rotary"
    rope_theta: float = 10_000.0
    max_context: int = 2048
    """Rows of the table of learned positions; unused otherwise."""
    tie_embeddings: bool = True
    """The head is the embedding, transposed. Not read by feedforward, whose head is as wide as its hidden layer."""
    qk_norm: bool = True
    """RMSNorm on queries and keys (Dehghani et al. 2023): keeps high learning rates stable."""
    logit_softcap: float | None = None
    """logits = cap * tanh(logits / cap), as in Gemma 2. Read by transformer alone."""
    window: int | None = None
    """Sliding-window attention: positions a token sees, itself included. Refused by encoder_decoder."""
    ngram_order: int = 5
    """n: feedforward and ngram predict from the n - 1 tokens before. Not read by others."""
    direct_connections: bool = False
    """From the embeddings to the output, past the hidden layer. Read by feedforward alone."""
    dropout: float = 0.0
    """On embeddings and on each block's output; never on a recurrence."""
    scan_layers: bool = False
    """One compiled block scanned over the layers: compiles faster when deep, runs slower when small. Same parameters either way."""
    recompute: Literal["nothing", "elementwise", "hidden", "block"] = "nothing"
    """What the backward pass computes anew rather than keep, for models whose activations do not fit (Chen et al. 2016): norms and
    activations, and attention where it is no kernel's; the MLP's hidden layer too; whole blocks. Read by transformer alone. Same results
    but for rounding."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters are float32."""

    def __post_init__(self) -> None:
        check_types(self, "model")
        for name in (
            *(
                "vocab_size",
                "num_layers",
                "num_encoder_layers",
                "d_model",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "d_ff",
            ),
            *("window", "rope_theta", "max_context", "logit_softcap"),
        ):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.{name} must be positive, got {value}")
        require(0 <= self.dropout < 1, f"model.dropout must lie in [0, 1), got {self.dropout}")
        least = 2 if self.family == "feedforward" else 1
        require(self.ngram_order >= least, f"model.ngram_order must be at least {least}, got {self.ngram_order}")
        if self.attends:
            self._check_attention()
        if self.family == "encoder_decoder":
            require(self.window is None, "model.window is of the causal family transformer, not of encoder_decoder")
        if self.family == "seq2seq_rnn":
            require(
                self.d_model % 2 == 0,
                f"model.d_model={self.d_model} does not divide among two directions of the encoder; try {self.d_model + 1}",
            )
        if self.experts.number:
            require(self.family == "transformer", f"model.experts needs model.family=transformer, got {self.family}")
            grains = self.experts.granularity
            if self.ff_width % grains:
                near = max(grain for grain in range(1, grains) if self.ff_width % grain == 0)
                raise BadInput(
                    f"model.experts.granularity={grains} does not divide the width {self.ff_width} of the MLP; nearest below: {near}"
                )
        require(
            self.media.kind == "none" or self.family == "transformer",
            f"model.media needs model.family=transformer, got {self.family}",
        )

    def _check_attention(self) -> None:
        if self.head_dim is None and self.d_model % self.num_heads:
            even = 2 if self.positions == "rotary" and self.d_model % 2 == 0 else 1
            divisors = [heads for heads in range(1, self.d_model + 1) if self.d_model % (even * heads) == 0]
            fits = min(divisors, key=lambda heads: abs(heads - self.num_heads))
            raise BadInput(
                f"model.num_heads={self.num_heads} does not divide model.d_model={self.d_model}; nearest that does: {fits}"
            )
        if self.num_heads % self.kv_heads:
            divisors = [k for k in range(1, self.num_heads + 1) if self.num_heads % k == 0]
            fits = min(divisors, key=lambda k: abs(k - self.kv_heads))
            raise BadInput(
                f"model.num_kv_heads={self.kv_heads} does not divide model.num_heads={self.num_heads}; nearest that does: {fits}"
            )
        if self.positions == "rotary":
            require(
                self.head_width % 2 == 0,
                f"rotary positions need an even head_dim, got {self.head_width}; try {self.head_width + 1}",
            )
        if self.positions == "sinusoidal":
            require(
                self.d_model % 2 == 0,
                f"sinusoidal positions need an even model.d_model, got {self.d_model}; try {self.d_model + 1}",
            )

    @property
    def attends(self) -> bool:
        """Whether the family has attention, and so heads and positions."""
        return self.family in ("transformer", "encoder_decoder")

    @property
    def encodes(self) -> bool:
        """Whether the first tokens of a row are read by an encoder, and the rest by a decoder."""
        return self.family in ("encoder_decoder", "seq2seq_rnn")

    @property
    def encoder_layers(self) -> int:
        """Layers of the encoder, where there is one."""
        return self.num_encoder_layers or self.num_layers

    @property
    def counted(self) -> bool:
        """Whether it is made by counting: no gradient, no FLOPs of training, and no size before the data is seen."""
        return self.family == "ngram"

    @property
    def max_positions(self) -> int | None:
        """Tokens of the longest row that the model can read, or its encoder or decoder; None where nothing bounds it."""
        return self.max_context if self.attends and self.positions == "learned" else None

    @property
    def head_width(self) -> int:
        """H, the width of one head."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """K, the key/value heads; all N where model.num_kv_heads is None."""
        return self.num_kv_heads or self.num_heads

    @property
    def ff_width(self) -> int:
        """F, the hidden width of the MLP; of feedforward, its hidden layer."""
        if self.d_ff:
            return self.d_ff
        return -(-8 * self.d_model // 3 // 8) * 8 if self.attends and self.mlp == "swiglu" else 4 * self.d_model

    @property
    def expert_width(self) -> int:
        """Hidden width of one expert."""
        return self.ff_width // self.experts.granularity

    @property
    def media_encoder(self) -> Model:
        """The blocks of the encoder of media as a model: pre-norm, LayerNorm and GELU as published, computed as this one is."""
        media = self.media
        return Model(
            num_layers=media.num_layers,
            d_model=media.d_model,
            num_heads=media.num_heads,
            mlp="gelu",
            norm="layernorm",
            positions="learned" if media.kind == "image" else "sinusoidal",
            max_context=media.tokens,
            qk_norm=self.qk_norm,  # one learning rate trains both
            dropout=self.dropout,
            scan_layers=self.scan_layers,
            recompute=self.recompute,
            dtype=self.dtype,
        )


@dataclass(frozen=True)
class Data:
    """Where tokens come from and how they are cut into rows."""

    source: str = "stdlib"
    """stdlib (this interpreter's own sources), files, synthetic, or tfds:NAME for a data set registered with TFDS.
    pairs: a source text and a target text each, for sequence-to-sequence tasks; a row holds one pair.
    media: texts with pictures or sounds in them, for model.media; a row holds one text."""
    files: tuple[str, ...] = ()
    """Globs for source files: .txt .md .py, and .jsonl with an optional .gz .xz .zst. Of pairs: .tsv, a pair a line, and .jsonl.
    Of media: .jsonl, lines {"text": "<media> is a cat", "media": ["cat.png"]}; paths are relative to the file."""
    text_field: str = "text"
    """The field of a .jsonl line or a TFDS example that holds the document."""
    pair_fields: tuple[str, ...] = ("source", "target")
    """The fields of a .jsonl line that hold the two texts of a pair."""
    tokenizer: Literal["bytes", "bpe", "unigram"] = "bytes"
    """bpe and unigram are SentencePiece models of model.vocab_size pieces with byte fallback, trained on the source."""
    context: int = 128
    """Tokens of a training row."""
    prefix: int = 0
    """Tokens of each row that are read and at which nothing is predicted, so that all families are scored on the same targets. An
    encoder reads them. Of pairs, the room of the source; its begin token and the source fill it from the right."""
    val_fraction: float = 0.05
    """Share of the documents that is held out."""
    eval_tokens: int = 65_536
    """Tokens of the fixed held-out set, spread evenly over the held-out documents; all of them where there are fewer."""
    document_mask: bool = False
    """Attention stays inside a document, and a recurrent state starts anew with it. Off, as in GPT-2: a packed row then sees the
    end of the document before."""
    shuffle_seed: int = 0
    synthetic: Synthetic = field(default_factory=Synthetic)

    def __post_init__(self) -> None:
        check_types(self, "data")
        kind = self.source.split(":", 1)[0]
        valid = {name.split(":")[0] for name in SOURCES}
        if kind not in valid or (kind == "tfds") != (":" in self.source) or self.source == "tfds:":
            raise BadInput(f'data.source "{self.source}" is no source{did_you_mean(self.source, SOURCES)}')
        reads_files = self.source in ("files", "pairs", "media")
        require(
            not reads_files or bool(self.files),
            f"data.source={self.source} needs data.files, for instance 'corpus/*.jsonl.xz'",
        )
        require(
            reads_files or not self.files,
            f"data.files is only read by data.source=files, pairs and media, not by {self.source}",
        )
        require(self.context >= 2, f"data.context must be at least 2, got {self.context}")
        require(
            0 <= self.prefix < self.context,
            f"data.prefix={self.prefix} must lie in [0, {self.context - 1}]: data.context={self.context} tokens are a row",
        )
        if self.source == "pairs":
            require(len(self.pair_fields) == 2, f"data.pair_fields must name two fields, got {len(self.pair_fields)}")
            require(
                self.prefix >= 2,
                f"data.source=pairs needs data.prefix, the room of the source; try {max(2, self.context // 2)}",
            )
        require(
            self.source not in ("pairs", "media") or not self.document_mask,
            f"data.source={self.source} has one {'pair' if self.source == 'pairs' else 'text'} a row: data.document_mask has no meaning",
        )
        require(0 < self.val_fraction < 1, f"data.val_fraction must lie in (0, 1), got {self.val_fraction}")
        require(
            self.eval_tokens >= self.context,
            f"data.eval_tokens={self.eval_tokens} is less than one row; at least data.context={self.context}",
        )


@dataclass(frozen=True)
class Train:
    """One run of the optimizer. "rule" follows N and D; llm_jax/ladder.py says how and why."""

    tokens: int | Literal["rule"] = RULE
    """D, the tokens trained on; "rule": 20 a parameter (Hoffmann et al. 2022)."""
    tokens_per_step: int | Literal["rule"] = RULE
    """The global batch, in tokens."""
    peak_lr: float | Literal["rule"] = RULE
    schedule: Literal["cosine", "linear", "wsd", "inverse_sqrt"] = "cosine"
    """wsd: warm-up, stable, decay (Hu et al. 2024); its trunk serves several horizons. inverse_sqrt: that of Vaswani et al. 2017,
    which knows no horizon and never decays to zero: its loss is not that of its budget."""
    warmup_steps: int | Literal["rule"] = RULE
    decay_fraction: float = 0.2
    """Share of the steps in the cool-down of wsd, 1 - sqrt (Haegele et al. 2024)."""
    final_lr: float = 0.0
    """Learning rate at the end, as a share of the peak; not read by inverse_sqrt."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled, times the learning rate, on matrices alone."""
    clip_norm: float = 1.0
    z_loss: float = 0.0
    """Weight of mean(logsumexp(logits)^2) (PaLM, 1e-4 there)."""
    label_smoothing: float = 0.0
    """Share of a target's probability spread evenly over the vocabulary in training (Szegedy et al. 2016; 0.1 in Vaswani et al. 2017)."""
    grad_accumulation: int = 1
    """Microbatches a step."""
    steps_per_call: int = 32
    """Optimizer steps in one compiled call; metrics, checkpoints and stops fall between calls."""
    checkpoint_every: int = 2000
    """Steps between checkpoints; the last step always has one."""
    eval_every: int = 0
    """Steps between evaluations on the held-out set; 0: at the end alone."""
    freeze: tuple[str, ...] = ()
    """Parameters that keep their values, by the beginning of their path: media/encoder, blocks, embed, ... as llm-jax explain names
    them. FLOPs are counted as if they were trained."""
    init_from: str = ""
    """A trial's folder, or a run directory, whose best trial it then is: parameters start as that trial left them, where path and
    shape agree. The optimizer starts anew."""
    seed: int = 0
    compile: Literal["jit", "pmap"] = field(default="jit", metadata=HOW)
    """jit: one program over the mesh. pmap: a replica of all parameters on each device of mesh.data, gradients added up; of one process,
    and with draws of dropout of its own. Like the mesh, no part of a trial's identity."""

    def __post_init__(self) -> None:
        check_types(self, "train")
        for name in (
            "tokens",
            "tokens_per_step",
            "peak_lr",
            "grad_accumulation",
            "steps_per_call",
            "checkpoint_every",
            "clip_norm",
        ):
            value = getattr(self, name)
            require(value == RULE or value > 0, f"train.{name} must be positive, got {value}")
        require(
            self.warmup_steps == RULE or self.warmup_steps >= 0,
            f"train.warmup_steps must not be negative, got {self.warmup_steps}",
        )
        for name in ("weight_decay", "z_loss", "eval_every"):
            require(getattr(self, name) >= 0, f"train.{name} must not be negative, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "label_smoothing"):
            require(0 <= getattr(self, name) < 1, f"train.{name} must lie in [0, 1), got {getattr(self, name)}")
        require(self.epsilon > 0, f"train.epsilon must be positive, got {self.epsilon}")
        require(0 < self.decay_fraction <= 1, f"train.decay_fraction must lie in (0, 1], got {self.decay_fraction}")
        require(0 <= self.final_lr <= 1, f"train.final_lr is a share of the peak in [0, 1], got {self.final_lr}")


@dataclass(frozen=True)
class Config:
    """All of one trial."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    mesh: Mesh = field(default_factory=Mesh, metadata=HOW)

    def __post_init__(self) -> None:
        if self.data.tokenizer == "bytes":
            require(
                self.model.vocab_size >= 256,
                f"the tokenizer bytes needs model.vocab_size >= 256, got {self.model.vocab_size}",
            )
        context, prefix = self.data.context, self.data.prefix
        media = self.model.media
        require(
            (media.kind != "none") == (self.data.source == "media"),
            f"model.media.kind={media.kind} does not fit data.source={self.data.source}: image and audio go with media alone",
        )
        if media.kind != "none":
            taken = media.items * media.tokens
            require(
                taken <= context - 2,
                f"data.context={context} has no room for {media.items} x {media.tokens} tokens of media and a text; at least {taken + 2}",
            )
        if self.model.encodes:
            require(
                prefix >= 1,
                f"model.family={self.model.family} reads data.prefix tokens with its encoder: give it, for instance {context // 2}",
            )
            require(
                not self.data.document_mask,
                f"data.document_mask has no meaning for model.family={self.model.family}, which reads a row as source and target",
            )
        if self.model.counted:
            require(
                self.data.source != "pairs", "model.family=ngram counts running text, which data.source=pairs is not"
            )
        if self.model.max_positions is not None:
            require(
                (max(prefix, context - prefix) if self.model.encodes else context) <= self.model.max_positions,
                f"data.context={context} exceeds the learned positions; model.max_context={self.model.max_context}",
            )
        if self.train.tokens_per_step != RULE:
            unit = self.data.context * self.train.grad_accumulation
            if self.train.tokens_per_step % unit:
                near = max(1, round(self.train.tokens_per_step / unit)) * unit
                raise BadInput(
                    f"train.tokens_per_step={self.train.tokens_per_step} is no multiple of data.context x train.grad_accumulation"
                    f" = {unit}; nearest: {near}"
                )
        self.check_mesh({name: max(1, size) for name, size in asdict(self.mesh).items()})

    def check_mesh(self, sizes: Mapping[str, int]) -> None:
        """Raises BadInput where a mesh of such axes cannot share this model's work; training/mesh.py checks its rows."""
        model, experts = self.model, self.model.experts.number
        shared = {"expert": {"model.experts.number": experts}} if experts else {}
        if model.attends:
            heads = {"model.num_heads": model.num_heads} | (
                {"model.num_kv_heads": model.kv_heads} if model.kv_heads > 1 else {}
            )
            shared["tensor"] = heads | {"model.d_ff": model.expert_width if experts else model.ff_width}
        shared["sequence"] = {"data.context": self.data.context}
        for axis, amounts in shared.items():
            for name, amount in amounts.items():
                if amount % sizes[axis]:
                    raise BadInput(
                        f"mesh.{axis}={sizes[axis]} does not divide {name}={amount}; nearest below: {math.gcd(sizes[axis], amount)}"
                    )
        plain = model.family == "transformer" and model.media.kind == "none"
        require(plain or sizes["sequence"] == 1, "mesh.sequence is of model.family=transformer without media alone")
        require(
            bool(experts) or sizes["expert"] == 1,
            "mesh.expert spreads experts, and model.experts.number=0; use mesh.data or mesh.fsdp",
        )
        require(
            experts == 0 or model.experts.routing == "token" or sizes["expert"] == 1,
            "model.experts.routing=expert chooses among all rows and is not spread over mesh.expert; use mesh.data",
        )
        if self.train.compile == "pmap":
            wrong = [name for name, size in sizes.items() if size > 1 and name != "data"]
            if wrong:
                raise BadInput(
                    f"train.compile=pmap has whole replicas: mesh.{wrong[0]} must be 1, or train.compile=jit"
                )
            require(not experts, "train.compile=pmap balances no experts over replicas; use train.compile=jit")

    @property
    def resolved(self) -> bool:
        """True when no setting is left to a rule."""
        return RULE not in (self.train.tokens, self.train.tokens_per_step, self.train.peak_lr, self.train.warmup_steps)

    @property
    def rows_per_step(self) -> int:
        """Rows of all microbatches of a step. Of a resolved config alone, as num_steps."""
        return int(self.train.tokens_per_step) // self.data.context

    @property
    def num_steps(self) -> int:
        """Optimizer steps: D over the batch, rounded, at least one."""
        return max(1, round(int(self.train.tokens) / int(self.train.tokens_per_step)))


def trunk_key(cfg: Config, data_fingerprint: str) -> str:
    """Names what a wsd run is until its cool-down: equal for runs that differ in their horizon alone."""
    tree = given(what(cfg))
    for name in ("tokens", "decay_fraction", "final_lr", "checkpoint_every", "eval_every"):
        tree.get("train", {}).pop(name, None)
    return fingerprint([tree, data_fingerprint])
