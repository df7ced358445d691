"""Tokenizers: nothing is lost, in any language, and bytes are counted exactly."""

import subprocess
import sys

import numpy as np
import pytest

from llm_jax.data import tokenizer
from llm_jax.settings import BadInput

TEXTS = [
    "def f(x):\n\treturn  x ** 2  # two  spaces\n",
    "Съешь ещё этих мягких французских булок, да выпей чаю.",
    "数学 и 🦜 emoji, \u0000 zero, \r\n line ends\n\n\n",
    "  leading, trailing  ",
    "",
]


@pytest.fixture(scope="module", params=["bytes", "bpe", "unigram"])
def tok(request):
    if request.param == "bytes":
        return tokenizer.Bytes()
    return tokenizer.train(request.param, 330, [text for text in TEXTS for _ in range(50)])


def test_decoding_returns_the_text(tok):
    """A tokenizer that normalises anything away would make losses of two tokenizers incomparable."""
    for text, ids in zip(TEXTS, tok.encode(TEXTS), strict=True):
        assert tok.decode(ids) == text
        assert ids.dtype == np.int32
        assert tok.bos not in ids


def test_token_bytes_add_up(tok):
    """Bits per byte divide by these."""
    for text, ids in zip(TEXTS, tok.encode(TEXTS), strict=True):
        assert tok.token_bytes()[ids].sum() == len(text.encode())
    assert tok.token_bytes().shape == (tok.vocab_size,)
    assert tok.token_bytes()[tok.bos] == 0


def test_characters_never_seen_fall_back_to_bytes(tok):
    """The held-out set holds characters that the training sample does not."""
    unseen = "ﬁ ᚠᛇᚻ 𝔘 ก"
    assert tok.decode(tok.encode([unseen])[0]) == unseen


def test_the_same_text_trains_the_same_pieces():
    """The hash goes into every trial: it must not depend on the process."""
    code = (
        "from llm_jax.data import tokenizer; t = tokenizer.train('bpe', 280, ['the cat sat on the mat ' * 50] * 20);"
        "print(t.sha256())"
    )
    hashes = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(hashes) == 1
    assert hashes != {tokenizer.train("unigram", 270, ["the cat sat on the mat " * 50] * 20).sha256() + "\n"}


@pytest.mark.parametrize("size", [100, 100_000])
def test_a_vocabulary_that_cannot_be_is_one_line(size):
    """SentencePiece itself answers with its source line."""
    with pytest.raises(BadInput, match=rf"vocab_size={size}") as caught:
        tokenizer.train("bpe", size, TEXTS)
    assert "\n" not in str(caught.value)
    assert ".cc" not in str(caught.value)
