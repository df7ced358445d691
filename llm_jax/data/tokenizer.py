"""Text to token ids and back: plain bytes, or a SentencePiece model with byte fallback."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from llm_jax.settings import BadInput

SAMPLE_CHARACTERS = 20_000_000
"""SentencePiece is trained on this much text from the start of the shuffled documents; its own sampling is not deterministic."""


PLACEHOLDER = "<|media|>"
"""A control piece, which no text is ever encoded to, of SentencePiece models for texts with media."""


class Tokenizer(Protocol):
    """Ids are in [0, vocab_size); `bos` begins each document and is never part of one, nor is `pad`, which fills rows of pairs, nor
    `media`, the placeholder of pictures and sounds."""

    vocab_size: int
    bos: int
    pad: int
    media: int

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text; ids of control tokens are left out, broken UTF-8 becomes U+FFFD."""

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int32 of shape V: what bits per byte divides by."""

    def sha256(self) -> str:
        """Hash of what determines the ids."""


class Bytes:
    """One token a UTF-8 byte. 0xFF begins a document, 0xFE pads, 0xFD is for media; UTF-8 uses none of them: 256 ids are enough."""

    vocab_size = 256
    bos, pad, media = 0xFF, 0xFE, 0xFD

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """A byte an id; half of a surrogate pair, which UTF-8 cannot write, becomes "?"."""
        return [np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """As in Tokenizer; ids from 0xF8, which no UTF-8 has, are left out."""
        return bytes(i for i in ids if i < 0xF8).decode("utf-8", "replace")

    def token_bytes(self) -> np.ndarray:
        """One each, and none for bos, pad and media."""
        sizes = np.ones(256, np.int32)
        sizes[[self.bos, self.pad, self.media]] = 0
        return sizes

    def sha256(self) -> str:
        """Of its name: nothing was learnt."""
        return hashlib.sha256(b"bytes").hexdigest()


class SentencePiece:
    """A SentencePiece model (Kudo and Richardson 2018); encoding then decoding returns the text unchanged.

    One exception: SentencePiece writes a space as U+2581, so that this character in a text comes back as a space.
    """

    def __init__(self, model: bytes):
        import sentencepiece

        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        self.bos = self._processor.bos_id()
        self.pad = self._processor.unk_id()  # no text has it: what is in no piece becomes bytes
        self.media = self._processor.piece_to_id(PLACEHOLDER)  # unk, where it was trained without

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32, without bos."""
        return [np.asarray(ids, np.int32) for ids in self._processor.encode(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """As in Tokenizer; pad is left out too."""
        text = [int(i) for i in ids]
        return self._processor.decode([i for i in text if i != self.pad and not self._processor.is_control(i)])

    @functools.cached_property
    def _pieces(self) -> list[tuple[str, float]]:
        return [(self._processor.id_to_piece(i), self._processor.get_score(i)) for i in range(self.vocab_size)]

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each piece, one for a byte, none for control tokens and pad."""

        def size(i: int, piece: str) -> int:
            if self._processor.is_control(i) or self._processor.is_unknown(i):
                return 0
            return 1 if self._processor.is_byte(i) else len(piece.replace("\u2581", " ").encode())

        return np.asarray([size(i, piece) for i, (piece, _) in enumerate(self._pieces)], np.int32)

    def sha256(self) -> str:
        """Of the pieces and their scores: the file itself differs between runs that learn the same pieces."""
        return hashlib.sha256(json.dumps(self._pieces).encode()).hexdigest()


def train(
    kind: Literal["bpe", "unigram"], vocab_size: int, documents: Iterable[str], media: bool = False
) -> SentencePiece:
    """A SentencePiece model of exactly `vocab_size` pieces, 256 of them single bytes, and one the placeholder of media where texts have
    any; nothing is normalised away."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(documents),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            control_symbols=[PLACEHOLDER] if media else [],
            unk_id=0,
            bos_id=1,
            eos_id=-1,
            pad_id=-1,
            num_threads=2,
            minloglevel=2,
        )
    except (
        RuntimeError,
        OSError,
    ) as error:  # "INTERNAL: file(line) [condition] Reason, often with the nearest size that fits."
        reason = str(error).strip().splitlines()[-1].rsplit("] ", 1)[-1]
        raise BadInput(f"SentencePiece cannot learn model.vocab_size={vocab_size} {kind} pieces: {reason}") from error
    return SentencePiece(model.getvalue())


def _lines(documents: Iterable[str]) -> Iterator[str]:
    # SentencePiece passes over sentences of more than 4,192 bytes, so that long lines are cut.
    left = SAMPLE_CHARACTERS
    for text in documents:
        for line in text.split("\n"):
            for start in range(0, len(line), 1000):
                yield line[start : start + 1000]
        left -= len(text)
        if left < 0:
            return


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes folder/tokenizer.model for a SentencePiece tokenizer; bytes need no file."""
    from llm_jax import files

    if isinstance(tokenizer, SentencePiece):
        files.write_atomic(folder / "tokenizer.model", tokenizer.model)


def load(folder: Path, kind: str) -> Tokenizer:
    """The tokenizer that `save` left in the folder; kind is "bytes", "bpe" or "unigram"."""
    return Bytes() if kind == "bytes" else SentencePiece((folder / "tokenizer.model").read_bytes())
