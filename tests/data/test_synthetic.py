"""The synthetic source: what is claimed of its entropy is what its text has."""

import math

import numpy as np
import pytest

from llm_jax.config import Synthetic
from llm_jax.data import synthetic


def lines_of(cfg):
    return [text.split("\n") for _, text in synthetic.documents(cfg)]


def test_the_entropy_rate_is_that_of_the_text():
    """Scores generated text by the generator's own probabilities: their mean is the entropy, up to sampling error.

    The probabilities are written out here a second time, a letter at a time, with nothing taken from `entropy_rate`.
    """
    cfg = Synthetic(keys=50, exponent=1.2, noise=0.3, documents=600, seed=3)
    documents = lines_of(cfg)
    everything = [line for lines in documents for line in lines]
    weights = [(k + 1) ** -cfg.exponent for k in range(cfg.keys)]
    # Rank keys by how often they were drawn; answers by their majority letter: at this size both are right for nearly all.
    counts: dict[str, int] = {}
    for line in everything:
        counts[line[:3]] = counts.get(line[:3], 0) + 1
    ranked = sorted(counts, key=lambda key: -counts[key])
    probability = {key: weights[rank] / sum(weights) for rank, key in enumerate(ranked)}
    answers = {}
    for key in counts:
        mine = [line[3:] for line in everything if line[:3] == key]
        answers[key] = [max(set(column), key=column.count) for column in zip(*mine, strict=True)]
    nats, tokens = [], 0
    for lines in documents:
        for i, line in enumerate(lines):
            value = -math.log(probability[line[:3]])
            for letter, right in zip(line[3:], answers[line[:3]], strict=True):
                value -= math.log((1 - cfg.noise) * (letter == right) + cfg.noise / 26)
            value -= math.log(1 / 128 if i == len(lines) - 1 else 127 / 128)
            nats.append(value)
            tokens += 8
    measured, error = sum(nats) / tokens, np.std(nats) / len(nats) ** 0.5 / 8
    assert abs(measured - synthetic.entropy_rate(cfg)) < 4 * error
    assert error < 0.005


def test_entropy_of_cases_known_by_hand():
    """Two keys of equal chance and no noise: one bit a line, and the end of a document."""
    end = -(math.log(1 / 128) / 128 + math.log(127 / 128) * 127 / 128)
    cfg = Synthetic(keys=2, exponent=1e-12, noise=0.0)
    assert synthetic.entropy_rate(cfg) == pytest.approx((math.log(2) + end) / 8, rel=1e-9)
    assert synthetic.entropy_rate(Synthetic(noise=0.5)) > synthetic.entropy_rate(Synthetic(noise=0.1))


def test_documents_are_lines_of_eight_tokens_and_reproducible():
    """Rows of a context that 8 divides then begin at a line's start, which is what makes the floor exact."""
    cfg = Synthetic(keys=1000, documents=130, seed=1)
    first, second = list(synthetic.documents(cfg)), list(synthetic.documents(cfg))
    assert first == second
    assert len(first) == 130
    for _, text in first:
        assert all(len(line) == 7 and line[:3].islower() and line[3:].isupper() for line in text.split("\n"))
        assert (len(text) + 1) % synthetic.LINE == 0
    other = list(synthetic.documents(Synthetic(keys=1000, documents=130, seed=2)))
    assert other != first
    longer = list(synthetic.documents(Synthetic(keys=1000, documents=200, seed=1)))
    assert longer[:130] == first, "more documents must not change those before"


def test_contexts_follow_the_zipf_law():
    """The exponent of the tail is what the exponents of the loss come from."""
    cfg = Synthetic(keys=200, exponent=1.5, documents=1000)
    counts: dict[str, int] = {}
    for lines in lines_of(cfg):
        for line in lines:
            counts[line[:3]] = counts.get(line[:3], 0) + 1
    total = sum(counts.values())
    seen = np.sort(np.asarray(list(counts.values())))[::-1][:20] / total
    expected = synthetic.key_probabilities(cfg)[:20]
    np.testing.assert_allclose(seen, expected, atol=5 * np.sqrt(expected.max() / total))
