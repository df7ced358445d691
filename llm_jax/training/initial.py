"""Starting a run from the parameters that another left: of a language model, of an encoder, or of all of it.

What is taken from where is decided without JAX, so that a path that is wrong is refused before anything starts.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax import files
from llm_jax.config import Config
from llm_jax.parts import begins, parts
from llm_jax.settings import BadInput, did_you_mean, from_dict

FILE = "initial.json"
"""In a trial's folder: where its parameters came from, and which were "taken" and "left"."""
OF_TOKENS = ("embed", "head", "head_bias")
"""Arrays with a row or a column a token, which mean nothing under another tokenizer."""


class Source(NamedTuple):
    """A finished trial."""

    folder: Path
    config: Config
    tokenizer_sha256: str


def find_trial(path: Path) -> Source:
    """The trial in the folder `path`, or the one with the lowest loss of the run directory `path`.

    Raises BadInput where it is neither, or nothing there is finished.
    """
    folders = [path] if files.exists(path / "trial.json") else files.children(path / "trials")
    if not folders:
        near = [str(found.parent) for found in path.parent.glob("*/experiment.json")]
        raise BadInput(
            f"train.init_from={path} is no run directory and no trial's folder{did_you_mean(str(path), near) if near else ''}"
        )
    results = files.for_each(lambda folder: files.find_json(folder / "result.json"), folders, path)
    done = {folder: one for folder, one in zip(folders, results, strict=True) if one and one["status"] == "done"}
    if not done:
        raise BadInput(f"train.init_from={path} has no finished trial; see llm-jax status")
    best = min(done, key=lambda folder: (done[folder].get("loss", math.inf), folder.name))
    config = from_dict(Config, files.read_json(best / "trial.json")["config"])
    if config.model.counted:
        raise BadInput(f"train.init_from={path} is an n-gram model, which has counts and no parameters")
    return Source(best, config, done[best]["tokenizer_sha256"])


def plan(cfg: Config, tokenizer_sha256: str | None = None) -> tuple[Source, dict[str, list[str]]]:
    """The trial that `cfg.train.init_from` names, and which parameters start as it left them: {"taken": paths, "left": paths}.

    Arrays of tokens are left where the tokenizer is another than `tokenizer_sha256`. Raises BadInput where nothing is taken, and where
    train.freeze would hold what is left, as it was drawn at random.
    """
    source, name = find_trial(files.as_path(cfg.train.init_from)), cfg.train.init_from
    own, theirs = (
        {part.name: (part.times, part.shape) for part in parts(model, 1) if part.stored}
        for model in (cfg.model, source.config.model)
    )
    same_ids = tokenizer_sha256 in (None, source.tokenizer_sha256)
    taken = [path for path in own if theirs.get(path) == own[path] and (same_ids or path not in OF_TOKENS)]
    left = [path for path in own if path not in taken]
    if not taken:
        path = next((path for path in own if path in theirs), next(iter(own)))
        there = f"there has shape {theirs[path][1]} in {theirs[path][0]} layers" if path in theirs else "is not there"
        raise BadInput(
            f"train.init_from={name} has no array that fits this model: {path} {there}, here {own[path][1]} in {own[path][0]}"
        )
    if wrong := [path for path in left if begins(path, cfg.train.freeze)]:
        why = "of that path and shape" if same_ids else "that fits: its tokenizer is another"
        raise BadInput(
            f"train.freeze would hold {wrong[0]} as it is drawn at random: train.init_from={name} has none {why}"
        )
    return source, {"taken": taken, "left": left}


def take(params: Any, others: Any, taken: Collection[str]) -> Any:
    """params with the arrays of `others` in the places `taken`."""
    import jax

    def name(path: Any) -> str:
        return jax.tree_util.keystr(path, simple=True, separator="/")

    theirs = {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(others)}
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: theirs[name(path)] if name(path) in taken else leaf, params
    )
