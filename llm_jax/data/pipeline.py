"""Batches of token rows, read through Grain: which rows make up step n depends on the seed and n alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain.python as grain
import numpy as np

from llm_jax.data import rows
from llm_jax.data.prepare import Prepared


class Windows:
    """Rows of `context` + 1 tokens cut from the longer stored rows. A batch: {"tokens"}, and "media" of rows that have them."""

    def __init__(self, sources: Sequence[Any], row_tokens: int, context: int):
        self._sources, self._context = sources, context
        self._per_row = row_tokens // context
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1]) * self._per_row

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Several rows at once, stacked: int32 tokens_BxT. Where the stored rows are in memory, as one step of NumPy for each part."""
        part_B, row_B, start_B = self._located(np.asarray(indices, np.int64))
        column_T = np.arange(self._context + 1)
        found: dict[str, np.ndarray] = {}
        for part in np.unique(part_B):
            mine_B = part_B == part
            columns, at_B = rows.stacked(self._sources[part], row_B[mine_B])
            place_BxT = start_B[mine_B, None] + column_T
            new = {"tokens": columns["tokens"][at_B[:, None], place_BxT].astype(np.int32)}
            if "media" in columns:
                new["media"] = columns["media"][at_B]
            for name, x in new.items():
                found.setdefault(name, np.empty((len(part_B), *x.shape[1:]), x.dtype))[mine_B] = x
        return found

    def document(self, index: int, bos: int) -> int:
        """The number of the document that a row begins in; see rows.pair."""
        part, row, start = (int(x[0]) for x in self._located(np.asarray([index])))
        stored = self._sources[part][row]
        return int(stored["document"]) + int((stored["tokens"][: start + 1] == bos).sum())

    def _located(self, index_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(part, stored row of it, first token of that) of rows."""
        row_B, offset_B = np.divmod(index_B, self._per_row)
        part_B = np.searchsorted(self._ends, row_B, "right")
        return part_B, row_B - np.concatenate([[0], self._ends])[part_B], offset_B * self._context


def num_windows(prepared: Prepared, context: int) -> int:
    """Training rows of an epoch."""
    return prepared.tokens["train"] // context


BLOCK = 1024
"""Places of an epoch's order that are found at a time."""


@functools.lru_cache
def _order(number: int, seed: int) -> grain.MapDataset:
    """Numbers of so many rows, shuffled anew each epoch, without an end."""
    return grain.MapDataset.range(number).seed(seed).shuffle().repeat()


@functools.lru_cache(maxsize=4096)
def _shuffled(number: int, seed: int, block: int) -> np.ndarray:
    """A block of `_order`: kept, as the trials of a sweep read one order, and a place of it takes Grain 10 us, a row a fourth of that."""
    order = _order(number, seed)
    return np.asarray([order[place] for place in range(block * BLOCK, (block + 1) * BLOCK)], np.int32)


def train_iterator(
    prepared: Prepared, context: int, rows_per_step: int, seed: int, own: Sequence[int] | None = None, step: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches {"tokens": tokens_BxT, "media": items_BxIx of rows that have them} from `step` on, shuffled anew each epoch.

    Of each step's rows, those numbered in `own`, a host's share, and no others are read. Row r of step n is one row of the data, whoever
    reads it and wherever it was begun: there is no state to save, and the hosts of a restart may be fewer or more.
    """
    windows = Windows(prepared.rows("train"), prepared.row_tokens, context)
    number = len(windows)
    own_B = np.arange(rows_per_step) if own is None else np.asarray(own)

    def batch(n: int) -> dict[str, np.ndarray]:
        place_B = n * rows_per_step + own_B
        first, last = place_B.min() // BLOCK, place_B.max() // BLOCK
        order = np.concatenate([_shuffled(number, seed, block) for block in range(first, last + 1)])
        return windows.batch(order[place_B - first * BLOCK])

    dataset = grain.MapDataset.range(step, len(_order(number, seed)) // rows_per_step).map(batch)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)))


def segments(tokens_BxT: np.ndarray, bos: int) -> np.ndarray:
    """Numbers the documents of the inputs of each row, int32 from 0."""
    return np.cumsum(tokens_BxT[..., :-1] == bos, axis=-1, dtype=np.int32)


class EvalSet(NamedTuple):
    """The fixed held-out rows, with the document that each begins in, and their media where they have any."""

    tokens_BxT: np.ndarray
    document_B: np.ndarray
    items_BxIx: np.ndarray | None = None


def eval_set(prepared: Prepared, context: int, max_tokens: int) -> EvalSet:
    """About `max_tokens` of the held-out split, spread evenly over it; all of it where it is smaller."""
    windows = Windows(prepared.rows("validation"), prepared.row_tokens, context)
    count = max(1, min(len(windows), max_tokens // context))
    indices = np.linspace(0, len(windows) - 1, count).astype(int)
    held, bos = windows.batch(indices), prepared.tokenizer().bos
    document_B = np.asarray([windows.document(int(index), bos) for index in indices])
    return EvalSet(held["tokens"], document_B, held.get("media"))
