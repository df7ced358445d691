"""Texts with pictures and sounds as rows: what goes in comes out, items in one split each, and files that are refused."""

import json
import wave
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from llm_jax.config import Config, Data, Media, Model
from llm_jax.data import media, pipeline, prepare, survey
from llm_jax.data.tokenizer import Bytes
from llm_jax.settings import BadInput, override

CONTEXT = 48
SEES = Media(kind="image", items=2, size=8, patch=4)
HEARS = Media(kind="audio", frames=16, mel_bins=20)


def picture(path, number, size=(8, 8), mode="RGB"):
    """One pixel tells which it is."""
    image = Image.new(mode, size)
    image.putpixel((3, 1), (number, 2 * number % 256, 255 - number) if mode == "RGB" else number)
    image.save(path)


def sound(path, samples, rate=16_000, dtype="<i2", channels=1):
    with wave.open(str(path), "wb") as f:
        f.setnchannels(channels)
        f.setsampwidth(np.dtype(dtype).itemsize)
        f.setframerate(rate)
        f.writeframes(np.asarray(samples).astype(dtype).tobytes())


@pytest.fixture
def texts(tmp_path):
    """Documents with no picture, with one and with two; picture k is shared by documents 3k, 3k + 1 and 3k + 2."""
    for i in range(30):
        picture(tmp_path / f"{i}.png", i)
    lines = []
    for i in range(30):
        lines.append({"text": f"<media> рисунок {i}", "media": [f"{i}.png"]})
        lines.append({"text": f"вот {i}: <media><media>, да", "media": [f"{i}.png", f"{i}.png"]})
        lines.append({"text": f"слова без картинок {i}", "media": []})
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    return path


def config(path, settings=SEES, **data):
    data = {"val_fraction": 0.2, "eval_tokens": 4096, "context": CONTEXT} | data
    return Config(model=Model(media=settings), data=Data(source="media", files=(str(path),), **data))


def documents(prepared, split, tokens):
    """(text, the items that it shows) of each row, cut out by hand."""
    tok, found = prepared.tokenizer(), []
    for row in (row for part in prepared.rows(split) for row in part):
        ids = row["tokens"].astype(int).tolist()
        assert len(ids) == CONTEXT + 1
        assert ids[0] == tok.bos
        end = ids.index(tok.bos, 1)
        assert set(ids[end + 1 :]) <= {tok.pad}
        text = media.decode(tok, ids[1:end], tokens)
        shown = text.count(media.MARK)
        assert ids.count(tok.media) == tokens * shown
        assert not row["media"][shown:].any()
        found.append((text, row["media"][:shown]))
    return found


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_documents_come_back_with_their_pictures(texts, tokenizer):
    """Text as it was, items in order, pixel for pixel. A picture in both splits would make the held-out loss one of training."""
    cfg = config(texts, tokenizer=tokenizer)
    cfg = replace(cfg, model=replace(cfg.model, vocab_size=300))
    prepared = prepare.prepare(cfg)
    splits = [documents(prepared, split, 4) for split in ("train", "validation")]
    wanted = [json.loads(line) for line in texts.read_text(encoding="utf-8").splitlines()]
    assert sorted(text for split in splits for text, _ in split) == sorted(line["text"] for line in wanted)
    pictures = {line["text"]: line["media"] for line in wanted}
    for text, items in [one for split in splits for one in split]:
        for name, item in zip(pictures[text], items, strict=True):
            np.testing.assert_array_equal(item, np.asarray(Image.open(texts.parent / name)))
    held, seen = ({items[0].tobytes() for _, items in split if len(items)} for split in (splits[1], splits[0]))
    assert held and not held & seen
    assert 0.1 < len(splits[1]) / len(wanted) < 0.3
    found = pipeline.eval_set(prepared, CONTEXT, 10**6)
    assert found.items_BxIx.shape == (len(splits[1]), 2, 8, 8, 3)
    assert len(set(found.document_B.tolist())) == len(splits[1])
    batch = next(pipeline.train_iterator(prepared, CONTEXT, 4, seed=0))
    assert (batch["tokens"].shape, batch["media"].shape) == ((4, CONTEXT + 1), (4, 2, 8, 8, 3))
    assert batch["media"].dtype == np.uint8


