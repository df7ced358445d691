"""Unlimited text whose entropy rate is known exactly: a sparse Markov source of order 7 with Zipf-distributed contexts.

A document is lines of seven letters: a key of three and an answer of four.

    qnkTREB
    zzaLLOW

Keys are drawn independently by a Zipf law, p_k ~ k^-s, and spelled by a fixed random injection; each answer letter is fixed by
its key, but with probability `noise` drawn uniformly. After each line the document ends with probability END. As in the
theory of Hutter 2021 («Learning Curve Theory») and Michaud et al. 2023 («The Quantization Model of Neural Scaling»), a model
with room for n answers loses what the tail beyond n holds, ~ n^-(s-1), and one that saw D lines loses what was never seen,
~ D^-(1-1/s): power laws in both, above a floor that is known.

The floor is exact for the tokenizer "bytes" where data.context is a multiple of 8: rows then begin at a line's start, and nothing
before that start says anything about what follows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llm_jax.config import Synthetic

LETTERS = 26
KEY_LETTERS, ANSWER_LETTERS = 3, 4
LINE = KEY_LETTERS + ANSWER_LETTERS + 1
"""Tokens of a line with what ends it: a newline, or the mark of the next document."""
END = 1 / 128
_BLOCK = 64
"""Documents drawn at once: a document depends on its block alone."""


def key_probabilities(cfg: Synthetic) -> np.ndarray:
    """The Zipf law over the keys."""
    p = np.arange(1, cfg.keys + 1, dtype=np.float64) ** -cfg.exponent
    return p / p.sum()


def entropy_rate(cfg: Synthetic) -> float:
    """Nats a token: what no model can go below, and what one with enough room and data reaches."""
    p = key_probabilities(cfg)
    other = cfg.noise / LETTERS
    letter = _plogp(1 - cfg.noise + other) + (LETTERS - 1) * _plogp(other)
    end = _plogp(END) + _plogp(1 - END)
    return float(-((p * np.log(p)).sum() + ANSWER_LETTERS * letter + end) / LINE)


def _plogp(p: float) -> float:
    return p * np.log(p) if p > 0 else 0.0


def documents(cfg: Synthetic) -> Iterator[tuple[str, str]]:
    """(id, text) of each document; the same for the same settings on every machine."""
    table = np.random.Generator(np.random.PCG64([cfg.seed, 0]))
    spelling = table.permutation(LETTERS**KEY_LETTERS)[: cfg.keys]
    key_letters = np.stack([spelling // LETTERS**i % LETTERS for i in range(KEY_LETTERS)], axis=1) + ord("a")
    answers = table.integers(0, LETTERS, (cfg.keys, ANSWER_LETTERS))
    cumulative = np.cumsum(key_probabilities(cfg))
    cumulative[-1] = 1.0
    for first in range(0, cfg.documents, _BLOCK):
        draw = np.random.Generator(np.random.PCG64([cfg.seed, 1, first]))
        lengths = draw.geometric(END, _BLOCK)
        keys = np.searchsorted(cumulative, draw.random(lengths.sum()), side="right")
        noisy = draw.random((len(keys), ANSWER_LETTERS)) < cfg.noise
        letters = np.where(noisy, draw.integers(0, LETTERS, noisy.shape), answers[keys]) + ord("A")
        lines = np.concatenate([key_letters[keys], letters, np.full((len(keys), 1), ord("\n"))], axis=1).astype(
            np.uint8
        )
        ends = np.cumsum(lengths)
        for i in range(min(_BLOCK, cfg.documents - first)):
            yield f"{first + i}", lines[ends[i] - lengths[i] : ends[i]].tobytes()[:-1].decode()
