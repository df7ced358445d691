"""Pictures and sounds as arrays, and texts with placeholders for them.

A picture is the bytes of its pixels. A sound is a log-mel spectrogram as Whisper reads it (Radford et al. 2022, section 2.2): windows of
25 ms every 10 ms at 16 kHz, triangular filters on the mel scale, decades of energy cut off 80 dB below the loudest.
"""

from __future__ import annotations

import functools
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llm_jax.config import Media
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.settings import BadInput

MARK = "<media>"
"""In a text: here stands the next item."""
RATE = 16_000
"""Samples a second."""
WINDOW, HOP = 400, 160
"""Samples: 25 and 10 ms."""


def load(path: Path, media: Media) -> np.ndarray:
    """One item as `media.shape` and `media.dtype` say. Raises BadInput for a file that is none, with what is the matter."""
    try:
        return _picture(path, media) if media.kind == "image" else _sound(path, media)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, wave.Error, EOFError) as error:
        what = "a picture that Pillow reads" if media.kind == "image" else "a .wav file"
        raise BadInput(
            f"{path} is not {what}: {str(error).splitlines()[0] if str(error) else 'it ends early'}"
        ) from None


def load_items(media: Media, text: str, paths: Sequence[Path | str]) -> np.ndarray:
    """The items of one row, of `media.items` and `media.shape`, for the marks of a text. Raises BadInput where their numbers differ."""
    if media.kind == "none":
        raise BadInput("the model has no encoder of media; train one with model.media.kind=image or audio")
    if text.count(MARK) != len(paths):
        raise BadInput(f"{text.count(MARK)} times {MARK} in the text and {len(paths)} files; there must be as many")
    if len(paths) > media.items:
        raise BadInput(f"{len(paths)} items of media, and a row has model.media.items={media.items}; try {len(paths)}")
    items = np.zeros((media.items, *media.shape), media.dtype)
    for i, path in enumerate(paths):
        items[i] = load(Path(path), media)
    return items


def _picture(path: Path, media: Media) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as file:
        picture: Image.Image = file
        if picture.size != (media.size, media.size):
            wide, high = picture.size
            near = f"; try model.media.size={wide}" if wide == high else ""
            raise BadInput(
                f"{path} has {wide} x {high} pixels; model.media.size={media.size} reads squares of {media.size}{near}"
            )
        if "A" in picture.getbands() or "transparency" in picture.info:  # onto white, as a page shows it
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        pixels = np.asarray(picture.convert("RGB" if media.channels == 3 else "L"), np.uint8)
    return pixels.reshape(media.shape)


def _sound(path: Path, media: Media) -> np.ndarray:
    with wave.open(str(path)) as f:
        width, rate, channels = f.getsampwidth(), f.getframerate(), f.getnchannels()
        if rate != RATE:
            raise BadInput(f"{path} has {rate} samples a second; resample it to {RATE}")
        if width not in (1, 2, 4):
            raise BadInput(f"{path} has {8 * width} bits a sample; 8, 16 and 32 are read")
        found = np.frombuffer(f.readframes(f.getnframes()), np.dtype(f"<i{width}" if width > 1 else "u1"))
    samples = found.reshape(-1, channels).astype(np.float64).mean(axis=1) / 2 ** (8 * width - 1) - (width == 1)
    if len(samples) > media.frames * HOP:
        need, seconds = 2 * -(-len(samples) // (2 * HOP)), len(samples) / RATE
        raise BadInput(
            f"{path} lasts {seconds:.2f} s, and model.media.frames={media.frames} of 10 ms are read; try {need}"
        )
    samples = np.pad(samples, (0, media.frames * HOP - len(samples)))
    return log_mel(samples, media.mel_bins).astype(np.float16)


def log_mel(samples: np.ndarray, bins: int) -> np.ndarray:
    """log10 of the energy in each mel band, float64 [len(samples) // HOP, bins], in [-4, 4]: 4 where it is largest, cut off below.

    Frame t is of WINDOW samples around t HOP, a Hann window on them, the ends mirrored: Whisper's `log_mel_spectrogram`, but for
    its last line, which divides by four and keeps the level. On that scale a small encoder did not hear: 500 steps on two to four
    dial tones in noise left 1.78 nats a token, which is what their number alone gives, and 0.50 on this one (one seed).
    """
    padded = np.pad(samples, WINDOW // 2, mode="reflect")
    starts = np.arange(len(samples) // HOP) * HOP
    frames = padded[starts[:, None] + np.arange(WINDOW)[None, :]] * np.hanning(WINDOW + 1)[:-1]
    power = np.abs(np.fft.rfft(frames, axis=-1)) ** 2
    energy = np.log10(np.maximum(power @ mel_filters(bins).T, 1e-10))
    return np.maximum(energy - energy.max() + 4.0, -4.0)


@functools.lru_cache
def mel_filters(bins: int) -> np.ndarray:
    """Triangles whose corners are equally far apart in mels, each of area 1 Hz: [bins, WINDOW // 2 + 1].

    Slaney's scale (Auditory Toolbox, 1998), librosa's default and Whisper's: linear below 1 kHz, at 200/3 Hz a mel, and above it
    27 mels a factor of 6.4.
    """
    step = np.log(6.4) / 27
    top = 15 + np.log(RATE / 2 / 1000) / step
    mels = np.linspace(0, top, bins + 2)
    corners = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(step * (mels - 15)))
    hertz = np.arange(WINDOW // 2 + 1) * RATE / WINDOW
    low, middle, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    triangle = np.minimum((hertz - low) / (middle - low), (high - hertz) / (high - middle))
    return np.maximum(triangle, 0) * 2 / (high - low)


def encode(tokenizer: Tokenizer, text: str, tokens: int) -> np.ndarray:
    """Ids of a text, int32: each mark becomes `tokens` placeholders, and what stands around it is encoded by itself."""
    pieces = [np.asarray(ids, np.int32) for ids in tokenizer.encode(text.split(MARK))]
    placeholders = np.full(tokens, tokenizer.media, np.int32)
    return np.concatenate([part for ids in pieces for part in (placeholders, ids)][1:])


def decode(tokenizer: Tokenizer, ids: Sequence[int], tokens: int) -> str:
    """The text of ids, with a mark for each `tokens` placeholders: the inverse of `encode`."""
    found = np.asarray(ids)
    ends = np.flatnonzero(found == tokenizer.media)[tokens - 1 :: tokens] + 1
    pieces = np.split(found, ends)
    return MARK.join(tokenizer.decode(piece[piece != tokenizer.media].tolist()) for piece in pieces)
