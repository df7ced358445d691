"""Whole runs of models that see and hear: they learn what only the media tell, parts of them stay frozen, and runs begin with others."""

import json
import wave
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from llm_jax.config import Config, Data, Media, Mesh, Model, Train
from llm_jax.data import prepare
from llm_jax.data.tokenizer import Bytes
from llm_jax.generation import media, sampling
from llm_jax.settings import BadInput, override, to_dict
from llm_jax.training import initial, loop, metrics, pretrain, programs

pytestmark = pytest.mark.usefixtures("mixed_dtypes", "quick_compilation")
COLOURS = {"красный": (220, 30, 30), "зелёный": (30, 200, 40), "синий": (20, 40, 230)}


@pytest.fixture
def cfg(tmp_path):
    """Pictures of one colour each, with noise: nothing but the picture tells which word is right."""
    random, lines = np.random.default_rng(0), []
    for i, (name, colour) in enumerate(30 * list(COLOURS.items())):
        pixels = np.clip(random.normal(colour, 20, (8, 8, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"text": f"<media>{name}", "media": [f"{i}.png"]}))
    (tmp_path / "colours.jsonl").write_text("\n".join(lines))
    return Config(
        model=Model(num_layers=1, d_model=32, media=Media(kind="image", size=8, patch=4, num_layers=1, d_model=16)),
        data=Data(source="media", files=(f"{tmp_path}/colours.jsonl",), context=24, val_fraction=0.2),
        train=Train(
            tokens=24 * 16 * 60,
            tokens_per_step=24 * 16,
            peak_lr=1e-2,
            warmup_steps=5,
            steps_per_call=8,
            checkpoint_every=24,
        ),
        mesh=Mesh(data=1),
    )


def leaves(params):
    found = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in found}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, leaf in a.items():
        np.testing.assert_array_equal(leaf, b[name], err_msg=name)


class Stop(Exception):
    pass


@pytest.mark.slow
def test_what_only_the_picture_tells_is_learned(cfg, tmp_path):
    """By generation: one of three colours would be right for a model that is blind. A run that was cut ends with the same bits."""
    prepared = prepare.prepare(cfg)

    def stop(step, total, loss):
        if step >= 40:
            raise Stop

    with pytest.raises(Stop):
        loop.train(cfg, prepared, tmp_path / "cut", progress=stop)
    cut, whole = (loop.train(cfg, prepared, tmp_path / name) for name in ("cut", "whole"))
    assert cut.loss == whole.loss < 0.1
    params = loop.load_params(cfg, tmp_path / "whole")
    assert_same(leaves(params), leaves(loop.load_params(cfg, tmp_path / "cut")))
    assert metrics.read_metrics(tmp_path / "cut") == metrics.read_metrics(tmp_path / "whole")
    asked = media.held_out(cfg, prepared)
    prompts, items, wanted = zip(*asked, strict=True)
    assert set(prompts) == {"<media>"}
    assert set(wanted) == set(COLOURS)
    found = media.caption(cfg, prepared.tokenizer(), params, prompts, items)
    scores = media.score(found, wanted)
    assert scores["exact_match"] == scores["token_f1"] == 1
    blind = media.caption(cfg, prepared.tokenizer(), params, prompts, items[:1] * len(items))
    assert len(set(blind)) == 1
    picture = tmp_path / f"{list(COLOURS).index('синий')}.png"
    text = sampling.continue_text(cfg, prepared, tmp_path / "whole", "<media>", 12, temperature=0, media=[picture])
    assert text == "синий"
    with pytest.raises(BadInput, match="2 times <media> in the text and 1 files"):
        sampling.continue_text(cfg, prepared, tmp_path / "whole", "<media><media>", 8, media=[picture])


