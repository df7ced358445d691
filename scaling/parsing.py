"""From the words of a command line to the options of a verb, and from these to an experiment; tyro does the reading.

Input that cannot be used raises BadInput with one line. Nothing heavy is imported here, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

import tyro
from tyro.conf import Positional

from llm_jax.config import Config, Data, Mesh, Model, Train
from llm_jax.settings import BadInput, did_you_mean, field_names, to_dict

if TYPE_CHECKING:
    from scaling.experiment import Axes, Experiment

Options = TypeVar("Options")


def parse(kind: Any, words: Sequence[str], verb: str) -> Any:
    """Options of the dataclass `kind` from the words after the verb.

    An experiment among them supplies the defaults, so that --help shows its config and overrides change it. Raises
    BadInput for what tyro or the dataclasses refuse, and SystemExit(0) after --help.
    """
    names = {field.name for field in dataclasses.fields(kind)}
    path = next((word for word in words if word.endswith(".py")), None)
    if "experiment" not in names or path is None:
        return _parse(kind, words, verb)
    from scaling.experiment import load

    base = load(path)[0]
    own = {"model": base.model, "data": base.data, "train": base.train, "mesh": base.mesh}
    default = kind(experiment=Path(path), **{name: value for name, value in own.items() if name in names})
    return _parse(kind, words, verb, default)


def _parse(kind: type[Options], words: Sequence[str], verb: str, default: Options | None = None) -> Options:
    """tyro's parser; what it refuses becomes one line."""
    _check_words(kind, words, verb)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found, unknown = tyro.cli(
                kind,
                args=_plain_numbers(words),
                default=default,
                prog=f"llm-jax {verb}",
                use_underscores=True,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise BadInput(_one_line(said.getvalue())) from None
    if unknown:
        raise BadInput(f'{verb} does not take "{unknown[0]}"; see llm-jax {verb} --help')
    assert found is not None  # only a default that is None could be
    return found


def _plain_numbers(words: Sequence[str]) -> list[str]:
    """1e9 becomes 1000000000 where a setting is given: fields that count are integers."""
    plain, of_setting = [], False
    for word in words:
        if word.startswith("--"):
            of_setting = word.startswith(("--model.", "--data.", "--train.", "--mesh."))
        elif of_setting and re.fullmatch(r"\d+(\.\d+)?[eE]\+?\d+", word) and float(word).is_integer():
            word = str(int(float(word)))
        plain.append(word)
    return plain


NEED_VALUES = ("--data.files", "--hold", "--media", "--peer", "--sbatch", "--train.freeze")
"""Options of several values, of which tyro would take none at all."""


def _check_words(kind: Any, words: Sequence[str], verb: str) -> None:
    """Refuses options that are none, and those without the values they need."""
    flags = _flags(kind)
    for word, after in zip(words, [*words[1:], "--"], strict=False):
        name = word.partition("=")[0]
        if not re.fullmatch(r"--?[A-Za-z][\w.-]*", name) or name in ("-h", "--help"):
            continue
        plain = "--" + name.lstrip("-").replace("-", "_")
        asserted = re.sub(r"([.-])no_(?=[^.]*$)", r"\1", plain)
        if not name.startswith("--") or not {plain, asserted} & set(flags):
            raise BadInput(f'"{word}" is no option of {verb}{did_you_mean(name, flags)}')
        if plain in NEED_VALUES and "=" not in word and after.startswith("--"):
            raise BadInput(f"{plain} needs at least one value")


def _flags(kind: Any) -> list[str]:
    """All options of a verb as its help shows them."""
    groups = {"model": Model, "data": Data, "train": Train, "mesh": Mesh}
    positional = get_args(Positional[int])[1]
    hints = get_type_hints(kind, include_extras=True)
    flags = []
    for field in dataclasses.fields(kind):
        if field.name in groups:
            flags += [f"--{field.name}.{name}" for name in field_names(groups[field.name])]
        elif positional not in getattr(hints[field.name], "__metadata__", ()):
            flags.append(f"--{field.name}")
    return flags


def _one_line(box: str) -> str:
    """The message in tyro's box of text; where the terminal is not UTF-8 that is a title and rules of hyphens."""
    parts: list[list[str]] = [[]]
    for line in (line.strip("│ ") for line in box.splitlines()):
        if line.startswith(("──", "---", "╰")):
            parts.append([])
        elif not line.startswith("╭"):
            parts[-1].append(line)
    body = parts[0] if "╭" in box or len(parts) == 1 else parts[1]
    text = re.sub(r"\s+", " ", " ".join(body)).strip()
    text = re.sub(r"^Error parsing (?:Config|model|data|train|mesh)(?:\.synthetic)?: ", "", text)
    return text or "the arguments are off; see --help"


def chosen_experiment(options: Any) -> tuple[Experiment, str]:
    """The experiment that options name, with the command line's config and axes in place of its own, and its docstring.

    Without one, the default experiment. Raises BadInput where an option sets what an axis of the file sets too.
    """
    from scaling.experiment import DERIVED, Experiment, load, product

    base, docstring = load(options.experiment) if options.experiment else (Experiment(), "")
    own = {name: getattr(options, name, getattr(base, name)) for name in ("model", "data", "train", "mesh")}
    changed = dataclasses.replace(base, **own)
    if words := getattr(options, "axis", None):
        return dataclasses.replace(changed, axes=product(*(_axis(changed, one) for one in words))), docstring
    before, after = _flat(to_dict(base.config)), _flat(to_dict(changed.config))
    given = {name for name in after if before[name] != after[name]}
    for point in changed.axes:
        ruled = set(point) - set(DERIVED)
        if "depth" in point:
            ruled |= set(base.ladder.shape(float(point["depth"])))
        if "compute" in point:
            ruled.add("train.tokens")
        if clash := sorted(given & ruled):
            raise BadInput(f"--{clash[0]} is set by an axis of {options.experiment}; give other points with --axis")
    return changed, docstring


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _axis(experiment: Experiment, words: Sequence[str]) -> Axes:
    """--axis NAME VALUE ...: values take the type of the field."""
    from scaling.experiment import DERIVED, axis

    if len(words) < 2:
        raise BadInput(f"--axis takes a name and at least one value, got {' '.join(words) or 'nothing'}")
    name, *values = words
    names = [*field_names(Config), *DERIVED]
    if name not in names:
        raise BadInput(f'axis "{name}" names no field{did_you_mean(name, names)}')
    if name.startswith("mesh.") or name == "train.compile":
        raise BadInput(f"--axis {name} is how trials are run and not what is trained; give --{name} {values[0]}")
    if name in DERIVED:
        try:
            return axis(name, [float(value) for value in values])
        except ValueError:
            raise BadInput(f"--axis {name} takes numbers, got {' '.join(values)}") from None
    parsed = [_parse(Config, [f"--{name}", value], "axis", experiment.config) for value in values]
    return axis(name, [_flat(to_dict(one))[name] for one in parsed])
