"""Tables of finished runs: one row a run, with N, D, C and the loss, from a run directory or any CSV."""

from __future__ import annotations

import ast
import csv
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.config import BadInput, did_you_mean

ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


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

        Knows chained comparisons, and, or, not, + - * / **, numbers, quoted strings and column names; it is parsed and
        never run as Python. An empty expression keeps every row. BadInput names what it does not know.
        """
        if not expression.strip():
            return self
        try:
            tree = ast.parse(expression.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise BadInput(
                f'where "{expression}" does not parse; write it like: N_params >= 1e5 and seed == 0'
            ) from None
        with np.errstate(all="ignore"):
            mask = _truth(tree, self, expression)
        return self.select(np.broadcast_to(mask, len(self)))


def _truth(node: ast.expr, table: Table, text: str) -> np.ndarray:
    """The value of a node that must be a condition."""
    value = np.asarray(_value(node, table, text))
    if value.dtype != bool:
        raise BadInput(
            f'where "{text}": "{ast.unparse(node)}" is no condition; compare it with something, as in N_params > 1e5'
        )
    return value


def _number(node: ast.expr, table: Table, text: str) -> Any:
    value = np.asarray(_value(node, table, text))
    if value.dtype.kind != "f":
        raise BadInput(f'where "{text}": "{ast.unparse(node)}" is no number')
    return value


def _value(node: ast.expr, table: Table, text: str) -> Any:
    match node:
        case ast.Name(id=name):
            return table.column(name)
        case ast.Constant(value=bool()):
            pass
        case ast.Constant(value=int() | float() as number):
            return np.float64(number)  # never a Python integer: 10**10**10 would not end
        case ast.Constant(value=str() as string):
            return np.asarray(string)
        case ast.BoolOp(op=op, values=values):
            combine = np.logical_and if isinstance(op, ast.And) else np.logical_or
            return combine.reduce(np.broadcast_arrays(*(_truth(value, table, text) for value in values)))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~_truth(operand, table, text)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand, table, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            return ARITHMETIC[type(op)](_number(left, table, text), _number(right, table, text))
        case ast.Compare(left=left, ops=ops, comparators=comparators) if all(type(op) in COMPARISONS for op in ops):
            sides = [_value(side, table, text) for side in (left, *comparators)]
            kinds = {np.asarray(value).dtype.kind for value in sides}
            if len(kinds) > 1:
                raise BadInput(
                    f'where "{text}": "{ast.unparse(node)}" compares text with numbers; quote text, and only text'
                )
            parts = [COMPARISONS[type(op)](a, b) for a, op, b in zip(sides, ops, sides[1:], strict=False)]
            return np.logical_and.reduce(np.broadcast_arrays(*parts))
    raise BadInput(
        f'where "{text}": "{ast.unparse(node)}" is not understood; valid: < <= > >= == != and or not + - * / ** ( )'
    )


def read(path: str | Path) -> Table:
    """The table of a run directory (its `table.csv`), or of any CSV with a header; BadInput where it cannot be read.

    A law asks for the columns it needs: N_params (parameters), D_tokens (tokens), loss (nats a token). Two columns are
    made where they are absent: `row`, the number of the row in the file from 1, and C_flops = 6 N D (Kaplan et al.
    2020), in float64 because 6 N D overflows an int64.
    """
    path = Path(path)
    path = path / "table.csv" if path.is_dir() else path
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.csv")) if path.parent.is_dir() else []
        raise BadInput(f"{path} is no table{did_you_mean(path.name, near) if near else ''}")
    with path.open(newline="", encoding="utf-8-sig") as file:
        header, *rows = [row for row in csv.reader(file) if row] or [[]]
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
    if "C_flops" not in columns and {"N_params", "D_tokens"} <= set(columns):
        for name in ("N_params", "D_tokens"):
            if columns[name].dtype.kind != "f":
                bad = next(cell for cell in columns[name] if not _is_number(cell))
                raise BadInput(f'{path}: column {name} must hold numbers, got "{bad}"')
        columns["C_flops"] = 6 * columns["N_params"] * columns["D_tokens"]
    return Table(columns)


NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|nan|[+-]?inf", re.ASCII | re.IGNORECASE)


def _is_number(cell: str) -> bool:
    return not cell or NUMBER.fullmatch(cell) is not None


def _parse(cells: list[str]) -> np.ndarray:
    if any(cells) and all(map(_is_number, cells)):
        return np.array([float(cell or "nan") for cell in cells])
    return np.array(cells)
