"""Attention maps against the model's own equations in NumPy float64, and against what a head may look at."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config import Config, Data, Experts, Model
from llm_jax.data.tokenizer import Bytes
from llm_jax.generation import maps
from llm_jax.models import families
from llm_jax.settings import BadInput

VOCAB, T, P = 19, 9, 4
BASE = Model(vocab_size=VOCAB, num_layers=2, d_model=16, num_heads=4, d_ff=24)
MODELS = {
    "rotary, grouped, window": replace(BASE, num_kv_heads=2, window=3),
    "learned, scanned": replace(BASE, positions="learned", qk_norm=False, scan_layers=True, recompute="block"),
    "sinusoidal, post, experts": replace(
        BASE, positions="sinusoidal", norm_position="post", experts=Experts(number=4, granularity=2)
    ),
    "encoder_decoder": replace(BASE, family="encoder_decoder", num_encoder_layers=1, num_kv_heads=1),
    "seq2seq_rnn": replace(BASE, family="seq2seq_rnn"),
}
KINDS = {"encoder_decoder": ["encoder", "decoder", "cross"], "seq2seq_rnn": ["cross"]}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Nine tenths of this file is compiling; with XLA's costlier passes off it takes a third less."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.lru_cache
def random_params(cfg: Model):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(families.init, cfg), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 + 0.5 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


TOKENS_T = np.random.default_rng(1).integers(0, VOCAB, T, dtype=np.int32)


@pytest.mark.parametrize("name", MODELS)
def test_rows_add_up_to_one_over_what_they_may_see(name):
    """A picture with a row of less than one, or a colour ahead of its token, teaches something false about every model."""
    cfg = MODELS[name]
    found = maps.attention_maps(cfg, random_params(cfg), TOKENS_T, None, P if cfg.encodes else 0)
    assert [one.name for one in found] == KINDS.get(name, ["self"])
    for one in found:
        layers = {"encoder": cfg.encoder_layers}.get(one.name, cfg.num_layers)
        shape = {
            "self": (T, T), "encoder": (P, P), "decoder": (T - P, T - P), "cross": (T - P, P),
        }[one.name]  # fmt: skip
        heads = (1, 1) if cfg.family == "seq2seq_rnn" else (layers, cfg.num_heads)
        assert one.weights_LxNxTxS.shape == (*heads, *shape)
        np.testing.assert_allclose(one.weights_LxNxTxS.sum(-1), 1, rtol=1e-6)
        distance_TxS = np.arange(shape[0])[:, None] - np.arange(shape[1])[None, :]
        ahead = (distance_TxS < 0) | (distance_TxS >= (cfg.window or T))
        expected = ~ahead if one.name in ("self", "decoder") else np.ones(shape, bool)
        np.testing.assert_array_equal(one.visible_TxS, expected)
        assert (one.weights_LxNxTxS[..., ~expected] == 0).all()
        assert (one.weights_LxNxTxS[..., expected] > 0).all()


def test_the_first_layer_equals_the_equations():
    """Embedding, norm, projections, norm of queries and keys, rotation and softmax, written out: the map is of this model."""
    cfg = MODELS["rotary, grouped, window"]
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), random_params(cfg))
    block = jax.tree.map(lambda x: x[0], params["blocks"])

    def rms(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    def rotated(x_TxH):
        half = x_TxH.shape[1] // 2
        angle_TxH = np.arange(T)[:, None] * cfg.rope_theta ** (-np.arange(half) / half)
        turned = (x_TxH[:, :half] + 1j * x_TxH[:, half:]) * np.exp(1j * angle_TxH)
        return np.concatenate([turned.real, turned.imag], axis=1)

    x_TxD = rms(params["embed"][TOKENS_T] * np.sqrt(cfg.d_model), block["norm1"]["scale"])
    weights_NxTxT = np.zeros((cfg.num_heads, T, T))
    for n in range(cfg.num_heads):
        q_TxH = rotated(rms(x_TxD @ block["attention"]["q"][:, n], block["attention"]["q_norm"]["scale"]))
        k_TxH = rotated(rms(x_TxD @ block["attention"]["k"][:, n // 2], block["attention"]["k_norm"]["scale"]))
        for t in range(T):
            seen = slice(max(0, t - cfg.window + 1), t + 1)
            e = np.exp(k_TxH[seen] @ q_TxH[t] / np.sqrt(cfg.head_width))
            weights_NxTxT[n, t, seen] = e / e.sum()
    [found] = maps.attention_maps(cfg, random_params(cfg), TOKENS_T)
    np.testing.assert_allclose(found.weights_LxNxTxS[0], weights_NxTxT, atol=1e-5)
    assert np.abs(found.weights_LxNxTxS[1] - weights_NxTxT).max() > 0.01, "the second layer is another"


@pytest.mark.parametrize("name", KINDS)
def test_padding_before_a_source_is_not_attended_to(name):
    """Sources of a batch are padded to one length: attention that leaks into padding makes a map depend on the others' length."""
    cfg, padding = MODELS[name], 3
    segment_T = np.array(padding * [1] + T * [0], np.int32)
    padded_T = np.concatenate([np.zeros(padding, np.int32), TOKENS_T])
    params = random_params(cfg)
    alone = maps.attention_maps(cfg, params, TOKENS_T, None, P)
    for one, bare in zip(maps.attention_maps(cfg, params, padded_T, segment_T, P + padding), alone, strict=True):
        if one.name == "encoder":
            assert (one.weights_LxNxTxS[:, :, padding:, :padding] == 0).all()
            own = one.weights_LxNxTxS[:, :, padding:, padding:]
        elif one.name == "cross":
            assert (one.weights_LxNxTxS[..., :padding] == 0).all()
            own = one.weights_LxNxTxS[..., padding:]
        else:
            own = one.weights_LxNxTxS
        np.testing.assert_allclose(own, bare.weights_LxNxTxS, atol=1e-5)


