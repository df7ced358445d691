"""What is on the picture? Emoji with their names, from 1,700 examples, by models that see them and two sizes of encoder.

    python experiments/captions.py write DATA/emoji32.npz DATA/emoji32_captions.jsonl     # media/emoji: 1,911 pictures of 32 x 32
    llm-jax sweep experiments/captions.py --workers 4
    python experiments/captions.py score runs/captions
    llm-jax generate runs/captions --prompt "<media>" --media media/emoji/0100.png --temperature 0

A text is the group of an emoji and its name, "Animals & Nature: bear face", both to be written by the model: classification and
captioning in one. Held out is a tenth, by content. `score` says how often the group is right, and the name; how many of its words
(F1) and how many edits a character; and the same with the pictures of other emoji, which is what a blind model gets that knows how
often each is asked for. Names that nobody saw, as those of most flags, cannot be right, but their group can.

Measured 2026-11-22 on two CPU cores that others used as well (--workers 2), six minutes, one seed, 187 held out (standard error of a
share 3.6 %). Loss in nats a token, standard error 0.06 to 0.09; group right and words F1 of the name, with the own pictures and others':

    N_media    tokens      loss    group own   others'   F1 own   others'
     19,072    500,000     2.219   54.0 %      15.5 %    0.098    0.004
     19,072    1,000,000   2.027   55.1 %      16.0 %    0.126    0.006
     19,072    2,000,000   2.004   61.5 %      14.4 %    0.140    0.008
    352,512    500,000     2.218   51.9 %      15.0 %    0.102    0.011
    352,512    1,000,000   1.995   58.3 %      17.1 %    0.114    0.014
    352,512    2,000,000   2.070   59.4 %      16.0 %    0.117    0.014

The models see: the group is right three to four times as often as blindly. No held-out name is right as a whole, words of it are. 1,700
pictures do not tell the two encoders apart.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llm_jax.config import Data, Media, Model, Train
from scaling.experiment import Experiment, axis, product, zipped

FOLDER = Path("media/emoji")

experiment = Experiment(
    model=Model(
        vocab_size=512,
        num_layers=2,
        d_model=96,
        num_heads=3,
        dropout=0.1,
        media=Media(kind="image", size=32, channels=3, patch=8),
    ),
    data=Data(
        source="media",
        files=("media/emoji/captions.jsonl",),
        tokenizer="bpe",
        context=56,
        val_fraction=0.1,
        eval_tokens=56 * 191,
    ),
    train=Train(tokens_per_step=56 * 32, peak_lr=0.003),
    axes=product(
        zipped(
            axis("model.media.num_layers", [1, 3]),
            axis("model.media.d_model", [32, 96]),
            axis("model.media.num_heads", [2, 6]),
        ),
        axis("train.tokens", [500_000, 1_000_000, 2_000_000]),
    ),
)


def write(pictures: str, captions: str, count: str = "1911") -> None:
    """media/emoji: a .png an emoji, and captions.jsonl."""
    import numpy as np
    from PIL import Image

    FOLDER.mkdir(parents=True, exist_ok=True)
    with np.load(pictures) as found:
        images = found["images"]
    lines = []
    for line in Path(captions).read_text(encoding="utf-8").splitlines()[: int(count)]:
        entry = json.loads(line)
        name = f"{entry['i']:04}.png"
        Image.fromarray(images[entry["i"]]).save(FOLDER / name)
        lines.append({"text": f"<media>{entry['category']}: {entry['caption']}", "media": [name]})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (FOLDER / "captions.jsonl").write_text(text, encoding="utf-8")


def score(run: str, count: str = "1000") -> None:
    """Groups and names of held-out emoji, with their own pictures and with those of others."""
    from llm_jax.data.prepare import prepare
    from llm_jax.generation import media
    from llm_jax.training import loop
    from scaling import ledger

    for trial in ledger.trials(Path(run)):
        prepared = prepare(trial.config)
        params = loop.load_params(trial.config, ledger.trial_folder(Path(run), trial.id))
        asked, seeing = media.answer(trial.config, prepared, params, int(count))
        prompts, items, wanted = zip(*asked, strict=True)
        half = len(items) // 2
        swapped = items[half:] + items[:half]
        blind = media.caption(trial.config, prepared.tokenizer(), params, prompts, swapped)
        counts = trial.counts
        print(f"N_media {counts['N_media']:,}, D {counts['D_tokens']:,}, {len(asked)} held out")
        for kind, found in (("own pictures", seeing), ("others'", blind)):
            group, name = (
                media.score(
                    [text.partition(": ")[part] for text in found], [text.partition(": ")[part] for text in wanted]
                )
                for part in (0, 2)
            )
            print(
                f"  {kind:13} group right {group['exact_match']:.3f}  name right {name['exact_match']:.3f}"
                f"  words F1 {name['token_f1']:.3f}  edits a character {name['character_error_rate']:.3f}"
            )
        for right, ours in list(zip(wanted, seeing, strict=True))[:: max(1, len(wanted) // 6)]:
            print(f"    {right!r}: {ours!r}")


if __name__ == "__main__":
    {"write": write, "score": score}[sys.argv[1]](*sys.argv[2:])
