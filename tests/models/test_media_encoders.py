"""Encoders of media against plain loops, and who sees what in a row of text and media."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llm_jax.config import Config, Data, Experts, Media, Model, Train
from llm_jax.data.tokenizer import Bytes
from llm_jax.generation.sampling import generate
from llm_jax.models import families
from llm_jax.models import media as encoders
from llm_jax.models.media import Items
from llm_jax.settings import BadInput
from llm_jax.training import pretrain

pytestmark = pytest.mark.usefixtures("quick_compilation")
SEES = Media(kind="image", items=2, size=8, patch=4, channels=3, num_layers=2, d_model=16)
HEARS = Media(kind="audio", items=2, frames=8, mel_bins=6, num_layers=2, d_model=16)
IMAGE = Model(num_layers=1, d_model=32, scan_layers=True, media=SEES)
AUDIO = Model(num_layers=1, d_model=32, positions="learned", max_context=32, scan_layers=True, media=HEARS)
MIXTURE = replace(IMAGE, experts=Experts(number=4))
both_kinds = pytest.mark.parametrize("model", [IMAGE, AUDIO], ids=["image", "audio"])
T, FIRST, SECOND = 16, 3, 9
"""A row: text, four placeholders, text, four placeholders, text."""


@functools.cache
def params_of(model):
    return jax.jit(functools.partial(families.init, model))(jax.random.key(0))


@functools.cache
def forward(model):
    return jax.jit(lambda params, tokens, items, at: families.apply(model, params, tokens, media=Items(items, at)))


def row(model, seed=0, rows=2):
    """(tokens_BxT, items_BxIx, at_BxT), placeholders at FIRST and SECOND."""
    random = np.random.default_rng(seed)
    tokens_BxT = random.integers(0, 200, (rows, T)).astype(np.int32)
    at_BxT = np.zeros((rows, T), bool)
    at_BxT[:, FIRST : FIRST + 4] = at_BxT[:, SECOND : SECOND + 4] = True
    tokens_BxT[at_BxT] = Bytes.media
    return tokens_BxT, items(model, random, rows), at_BxT


def items(model, random, rows=2):
    shape = (rows, model.media.items, *model.media.shape)
    if model.media.kind == "image":
        return random.integers(0, 256, shape).astype(np.uint8)
    return random.normal(size=shape).astype(np.float16)


def test_patches_are_read_as_a_page_is():
    """Against a loop: a patch is a square, its pixels by rows, and patches follow each other by rows."""
    pictures = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
    found = np.asarray(encoders.patches(jnp.asarray(pictures), 4))
    for x in range(2):
        for i in range(3):
            for j in range(3):
                square = pictures[x, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                np.testing.assert_array_equal(found[x, 3 * i + j], square.reshape(-1))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_is_a_sum_over_taps(stride):
    """Against a loop, with zeros beyond both ends (PyTorch's padding=1, which Whisper has)."""
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(2, 8, 5)).astype(np.float32), random.normal(size=(3, 5, 4)).astype(np.float32)
    wanted = np.zeros((2, 8 // stride, 4))
    for f in range(8 // stride):
        for k in range(3):
            if 0 <= f * stride + k - 1 < 8:
                wanted[:, f] += x[:, f * stride + k - 1].astype(np.float64) @ kernel[k]
    found = encoders.convolve(jnp.asarray(x), jnp.asarray(kernel), stride)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_embeddings_take_the_placeholders_in_order():
    """Against a loop, with rows of no placeholder, of some and of all."""
    random = np.random.default_rng(0)
    x, media = random.normal(size=(4, 7, 3)).astype(np.float32), random.normal(size=(4, 5, 3)).astype(np.float32)
    at = np.zeros((4, 7), bool)
    at[1, [0, 2, 6]] = at[2, 1:6] = at[3, -1] = True
    wanted = x.copy()
    for b in range(4):
        taken = 0
        for t in range(7):
            if at[b, t]:
                wanted[b, t] = media[b, taken]
                taken += 1
    np.testing.assert_array_equal(encoders.place(jnp.asarray(x), jnp.asarray(media), at), wanted)


def test_bytes_become_numbers_around_zero():
    found = encoders.scaled(jnp.asarray([0, 255], jnp.uint8), jnp.float32)
    np.testing.assert_allclose(found, [-1, 1])


@both_kinds
def test_text_sees_what_stands_before_it(model):
    """Text before an item does not move with it; text behind does. That of the first item alone does not move with the second."""
    tokens, media, at = row(model)
    plain = np.asarray(forward(model)(params_of(model), tokens, media, at))
    for which, start in ((0, FIRST), (1, SECOND)):
        other = media.copy()
        other[:, which] = items(model, np.random.default_rng(9))[:, which]
        changed = np.asarray(forward(model)(params_of(model), tokens, other, at))
        np.testing.assert_array_equal(plain[:, :start], changed[:, :start])
        assert np.abs(plain[:, start + 4 :] - changed[:, start + 4 :]).max(-1).min() > 1e-4


@both_kinds
def test_an_item_is_seen_as_a_whole(model):
    """The encoder looks both ways: its first embedding moves with the last pixel or the last frame."""
    encode = jax.jit(lambda params, media: encoders.Media(model).apply({"params": params["media"]}, media))
    media = row(model)[1]
    other = media.copy()
    other[:, 0, -1] = 0
    one, two = (np.asarray(encode(params_of(model), x)) for x in (media, other))
    assert one.shape == (2, 8, model.d_model)
    assert np.abs(one - two)[:, :4].max(-1).min() > 1e-5
    np.testing.assert_array_equal(one[:, 4:], two[:, 4:])  # items do not see each other in the encoder


def test_without_placeholders_nothing_is_seen():
    """A row with fewer items than there is room for: what fills it up is read by nobody."""
    tokens, media, at = row(IMAGE)
    at[:, SECOND : SECOND + 4] = False
    other = media.copy()
    other[:, 1] = 0
    one, two = (forward(IMAGE)(params_of(IMAGE), tokens, x, at) for x in (media, other))
    np.testing.assert_array_equal(one, two)


def test_text_alone_is_read_as_without_an_encoder():
    """The language model of a multimodal one is a language model: same parameters, same logits."""
    text = replace(IMAGE, media=Media())
    own, other = params_of(IMAGE), params_of(text)
    assert set(own) - set(other) == {"media"}
    jax.tree.map(np.testing.assert_array_equal, {name: own[name] for name in other}, other)
    tokens = jnp.asarray(row(IMAGE)[0])
    np.testing.assert_array_equal(families.apply(IMAGE, own, tokens), families.apply(text, other, tokens))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(IMAGE, id="image"),
        pytest.param(AUDIO, id="audio"),
        pytest.param(MIXTURE, id="mixture", marks=pytest.mark.slow),
    ],
)
def test_the_gradient_reaches_every_array(model):
    """Of the encoder and the projector too; and the loss is of text alone: another target in the place of an item changes nothing."""
    tokens, media, at = row(model)
    tokens = np.concatenate([tokens, [[7], [8]]], axis=1).astype(np.int32)
    tokens[:, -1] = Bytes.pad
    data = Data(source="media", files=("x",), context=T)
    loss = jax.jit(jax.value_and_grad(pretrain.loss_fn(model, Train()), has_aux=True))
    batch = pretrain.make_batch(tokens, Bytes(), data, media)
    np.testing.assert_array_equal(batch["weights"], ~np.pad(at[:, 1:], ((0, 0), (0, 1)), constant_values=True))
    (_, sums), grads = loss(params_of(model), batch, jax.random.key(0))
    assert sums["weight"] == 2 * (T - 1 - 8)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.any(np.asarray(leaf)), jax.tree_util.keystr(path)
    changed = {**batch, "tokens": np.where(np.pad(at, ((0, 0), (0, 1))), 5, tokens)}
    (_, again), grads_again = loss(params_of(model), changed, jax.random.key(0))
    assert again["nll"] == sums["nll"]
    assert np.any(np.asarray(grads["embed"]))
    jax.tree.map(np.testing.assert_array_equal, grads, grads_again)


@both_kinds
def test_generation_with_a_cache_is_the_full_forward(model):
    """Greedy: the media go in with the prompt and stay in the cache; prompts of unequal length stand behind padding."""
    tokens, media, at = row(model)
    tokens, at = tokens[:, :14], at[:, :14]
    new = generate(
        model,
        params_of(model),
        jnp.asarray(tokens),
        jax.random.key(0),
        num_tokens=4,
        temperature=0,
        media=Items(jnp.asarray(media), jnp.asarray(at)),
    )
    text = np.concatenate([tokens, new], axis=1)
    everywhere = np.pad(at, ((0, 0), (0, 4)))
    logits = np.asarray(forward(model)(params_of(model), text, media, everywhere))
    np.testing.assert_array_equal(new, logits[:, 13:-1].argmax(-1))
    segment = np.zeros((2, 17), np.int32)
    segment[:, :3] = 1
    padded = generate(
        model,
        params_of(model),
        jnp.asarray(np.pad(tokens, ((0, 0), (3, 0)), constant_values=Bytes.pad)),
        jax.random.key(0),
        num_tokens=4,
        temperature=0,
        segment_BxT=jnp.asarray(segment),
        media=Items(jnp.asarray(media), jnp.asarray(np.pad(at, ((0, 0), (3, 0))))),
    )
    np.testing.assert_array_equal(padded, new)


SIZES = {
    "layers": 2, "embed": 16, "heads": 2, "kv": 2, "head": 8, "mlp": 64, "positions": 4, "pixels": 48, "taps": 3, "mel": 6,
    "hidden": 16,
}  # fmt: skip


@both_kinds
def test_logical_axes_name_every_dimension(model):
    """A mesh shards by these names; of the encoder here, whose sizes all differ from those of the language model."""
    shapes = jax.eval_shape(functools.partial(families.init, model), jax.random.key(0))
    axes = families.logical_axes(model)
    assert jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, PartitionSpec)) == jax.tree.structure(shapes)
    jax.tree.map(
        lambda leaf, spec: np.testing.assert_equal(leaf.shape, tuple(SIZES[name] for name in spec)),
        shapes["media"]["encoder"],
        axes["media"]["encoder"],
    )
    assert axes["media"]["projector"]["up"] == PartitionSpec("hidden", "mlp")