@pytest.mark.slow
def test_a_tone_is_told_by_its_pitch(tmp_path):
    """The same for sounds: two tones in noise, of unequal length."""
    random, lines = np.random.default_rng(1), []
    for i in range(60):
        name, hertz = (("low", 400), ("high", 1500))[i % 2]
        samples = np.sin(2 * np.pi * hertz * np.arange(1800 + 10 * i) / 16_000) + random.normal(0, 0.3, 1800 + 10 * i)
        with wave.open(str(tmp_path / f"{i}.wav"), "wb") as f:
            f.setnchannels(1), f.setsampwidth(2), f.setframerate(16_000)
            f.writeframes((8000 * samples).astype("<i2").tobytes())
        lines.append(json.dumps({"text": f"<media>{name}", "media": [f"{i}.wav"]}))
    (tmp_path / "tones.jsonl").write_text("\n".join(lines))
    hears = Media(kind="audio", frames=16, mel_bins=16, num_layers=1, d_model=16)
    cfg = Config(
        model=Model(num_layers=1, d_model=32, media=hears),
        data=Data(source="media", files=(f"{tmp_path}/tones.jsonl",), context=16, val_fraction=0.3),
        train=Train(tokens=16 * 16 * 40, tokens_per_step=16 * 16, peak_lr=1e-2, warmup_steps=5, steps_per_call=8),
        mesh=Mesh(data=1),
    )
    prepared = prepare.prepare(cfg)
    assert loop.train(cfg, prepared, tmp_path / "run").loss < 0.1
    prompts, items, wanted = zip(*media.held_out(cfg, prepared), strict=True)
    params = loop.load_params(cfg, tmp_path / "run")
    assert media.score(media.caption(cfg, prepared.tokenizer(), params, prompts, items), wanted)["exact_match"] == 1


@pytest.mark.slow
def test_frozen_parts_keep_their_bits_and_the_rest_moves(cfg, tmp_path):
    """No update, no decay and no memory of the optimizer; a prefix is whole steps of a path."""
    prepared = prepare.prepare(cfg)
    freeze = ("media/encoder", "blocks/mlp")
    held = override(cfg, {"train.freeze": freeze, "train.tokens": 24 * 16 * 8})
    start = leaves(programs.compiled_init(cfg.model)(jax.random.key(cfg.train.seed)))
    loop.train(held, prepared, tmp_path / "held")
    end = leaves(loop.load_params(held, tmp_path / "held"))
    frozen = {name for name in start if name.startswith(("media/encoder/", "blocks/mlp/"))}
    assert frozen
    for name, leaf in start.items():
        assert np.array_equal(leaf, end[name]) == (name in frozen), name
    _, init_opt = programs.compiled_call(held.model, programs.program(held.train), 0)
    kept = sum(leaf.size for leaf in jax.tree.leaves(init_opt(loop.load_params(held, tmp_path / "held"))) if leaf.ndim)
    assert kept == 2 * sum(leaf.size for name, leaf in start.items() if name not in frozen)


def test_a_frozen_gradient_does_not_clip_the_others(cfg):
    """The norm that is clipped is of what is trained."""
    prepared = prepare.prepare(cfg)
    rows = [row for part in prepared.rows("train") for row in part][:4]
    tokens = np.stack([row["tokens"] for row in rows]).astype(np.int32)
    batch = pretrain.make_batch(tokens, Bytes(), cfg.data, np.stack([row["media"] for row in rows]))
    params = programs.compiled_init(cfg.model)(jax.random.key(0))

    def grads(freeze):
        loss = pretrain.loss_fn(cfg.model, replace(cfg.train, freeze=freeze))
        return leaves(jax.jit(jax.grad(loss, has_aux=True))(params, batch, jax.random.key(0))[0])

    all_of_them, some = grads(()), grads(("blocks", "embed"))
    for name, leaf in some.items():
        assert np.any(all_of_them[name]), name
        if name.startswith(("blocks/", "embed")):
            assert not np.any(leaf)
        else:
            np.testing.assert_allclose(leaf, all_of_them[name], rtol=1e-5, atol=1e-6 * np.abs(leaf).max())


