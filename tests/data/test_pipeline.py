"""Batches: which rows make up a step depends on the seed and the step alone."""

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
    for i in range(len(windows) - 1):
        assert windows[i]["tokens"][-1] == windows[i + 1]["tokens"][0]


def test_the_state_brings_back_the_very_next_batch(prepared):
    """A checkpoint holds this state: a restart must neither skip nor repeat a row."""
    iterator = pipeline.train_iterator(prepared, CONTEXT, 3, seed=1)
    take(iterator, 5)
    state = iterator.get_state()
    expected = take(iterator, 4)
    fresh = pipeline.train_iterator(prepared, CONTEXT, 3, seed=1)
    fresh.set_state(state)
    np.testing.assert_array_equal(take(fresh, 4), expected)


def test_hosts_share_a_step_without_overlap(prepared):
    """The rows of a step are the same set however many hosts there are."""
    whole = take(pipeline.train_iterator(prepared, CONTEXT, 4, seed=2), 6)
    halves = [take(pipeline.train_iterator(prepared, CONTEXT, 4, 2, host, 2), 6) for host in range(2)]
    for step in range(6):
        together = np.concatenate([halves[0][step], halves[1][step]])
        assert sorted(map(bytes, together)) == sorted(map(bytes, whole[step]))
    with pytest.raises(ValueError, match="do not divide"):
        pipeline.train_iterator(prepared, CONTEXT, 3, 0, 0, 2)


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
