"""n-gram counts against Chen and Goodman's formulas in dictionaries, one probability at a time."""

import itertools
from collections import Counter, defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config import Model
from llm_jax.generation import sampling
from llm_jax.models import families, ngram

BOS, VOCAB = 0, 7


def rows(seed: int = 0, shape=(60, 13)) -> np.ndarray:
    """Skewed tokens in which what follows depends on the two before, with documents that begin and end."""
    rng = np.random.default_rng(seed)
    table = rng.dirichlet([0.25] * VOCAB, size=(VOCAB, VOCAB))
    tokens = rng.integers(VOCAB, size=shape).astype(np.int32)
    for row, t in itertools.product(range(shape[0]), range(2, shape[1])):
        tokens[row, t] = rng.choice(VOCAB, p=table[tokens[row, t - 2], tokens[row, t - 1]])
    return tokens


class Reference:
    """Interpolated modified Kneser-Ney from Chen and Goodman 1998, equations 24 to 26, with dictionaries of tuples.

    Where the grams are cut at document starts, those that begin one keep their counts, as those with <s> do in the literature.
    """

    def __init__(self, tokens_RxT: np.ndarray, order: int, bos: int | None):
        self.bos, self.order = bos, order
        seen: dict[int, Counter] = {k: Counter() for k in range(1, order + 1)}
        for row in tokens_RxT.tolist():
            for t in range(1, len(row)):
                context = self.context(row[:t])
                for k in range(1, min(order, len(context) + 1) + 1):
                    seen[k][(*context[len(context) - k + 1 :], row[t])] += 1
        self.counts = {order: dict(seen[order])}
        for k in range(1, order):
            before = defaultdict(set)
            for gram in seen[k + 1]:
                before[gram[1:]].add(gram[0])
            self.counts[k] = {
                gram: times if bos is not None and k > 1 and gram[0] == bos else len(before[gram])
                for gram, times in seen[k].items()
            }
        self.discounts = {k: self.discount(list(counts.values())) for k, counts in self.counts.items()}

    def context(self, before: list[int]) -> list[int]:
        if self.bos is not None and self.bos in before:
            return before[len(before) - 1 - before[::-1].index(self.bos) :]
        return before

    @staticmethod
    def discount(counts: list[int]) -> list[float]:
        n = [counts.count(times) for times in range(5)]
        if not all(n[1:]):
            return [0, 0.5, 1, 1.5]
        y = n[1] / (n[1] + 2 * n[2])
        found = [0, *(i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3))]
        return found if all(0 <= d <= i for i, d in enumerate(found)) else [0, 0.5, 1, 1.5]

    def probability(self, before: list[int], token: int) -> float:
        context = self.context(before)
        p = 1 / VOCAB
        for k in range(1, min(self.order, len(context) + 1) + 1):
            h = tuple(context[len(context) - k + 1 :])
            following = {gram[-1]: a for gram, a in self.counts[k].items() if gram[:-1] == h}
            total = sum(following.values())
            if total:
                lost = {w: self.discounts[k][min(a, 3)] for w, a in following.items()}
                kept = following.get(token, 0) - lost.get(token, 0)
                p = kept / total + sum(lost.values()) / total * p
        return p


CASES = pytest.mark.parametrize(("order", "bos"), [(1, None), (2, None), (3, None), (5, None), (2, BOS), (4, BOS)])


def segments(tokens_RxT, bos):
    return None if bos is None else np.cumsum(tokens_RxT[:, :-1] == bos, axis=1, dtype=np.int32)


@CASES
def test_probabilities_are_those_of_the_formulas(order, bos):
    """A wrong discount or a raw count where a continuation count belongs costs percents of a baseline that all are held to."""
    train, held_out = rows(0), rows(1, (8, 13))
    reference = Reference(train, order, bos)
    params = ngram.count(Model(vocab_size=VOCAB, ngram_order=order, family="ngram"), train, bos)
    expected = [[reference.probability(row[:t], row[t]) for t in range(1, len(row))] for row in held_out.tolist()]
    actual = ngram.token_log_probs(params, held_out, segments(held_out, bos))
    np.testing.assert_allclose(np.exp(actual), expected, rtol=1e-12)
    assert ngram.num_counts(params) == sum(a > 0 for counts in reference.counts.values() for a in counts.values())


def test_discounts_are_those_of_the_equation_where_it_can_be_used():
    """Guards the tests above and below: with the fallback everywhere they would say nothing of equation 26."""
    params = ngram.count(Model(vocab_size=VOCAB, ngram_order=5, family="ngram"), rows())
    found = [ngram.discounts(level.count_G) for level in params]
    assert found[0] == ngram.FALLBACK
    assert ngram.FALLBACK not in found[2:]
    assert ngram.discounts(np.repeat([1, 2, 3, 4], [8, 4, 2, 1])) == (0.5, 1.25, 2.0)


@CASES
def test_probabilities_of_any_context_sum_to_one(order, bos):
    """A distribution that sums to more reaches any loss; contexts never seen are contexts too."""
    train = rows(0, (20, 9))
    params = ngram.count(Model(vocab_size=VOCAB, ngram_order=order, family="ngram"), train, bos)
    contexts = np.random.default_rng(3).integers(VOCAB, size=(100, 6)).astype(np.int32)
    segment = None if bos is None else np.cumsum(contexts == bos, axis=1)
    log_p = ngram.log_probs(params, contexts, segment)
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=1e-12)
    taken = np.take_along_axis(log_p[:, :-1], contexts[:, 1:, None].astype(np.int64), axis=-1)[..., 0]
    np.testing.assert_allclose(
        taken, ngram.token_log_probs(params, contexts, None if segment is None else segment[:, :-1]), rtol=1e-10
    )


def test_counts_come_back_from_disk(tmp_path):
    params = ngram.count(Model(vocab_size=VOCAB, ngram_order=4, family="ngram"), rows())
    ngram.save(params, tmp_path / "counts.npz")
    jax.tree.map(np.testing.assert_array_equal, params, ngram.load(tmp_path / "counts.npz"))


def test_before_anything_is_counted_all_tokens_are_alike():
    cfg = Model(vocab_size=VOCAB, ngram_order=3, family="ngram")
    np.testing.assert_allclose(ngram.log_probs(families.init(cfg, jax.random.key(0)), rows()), -np.log(VOCAB))


@pytest.mark.parametrize("order", [1, 2, 4])
def test_a_cache_and_the_compiled_generation_change_nothing(order):
    """The same interface as the other families, inside of jit too."""
    cfg = Model(vocab_size=VOCAB, ngram_order=order, family="ngram")
    params, text_BxT = ngram.count(cfg, rows()), rows(2, (3, 8))
    whole = families.apply(cfg, params, text_BxT)
    np.testing.assert_allclose(whole, ngram.log_probs(params, text_BxT), rtol=1e-5)
    cache, logits = families.init_cache(cfg, 3, 8), []
    for start, end in [(0, 3), (3, 4), (4, 5), (5, 8)]:
        step, cache = families.apply(cfg, params, text_BxT[:, start:end], cache=cache)
        logits.append(step)
    np.testing.assert_allclose(np.concatenate(logits, axis=1), whole, rtol=1e-5)
    fast = sampling.generate(cfg, params, jnp.asarray(text_BxT), jax.random.key(0), num_tokens=4, temperature=0)
    for _ in range(4):
        best = ngram.log_probs(params, text_BxT)[:, -1].argmax(-1).astype(np.int32)
        text_BxT = np.concatenate([text_BxT, best[:, None]], axis=1)
    np.testing.assert_array_equal(fast, text_BxT[:, 8:])