def test_an_unknown_part_is_not_frozen_silently(cfg):
    from llm_jax import ladder

    wrong = override(cfg, {"train.freeze": ("media/encodr",)})
    with pytest.raises(BadInput, match=r'train.freeze "media/encodr" begins no path .*did you mean "media/encoder"'):
        ladder.resolve(wrong)
    with pytest.raises(BadInput, match=r'train.freeze "block"'):  # not as a mere beginning of a word
        ladder.resolve(override(cfg, {"train.freeze": ("block",)}))


def finish(cfg, prepared, folder, loss):
    """The files that a sweep leaves of a trial."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trial.json").write_text(json.dumps({"config": to_dict(cfg), "point": {}}))
    result = {"status": "done", "loss": loss, "tokenizer_sha256": prepared.tokenizer_sha256}
    (folder / "result.json").write_text(json.dumps(result))


@pytest.mark.slow
def test_a_run_begins_with_the_parameters_of_another(cfg, tmp_path, corpus):
    """A language model trained on text gets eyes: its arrays are taken as they are, by path and shape, and the encoder starts anew."""
    short = override(cfg, {"train.tokens": 24 * 16})
    text = Config(
        model=replace(cfg.model, media=Media()),
        data=Data(source="files", files=(f"{corpus}/*",), context=24, val_fraction=0.2),
        train=short.train,
    )
    run = tmp_path / "text"
    loop.train(text, prepare.prepare(text), run / "trials" / "better")
    finish(text, prepare.prepare(text), run / "trials" / "better", loss=1.0)
    finish(override(text, {"train.seed": 1}), prepare.prepare(text), run / "trials" / "worse", loss=2.0)
    prepared = prepare.prepare(cfg)
    frozen = override(short, {"train.init_from": str(run), "train.freeze": ("blocks", "embed", "norm")})
    loop.train(frozen, prepared, tmp_path / "seeing")
    found, there = (
        leaves(loop.load_params(*of)) for of in ((frozen, tmp_path / "seeing"), (text, run / "trials/better"))
    )
    for name, leaf in there.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    said = json.loads((tmp_path / "seeing" / initial.FILE).read_text())
    assert said["from"].endswith("better")
    assert set(said["taken"]) == set(there)
    assert set(said["left"]) == set(found) - set(there)
    for change, message in {
        (
            "model.d_model",
            48,
        ): "no array that fits this model: embed there has shape .256, 32. in 1 layers, here .256, 48. in 1",
        ("train.freeze", ("media/encoder",)): "train.freeze would hold media/encoder/patch as it is drawn at random",
    }.items():
        with pytest.raises(BadInput, match=message) as caught:
            loop.train(override(frozen, dict([change])), prepared, tmp_path / "wrong")
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="is no run directory and no trial's folder"):
        initial.find_trial(tmp_path / "txt")
    assert initial.find_trial(run).folder == run / "trials" / "better"


def test_rows_of_an_embedding_are_not_taken_from_another_tokenizer(cfg, tmp_path):
    """The shape fits and the meaning does not: row 300 is another piece."""
    (tmp_path / "trial.json").write_text(json.dumps({"config": to_dict(cfg), "point": {}}))
    (tmp_path / "result.json").write_text(json.dumps({"status": "done", "loss": 1.0, "tokenizer_sha256": "a"}))
    own = override(cfg, {"train.init_from": str(tmp_path)})
    assert initial.plan(own, "a")[1]["left"] == []
    assert initial.plan(own, "b")[1]["left"] == ["embed"]
    held = override(own, {"train.freeze": ("embed",)})
    assert initial.plan(held, "a")[0].folder == tmp_path
    with pytest.raises(BadInput, match=r"train.freeze would hold embed .* its tokenizer is another"):
        initial.plan(held, "b")
