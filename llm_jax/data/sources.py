"""Where documents come from. A source is an iterable of (id, text) that can be read again, and a cheap signature of its content."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax.config import Data
from llm_jax.settings import BadInput, did_you_mean

Documents = Iterator[tuple[str, str]]

UNIT = "\x1f"
"""Between the two texts of a pair, which is a document of this form, and between a text and the paths of its media: ASCII's unit
separator."""

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")
PAIR_SUFFIXES = (".tsv", ".jsonl")
MEDIA_SUFFIXES = (".jsonl",)
COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
NEEDS_TENSORFLOW = ("tiny_shakespeare", "lm1b", "pg19", "math_dataset")
NEEDS_BEAM = ("c4", "wiki40b", "wikipedia")


class Source(NamedTuple):
    """Where documents come from: (id, text) pairs, and what tells that they may have changed."""

    documents: Callable[[], Documents]
    """Reads all documents, in a fixed order."""
    signature: Any
    """JSON that changes when the content may have: looked up before anything is read."""


def open_source(cfg: Data) -> Source:
    """The source that `cfg` names. Raises BadInput where it cannot be read."""
    if cfg.source == "stdlib":
        return _stdlib()
    if cfg.source == "files":
        return _files(cfg)
    if cfg.source == "pairs":
        return _pairs(cfg)
    if cfg.source == "media":
        return _media(cfg)
    if cfg.source == "synthetic":
        from llm_jax.data import synthetic

        settings = cfg.synthetic
        return Source(lambda: synthetic.documents(settings), ["synthetic", repr(settings)])
    return _registered(cfg)


def _stdlib() -> Source:
    """The standard library of the running interpreter: real text on every machine that runs this, without a network.

    Tests are left out: some distributions do not ship them.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = sorted(path for path in root.rglob("*.py") if not skip & set(path.relative_to(root).parts))
    if not paths:
        raise BadInput(f"data.source=stdlib: no sources below {root}; try data.source=synthetic")

    def documents() -> Documents:
        for path in paths:
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8", errors="replace")

    return Source(documents, ["stdlib", sys.version, [_stat(path) for path in paths]])


def _files(cfg: Data) -> Source:
    paths = _paths(cfg)
    for path in paths:
        _kind(path)  # refuse before reading the first

    def documents() -> Documents:
        for path in paths:
            yield from _read(path, cfg.text_field)

    return Source(documents, ["files", cfg.text_field, [_stat(path) for path in paths]])


def _pairs(cfg: Data) -> Source:
    """Documents `source UNIT target`, one a line of each file."""
    paths, fields = _paths(cfg), cfg.pair_fields
    for path in paths:
        _kind(path, PAIR_SUFFIXES)

    def documents() -> Documents:
        for path in paths:
            suffix, compression = _kind(path, PAIR_SUFFIXES)
            with _open(path, compression) as f:
                for number, line in enumerate(f, 1):
                    where = f"{path}:{number}"
                    if line.strip():
                        pair = _tabbed(line, where) if suffix == ".tsv" else _values(line, fields, where, "pair_fields")
                        if any(UNIT in text for text in pair):
                            raise BadInput(f"{where}: U+001F may not be in a text of a pair")
                        yield where, UNIT.join(pair)

    return Source(documents, ["pairs", *fields, [_stat(path) for path in paths]])


def _media(cfg: Data) -> Source:
    """Documents `text UNIT path UNIT path ...`, a line each, the marks in the text its media in order."""
    paths = _paths(cfg)
    for path in paths:
        _kind(path, MEDIA_SUFFIXES)

    def documents() -> Documents:
        for path in paths:
            with _open(path, _kind(path, MEDIA_SUFFIXES)[1]) as f:
                for number, line in enumerate(f, 1):
                    if line.strip():
                        where = f"{path}:{number}"
                        text = _values(line, (cfg.text_field,), where, "text_field")[0]
                        if UNIT in text:
                            raise BadInput(f"{where}: U+001F may not be in a text with media")
                        yield where, UNIT.join([text, *_items(line, path.parent, where)])

    items = sorted({path for _, text in documents() for path in text.split(UNIT)[1:]})
    return Source(documents, ["media", cfg.text_field, [_stat(path) for path in paths], list(map(_stat_item, items))])


def _stat_item(path: str) -> list[Any]:
    try:
        return _stat(Path(path))
    except OSError:
        raise BadInput(f"data.source=media: {path}: no such file") from None


