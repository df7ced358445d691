"""Pairs of texts as rows: what goes in comes out, each source in one split, and padding where a row is not full."""

import json
from dataclasses import replace

import numpy as np
import pytest

from llm_jax.config import Config, Data, Model
from llm_jax.data import pipeline, prepare, rows
from llm_jax.generation import pairs
from llm_jax.settings import BadInput

CONTEXT, PREFIX = 48, 20


@pytest.fixture
def pairs_file(tmp_path):
    """Russian words and their capitals; every fifth source has two targets, and one pair is too long for a row."""
    path = tmp_path / "pairs.tsv"
    lines = [f"слово {i}\tСЛОВО {i}" for i in range(200)] + [f"слово {i}\tещё {i}" for i in range(0, 200, 5)]
    path.write_text("".join(line + "\n" for line in [*lines, "слишком длинно " * 3 + "\tда"]), encoding="utf-8")
    return path


def config(path, **data):
    settings = {"val_fraction": 0.2, "eval_tokens": 1024} | data
    return Config(data=Data(source="pairs", files=(str(path),), context=CONTEXT, prefix=PREFIX, **settings))


def texts(prepared, split):
    """(source, target) of each row, cut out by hand."""
    tok, found = prepared.tokenizer(), []
    for part in prepared.rows(split):
        for row in part:
            tokens = row["tokens"].astype(int).tolist()
            assert len(tokens) == CONTEXT + 1
            before, after = tokens[:PREFIX], tokens[PREFIX:]
            start = before.index(tok.bos)
            assert set(before[:start]) <= {tok.pad}
            assert after[0] == tok.bos
            end = after.index(tok.bos, 1)
            assert set(after[end + 1 :]) <= {tok.pad}
            found.append((tok.decode(before[start + 1 :]), tok.decode(after[1:end])))
    return found


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_pair_that_fits_is_in_one_split(pairs_file, tokenizer):
    """A source in both splits would make the held-out loss a training loss, also where its targets differ."""
    cfg = config(pairs_file, tokenizer=tokenizer)
    prepared = prepare.prepare(replace(cfg, model=Model(vocab_size=296)))
    train, held = texts(prepared, "train"), texts(prepared, "validation")
    wanted = [tuple(line.split("\t")) for line in pairs_file.read_text(encoding="utf-8").splitlines()]
    fitting = wanted[:-1] if tokenizer == "bytes" else wanted
    assert set(wanted[:-1]) <= {*train, *held} <= set(fitting)
    assert not {source for source, _ in train} & {source for source, _ in held}
    assert 0.1 < len(held) / len(wanted) < 0.3
    assert prepared.documents["train"] + prepared.documents["validation"] == len(wanted)
    assert pairs.held_out(replace(cfg, model=Model(vocab_size=296)), prepared) == held


def test_a_row_of_a_pair():
    """Source to the right, target to the left of the boundary: between them nothing, so that both are one document."""
    encoded = [
        (np.array([1, 2]), np.array([3])),
        (np.array([1, 2, 4, 5]), np.array([3])),
        (np.array([]), np.array([6, 7, 8])),
    ]
    found = list(rows.pair(encoded, 0, 9, 8, 4))
    assert [row["tokens"].tolist() for row in found] == [[9, 0, 1, 2, 0, 3, 0, 9, 9], [9, 9, 9, 0, 0, 6, 7, 8, 0]]


def test_each_held_out_row_is_a_cluster_of_its_own(pairs_file):
    """The standard error stands on these numbers."""
    prepared = prepare.prepare(config(pairs_file))
    held = pipeline.eval_set(prepared, CONTEXT, 10**6)
    assert len(set(held.document_B.tolist())) == len(held.document_B) == len(texts(prepared, "validation"))


def test_jsonl_pairs_are_the_same_data(pairs_file, tmp_path):
    lines = [line.split("\t") for line in pairs_file.read_text(encoding="utf-8").splitlines()]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"ru": a, "big": b}, ensure_ascii=False) + "\n" for a, b in lines))
    found = prepare.prepare(config(path, pair_fields=("ru", "big")))
    assert found.fingerprint == prepare.prepare(config(pairs_file)).fingerprint


def test_bad_pairs_are_one_line(tmp_path):
    cases = {
        "three.tsv": ("a\tb\tc\n", "three.tsv:1: .* this one has 2 tabs"),
        "one.tsv": ("a\tb\n", "no pair is small enough"),
        "long.tsv": ("a" * 90 + "\tb\n" + "".join(f"{'c' * 90}{i}\td\n" for i in range(30)), "no pair that fits"),
        "field.jsonl": ('{"sourse": "a", "target": "b"}\n', 'did you mean "sourse"'),
        "text.txt": ("a\tb\n", r"is none of \.tsv \.jsonl"),
    }
    for name, (text, message) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(BadInput, match=message) as caught:
            prepare.prepare(config(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_distance_and_scores():
    """Insertions, deletions and replacements, counted by character of what is wanted."""
    assert [pairs.edit_distance(a, b) for a, b in [("", ""), ("кот", ""), ("кот", "кит"), ("кот", "ток")]] == [
        0,
        3,
        1,
        2,
    ]
    assert pairs.edit_distance("intention", "execution") == 5
    found = pairs.score(["кот", "кит"], ["кот", "скит"])
    assert found == {"exact_match": 0.5, "character_error_rate": pytest.approx(1 / 7)}
