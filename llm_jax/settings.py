"""What all settings share: their types checked, JSON in and out, overrides by dotted name, fingerprints, and how bad input is told."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


class BadInput(ValueError):
    """Something the user gave cannot be used. The message is one line: it names the thing and the nearest valid one."""


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """'; did you mean "x"?' for the closest valid name, or the whole list where none is close."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else f"; valid: {', '.join(valid)}"


def require(ok: bool, message: str) -> None:
    """Raises BadInput with the message unless ok."""
    if not ok:
        raise BadInput(message)


def check_types(config: Any, path: str) -> None:
    """Refuses values that the type of their field does not allow, which would otherwise train something else unnoticed.

    A whole number where a fraction is wanted becomes a float, so that equal settings have equal fingerprints.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        options = (hint,) if isinstance(hint, type) or get_origin(hint) in (Literal, tuple) else get_args(hint)
        choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if float in options and number:
            object.__setattr__(config, name, float(value))
        elif get_origin(hint) is tuple:
            ok = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
            require(ok, f"{path}.{name} must be a list of strings, got {value!r}")
            object.__setattr__(config, name, tuple(value))
        elif value not in choices and type(value) not in options:
            kinds = [kind.__name__ for kind in options if isinstance(kind, type) and kind is not type(None)]
            hint = f"; must be {' or '.join(kinds + choices)}" if kinds else did_you_mean(str(value), choices)
            raise BadInput(f'{path}.{name} cannot be "{value}"{hint}')


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """The inverse of `to_dict`; an unknown field raises BadInput with the nearest name."""
    hints = get_type_hints(cls)
    kwargs = {}
    for name, value in values.items():
        if name not in hints:
            raise BadInput(
                f'"{path}{name}" names no field of {cls.__name__}{did_you_mean(path + name, [path + hint for hint in hints])}'
            )
        if dataclasses.is_dataclass(hints[name]):
            require(isinstance(value, Mapping), f'"{path}{name}" must hold fields of its own, got {value!r}')
            value = from_dict(hints[name], value, f"{path}{name}.")
        elif isinstance(value, list):
            value = tuple(value)
        kwargs[name] = value
    return cls(**kwargs)


def field_names(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of all leaf fields."""
    names = []
    for name, hint in get_type_hints(cls).items():
        names += field_names(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [prefix + name]  # type: ignore[arg-type]
    return names


def override(config: T, values: Mapping[str, Any]) -> T:
    """A copy with fields replaced by dotted name, all at once, so that settings that depend on each other may change together.

    Raises BadInput for a name that is no field, and for whatever the dataclasses refuse.
    """
    tree = to_dict(config)
    valid = field_names(type(config))
    for name, value in values.items():
        if name not in valid:
            raise BadInput(f'"{name}" names no field of {type(config).__name__}{did_you_mean(name, valid)}')
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return from_dict(type(config), tree)


HOW = {"how": True}
"""Metadata of a dataclass's field that says how a trial is run and not what is trained: it is no part of the trial's identity."""


def what(config: T) -> T:
    """A copy with fields marked HOW at their defaults: what tells a trial from others."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if field.metadata.get("how"):
            made: Any = field.default_factory
            changes[field.name] = made() if field.default is dataclasses.MISSING else field.default
        elif dataclasses.is_dataclass(value):
            changes[field.name] = what(value)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def given(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their defaults, as plain JSON values."""
    found = {}
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        if dataclasses.is_dataclass(value):
            value, default = given(value), {}
        if value != default:
            found[field.name] = value
    return json.loads(json.dumps(found))


def fingerprint(value: Any) -> str:
    """12 hex digits of the SHA-256 of JSON values, or of what a dataclass has that is not its default: the name of a trial.

    So a setting that is new here renames no trial that was run without it. Fields marked HOW are left out.
    """
    if dataclasses.is_dataclass(value):
        value = given(what(value))
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
