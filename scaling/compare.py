"""Groups of one table side by side, such as the families of an architecture sweep: the same law fitted to each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_jax.settings import BadInput
from scaling.analysis import PRINTED, Analysis
from scaling.tables import Table, finite


@dataclass(frozen=True)
class Comparison:
    """The fit of each group."""

    column: str
    groups: dict[str, Analysis]
    unfitted: dict[str, str]
    """{group: why no law was fitted to it}."""

    def to_json(self) -> str:
        """What `llm-jax fit --by COLUMN --json` prints, on one line."""
        groups = {name: {key: one.to_dict()[key] for key in PRINTED} for name, one in self.groups.items()}
        return json.dumps(finite({"by": self.column, "groups": groups, "unfitted": self.unfitted}))

    def summary(self) -> str:
        """A line a group with its parameters and the first of their intervals, then the warnings of each."""
        names = list(dict.fromkeys(name for one in self.groups.values() for name in one.parameters))
        rows = [[self.column, "rows", *names]]
        for group, one in self.groups.items():
            rows.append([group, f"{one.n}", *(parameter_text(one, name) for name in names)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        first = next(iter(self.groups.values()), None)
        head = [f"{first.law}: {first.formula}"] if first else []
        told = [f"  {group}: {reason}" for group, reason in self.unfitted.items()]
        told += [f"  warning: {group}: {text}" for group, one in self.groups.items() for text in one.warnings]
        return "\n".join([*head, *(lines if first else []), *told])


def parameter_text(one: Analysis, name: str) -> str:
    """0.34 [0.32, 0.37]; open ends as signs of infinity."""
    if name not in one.parameters:
        return ""
    ends = (one.intervals or {}).get(name)
    if ends is None:
        return f"{one.parameters[name]:.4g}"
    low, high = ("∞" if end == np.inf else "−∞" if end == -np.inf else f"{end:.3g}" for end in ends)
    return f"{one.parameters[name]:.4g} [{low}, {high}]"


def by_column(table: Table, column: str, analyse: Callable[[Table], Analysis]) -> Comparison:
    """`analyse` of the rows of each value of a column, that of the least loss first.

    BadInput where the column is none, or where no group can be fitted.
    """
    values = table.column(column)
    groups: dict[str, Analysis] = {}
    unfitted: dict[str, str] = {}
    loss = table.columns.get("loss", np.zeros(len(table)))
    for value in sorted(set(values.tolist()), key=lambda value: np.nanmin(loss[values == value])):
        name = f"{value:g}" if isinstance(value, float) else str(value)
        try:
            groups[name] = analyse(table.select(values == value))
        except BadInput as error:
            unfitted[name] = str(error)
    if not groups:
        raise BadInput(f"no group of {column} can be fitted: {next(iter(unfitted.values()))}")
    return Comparison(column, groups, unfitted)


def record(found: Comparison, bands: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups as a report reads them: name, fit, bands (frontier.bands or None) and why there is no fit."""
    fitted = [
        {"name": name, "fit": finite(one.to_dict()), "bands": bands.get(name), "reason": ""}
        for name, one in found.groups.items()
    ]
    return fitted + [
        {"name": name, "fit": None, "bands": None, "reason": reason} for name, reason in found.unfitted.items()
    ]