def test_documents_of_a_packed_row_have_maps_of_their_own():
    """What holds in training holds in the picture of it."""
    cfg = MODELS["rotary, grouped, window"]
    segment_T = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1], np.int32)
    [packed] = maps.attention_maps(cfg, random_params(cfg), TOKENS_T, segment_T)
    [second] = maps.attention_maps(cfg, random_params(cfg), TOKENS_T[4:])
    np.testing.assert_allclose(packed.weights_LxNxTxS[:, :, 4:, 4:], second.weights_LxNxTxS, atol=1e-5)


@pytest.mark.parametrize("family", ["lstm", "rnn", "feedforward", "ngram"])
def test_families_without_attention_are_refused(family):
    """One line that names those that have it, and no figure."""
    with pytest.raises(BadInput, match=rf"^model\.family={family} has no attention; transformer, encoder_decoder"):
        maps.attention_maps(replace(BASE, family=family), {}, TOKENS_T)


def test_each_token_has_a_text_whatever_its_bytes():
    """A letter of Russian is two bytes, neither of which is a letter: the first is labelled with it, the second with nothing."""
    tokenizer = Bytes()
    ids = [tokenizer.bos, *tokenizer.encode(["Ёж a\n€"])[0].tolist()]
    assert maps.token_texts(tokenizer, ids) == ("<s>", "Ё", "", "ж", "", "␣", "a", "\\n", "€", "", "")
    assert maps.token_texts(tokenizer, [0xD0]) == ("�",), "half a letter"


@pytest.mark.parametrize(("text", "source"), [("Ёж, ёжик", ("<s>", "Ё", "", "ж")), ("ab", ("<s>", "a"))])
def test_an_encoder_of_running_text_reads_the_start_of_it(text, source, monkeypatch, tmp_path):
    """Labels that are off by one token teach the opposite of what the model does; a text shorter than the prefix has a map too."""
    model = replace(MODELS["encoder_decoder"], vocab_size=256)
    cfg = Config(model, Data(context=16, prefix=4))
    monkeypatch.setattr(maps.loop, "load_params", lambda *_: random_params(model))
    prepared = SimpleNamespace(tokenizer=Bytes)
    encoder, decoder, cross = maps.maps_of_text(cfg, prepared, tmp_path, text)
    assert encoder.queries == encoder.keys == cross.keys == source
    assert decoder.queries == decoder.keys == cross.queries
    assert "".join(encoder.keys + decoder.keys) == "<s>" + text.replace(" ", "␣")
    for one in (encoder, decoder, cross):
        assert one.weights_LxNxTxS.shape[2:] == (len(one.queries), len(one.keys))
