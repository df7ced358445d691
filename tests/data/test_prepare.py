"""Preparation: what goes in comes out, once, and survives a kill."""

import gzip
import itertools
import json
import lzma
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import zstandard

from llm_jax.config import Config, Data, Model
from llm_jax.data import prepare, rows, sources
from llm_jax.settings import BadInput, override


def config(pattern, **data):
    return Config(data=Data(source="files", files=(str(pattern),), context=64, eval_tokens=1024, **data))


def stream(prepared, split):
    """All tokens of a split in order, the overlap of rows taken out."""
    stored = [row["tokens"] for part in prepared.rows(split) for row in part]
    return np.concatenate([row[:-1] for row in stored])


def test_every_document_is_in_one_split_and_whole(corpus):
    """Leakage between splits would make the held-out loss a training loss; a lost document would go unnoticed."""
    prepared = prepare.prepare(config(f"{corpus}/*", val_fraction=0.2))
    tok = prepared.tokenizer()
    texts = {path.read_text(encoding="utf-8") for path in corpus.iterdir()}
    found = {}
    for split in ("train", "validation"):
        tokens = stream(prepared, split)
        starts = np.flatnonzero(tokens == tok.bos)
        assert starts[0] == 0
        found[split] = [tok.decode(part) for part in np.split(tokens, starts[1:])]
        assert set(found[split][:-1]) <= texts  # the last is cut where the last row ends
        assert any(text.startswith(found[split][-1]) for text in texts)
    assert not set(found["train"]) & set(found["validation"])
    assert prepared.documents["train"] + prepared.documents["validation"] == len(texts)
    assert any("Мороз" in text for part in found.values() for text in part)
    held = sum(map(len, found["validation"])) / sum(map(len, texts))
    assert 0.05 < held <= 0.2


def test_rows_overlap_by_one_and_number_their_documents(corpus):
    """The last target of a row is the first input of the next: no token is left without being predicted."""
    prepared = prepare.prepare(config(f"{corpus}/*"))
    tok = prepared.tokenizer()
    stored = list(prepared.rows("train")[0])
    assert len(stored) > 5
    begun = 0
    for row, following in itertools.pairwise(stored):
        assert row["tokens"][-1] == following["tokens"][0]
        assert row["document"] == begun
        begun += int((row["tokens"][:-1] == tok.bos).sum())


def test_packing_small_and_large_documents():
    """Documents longer than a row, and several in one."""
    documents = [np.arange(n, dtype=np.int32) + 1 for n in (3, 25, 1, 0, 9)]
    packed = list(rows.pack(documents, 0, 10))
    whole = np.concatenate([np.concatenate([[0], ids]) for ids in documents])
    assert [len(row["tokens"]) for row in packed] == [11] * 4
    for i, row in enumerate(packed):
        np.testing.assert_array_equal(row["tokens"], whole[10 * i : 10 * i + 11])
        assert row["document"] == (whole[: 10 * i] == 0).sum()


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_jsonl_in_every_compression(tmp_path, suffix):
    """The same documents, whatever they were packed with."""
    lines = "".join(
        json.dumps({"text": f"документ {i} " * 60, "id": i}, ensure_ascii=False) + "\n" for i in range(30)
    ).encode()
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"corpus.jsonl{suffix}"
    path.write_bytes(pack(lines))
    texts = [text for _, text in sources.open_source(config(path).data).documents()]
    assert texts == [f"документ {i} " * 60 for i in range(30)]


def test_content_decides_and_not_names_or_dates(corpus, tmp_path):
    """Two copies of a corpus are one data set; one changed letter makes another."""
    first = prepare.prepare(config(f"{corpus}/*"))
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in corpus.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert prepare.prepare(config(f"{copy}/*")).fingerprint == first.fingerprint
    (copy / "00.txt").write_text((copy / "00.txt").read_text().replace("beer", "bear"))
    assert prepare.prepare(config(f"{copy}/*")).fingerprint != first.fingerprint


def test_prepared_data_is_found_again_without_reading(corpus, monkeypatch):
    """A second start must not pay for the first."""
    first = prepare.prepare(config(f"{corpus}/*"))
    monkeypatch.setattr(prepare, "Survey", None)
    monkeypatch.setattr(prepare, "_write", None)
    assert prepare.prepare(config(f"{corpus}/*")) == first


