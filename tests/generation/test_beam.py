"""Beam search against brute force, greedy search and the formula of its length penalty."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config import Model
from llm_jax.generation import sampling
from llm_jax.generation.beam import beam_search, length_penalty
from llm_jax.models import families

VOCAB, END, P, STEPS = 3, 2, 3, 3
BASE = Model(vocab_size=VOCAB, num_layers=1, d_model=8, num_heads=1, tie_embeddings=False)
MODELS = {
    "encoder_decoder": replace(BASE, family="encoder_decoder"),
    "seq2seq_rnn": replace(BASE, family="seq2seq_rnn"),
    "transformer": BASE,
    "lstm": replace(BASE, family="lstm"),
}
SEARCHED = [("encoder_decoder", 1.5), ("seq2seq_rnn", 1.5), ("transformer", 1.5), ("encoder_decoder", 0.0)]
pytestmark = pytest.mark.usefixtures("quick_compilation")  # most of this file is compiling
every_model = pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
PROMPT = np.asarray([[0, 1, 2, 0], [1, 1, 0, 1], [2, 1, 0, 2]], np.int32)
SEGMENTS = np.asarray([[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]], np.int32)
"""The last prompt is a token shorter, behind padding."""


@functools.lru_cache
def random_params(cfg: Model):
    params = jax.jit(functools.partial(families.init, cfg))(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        tree, [x + 0.5 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def search(cfg, params, **arguments):
    settings = {"num_tokens": STEPS, "end": END, "segment_BxT": jnp.asarray(SEGMENTS), "prefix": P} | arguments
    found = beam_search(cfg, params, jnp.asarray(PROMPT), **settings)
    return jax.tree.map(np.asarray, found)


def continuations() -> np.ndarray:
    """Every sequence that ends with END or is cut at STEPS, filled up with END."""
    found = {seq[: seq.index(END) + 1] if END in seq else seq for seq in itertools.product(range(VOCAB), repeat=STEPS)}
    return np.asarray([[*seq, *(STEPS - len(seq)) * (END,)] for seq in sorted(found)], np.int32)


def brute_force(cfg, params, alpha):
    """(sequences SxC, scores BxS) of all continuations, each by a full forward pass."""
    sequences = continuations()
    rows = len(PROMPT)
    text = np.concatenate([np.repeat(PROMPT, len(sequences), axis=0), np.tile(sequences, (rows, 1))], axis=1)
    segment = np.pad(np.repeat(SEGMENTS, len(sequences), axis=0), ((0, 0), (0, STEPS)))
    logits = families.apply(cfg, params, jnp.asarray(text), jnp.asarray(segment), prefix=P)
    log_p = np.asarray(jax.nn.log_softmax(logits)[:, :-1], np.float64)
    picked = np.take_along_axis(log_p, text[:, P + 1 :, None], -1)[..., 0]
    length = np.where((sequences == END).any(1), (sequences == END).argmax(1) + 1, STEPS)
    counted = np.where(np.arange(STEPS) < np.tile(length, rows)[:, None], picked, 0).sum(1)
    return sequences, counted.reshape(rows, -1) / ((5 + length) / 6) ** alpha


@pytest.mark.parametrize(
    ("name", "alpha"),
    [("lstm", 1.5), *(pytest.param(*case, marks=pytest.mark.slow) for case in SEARCHED)],
)
def test_a_beam_of_all_sequences_finds_the_best(name, alpha):
    """As wide as there are continuations, the search is exhaustive: the best ones, in their order, with their scores."""
    cfg = MODELS[name]
    params = random_params(cfg)
    ids_BxWxC, score_BxW = search(cfg, params, width=VOCAB**STEPS, alpha=alpha)
    sequences, scores = brute_force(cfg, params, alpha)
    order = np.argsort(-scores, axis=1)[:, :5]
    np.testing.assert_allclose(score_BxW[:, :5], np.take_along_axis(scores, order, axis=1), rtol=2e-5, atol=1e-5)
    np.testing.assert_array_equal(ids_BxWxC[:, 0], sequences[order[:, 0]])
    assert (score_BxW[:, len(sequences) :] == np.float32(-1e30)).all(), "there are no more"


@every_model
def test_width_one_is_greedy(cfg):
    """It stops at the first end that is likeliest, though a longer text might score better."""
    cfg = replace(cfg, vocab_size=12)
    params = random_params(cfg)
    ids_BxC = search(cfg, params, width=1, num_tokens=12)[0][:, 0]
    greedy = np.array(
        sampling.generate(
            cfg,
            params,
            jnp.asarray(PROMPT),
            jax.random.key(0),
            num_tokens=12,
            temperature=0,
            segment_BxT=jnp.asarray(SEGMENTS),
            prefix=P,
        )
    )
    after = np.cumsum(greedy == END, axis=1) > 0
    np.testing.assert_array_equal(ids_BxC, np.where(after, END, greedy))
    assert len({tuple(row) for row in ids_BxC}) > 1, "or the test shows nothing"


def test_scores_are_those_of_the_sequences():
    """Whatever the width, a hypothesis carries the log-probability of its own tokens over its own penalty, best first."""
    cfg = MODELS["encoder_decoder"]
    params = random_params(cfg)
    ids_BxWxC, score_BxW = search(cfg, params, width=3, alpha=0.6)
    sequences, scores = brute_force(cfg, params, 0.6)
    number = {tuple(seq): i for i, seq in enumerate(sequences.tolist())}
    for row, (hypotheses, found) in enumerate(zip(ids_BxWxC.tolist(), score_BxW, strict=True)):
        assert (np.diff(found) <= 0).all()
        assert len({tuple(seq) for seq in hypotheses}) == 3
        expected = [scores[row, number[tuple(seq)]] for seq in hypotheses]
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)


def test_a_bad_end_does_not_stop_a_good_hypothesis():
    """Found on trained models: where the first token is all but certain, a beam that stops once W hypotheses have ended, however
    unlikely, ends before the best one does. Here each token is followed by the next with p = 0.97."""
    vocab = 8
    cfg = Model(
        family="feedforward", vocab_size=vocab, d_model=vocab, d_ff=vocab, ngram_order=2, direct_connections=True
    )
    params = jax.tree.map(jnp.zeros_like, jax.jit(functools.partial(families.init, cfg))(jax.random.key(0)))
    params["embed"] = jnp.eye(vocab) / vocab**0.5
    likely = np.log(0.97 / 0.03 * (vocab - 1)) * np.eye(vocab)[[*range(1, vocab), 0]]
    params["direct"] = jnp.asarray(likely[None], jnp.float32)
    ids_BxWxC, score_BxW = beam_search(cfg, params, jnp.zeros((1, 1), jnp.int32), num_tokens=12, width=4, end=7)
    np.testing.assert_array_equal(ids_BxWxC[0, 0], [1, 2, 3, 4, 5, 6, *6 * (7,)])
    assert float(score_BxW[0, 0]) == pytest.approx(7 * np.log(0.97) / 2**0.6, rel=1e-5)


def test_rows_do_not_touch_each_other():
    """A row that is ready early waits for the others unchanged."""
    cfg = MODELS["seq2seq_rnn"]
    params = random_params(cfg)
    ids_BxWxC, score_BxW = search(cfg, params, width=2, num_tokens=9)
    for row in range(len(PROMPT)):
        alone = beam_search(
            cfg,
            params,
            jnp.asarray(PROMPT[row : row + 1]),
            num_tokens=9,
            end=END,
            width=2,
            segment_BxT=jnp.asarray(SEGMENTS[row : row + 1]),
            prefix=P,
        )
        np.testing.assert_array_equal(ids_BxWxC[row], alone[0][0])
        np.testing.assert_allclose(score_BxW[row], alone[1][0], rtol=1e-5)


def test_the_length_penalty_is_that_of_wu_et_al():
    """Eq. 14: 1 for one token, and without alpha for all."""
    lengths = jnp.asarray([1, 7, 19])
    np.testing.assert_allclose(length_penalty(lengths, 0.6), [1, 2**0.6, 4**0.6], rtol=1e-6)
    np.testing.assert_array_equal(length_penalty(lengths, 0.0), [1, 1, 1])
