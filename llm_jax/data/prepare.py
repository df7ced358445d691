"""From documents to packed rows of tokens on disk, once: a TFDS builder a part, so that a killed preparation goes on where it was.

    CACHE/data/<fingerprint>/
        prepared.json                  counts, hashes; written last
        tokenizer.model                of SentencePiece
        rows/token_rows/<part>/1.0.0/  a TFDS data set of array records

The fingerprint is of the documents' content, the tokenizer's settings and the split, not of the files' names or dates.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import files
from llm_jax.config import Config, Data, Media
from llm_jax.data import media, sources, synthetic, tokenizer
from llm_jax.data.sources import UNIT
from llm_jax.data.survey import Survey
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.settings import BadInput, fingerprint

ROW_TOKENS = 2048
"""Tokens of a stored row, less what a context does not divide. Long rows, because reading costs by the row and not by the token."""
IN_MEMORY = 2**26
"""Tokens of a split, and of its media as many pairs of bytes, up to which its rows are kept in memory."""
SINGLE = ("pairs", "media")
"""Sources of which a row holds one document."""
PART_CHARACTERS = 64_000_000
"""Text of a part: what a kill loses at most."""


@dataclass(frozen=True)
class Prepared:
    """Rows on disk. Counts are of what the splits hold after packing; of pairs and media, "tokens" / row_tokens of "documents" fitted."""

    folder: Path
    fingerprint: str
    tokenizer_kind: str
    tokenizer_sha256: str
    vocab_size: int
    row_tokens: int
    train_parts: tuple[str, ...]
    documents: dict[str, int]
    tokens: dict[str, int]
    bytes: dict[str, int]
    entropy: float | None
    """True irreducible loss in nats a token, for the synthetic source."""
    checksums: dict[str, str]
    """SHA-256 of each file of rows."""
    media_bytes: int = 0
    """Of the media of a row."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the rows."""
        return tokenizer.load(self.folder, self.tokenizer_kind)

    def rows(self, split: str) -> list[Any]:
        """Random-access sources of {"tokens": uint16 or int32 [row_tokens + 1], "document": int64}, one a part; of media also
        "media": [items, ...]."""
        from llm_jax.data import rows

        size = self.tokens[split] + self.tokens[split] // self.row_tokens * self.media_bytes // 2
        read = rows.read_all if size <= IN_MEMORY else rows.read
        parts = ("validation",) if split == "validation" else self.train_parts
        return [read(self.folder / "rows", part) for part in parts]


def prepare(cfg: Config, progress: Callable[[str, int, int], None] = lambda what, done, total: None) -> Prepared:
    """Prepares what `cfg.data` names, or finds it prepared. `progress(what, done, total)` is told characters.

    Raises BadInput where the source is empty, or too small to hold a row in each split.
    """
    source = sources.open_source(cfg.data)
    root = files.cache_dir() / "data"
    settings: list[Any] = [cfg.data.tokenizer, cfg.data.val_fraction, _row_tokens(cfg.data)]
    if cfg.data.source == "pairs":
        settings.append(["pairs", cfg.data.prefix])
    if cfg.data.source == "media":
        items = cfg.model.media
        settings.append([items.kind, items.items, items.tokens, *items.shape])
    if cfg.data.tokenizer != "bytes":
        settings.append(cfg.model.vocab_size)
    known = root / "index" / f"{fingerprint([source.signature, settings])}.json"
    if known.exists():
        folder = root / files.read_json(known)["fingerprint"]
        if (folder / "prepared.json").exists():
            return _load(folder)
    has_media = cfg.data.source == "media"
    documents = _checked(source.documents(), cfg.model.media) if has_media else source.documents()
    survey = Survey(_counted(documents, "reading", 0, progress), cfg.data.val_fraction, has_media)
    if not sum(survey.sizes):
        raise BadInput(f"data.source={cfg.data.source} is empty: {len(survey.sizes)} documents without text")
    key = fingerprint([survey.sha256, settings])
    folder = root / key
    with files.locked(root / f"{key}.lock"):
        if not (folder / "prepared.json").exists():
            _write(cfg, source.documents, survey, folder, key, progress)
    files.write_json(known, {"fingerprint": key})
    return _load(folder)


