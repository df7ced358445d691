"""n-gram language models with interpolated modified Kneser-Ney smoothing (Kneser and Ney 1995; Chen and Goodman 1998, section 3).

Not trained: counted. Of a context h = (h', the rest) and a next token w,

    p(w | h) = max(a(h w) - D(a(h w)), 0) / sum_w a(h w) + gamma(h) p(w | the rest),     gamma(h) = sum_w D(a(h w)) / sum_w a(h w)

and p = 1 / V below the unigrams. a is the count for the longest n-grams and those that begin a document; for others the number of
different tokens seen before them. D is D_1, D_2 or D_3+ by a (Chen and Goodman 1998, eq. 26), one set for each length.

The counts are a trie in arrays of int32, a `Level` for each length k. A k-gram is known by its number: its place in the level, where
the k-grams of one context lie side by side, by their last token. Letters beside those of config.py: R rows, G k-grams, C contexts,
which are the (k-1)-grams.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import files
from llm_jax.config import Model
from llm_jax.models.feedforward import NOTHING, Cache
from llm_jax.settings import BadInput

FALLBACK = (0.5, 1.0, 1.5)
"""D_1, D_2 and D_3+ where the counts of counts leave them undefined or out of range, as among the 256 unigrams of bytes."""


class Level(NamedTuple):
    """All k-grams of one k, of NumPy arrays, or of JAX's inside a compiled function."""

    first_C: np.ndarray
    """The k-grams that continue context c are first_C[c] to first_C[c + 1]; one entry more than contexts."""
    token_G: np.ndarray
    count_G: np.ndarray
    """a: what the formula discounts, not always the times seen."""
    share_G: np.ndarray
    """(a - D(a)) / sum a, float64."""
    rest_C: np.ndarray
    """gamma, float64; 1 for a context that nothing was seen to follow."""


Params = tuple[Level, ...]


def discounts(count_G: np.ndarray) -> tuple[float, float, float]:
    """D_1, D_2 and D_3+ of Chen and Goodman 1998, eq. 26, from the k-grams counted once to four times; else FALLBACK."""
    n1, n2, n3, n4 = (int((count_G == times).sum()) for times in (1, 2, 3, 4))
    if not n1 * n2 * n3 * n4:
        return FALLBACK
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return found if all(0 <= d <= i for i, d in enumerate(found, 1)) else FALLBACK


def _level(first_C: np.ndarray, token_G: np.ndarray, count_G: np.ndarray) -> Level:
    discount_G = np.array([0.0, *discounts(count_G)])[np.minimum(count_G, 3)]
    sums = np.zeros((2, len(token_G) + 1))  # running sums, so that contexts without k-grams sum to zero
    np.cumsum([count_G, discount_G], axis=1, out=sums[:, 1:])
    total_C, lost_C = sums[:, first_C[1:]] - sums[:, first_C[:-1]]
    seen_C = total_C > 0
    rest_C = np.where(seen_C, lost_C / np.where(seen_C, total_C, 1), 1.0)
    total_G = np.repeat(total_C, np.diff(first_C))
    share_G = (count_G - discount_G) / np.where(total_G > 0, total_G, 1)
    return Level(first_C.astype(np.int32), token_G.astype(np.int32), count_G.astype(np.int32), share_G, rest_C)


