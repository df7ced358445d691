"""Starting a run from the parameters that another left: of a language model, of an encoder, or of all of it.

Where they come from is found without JAX, so that a path that is wrong is refused before anything starts.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax import files
from llm_jax.config import Config
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
    folders = [path] if (path / "trial.json").exists() else [found.parent for found in path.glob("trials/*/trial.json")]
    if not folders:
        near = [str(one) for one in (path.parent.iterdir() if path.parent.is_dir() else ()) if one.is_dir()]
        raise BadInput(
            f"train.init_from={path} is no run directory and no trial's folder{did_you_mean(str(path), near) if near else ''}"
        )
    results = {
        folder: files.read_json(folder / "result.json") for folder in folders if (folder / "result.json").exists()
    }
    done = {folder: result for folder, result in results.items() if result["status"] == "done"}
    if not done:
        raise BadInput(f"train.init_from={path} has no finished trial; see llm-jax status")
    best = min(done, key=lambda folder: (done[folder].get("loss", math.inf), folder.name))
    config = from_dict(Config, files.read_json(best / "trial.json")["config"])
    if config.model.counted:
        raise BadInput(f"train.init_from={path} is an n-gram model, which has counts and no parameters")
    return Source(best, config, done[best]["tokenizer_sha256"])


def take(params: Any, others: Any, same_ids: bool, name: str) -> tuple[Any, dict[str, list[str]]]:
    """(params with the arrays of `others` in place of those of the same path and shape, {"taken": paths, "left": paths}).

    Where the tokenizers differ, arrays of tokens are left. Raises BadInput where nothing is taken.
    """
    import jax

    def flat(tree: Any) -> dict[str, Any]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}

    own, theirs = flat(params), flat(others)
    fits = {
        path: path in theirs and theirs[path].shape == leaf.shape and (same_ids or path not in OF_TOKENS)
        for path, leaf in own.items()
    }
    if not any(fits.values()):
        path, leaf = next(((path, leaf) for path, leaf in own.items() if path in theirs), next(iter(own.items())))
        there = f"has shape {theirs[path].shape} there and" if path in theirs else "is not there; it"
        raise BadInput(
            f"train.init_from={name} has no array that fits this model: the nearest, {path}, {there} has shape {leaf.shape} here"
        )
    leaves = [theirs[path] if fits[path] else leaf for path, leaf in own.items()]
    said = {"taken": [path for path in own if fits[path]], "left": [path for path in own if not fits[path]]}
    return jax.tree.unflatten(jax.tree.structure(params), leaves), said