def _row_tokens(data: Data) -> int:
    return data.context if data.source in SINGLE else data.context * max(1, ROW_TOKENS // data.context)


def _load(folder: Path) -> Prepared:
    values = files.read_json(folder / "prepared.json")
    return Prepared(folder=folder, **{**values, "train_parts": tuple(values["train_parts"])})


def check(prepared: Prepared) -> list[str]:
    """Files whose bytes are not the ones that were written; a missing file counts."""
    bad = []
    for name, sha256 in prepared.checksums.items():
        path = prepared.folder / "rows" / name
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            bad.append(str(path))
    return bad


def _write(cfg: Config, documents: Callable, survey: Survey, folder: Path, key: str, progress: Callable) -> None:
    if cfg.data.source in SINGLE and not survey.held_out:
        what = "pair" if cfg.data.source == "pairs" else "text"
        raise BadInput(
            f"data.source={cfg.data.source}: no {what} is small enough to be held out of {len(survey.sizes)}; "
            f"add {what}s, or raise data.val_fraction"
        )
    folder.mkdir(parents=True, exist_ok=True)
    row_tokens = _row_tokens(cfg.data)
    kind = cfg.data.tokenizer
    if kind != "bytes" and not (folder / "tokenizer.model").exists():
        has_media = cfg.data.source == "media"
        training_texts = (
            text.partition(UNIT)[0].replace(media.MARK, "\n") if has_media else text.replace(UNIT, "\n")
            for i, (_, text) in enumerate(documents())
            if i not in survey.held_out
        )
        tokenizer.save(tokenizer.train(kind, cfg.model.vocab_size, training_texts, has_media), folder)
    tok = tokenizer.load(folder, kind)
    train, held_out = _split(documents, survey, cfg.data.val_fraction)
    bounds = _part_bounds(survey)
    parts = {"validation": held_out} | {
        f"train-{k:04d}-of-{len(bounds) - 1:04d}": _slice(train, bounds[k], bounds[k + 1])
        for k in range(len(bounds) - 1)
    }
    counts = {}
    for part, texts in parts.items():
        counts[part] = _write_part(folder, part, texts, tok, cfg, sum(survey.sizes), progress)
    totals = {
        name: {
            "train": sum(count[name] for part, count in counts.items() if part != "validation"),
            "validation": counts["validation"][name],
        }
        for name in ("documents", "tokens", "bytes")
    }
    for split, tokens in totals["tokens"].items():
        if not tokens:
            shutil.rmtree(folder)
            what = "the held-out documents hold" if split == "validation" else "the training documents hold"
            if cfg.data.source == "pairs":
                raise BadInput(
                    f"data.source=pairs: {what} no pair that fits into data.prefix={cfg.data.prefix} and data.context={row_tokens}"
                    f" tokens; try data.prefix={2 * cfg.data.prefix} and data.context={2 * row_tokens}, or more pairs"
                )
            if cfg.data.source == "media":
                raise BadInput(
                    f"data.source=media: {what} no text that fits into data.context={row_tokens}, an item being"
                    f" {cfg.model.media.tokens} tokens; try data.context={2 * row_tokens}, or more texts"
                )
            raise BadInput(
                f"data.source={cfg.data.source} is too small: {what} less than one row of {row_tokens} tokens; "
                f"add text, or try data.val_fraction={min(0.5, 2 * cfg.data.val_fraction)}"
            )
    base = folder / "rows"
    values = Prepared(
        folder=folder,
        fingerprint=key,
        tokenizer_kind=kind,
        tokenizer_sha256=tok.sha256(),
        vocab_size=tok.vocab_size,
        row_tokens=row_tokens,
        train_parts=tuple(part for part, count in counts.items() if part != "validation" and count["tokens"]),
        **totals,
        entropy=synthetic.entropy_rate(cfg.data.synthetic)
        if cfg.data.source == "synthetic" and kind == "bytes"
        else None,
        checksums={
            str(path.relative_to(base)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(base.rglob("*.array_record*"))
        },
        media_bytes=media.load_items(cfg.model.media, "", []).nbytes if cfg.data.source == "media" else 0,
    )
    plain = {field.name: getattr(values, field.name) for field in dataclasses.fields(values) if field.name != "folder"}
    files.write_json(folder / "prepared.json", plain)


def _split(documents: Callable, survey: Survey, fraction: float) -> tuple[Callable, Callable]:
    """(training, held-out) documents. Where no whole document is small enough to be held out, the end of each is."""

    def train():
        for i, (_, text) in enumerate(documents()):
            if survey.held_out:
                if i not in survey.held_out:
                    yield text
            else:
                yield text[: len(text) - round(fraction * len(text))]

    def held_out():
        for i, (_, text) in enumerate(documents()):
            if survey.held_out:
                if i in survey.held_out:
                    yield text
            else:
                yield text[len(text) - round(fraction * len(text)) :]

    return train, held_out


def _part_bounds(survey: Survey) -> list[int]:
    """Cuts the list of training documents where PART_CHARACTERS are full."""
    bounds, room, n = [0], PART_CHARACTERS, 0
    for i, size in enumerate(survey.sizes):
        if i in survey.held_out:
            continue
        if room < 0:
            bounds.append(n)
            room = PART_CHARACTERS
        room -= size
        n += 1
    return [*bounds, n]


def _slice(texts: Callable, start: int, stop: int) -> Callable:
    def part():
        for i, text in enumerate(texts()):
            if start <= i < stop:
                yield text

    return part


def _write_part(
    folder: Path, part: str, texts: Callable, tok: Tokenizer, cfg: Config, total: int, progress: Callable
) -> dict[str, int]:
    """Prepares one part unless a finished one is there; returns its counts."""
    from llm_jax.data import rows

    note = folder / "rows" / f"{part}.json"
    if note.exists():
        return files.read_json(note)
    data, sizes, row_tokens = cfg.data, tok.token_bytes(), _row_tokens(cfg.data)
    counts = {"documents": 0, "tokens": 0, "bytes": 0}

    def batches() -> Iterator[list[str]]:
        done = 0
        for batch in _batched(texts(), 64):
            counts["documents"] += len(batch)
            done += sum(map(len, batch))
            progress(f"tokenizing {part}", done, total)
            yield batch

    def encoded() -> Iterator[np.ndarray]:
        for batch in batches():
            yield from tok.encode(batch)

    def encoded_pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in batches():
            source, target = zip(*(text.split(UNIT) for text in batch), strict=True)
            yield from zip(tok.encode(source), tok.encode(target), strict=True)

    def encoded_media() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for text in itertools.chain.from_iterable(batches()):
            body, *paths = text.split(UNIT)
            yield media.encode(tok, body, cfg.model.media.tokens), media.load_items(cfg.model.media, body, paths)

    def counted() -> Iterator[dict[str, Any]]:
        if data.source == "pairs":
            found = rows.pair(encoded_pairs(), tok.bos, tok.pad, row_tokens, data.prefix)
        elif data.source == "media":
            found = rows.single(encoded_media(), tok.bos, tok.pad, row_tokens)
        else:
            found = rows.pack(encoded(), tok.bos, row_tokens)
        for row in found:
            counts["tokens"] += row_tokens
            counts["bytes"] += int(sizes[row["tokens"][1:]].sum())
            yield row

    rows.write(folder / "rows", part, counted(), row_tokens, tok.vocab_size)
    files.write_json(note, counts)
    return counts


def _checked(documents: Iterable[tuple[str, str]], settings: Media) -> Iterator[tuple[str, str]]:
    """The documents, once it is sure that the media of each can be read and fit into a row. Raises BadInput, with the line."""
    for where, text in documents:
        body, *paths = text.split(UNIT)
        try:
            media.load_items(settings, body, paths)
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from None
        yield where, text


def _batched(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _counted(
    documents: Iterable[tuple[str, str]], what: str, total: int, progress: Callable
) -> Iterator[tuple[str, str]]:
    done = 0
    for name, text in documents:
        done += len(text)
        progress(what, done, total)
        yield name, text