def test_a_changed_file_of_rows_is_noticed(corpus):
    prepared = prepare.prepare(config(f"{corpus}/*", val_fraction=0.11))
    assert prepare.check(prepared) == []
    path = next((prepared.folder / "rows").rglob("*.array_record*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert prepare.check(prepared) == [str(path)]


def test_sentencepiece_is_stored_with_its_data(corpus):
    cfg = override(config(f"{corpus}/*", tokenizer="bpe", val_fraction=0.3), {"model.vocab_size": 384})
    prepared = prepare.prepare(cfg)
    assert prepared.vocab_size == 384
    assert prepared.tokenizer().sha256() == prepared.tokenizer_sha256
    assert prepared.bytes["train"] / prepared.tokens["train"] > 1.5, "pieces must be longer than bytes"
    other = prepare.prepare(override(cfg, {"model.vocab_size": 400}))
    assert other.fingerprint != prepared.fingerprint


def test_one_long_document_gives_up_its_end(tmp_path):
    """A single file, such as the collected works of Shakespeare, still has a held-out part."""
    text = "".join(f"line {i}\n" for i in range(5000))
    (tmp_path / "one.txt").write_text(text)
    prepared = prepare.prepare(config(tmp_path / "one.txt", val_fraction=0.1))
    tok = prepared.tokenizer()
    held = tok.decode(stream(prepared, "validation"))
    assert held in text
    assert held not in tok.decode(stream(prepared, "train"))


def bad_inputs(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    small = tmp_path / "small.txt"
    small.write_text("too little")
    field = tmp_path / "field.jsonl"
    field.write_text('{"texts": "a"}\n')
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    return {
        str(empty): "is empty",
        str(small): "is too small",
        str(field): 'did you mean "texts"',
        str(broken): "broken.jsonl:2: not a JSON object",
        str(tmp_path / "smal.txt"): 'did you mean ".*small.txt"',
        str(tmp_path / "*.pdf"): "matches no file",
    }


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("LLM_JAX_CACHE", str(cache))
    for pattern, message in bad_inputs(tmp_path).items():
        with pytest.raises(BadInput, match=message) as caught:
            prepare.prepare(config(pattern))
        assert "\n" not in str(caught.value)
    assert not list(cache.rglob("prepared.json"))
    assert not list(cache.rglob("*.array_record*"))


def test_registered_data_sets_are_named():
    """TFDS names: a wrong one gets the nearest, and one that needs what we do not install is said so before it starts."""
    with pytest.raises(BadInput, match='did you mean "gsm8k"'):
        sources.open_source(Data(source="tfds:gsm8"))
    with pytest.raises(BadInput, match="needs TensorFlow"):
        sources.open_source(Data(source="tfds:tiny_shakespeare"))
    with pytest.raises(BadInput, match='did you mean "question"'):
        sources.open_source(Data(source="tfds:gsm8k", text_field="questions"))


def test_a_registered_data_set_is_read(tmp_path, monkeypatch):
    """Through TFDS's own array records, without TensorFlow; the download is replaced by a file of the same form."""
    import tensorflow_datasets as tfds

    class SmallBooks(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(40), "test": self._generate_examples(3)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"text": f"книга {count} {i} " * 50}

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(tfds, "builder", lambda name, **kwargs: SmallBooks(data_dir=tmp_path, **kwargs))
    texts = [text for _, text in sources.open_source(Data(source="tfds:small_books")).documents()]
    assert sorted(texts) == sorted(
        [f"книга 40 {i} " * 50 for i in range(40)] + [f"книга 3 {i} " * 50 for i in range(3)]
    )


KILLED = """
import hashlib, sys, time
from llm_jax.config import Config, Data
from llm_jax.data import prepare, rows
prepare.PART_CHARACTERS = 5000
plain = rows.write
def slow(folder, part, *rest):
    if part.startswith("train-0003"):
        print("half", flush=True)
        time.sleep(60)
    plain(folder, part, *rest)
if "slow" in sys.argv:
    rows.write = slow
prepared = prepare.prepare(Config(data=Data(source="files", files=(sys.argv[1],), context=64, eval_tokens=1024)))
assert not prepare.check(prepared)
rows = [row["tokens"].tobytes() for part in prepared.rows("train") + prepared.rows("validation") for row in part]
print(prepared.tokens, hashlib.sha256(b"".join(rows)).hexdigest())  # of the rows: the files' own framing may differ
"""


def test_a_killed_preparation_goes_on(corpus, tmp_path, monkeypatch):
    """Parts that were finished are not written again, and the result is that of an undisturbed preparation."""
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "killed"))
    command = [sys.executable, "-c", KILLED, f"{corpus}/*"]
    with subprocess.Popen([*command, "slow"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.array_record*")}
    assert len(stamps) >= 3
    time.sleep(0.05)
    resumed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    env = {**os.environ, "LLM_JAX_CACHE": str(tmp_path / "undisturbed")}
    assert subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout == resumed


def test_stdlib_is_there_without_a_network():
    prepared = prepare.prepare(Config(model=Model(), data=Data(source="stdlib")))
    assert prepared.tokens["train"] > 3_000_000
    assert 0.01 < prepared.tokens["validation"] / prepared.tokens["train"] < 0.08
