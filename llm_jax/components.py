"""Settings of parts: a mixture of experts and an encoder of media in a model, a source of text made here, a mesh of devices."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from llm_jax.settings import BadInput, check_types, require


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP of every block (Shazeer et al. 2017, Fedus et al. 2021). Of family transformer alone."""

    number: int = 0
    """E, the experts that a router chooses from; 0: a dense MLP, and nothing below is read."""
    per_token: int = 2
    """k, the experts that a token goes to: 1 in Switch (Fedus et al. 2021), 2 in GShard and Mixtral. With routing=expert, on average."""
    shared: int = 0
    """Experts of the same width that every token passes besides (DeepSeekMoE, Dai et al. 2024)."""
    granularity: int = 1
    """G = hidden width of the dense MLP over that of an expert: more than 1 for fine-grained ones (Krajewski et al. 2024)."""
    routing: Literal["token", "expert"] = "token"
    """Who chooses: a token its k experts, or an expert its k / E of the batch's tokens (Zhou et al. 2022). The latter looks ahead,
    at later tokens of the row, and so its training loss is none of a language model; held-out loss and generation let the tokens
    choose by the same router."""
    gate: Literal["softmax", "sigmoid"] = "softmax"
    """How scores become weights: softmax over all experts (Shazeer et al. 2017), or a sigmoid each (DeepSeek-V3, 2024)."""
    normalize: bool = True
    """The weights of a token's k experts add up to 1, as in GShard, Mixtral and DeepSeek-V3. Read by routing=token; with k = 1 it
    would leave the router without a gradient, and Switch does not."""
    balance: Literal["aux", "bias", "none"] = "aux"
    """aux: the loss of Switch (Fedus et al. 2021, eq. 4); bias: one an expert, added to its score where experts are chosen and not to
    its weight, moved after each step towards the mean load (Wang et al. 2024, DeepSeek-V3). Experts that choose need none."""
    aux_weight: float = 0.01
    """Of the balancing loss, a layer (0.01 in Fedus et al. 2021)."""
    bias_rate: float = 0.001
    """What the bias moves by in a step (Wang et al. 2024, section 4.1)."""
    z_weight: float = 0.001
    """Of the router z-loss, mean(logsumexp(router logits)^2), a layer (ST-MoE, Zoph et al. 2022, eq. 5)."""
    capacity_factor: float | None = None
    """None: dropless. A number c: in training an expert takes the first c k M / E choices of a batch of M tokens and drops the rest
    (Lepikhin et al. 2020); evaluation and generation drop nothing."""

    def __post_init__(self) -> None:
        check_types(self, "model.experts")
        for name in ("number", "shared", "aux_weight", "bias_rate", "z_weight"):
            require(getattr(self, name) >= 0, f"model.experts.{name} must not be negative, got {getattr(self, name)}")
        for name in ("per_token", "granularity", "capacity_factor"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.experts.{name} must be positive, got {value}")
        if not self.number:
            return
        require(
            self.per_token <= self.number,
            f"model.experts.per_token={self.per_token} exceeds model.experts.number={self.number}",
        )
        if self.routing == "expert":
            require(
                self.balance == "none" and self.capacity_factor is None,
                "model.experts.routing=expert fills every expert alike: it needs balance=none and no capacity_factor",
            )
        else:
            require(
                self.per_token > 1 or not self.normalize,
                "model.experts.normalize=true makes the one weight of per_token=1 a constant; set it to false",
            )

    @property
    def sparsity(self) -> float:
        """Share of the routed experts that a token does not pass; 0 for a dense MLP (Abnar et al. 2025)."""
        return 1 - self.per_token / self.number if self.number else 0.0


@dataclass(frozen=True)
class Media:
    """An encoder of pictures or sounds, and a projector into the embedding space of the language model (LLaVA, Liu et al. 2023), which
    reads them among its tokens. Of family transformer alone."""

    kind: Literal["none", "image", "audio"] = "none"
    """image: a ViT (Dosovitskiy et al. 2021) on square pictures. audio: convolutions and a Transformer on log-mel spectrograms (Whisper,
    Radford et al. 2022). none: nothing below is read."""
    items: int = 1
    """I, items of a row at most; the encoder's cost is that of so many, also in a row with fewer."""
    size: int = 32
    """Pixels of a side of a picture; one of another size is refused."""
    channels: int = 3
    """3 for colours, 1 for grey."""
    patch: int = 8
    """Pixels of a side of a patch: (size / patch)^2 tokens a picture."""
    frames: int = 128
    """Of a spectrogram, 10 ms each: frames / 2 tokens a sound. Silence follows a shorter one, a longer one is refused."""
    mel_bins: int = 80
    """Bands of a spectrogram, on the mel scale from 0 to 8 kHz."""
    num_layers: int = 2
    """This and what follows is of the encoder's blocks."""
    d_model: int = 64
    num_heads: int = 2

    def __post_init__(self) -> None:
        check_types(self, "model.media")
        for name in ("items", "size", "patch", "frames", "mel_bins", "num_layers", "d_model", "num_heads"):
            require(getattr(self, name) > 0, f"model.media.{name} must be positive, got {getattr(self, name)}")
        require(
            self.channels in (1, 3), f"model.media.channels must be 3 for colours or 1 for grey, got {self.channels}"
        )
        self._divides("patch", "size", self.kind == "image")
        self._divides("num_heads", "d_model", self.kind != "none")
        if self.kind == "audio":
            require(self.frames % 2 == 0, f"model.media.frames={self.frames} must be even; try {self.frames + 1}")
            require(self.d_model % 2 == 0, f"model.media.d_model={self.d_model} must be even; try {self.d_model + 1}")

    def _divides(self, name: str, whole: str, read: bool) -> None:
        part, total = getattr(self, name), getattr(self, whole)
        if read and total % part:
            near = min((d for d in range(1, total + 1) if total % d == 0), key=lambda d: abs(d - part))
            raise BadInput(
                f"model.media.{name}={part} does not divide model.media.{whole}={total}; nearest that does: {near}"
            )

    @property
    def tokens(self) -> int:
        """P, tokens of one item."""
        return (self.size // self.patch) ** 2 if self.kind == "image" else self.frames // 2

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one item: a picture, size x size x channels, or a spectrogram, frames x mel_bins."""
        return (self.size, self.size, self.channels) if self.kind == "image" else (self.frames, self.mel_bins)

    @property
    def dtype(self) -> str:
        """Of an item as it is stored and read."""
        return "uint8" if self.kind == "image" else "float16"


@dataclass(frozen=True)
class Synthetic:
    """A source of unlimited text whose entropy rate is known exactly; see llm_jax/data/synthetic.py."""

    keys: int = 16_384
    """Contexts, drawn by a Zipf law."""
    exponent: float = 1.3
    """Of the Zipf law: p_k proportional to k^-exponent."""
    noise: float = 0.1
    """Chance that an answer is drawn uniformly and not from the table."""
    documents: int = 20_000
    """Of about 1,000 characters each."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self, "data.synthetic")
        require(2 <= self.keys <= 26**3, f"data.synthetic.keys must lie in [2, {26**3}], got {self.keys}")
        require(self.exponent > 0, f"data.synthetic.exponent must be positive, got {self.exponent}")
        require(0 <= self.noise < 1, f"data.synthetic.noise must lie in [0, 1), got {self.noise}")
        require(self.documents >= 2, f"data.synthetic.documents must be at least 2, got {self.documents}")


@dataclass(frozen=True)
class Mesh:
    """How the devices of all hosts share the work, as the sizes of five axes. The same model is trained, to rounding, and a checkpoint of
    one mesh goes on with any other: no part of a trial's identity. Only model.experts.capacity_factor counts for each device alone.

    One axis may be -1, the rest of the devices; where that is more than there are rows for, some stay idle. Rows of a step are spread
    over data, fsdp and expert."""

    data: int = -1
    """Copies of the parameters, each with rows of its own."""
    fsdp: int = 1
    """Parameters and the optimizer's state are spread over it, and gathered where they are needed (ZeRO, Rajbhandari et al. 2020)."""
    tensor: int = 1
    """Heads, the MLP's hidden layer and the vocabulary are spread over it (Megatron-LM, Shoeybi et al. 2019)."""
    expert: int = 1
    """Experts are spread over it, and tokens sent to them (GShard, Lepikhin et al. 2020)."""
    sequence: int = 1
    """Positions of a row are spread over it (context parallelism). Attention exchanges them for heads where it divides those of queries and
    keys (DeepSpeed-Ulysses, Jacobs et al. 2023), else keys and values are gathered (Llama 3, 2024, section 3.3.2)."""

    def __post_init__(self) -> None:
        check_types(self, "mesh")
        sizes = asdict(self)
        for name, size in sizes.items():
            require(size > 0 or size == -1, f"mesh.{name} must be positive, or -1 for the rest, got {size}")
        rest = [name for name, size in sizes.items() if size == -1]
        require(len(rest) < 2, f"mesh.{' and mesh.'.join(rest)} cannot all be -1, the rest; give all but one")