def test_wrong_settings_are_one_line():
    for change, message in {
        lambda: Media(
            kind="image", size=28, patch=8
        ): "patch=8 does not divide model.media.size=28; nearest that does: 7",
        lambda: Media(kind="image", channels=4): "channels must be 3 for colours or 1 for grey, got 4",
        lambda: Media(kind="audio", frames=7): "frames=7 must be even; try 8",
        lambda: Media(
            kind="image", d_model=30, num_heads=4
        ): "num_heads=4 does not divide model.media.d_model=30; nearest",
        lambda: Media(kind="imgae"): 'did you mean "image"',
        lambda: replace(IMAGE, family="lstm"): "model.media needs model.family=transformer, got lstm",
        lambda: Config(model=IMAGE): "kind=image does not fit data.source=stdlib",
        lambda: Config(data=Data(source="media", files=("x",))): "kind=none does not fit data.source=media",
        lambda: Config(
            model=IMAGE, data=Data(source="media", files=("x",), context=9)
        ): "no room for 2 x 4 .* at least 10",
        lambda: Data(source="media", files=("x",), document_mask=True): "one text a row",
        lambda: families.apply(
            Model(), params_of(Model()), jnp.zeros((1, 2), jnp.int32), media=Items(np.zeros(1), np.zeros(1))
        ): "no encoder of media",
    }.items():
        with pytest.raises(BadInput, match=message) as caught:
            change()
        assert "\n" not in str(caught.value)
