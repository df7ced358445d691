"""Image scaling: how well does a small language model read handwriting, by the size of its encoder and the pictures that it saw?

    python experiments/digits.py digits DATA/mnist_t10k.npz        # writes media/digits: 10,000 pictures of 28 x 28 and their names
    llm-jax sweep experiments/digits.py --workers 8
    llm-jax fit runs/digits --law experiments/digits.py:image_scaling
    python experiments/digits.py score runs/digits

Classification by generation: a row is sixteen placeholders of a picture and its digit, and a model is right if that is what it
writes. Five encoders from 4 k to 340 k parameters, four horizons of one to eight passes over 9,000 pictures; the language model is the
same, two blocks of width 48. The loss is of the text alone: of a digit and of the end behind it. In the table: N_media, the encoder.

Measured 2026-11-22 on two CPU cores that others used as well (--workers 2), four minutes, 52 seconds for the scores, one seed. Loss in
nats a token, standard error 0.008 to 0.014, and share of 1,000 held-out digits that are right, standard error 0.5 to 1 %:

    N_media    1 pass           2 passes         4 passes         8 passes
      4,192    0.226   87.5 %   0.126   92.9 %   0.077   94.4 %   0.055   96.6 %
     14,496    0.165   91.0 %   0.099   94.0 %   0.059   96.4 %   0.046   97.1 %
     26,880    0.177   89.4 %   0.103   93.9 %   0.076   95.6 %   0.047   97.2 %
    102,848    0.174   89.7 %   0.094   94.8 %   0.060   95.7 %   0.053   97.1 %
    338,784    0.170   90.9 %   0.103   93.4 %   0.078   95.8 %   0.063   97.0 %

What the pictures buy is a power, beta 0.96 [0.69, 1.58]; what the encoder buys ends at 14 k parameters, where its exponent is not
determined (alpha unbounded below): 9,000 digits need no larger one.

Letters of eight alphabets (Omniglot, Lake et al. 2015), each to be named by its alphabet; held out is a tenth of the 4,840 drawings, by
people and of letters that are in the training set too:

    python experiments/digits.py alphabets DATA/omniglot_images_background_small1.zip DATA/omniglot_images_background_small2.zip
    llm-jax sweep experiments/digits.py --workers 8 --run runs/alphabets --data.files media/alphabets/pictures.jsonl \
        --data.context 40 --train.tokens-per-step 2560
    python experiments/digits.py score runs/alphabets

Two pictures in a text, interleaved, "<media> + <media> = 12", each digit in one sum alone:

    python experiments/digits.py sums DATA/mnist_t10k.npz
    llm-jax sweep experiments/digits.py --workers 8 --run runs/sums --data.files media/sums/pictures.jsonl \
        --model.media.items 2 --data.context 42 --train.tokens-per-step 2688
    python experiments/digits.py score runs/sums
"""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from llm_jax.config import Data, Media, Model, Train
from scaling.experiment import Experiment, axis, product, zipped

if TYPE_CHECKING:
    from PIL import Image

FOLDER = Path("media")
SIZE = 28
ENCODERS = ((1, 16), (1, 32), (2, 32), (2, 64), (3, 96))
"""Layers and width; heads are 16 wide."""

experiment = Experiment(
    model=Model(
        num_layers=2,
        d_model=48,
        num_heads=3,
        media=Media(kind="image", size=SIZE, channels=1, patch=7, num_layers=2, d_model=32),
    ),
    data=Data(
        source="media",
        files=("media/digits/pictures.jsonl",),
        context=18,
        val_fraction=0.1,
        eval_tokens=18 * 1000,
    ),
    # One rate for all: the rule's is for batches of which every token counts. Of 0.002, 0.005 and 0.0125 it was the best for the
    # encoder of 27 k parameters at two passes.
    train=Train(tokens_per_step=18 * 64, peak_lr=0.005),
    axes=product(
        zipped(
            axis("model.media.num_layers", [layers for layers, _ in ENCODERS]),
            axis("model.media.d_model", [width for _, width in ENCODERS]),
            axis("model.media.num_heads", [width // 16 for _, width in ENCODERS]),
        ),
        axis("train.tokens", [18 * 9000 * passes for passes in (1, 2, 4, 8)]),
    ),
)


def image_scaling(N_media, D_tokens, A, B, E, alpha, beta):
    """L = E + A / N_media^alpha + B / D^beta"""
    return E + A / N_media**alpha + B / D_tokens**beta


def write(name: str, texts: Iterable[tuple[str, list[Image.Image]]]) -> None:
    """media/NAME/pictures.jsonl, and a .png a picture beside it."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (text, pictures) in enumerate(texts):
        names = [f"{i:05}{letter}.png" for letter, _ in zip("ab", pictures, strict=False)]
        for file, picture in zip(names, pictures, strict=True):
            picture.save(folder / file)
        lines.append(json.dumps({"text": text, "media": names}) + "\n")
    (folder / "pictures.jsonl").write_text("".join(lines), encoding="utf-8")


def mnist(source: str, count: str) -> list[tuple[Image.Image, int]]:
    """The first `count` digits of MNIST's test set (LeCun et al. 1998), with what they are."""
    import numpy as np
    from PIL import Image

    with np.load(source) as found:
        pairs = list(zip(found["images"], found["labels"], strict=True))[: int(count)]
    return [(Image.fromarray(picture), int(label)) for picture, label in pairs]


def write_digits(source: str, count: str = "10000") -> None:
    """A picture and its digit, a line each."""
    write("digits", ((f"<media>{label}", [picture]) for picture, label in mnist(source, count)))


def write_sums(source: str, count: str = "10000") -> None:
    """Two pictures and the sum of their digits, a line each."""
    found = mnist(source, count)
    pairs = zip(found[::2], found[1::2], strict=True)
    write("sums", ((f"<media> + <media> = {a + b}", [one, other]) for (one, a), (other, b) in pairs))


def write_alphabets(*sources: str) -> None:
    """Omniglot's drawings, scaled down, with the names of their alphabets; one that is in two archives is written once."""
    from PIL import Image

    found: dict[str, tuple[str, list[Image.Image]]] = {}
    for source in sources:
        with zipfile.ZipFile(source) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".png"):
                    large = Image.open(io.BytesIO(archive.read(name))).convert("L")
                    picture = large.resize((SIZE, SIZE), Image.Resampling.BOX)
                    _, alphabet, character, file = name.split("/")
                    found[f"{alphabet}/{character}/{file}"] = f"<media>{alphabet}", [picture]
    write("alphabets", found.values())


def score(run: str, count: str = "1000") -> None:
    """Accuracy on held-out pictures, with its standard error, a line a trial."""
    from llm_jax.data.prepare import prepare
    from llm_jax.generation import media
    from llm_jax.training import loop
    from scaling import ledger

    for trial in ledger.trials(Path(run)):
        params = loop.load_params(trial.config, ledger.trial_folder(Path(run), trial.id))
        asked, found = media.answer(trial.config, prepare(trial.config), params, int(count))
        right = media.score(found, [question.wanted for question in asked])["exact_match"]
        error = (right * (1 - right) / len(asked)) ** 0.5
        counts = trial.counts
        print(f"N_media {counts['N_media']:9,}  D {counts['D_tokens']:11,}  {right:.3f} +- {error:.3f} of {len(asked)}")


if __name__ == "__main__":
    {"digits": write_digits, "sums": write_sums, "alphabets": write_alphabets, "score": score}[sys.argv[1]](
        *sys.argv[2:]
    )
