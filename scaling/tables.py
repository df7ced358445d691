"""Tables of runs, one row a run, with N, D, C and the loss: read from any CSV, filtered, and written for programs and people."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import files
from llm_jax.settings import BadInput, did_you_mean
from scaling import expressions

TERMINAL_FORMATS = {
    "id": "{}",
    "status": "{}",
    "progress": "{:.0%}",
    "depth": "{:g}",
    "N_params": "{:,}",
    "D_tokens": "{:,}",
    "C_flops": "{:.2e}",
    "tokens_per_step": "{:,}",
    "peak_lr": "{:.2e}",
    "loss": "{:.4f}",
    "bits_per_byte": "{:.4f}",
    "tokens_per_second": "{:,.0f}",
    "goodput": "{:.0%}",
    "reason": "{}",
}
"""The columns of a ledger that a terminal shows, in their order."""
DISPENSABLE = (
    "goodput",
    "bits_per_byte",
    "tokens_per_step",
    "tokens_per_second",
    "C_flops",
    "peak_lr",
    "depth",
    "D_tokens",
    "reason",
)
"""What a narrow terminal does without, the first first."""


@dataclass(frozen=True)
class Table:
    """Named columns of equal length: float64 where every cell is a number (an empty one is NaN), strings otherwise."""

    columns: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise BadInput(f"the columns of a table differ in length: {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def column(self, name: str) -> np.ndarray:
        """The values of one column, one a row; BadInput with the nearest name where there is none."""
        if name not in self.columns:
            raise BadInput(f'the table has no column "{name}"{did_you_mean(name, self.columns)}')
        return self.columns[name]

    def select(self, mask: np.ndarray) -> Table:
        """The rows where `mask` is true; integers pick rows by position."""
        return Table({name: column[mask] for name, column in self.columns.items()})

    def where(self, expression: str) -> Table:
        """The rows for which an expression over the columns holds, such as `N_params >= 1e5 and status == "done"`.

        An empty expression keeps every row. BadInput for what scaling/expressions.py does not know, and unknown columns.
        """
        if not expression.strip():
            return self
        origin = f'where "{expression}"'
        tree = expressions.parse(expression, origin, "N_params >= 1e5 and seed == 0")
        with np.errstate(all="ignore"):
            mask = expressions.condition(tree, self.column, origin)
        return self.select(np.broadcast_to(mask, len(self)))


def read(path: str | Path) -> Table:
    """The table of a run directory (its `table.csv`), or of any CSV with a header; BadInput where it cannot be read.

    A law asks for the columns it needs: N_params (parameters), D_tokens (tokens), loss (nats a token). Three columns are
    made where they are absent: `row`, the number of the row in the file from 1, N_active, which is N_params, and C_flops =
    6 N D of the active N (Kaplan et al. 2020), in float64 because 6 N D overflows an int64.
    """
    path = files.as_path(path)
    path = path / "table.csv" if files.is_dir(path) else path
    if not files.exists(path):
        near = [p.name for p in files.children(path.parent) if p.suffix == ".csv"]
        raise BadInput(f"{path} is no table{did_you_mean(path.name, near) if near else ''}")
    text = io.StringIO(files.read_bytes(path).decode("utf-8-sig"), newline="")
    header, *rows = [row for row in csv.reader(text) if row] or [[]]
    header = [name.strip() for name in header]
    if not header or not rows:
        raise BadInput(f"{path} holds no rows")
    if len(set(header)) < len(header):
        raise BadInput(f"{path} names a column twice: {', '.join(sorted({n for n in header if header.count(n) > 1}))}")
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise BadInput(f"{path}, row {number}: {len(row)} cells under a header of {len(header)}")
    columns = {name: _parse([row[i].strip() for row in rows]) for i, name in enumerate(header)}
    columns.setdefault("row", np.arange(1.0, len(rows) + 1))
    if "N_params" in columns:
        columns.setdefault("N_active", columns["N_params"])
    if "C_flops" not in columns and {"N_params", "D_tokens"} <= set(columns):
        for name in ("N_params", "N_active", "D_tokens"):
            if columns[name].dtype.kind != "f":
                bad = next(cell for cell in columns[name] if not _is_number(cell))
                raise BadInput(f'{path}: column {name} must hold numbers, got "{bad}"')
        columns["C_flops"] = 6 * columns["N_active"] * columns["D_tokens"]
    return Table(columns)


NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|nan|[+-]?inf", re.ASCII | re.IGNORECASE)


def _is_number(cell: str) -> bool:
    return not cell or NUMBER.fullmatch(cell) is not None


def _parse(cells: list[str]) -> np.ndarray:
    if any(cells) and all(map(_is_number, cells)):
        return np.array([float(cell or "nan") for cell in cells])
    return np.array(cells)


def finite(value: Any) -> Any:
    """JSON values with None for NaN and infinity, which JSON does not know; lists and dicts all the way down."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, a column for each key in the order of first appearance; floats keep every digit, None is empty."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: cell.item() if isinstance(cell, np.generic) else cell for name, cell in row.items()})
    return text.getvalue()


def terminal_text(rows: Sequence[Mapping[str, Any]], width: int | None = None) -> str:
    """The columns of TERMINAL_FORMATS in which any row has something, aligned; the first two to the left, the rest to the right.

    Without the DISPENSABLE ones that `width` characters have no room for.
    """
    names = [name for name in TERMINAL_FORMATS if any(row.get(name) not in (None, "") for row in rows)]
    columns = {name: [name, *(_cell(name, row.get(name)) for row in rows)] for name in names}
    wide = {name: max(map(len, column)) for name, column in columns.items()}
    for name in DISPENSABLE:
        if width is not None and sum(wide.values()) + 2 * (len(wide) - 1) > width:
            wide.pop(name, None)
    widths, table = list(wide.values()), list(zip(*(columns[name] for name in wide), strict=True))
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def _cell(name: str, value: Any) -> str:
    empty = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if empty else TERMINAL_FORMATS[name].format(value)