def test_content_and_not_names_decides(texts, tmp_path):
    """The same pictures under other names are the same data; another pixel is not, though the list of files is."""
    cfg = config(texts)
    before = prepare.prepare(cfg).fingerprint
    other = tmp_path / "elsewhere"
    other.mkdir()
    for i in range(30):
        (other / f"picture-{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes())
    lines = [json.loads(line) for line in texts.read_text(encoding="utf-8").splitlines()]
    renamed = [{**line, "media": [f"picture-{name}" for name in line["media"]]} for line in lines]
    (other / "t.jsonl").write_text("\n".join(map(json.dumps, renamed)))
    assert prepare.prepare(config(other / "t.jsonl")).fingerprint == before
    picture(tmp_path / "7.png", 200)
    assert prepare.prepare(cfg).fingerprint != before


def test_documents_that_share_an_item_go_together():
    """Also through a third: a is in one with b, b in one with c."""
    names = survey.linked([["a"], ["b", "a"], ["d"], ["c", "b"], ["e"], ["d", "f"]])
    assert len(set(names)) == 3
    assert names[0] == names[1] == names[3]
    assert names[2] == names[5]


def test_grey_and_transparent_pictures(tmp_path):
    """Grey is one channel; what is transparent is white, as on a page, and not the black that its pixels often are."""
    picture(tmp_path / "grey.png", 77, mode="L")
    found = media.load(tmp_path / "grey.png", replace(SEES, channels=1))
    assert found.shape == (8, 8, 1) and found[1, 3, 0] == 77
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.putpixel((0, 0), (10, 20, 30, 255))
    clear.save(tmp_path / "clear.png")
    found = media.load(tmp_path / "clear.png", SEES)
    assert found[0, 0].tolist() == [10, 20, 30] and found[5, 5].tolist() == [255] * 3


def test_the_spectrogram_against_a_plain_transform():
    """Term by term, as Whisper defines it but for the scale: window, DFT, filters whose area is 1 Hz, logarithm, cut-off."""
    samples = np.random.default_rng(0).normal(size=4 * 160) * np.linspace(0, 1, 640)
    found = media.log_mel(samples, 20)
    assert found.shape == (4, 20)
    padded = np.concatenate([samples[200:0:-1], samples, samples[-2:-202:-1]])
    k, n = np.arange(201)[:, None], np.arange(400)[None, :]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * n[0] / 400)
    power = np.stack(
        [
            np.abs((padded[160 * t : 160 * t + 400] * hann * np.exp(-2j * np.pi * k * n / 400)).sum(1)) ** 2
            for t in range(4)
        ]
    )

    def hertz(mel):
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    top = 15 + 27 * np.log(8) / np.log(6.4)
    corners = [hertz(top * i / 21) for i in range(22)]
    assert corners[-1] == pytest.approx(8000)
    energy = np.zeros((4, 20))
    for m in range(20):
        low, middle, high = corners[m : m + 3]
        for i in range(201):
            f = 40 * i
            rise, fall = (f - low) / (middle - low), (high - f) / (high - middle)
            energy[:, m] += power[:, i] * max(0.0, min(rise, fall)) * 2 / (high - low)
    logs = np.log10(np.maximum(energy, 1e-10))
    np.testing.assert_allclose(found, np.maximum(logs, logs.max() - 8) - logs.max() + 4, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(media.log_mel(0.01 * samples, 20), found, atol=1e-9)  # however loud it is


def test_a_tone_lights_up_its_band(tmp_path):
    """At the time when it sounds, and silence follows a clip that is too short."""
    samples = np.sin(2 * np.pi * 1000 * np.arange(800) / 16_000)
    sound(tmp_path / "tone.wav", 20_000 * samples)
    found = media.load(tmp_path / "tone.wav", HEARS)
    assert (found.shape, found.dtype) == ((16, 20), np.float16)
    centres = (media.mel_filters(20) @ np.arange(201) * 40) / media.mel_filters(20).sum(1)
    assert abs(centres[found[2].argmax()] - 1000) < 120
    assert found[2].max() == 4 and found[12].max() == -4
    for dtype, scale in (("u1", 128), ("<i4", 2**31)):
        sound(tmp_path / "other.wav", scale * 20_000 / 32_768 * samples + (128 if dtype == "u1" else 0), dtype=dtype)
        np.testing.assert_allclose(
            media.load(tmp_path / "other.wav", HEARS)[2][found[2] > 2], found[2][found[2] > 2], atol=0.05
        )
    sound(tmp_path / "stereo.wav", np.repeat(20_000 * samples, 2), channels=2)
    np.testing.assert_array_equal(media.load(tmp_path / "stereo.wav", HEARS), found)


def test_placeholders_and_back():
    """Also at both ends and next to each other; Russian bytes stay whole."""
    tok = Bytes()
    for text in ("", "текст", "<media>", "а<media>", "<media><media>б", "а <media> и <media>."):
        ids = media.encode(tok, text, 3)
        assert (ids == tok.media).sum() == 3 * text.count(media.MARK)
        assert media.decode(tok, ids, 3) == text


def test_bad_media_are_one_line(tmp_path):
    picture(tmp_path / "good.png", 1)
    picture(tmp_path / "wide.png", 1, size=(9, 8))
    picture(tmp_path / "large.png", 1, size=(16, 16))
    (tmp_path / "text.png").write_text("no picture")
    sound(tmp_path / "rate.wav", np.zeros(100), rate=8000)
    sound(tmp_path / "long.wav", np.zeros(160 * 16 + 1))
    cases = [
        (SEES, "<media>", ["none.png"], "none.png: no such file"),
        (SEES, "<media>", ["wide.png"], r"t.jsonl:1: .*wide.png has 9 x 8 pixels; model.media.size=8"),
        (SEES, "<media>", ["large.png"], "try model.media.size=16"),
        (SEES, "<media>", ["text.png"], "text.png is not a picture"),
        (SEES, "<media>", [], "1 times <media> in the text and 0 files"),
        (SEES, "<media><media><media>", 3 * ["good.png"], "3 items of media, .* model.media.items=2; try 3"),
        (SEES, "<media>", "good.png", '"media" must be a list'),
        (HEARS, "<media>", ["rate.wav"], "8000 samples a second; resample it to 16000"),
        (HEARS, "<media>", ["long.wav"], "lasts 0.16 s, .*frames=16 of 10 ms are read; try 18"),
        (HEARS, "<media>", ["good.png"], "good.png is not a .wav file"),
        (SEES, "<media>", ["good.png"], "no text is small enough to be held out of 1"),
    ]
    for settings, text, names, message in cases:
        (tmp_path / "t.jsonl").write_text(json.dumps({"text": text, "media": names}))
        with pytest.raises(BadInput, match=message) as caught:
            prepare.prepare(config(tmp_path / "t.jsonl", settings))
        assert "\n" not in str(caught.value)
    for i in range(40):
        picture(tmp_path / f"{i}.png", i)
    lines = [{"text": f"<media>{'long ' * 20}", "media": [f"{i}.png"]} for i in range(40)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(BadInput, match=r"no text that fits into data\.context=48, an item being 4 tokens"):
        prepare.prepare(config(tmp_path / "t.jsonl"))


def test_a_changed_setting_is_other_data(texts):
    """Rows hold as many placeholders as the model has tokens for an item."""
    cfg = config(texts)
    prepared = {
        prepare.prepare(one).fingerprint for one in (cfg, override(cfg, {"model.media.patch": 2, "data.context": 80}))
    }
    assert len(prepared) == 2
    assert prepare.prepare(override(cfg, {"model.media.d_model": 32})).fingerprint in prepared
