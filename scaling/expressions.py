"""Expressions over named arrays, parsed and never run as Python: the filter of a table, the printed formula of a law.

They know numbers, quoted strings and names, + - * / **, chained comparisons, and, or, not, and parentheses.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from llm_jax.settings import BadInput

Lookup = Callable[[str], np.ndarray | float]
"""The value of a name: float64 for a number, strings for text."""

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


def parse(text: str, origin: str, example: str) -> ast.expr:
    """The tree of an expression. BadInput where it does not parse; `origin` says in messages where it stood."""
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise BadInput(f"{origin} does not parse; write it like: {example}") from None


def names(tree: ast.expr) -> set[str]:
    """All names that an expression asks for."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def condition(tree: ast.expr, lookup: Lookup, origin: str) -> np.ndarray:
    """The truth of an expression, elementwise; BadInput where it is no condition, or holds what is not understood."""
    value = np.asarray(_value(tree, lookup, origin))
    if value.dtype != bool:
        raise BadInput(
            f'{origin}: "{ast.unparse(tree)}" is no condition; compare it with something, as in N_params > 1e5'
        )
    return value


def number(tree: ast.expr, lookup: Lookup, origin: str) -> np.ndarray:
    """The float64 value of an expression, elementwise; BadInput where it is none, or holds what is not understood."""
    value = np.asarray(_value(tree, lookup, origin))
    if value.dtype.kind != "f":
        raise BadInput(f'{origin}: "{ast.unparse(tree)}" is no number')
    return value


def _value(node: ast.expr, lookup: Lookup, origin: str) -> Any:
    match node:
        case ast.Name(id=name):
            return lookup(name)
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return np.float64(value)  # never a Python integer: 10**10**10 would not end
        case ast.Constant(value=str() as string):
            return np.asarray(string)
        case ast.BoolOp(op=op, values=values):
            combine = np.logical_and if isinstance(op, ast.And) else np.logical_or
            return combine.reduce(np.broadcast_arrays(*(condition(value, lookup, origin) for value in values)))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~condition(operand, lookup, origin)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -number(operand, lookup, origin)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            return ARITHMETIC[type(op)](number(left, lookup, origin), number(right, lookup, origin))
        case ast.Compare(left=left, ops=ops, comparators=comparators) if all(type(op) in COMPARISONS for op in ops):
            sides = [_value(side, lookup, origin) for side in (left, *comparators)]
            kinds = {np.asarray(value).dtype.kind for value in sides}
            if len(kinds) > 1:
                raise BadInput(f'{origin}: "{ast.unparse(node)}" compares text with numbers; quote text, and only text')
            parts = [COMPARISONS[type(op)](a, b) for a, op, b in zip(sides, ops, sides[1:], strict=False)]
            return np.logical_and.reduce(np.broadcast_arrays(*parts))
    raise BadInput(
        f'{origin}: "{ast.unparse(node)}" is not understood; valid: < <= > >= == != and or not + - * / ** ( )'
    )