def _items(line: str, folder: Path, where: str) -> list[str]:
    """Paths of the media of one line."""
    names = json.loads(line).get("media", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadInput(f'{where}: "media" must be a list of file names, got {names!r}')
    if any(UNIT in part for part in names):
        raise BadInput(f"{where}: U+001F may not be in the name of a file")
    return [str(folder / name) for name in names]


def _tabbed(line: str, where: str) -> list[str]:
    pair = line.rstrip("\r\n").split("\t")
    if len(pair) != 2:
        raise BadInput(f"{where}: a line of a .tsv of pairs is source, tab, target; this one has {len(pair) - 1} tabs")
    return pair


def _paths(cfg: Data) -> list[Path]:
    paths: list[Path] = []
    for pattern in cfg.files:
        found = [Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(name)]
        if not found:
            raise BadInput(f'data.files "{pattern}" matches no file{_nearest_file(pattern)}')
        paths += found
    return sorted(set(paths))


def _kind(path: Path, valid: tuple[str, ...] = SUFFIXES) -> tuple[str, str]:
    """(suffix, compression) of a file's name."""
    suffixes = path.suffixes
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    if not suffixes or suffixes[-1] not in valid:
        raise BadInput(f"data.files: {path} is none of {' '.join(valid)}, with an optional {' '.join(COMPRESSIONS)}")
    return suffixes[-1], compression


def _open(path: Path, compression: str) -> io.TextIOBase:
    if compression == ".zst":
        import zstandard

        return io.TextIOWrapper(
            zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), closefd=True), "utf-8", "replace"
        )
    opener: Any = {"": open, ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}[compression]
    return opener(path, "rt", encoding="utf-8", errors="replace")


def _read(path: Path, text_field: str) -> Documents:
    suffix, compression = _kind(path)
    with _open(path, compression) as f:
        if suffix != ".jsonl":
            yield str(path), f.read()
            return
        for number, line in enumerate(f, 1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, _values(line, (text_field,), where, "text_field")[0]


def _values(line: str, fields: tuple[str, ...], where: str, setting: str) -> list[str]:
    """The texts of some fields of a JSON object."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{where}: not a JSON object ({error})") from None
    known = [name for name, item in value.items() if isinstance(item, str)] if isinstance(value, dict) else []
    for field in fields:
        if field not in known:
            raise BadInput(f'{where}: no text in the field "{field}"{did_you_mean(field, known)} (data.{setting})')
    return [value[field] for field in fields]


def _nearest_file(pattern: str) -> str:
    folder = Path(os.path.expanduser(pattern)).parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    endings = (*SUFFIXES, *PAIR_SUFFIXES, *COMPRESSIONS)
    names = [str(folder / name.name) for name in folder.iterdir() if name.name.endswith(endings)]
    return did_you_mean(pattern, names) if names else f"; the nearest folder that exists, {folder}, holds no text"


def _registered(cfg: Data) -> Source:
    """A data set registered with TFDS, prepared as array_record, read without TensorFlow."""
    import tensorflow_datasets as tfds

    name = cfg.source.removeprefix("tfds:")
    base = name.split("/")[0].split(":")[0]
    registered = tfds.list_builders(with_community_datasets=False)  # asking for the community's needs TensorFlow
    if base not in registered:
        raise BadInput(f'data.source: TFDS registers no "{base}"{did_you_mean(base, registered)}')
    if base in NEEDS_TENSORFLOW + NEEDS_BEAM:
        need = "TensorFlow" if base in NEEDS_TENSORFLOW else "Apache Beam"
        raise BadInput(
            f"data.source: the builder of tfds:{base} needs {need}, which is no dependency of llm_jax; export it to .jsonl and use files"
        )
    builder = tfds.builder(name, file_format="array_record")
    features = builder.info.features
    texts = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
    if cfg.text_field not in features:
        raise BadInput(
            f'data.text_field "{cfg.text_field}" is no field of tfds:{name}{did_you_mean(cfg.text_field, texts)}'
        )

    def documents() -> Documents:
        builder.download_and_prepare()
        for split in sorted(builder.info.splits):
            for i, example in enumerate(builder.as_data_source(split=split)):
                text = example[cfg.text_field]
                yield f"{split}/{i}", text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)

    return Source(documents, ["tfds", builder.info.full_name, cfg.text_field])


def _stat(path: Path) -> list[Any]:
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
