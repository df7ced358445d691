"""One pass over the documents of a source before they are prepared: what they are, by hash, and which of them are held out."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path

from llm_jax.data.sources import UNIT


class Survey:
    """What one pass over a source tells: content hash, and which documents are held out."""

    def __init__(self, documents: Iterable[tuple[str, str]], val_fraction: float, media: bool = False):
        """Of pairs, those of one source are in one split; of texts with media, those that share an item."""
        digest = hashlib.sha256()
        names: list[list[str]] = []
        sizes: list[int] = []
        for _, text in documents:
            first, *others = text.split(UNIT)
            keys = [first]
            if media:  # their content stands for them, and not where they are
                others = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in others]
                text, keys = UNIT.join([first, *others]), others or [first]
            data = text.encode("utf-8", "replace")
            digest.update(len(data).to_bytes(8, "little") + data)
            names.append([hashlib.sha256(key.encode("utf-8", "replace")).hexdigest() for key in keys])
            sizes.append(len(first if media else text))
        self.sha256 = digest.hexdigest()
        self.sizes = sizes
        self.held_out = _hold_out(linked(names), sizes, val_fraction)


def linked(keys: list[list[str]]) -> list[str]:
    """One name a document, equal for those that share a key, directly or through others: the least of all their keys."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while (above := parent.setdefault(key, key)) != key:
            parent[key] = key = parent[above]
        return key

    for own in keys:
        low, *rest = sorted(map(root, own))
        parent.update(dict.fromkeys(rest, low))
    return [root(own[0]) for own in keys]


def _hold_out(hashes: list[str], sizes: list[int], fraction: float) -> set[int]:
    """Documents in the order of their hashes until `fraction` of the text is reached, passing over those too large to fit in.

    Those of one hash go together, so that no document is in both splits.
    """
    room, held = fraction * sum(sizes), set()
    for _, group in itertools.groupby(sorted(range(len(sizes)), key=lambda i: hashes[i]), key=lambda i: hashes[i]):
        same = list(group)
        if (size := sum(sizes[i] for i in same)) <= room:
            held.update(same)
            room -= size
    return held
