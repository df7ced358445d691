"""Batches: which rows make up a step depends on the seed and the step alone."""

from collections import Counter

import numpy as np
import pytest

from llm_jax.config import Config, Data
from llm_jax.data import pipeline, prepare

CONTEXT = 64


@pytest.fixture
def prepared(corpus):
    return prepare.prepare(
        Config(data=Data(source="files", files=(f"{corpus}/*",), context=CONTEXT, eval_tokens=1024, val_fraction=0.2))
    )


def take(iterator, steps):
    return [next(iterator)["tokens"] for _ in range(steps)]


def test_an_epoch_shows_every_row_once(prepared):
    """And the next shows them in another order."""
    rows = pipeline.num_windows(prepared, CONTEXT)
    batch = next(size for size in (4, 3, 2, 1) if rows % size == 0)
    iterator = pipeline.train_iterator(prepared, CONTEXT, batch, seed=0)
    first = np.concatenate(take(iterator, rows // batch))
    second = np.concatenate(take(iterator, rows // batch))
    assert first.shape == (rows, CONTEXT + 1)
    assert first.dtype == np.int32
    assert sorted(map(bytes, first)) == sorted(map(bytes, second))
    assert not np.array_equal(first, second)


def test_windows_are_consecutive_cuts_of_the_stream(prepared):
    windows = pipeline.Windows(prepared.rows("train"), prepared.row_tokens, CONTEXT)
    tokens_BxT = windows.batch(range(len(windows)))["tokens"]
    np.testing.assert_array_equal(tokens_BxT[:-1, -1], tokens_BxT[1:, 0])


def test_a_restart_reads_the_very_next_batch(prepared):
    """It knows its step and nothing else: it must neither skip nor repeat a row, also in a later epoch."""
    iterator = pipeline.train_iterator(prepared, CONTEXT, 3, seed=1)
    steps = pipeline.num_windows(prepared, CONTEXT) // 3 + 5
    take(iterator, steps)
    fresh = pipeline.train_iterator(prepared, CONTEXT, 3, seed=1, step=steps)
    np.testing.assert_array_equal(take(fresh, 4), take(iterator, 4))


def test_hosts_share_a_step_without_overlap(prepared):
    """A step is the same rows in the same order however many hosts there are, and each reads its own alone."""
    whole = take(pipeline.train_iterator(prepared, CONTEXT, 4, seed=2), 6)
    for rows in ([[0, 1], [2, 3]], [[0, 2], [1, 3]], [[1], [0, 2, 3]]):
        parts = [take(pipeline.train_iterator(prepared, CONTEXT, 4, 2, share), 6) for share in rows]
        for step in range(6):
            for share, part in zip(rows, parts, strict=True):
                np.testing.assert_array_equal(part[step], whole[step][share])


@pytest.mark.parametrize("hosts", [(1, 2, 4), (4, 1, 3)])
def test_no_row_is_lost_or_repeated_where_the_number_of_hosts_changes(prepared, hosts):
    """Spot machines come back fewer or more: over the restarts an epoch still shows every row as often as it is there, once."""
    rows = pipeline.num_windows(prepared, CONTEXT)
    per_step = 12
    steps, seen = rows // per_step, []
    cuts = [0, steps // 3, steps // 2, steps]
    for count, start, stop in zip(hosts, cuts[:-1], cuts[1:], strict=True):
        for host in range(count):
            own = range(host * per_step // count, (host + 1) * per_step // count)
            iterator = pipeline.train_iterator(prepared, CONTEXT, per_step, 3, own, start)
            seen += [row for batch in take(iterator, stop - start) for row in batch]
    first = pipeline.train_iterator(prepared, CONTEXT, per_step, 3)
    assert Counter(map(bytes, seen)) == Counter(map(bytes, np.concatenate(take(first, steps))))
    windows = pipeline.Windows(prepared.rows("train"), prepared.row_tokens, CONTEXT)
    left = Counter(map(bytes, windows.batch(range(rows))["tokens"])) - Counter(map(bytes, seen))
    assert left.total() == rows - steps * per_step


def test_seeds_differ_and_repeat(prepared):
    a, b, c = (take(pipeline.train_iterator(prepared, CONTEXT, 2, seed), 5) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_segments_number_documents():
    """A row may begin inside a document; each mark of a beginning counts one up."""
    tokens = np.asarray([[5, 6, 255, 7, 255, 255, 8], [255, 1, 2, 3, 4, 5, 6]])
    np.testing.assert_array_equal(pipeline.segments(tokens, 255), [[0, 0, 1, 1, 2, 3], [1, 1, 1, 1, 1, 1]])


def test_the_held_out_set_is_fixed_and_knows_its_documents(prepared):
    """Its clusters are what the standard error stands on: rows of one document share a number, others do not."""
    held = pipeline.eval_set(prepared, CONTEXT, 10**9)
    again = pipeline.eval_set(prepared, CONTEXT, 10**9)
    np.testing.assert_array_equal(held.tokens_BxT, again.tokens_BxT)
    stream = np.concatenate([row["tokens"][:-1] for part in prepared.rows("validation") for row in part])
    starts = np.cumsum(stream == prepared.tokenizer().bos)
    np.testing.assert_array_equal(held.document_B, starts[::CONTEXT][: len(held.document_B)])
    assert len(held.tokens_BxT) == len(stream) // CONTEXT
    few = pipeline.eval_set(prepared, CONTEXT, 3 * CONTEXT)
    assert len(few.tokens_BxT) == 3
    assert {bytes(row) for row in few.tokens_BxT} <= {bytes(row) for row in held.tokens_BxT}