def count(cfg: Model, tokens_RxT: np.ndarray, bos: int | None = None) -> Params:
    """Counts the k-grams up to n that end at each token of a row but the first, within the row; with `bos`, within the document too.

    Takes some 120 bytes a token while it counts.
    """
    segment_RxT = None if bos is None else np.cumsum(tokens_RxT == bos, axis=1)
    vocab = cfg.vocab_size
    number_RxT = tokens_RxT.astype(np.int32)
    token_G, first_C = np.arange(vocab), np.array([0, vocab])
    count_G = np.bincount(tokens_RxT[:, 1:].ravel(), minlength=vocab)
    levels: list[Level] = []
    for k in range(2, cfg.ngram_order + 1):
        context_RxT = _contexts(number_RxT, segment_RxT, k)
        row_X, t_X = np.nonzero(context_RxT >= 0)  # X: the k-grams as they come
        if not len(row_X):  # no row is that long
            break
        key_X = context_RxT[row_X, t_X].astype(np.int64) * vocab + tokens_RxT[row_X, t_X + 1]
        key_G, number_X, times_G = np.unique(key_X, return_inverse=True, return_counts=True)
        # The (k-1)-gram that ends where a k-gram does is the k-gram without its first token.
        shorter_G = np.empty(len(key_G), np.int32)
        shorter_G[number_X] = number_RxT[row_X, t_X + 1]
        before_G = np.bincount(shorter_G, minlength=len(token_G))
        if bos is not None and k > 2:  # what begins a document has nothing before it
            before_G = np.where(_leading(levels, first_C, bos, vocab), count_G, before_G)
        levels.append(_level(first_C, token_G, before_G))
        first_C = np.searchsorted(key_G // vocab, np.arange(len(token_G) + 1))
        token_G, count_G = key_G % vocab, times_G
        number_RxT = np.full_like(number_RxT, NOTHING)
        number_RxT[row_X, t_X + 1] = number_X
    return (*levels, _level(first_C, token_G, count_G))


def _contexts(number_RxT: np.ndarray, segment_RxT: np.ndarray | None, k: int) -> np.ndarray:
    """The (k-1)-gram before each token but the first, R x T-1; NOTHING where there is none in the row and document.

    `segment_RxT` numbers documents, which begin with their first input; the last column is read by nobody.
    """
    context_RxT = number_RxT[:, :-1].copy()
    if segment_RxT is not None:
        inputs_RxT, reach = segment_RxT[:, : context_RxT.shape[1]], k - 2
        if reach:
            context_RxT[:, :reach] = NOTHING
            context_RxT[:, reach:][inputs_RxT[:, reach:] != inputs_RxT[:, :-reach]] = NOTHING
    return context_RxT


def _leading(levels: list[Level], first_C: np.ndarray, bos: int, vocab: int) -> np.ndarray:
    """Whether each of the k-grams over `first_C`, the level above `levels`, begins with `bos`."""
    begins_G = np.arange(vocab) == bos
    for above_C in [*(level.first_C for level in levels[1:]), first_C]:
        begins_G = np.repeat(begins_G, np.diff(above_C))
    return begins_G


def num_counts(params: Params) -> int:
    """N: the k-grams of all lengths that a count is stored for."""
    return sum(int((level.count_G > 0).sum()) for level in params)


def _find(level: Level, context_X: np.ndarray, token_X: np.ndarray) -> np.ndarray:
    """The number of each k-gram, or NOTHING where it or its context is unknown; by bisection among the k-grams of the context."""
    known_X = (context_X >= 0) & (token_X >= 0)
    context_X = np.where(known_X, context_X, 0)
    low_X, end_X = level.first_C[context_X], level.first_C[context_X + 1]
    high_X = end_X
    for _ in range(int(np.diff(level.first_C).max(initial=0)).bit_length()):
        middle_X = (low_X + high_X) // 2
        less_X = level.token_G[np.minimum(middle_X, len(level.token_G) - 1)] < token_X
        low_X = np.where(less_X & (low_X < high_X), middle_X + 1, low_X)
        high_X = np.where(less_X, high_X, np.maximum(low_X, middle_X))
    found_X = known_X & (low_X < end_X)
    found_X[found_X] = level.token_G[low_X[found_X]] == token_X[found_X]
    return np.where(found_X, low_X, NOTHING)


def token_log_probs(params: Params, tokens_RxT: np.ndarray, segment_RxT: np.ndarray | None = None) -> np.ndarray:
    """log p of each token but the first given those before it in the row, and in the document where segments number the inputs:
    R x T-1, float64."""
    vocab = len(params[0].token_G)
    number_RxT = tokens_RxT.astype(np.int32)
    target_RxT = tokens_RxT[:, 1:]
    p_RxT = np.full(target_RxT.shape, 1.0 / vocab)
    for k, level in enumerate(params, 1):
        context_RxT = np.zeros_like(target_RxT) if k == 1 else _contexts(number_RxT, segment_RxT, k)
        found_RxT = _find(level, context_RxT, target_RxT)
        share_RxT = np.where(found_RxT >= 0, level.share_G[np.maximum(found_RxT, 0)], 0.0)
        p_RxT = np.where(context_RxT >= 0, share_RxT + level.rest_C[np.maximum(context_RxT, 0)] * p_RxT, p_RxT)
        if k > 1:
            number_RxT = np.concatenate([np.full_like(number_RxT[:, :1], NOTHING), found_RxT], axis=1)
    return np.log(p_RxT)


def log_probs(params: Params, tokens_RxT: np.ndarray, segment_RxT: np.ndarray | None = None) -> np.ndarray:
    """log p of every token after each position, given the row and document up to there: RxTxV, float64."""
    rows, length = tokens_RxT.shape
    vocab = len(params[0].token_G)
    number_RxT = np.pad(tokens_RxT.astype(np.int32), ((0, 0), (0, 1)))  # a column more, which is read by nobody
    p_XxV = np.full((rows * length, vocab), 1.0 / vocab)
    for k, level in enumerate(params, 1):
        context_RxT = np.zeros_like(tokens_RxT) if k == 1 else _contexts(number_RxT, segment_RxT, k)
        known_X = np.flatnonzero(context_RxT >= 0)
        context_X = context_RxT.reshape(-1)[known_X]
        p_XxV[known_X] *= level.rest_C[context_X][:, None]
        first_X = level.first_C[context_X].astype(np.int64)
        times_X = level.first_C[context_X + 1] - first_X
        # All k-grams of all contexts, one after another: their starts, and counting up from each.
        gram_Y = np.repeat(first_X - np.cumsum(times_X) + times_X, times_X) + np.arange(times_X.sum())
        p_XxV[np.repeat(known_X, times_X), level.token_G[gram_Y]] += level.share_G[gram_Y]
        if k > 1:
            found_RxT = _find(level, context_RxT[:, :-1], tokens_RxT[:, 1:])
            number_RxT = np.pad(found_RxT, ((0, 0), (1, 1)), constant_values=NOTHING)
    return np.log(p_XxV).reshape(rows, length, vocab)


def save(params: Params, path: Path) -> None:
    """The arrays that cannot be computed from others, compressed."""
    names = ("first_C", "token_G", "count_G")
    f = io.BytesIO()
    np.savez_compressed(f, **{f"{k}/{name}": getattr(level, name) for k, level in enumerate(params) for name in names})
    files.write_atomic(path, f.getvalue())


def load(path: Path) -> Params:
    """The inverse of `save`."""
    with np.load(io.BytesIO(files.read_bytes(path))) as arrays:
        return tuple(
            _level(arrays[f"{k}/first_C"], arrays[f"{k}/token_G"], arrays[f"{k}/count_G"])
            for k in range(len(arrays) // 3)
        )


def init(cfg: Model) -> Params:
    """Before anything is counted: every token is as likely as any other."""
    return count(cfg, np.zeros((1, 1), np.int32))


def apply(
    cfg: Model,
    params: Params,
    tokens_BxT: jax.Array,
    segment_BxT: jax.Array | None = None,
    cache: Cache | None = None,
):
    """Log-probabilities for logits, by NumPy on the host whatever the device; there is no gradient."""
    if cache is not None and segment_BxT is not None:
        raise BadInput("the cache of an n-gram model holds rows of one document each: no segments with it")
    length = tokens_BxT.shape[1]
    all_Bx_ = tokens_BxT if cache is None else jnp.concatenate([cache.tokens_Bx_, jnp.asarray(tokens_BxT)], axis=1)
    shape = jax.ShapeDtypeStruct((*tokens_BxT.shape, cfg.vocab_size), jnp.float32)

    def on_host(params, tokens_Bx_, segment_BxT):
        params, tokens_Bx_, segment_BxT = jax.tree.map(np.asarray, (params, tokens_Bx_, segment_BxT))
        return log_probs(params, tokens_Bx_, segment_BxT)[:, -length:].astype(np.float32)

    logits_BxTxV = jax.pure_callback(on_host, shape, params, all_Bx_, segment_BxT, vmap_method="sequential")
    return logits_BxTxV if cache is None else (logits_BxTxV, Cache(all_Bx_[:, length:]))


def init_cache(cfg: Model, batch: int, length: int = 0, prefix: int = 0) -> Cache:
    """Of the last n - 2 tokens: with the next one they are all that the model sees."""
    return Cache(jnp.full((batch, max(0, cfg.ngram_order - 2)), NOTHING, jnp.int32))
