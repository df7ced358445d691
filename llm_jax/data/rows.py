"""Packed rows of tokens as a TFDS data set of array records, one builder configuration a part."""

from __future__ import annotations

import contextlib
import functools
import io
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

logging.set_verbosity(logging.ERROR)  # TFDS warns of every configuration that is not listed in the class
tfds.disable_progress_bar()


def pack(encoded: Iterable[np.ndarray], bos: int, row_tokens: int) -> Iterator[dict[str, Any]]:
    """Documents joined, each behind `bos`, and cut into rows of row_tokens + 1 that overlap by one token: the last target of a
    row is the first input of the next. "document" counts the documents that began before the row; a last part row is dropped.
    """
    buffer: list[np.ndarray] = []
    filled, before = 0, 0
    for ids in encoded:
        buffer += [np.asarray([bos], np.int32), ids]
        filled += len(ids) + 1
        while filled > row_tokens:
            stream = np.concatenate(buffer)
            row = stream[: row_tokens + 1]
            yield {"tokens": row, "document": before}
            before += int((row[:-1] == bos).sum())
            buffer, filled = [stream[row_tokens:]], filled - row_tokens


def pair(
    encoded: Iterable[tuple[np.ndarray, np.ndarray]], bos: int, pad: int, row_tokens: int, prefix: int
) -> Iterator[dict[str, Any]]:
    """A row each of row_tokens + 1: `bos` and the source, at the right of the first `prefix` tokens; then `bos`, the target, `bos`.

    The rest is `pad`. What stands between the padding is one document: families without an encoder read it as such, and the source's
    length moves nothing. Pairs that do not fit are left out. "document" is such that a row's is one more than of the row before.
    """
    fitting = 0
    for source, target in encoded:
        if len(source) < prefix and len(target) < row_tokens - prefix:
            row = np.full(row_tokens + 1, pad, np.int32)
            row[prefix - len(source) - 1 : prefix] = [bos, *source]
            row[prefix : prefix + len(target) + 2] = [bos, *target, bos]
            yield {"tokens": row, "document": fitting + int(row[0] != bos)}
            fitting += 1


def single(
    encoded: Iterable[tuple[np.ndarray, np.ndarray]], bos: int, pad: int, row_tokens: int
) -> Iterator[dict[str, Any]]:
    """A row each of row_tokens + 1: `bos`, the document, `bos`, then `pad`; beside it "media", its items. Documents that do not fit are
    left out; "document" counts those before."""
    fitting = 0
    for ids, items in encoded:
        if len(ids) < row_tokens:
            row = np.full(row_tokens + 1, pad, np.int32)
            row[: len(ids) + 2] = [bos, *ids, bos]
            yield {"tokens": row, "document": fitting, "media": items}
            fitting += 1


class _OwnInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Nothing: TFDS would ask its public bucket for these rows, and leave an empty temporary folder each time."""


class TokenRows(tfds.core.GeneratorBasedBuilder):
    """{"tokens": [row_tokens + 1], "document": how many documents began before the row}, and "media" where there are any, in the
    order given."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        part: str,
        rows: Iterable[dict[str, Any]],
        row_tokens: int,
        vocab_size: int,
        data_dir: Path,
        media: np.ndarray | None,
    ):
        self._rows, self._row_tokens, self._media = rows, row_tokens, media
        self._dtype = np.uint16 if vocab_size <= 2**16 else np.int32
        config = tfds.core.BuilderConfig(name=part, version="1.0.0")
        super().__init__(config=config, data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = tfds.features.Tensor(shape=(self._row_tokens + 1,), dtype=self._dtype, encoding="bytes")
        features = {"tokens": tokens, "document": np.int64}
        if self._media is not None:
            shape, dtype = self._media.shape, self._media.dtype
            features["media"] = tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")
        features = tfds.features.FeaturesDict(features)
        return _OwnInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"rows": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, row in enumerate(self._rows):
            yield i, {**row, "tokens": row["tokens"].astype(self._dtype)}


def write(folder: Path, part: str, rows: Iterable[dict[str, Any]], row_tokens: int, vocab_size: int) -> None:
    """Writes one part below `folder`, over what a killed call left of it. Nothing is written where there are no rows."""
    shutil.rmtree(folder / TokenRows.name / part, ignore_errors=True)
    iterator = iter(rows)
    first = next(iterator, None)
    if first is None:
        return
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints where it writes
        rows = _chain(first, iterator)
        TokenRows(part, rows, row_tokens, vocab_size, folder, first.get("media")).download_and_prepare()


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def read(folder: Path, part: str) -> Any:
    """A random-access source of the rows of one part."""
    return tfds.builder_from_directory(folder / TokenRows.name / part / "1.0.0").as_data_source(split="rows")


class Kept(Sequence[dict[str, Any]]):
    """Rows of one part in memory, decoded: a sequence of them, and `columns`, a name each, stacked."""

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self.columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}
        self._length = len(rows)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if not -self._length <= index < self._length:  # NumPy's error would not end a loop
            raise IndexError(index)
        return {name: column[index] for name, column in self.columns.items()}


@functools.lru_cache(maxsize=8)
def read_all(folder: Path, part: str) -> Kept:
    """The rows of one part, kept in memory: each read from disk costs 100 us, a tenth of a small model's step."""
    source = read(folder, part)
    return Kept(source.__getitems__(range(len(source))))


def stacked(source: Any, index_B: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(columns, where in them the rows asked for are) of what `read` or `read_all` gave."""
    if isinstance(source, Kept):
        return source.columns, index_B
    return Kept(source.__getitems__(index_B.tolist())).columns, np.arange(len(index_B))
