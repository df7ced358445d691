"""Exact first derivatives of plain NumPy arithmetic: forward mode, sparse in the parameters (Wengert 1964).

A Dual carries a value_SxR and its slopes by the parameters that it depends on, so that a term of a law costs as many
products as it has parameters, not as many as the law has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import special

from llm_jax.settings import BadInput

Array = np.ndarray


class Dual(np.lib.mixins.NDArrayOperatorsMixin):
    """A value and {parameter: d value / d parameter}, which broadcast against each other; see RULES for what it knows."""

    __slots__ = ("slopes", "value")
    __array_priority__ = 1000

    def __init__(self, value: Array, slopes: Mapping[int, Any]):
        self.value, self.slopes = value, slopes

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return self.value.shape

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if ufunc in PLAIN and method == "__call__":
            return ufunc(*(_value(one) for one in inputs), **kwargs)
        if ufunc not in RULES or method != "__call__" or kwargs:
            known = ", ".join(sorted({rule.__name__ for rule in RULES}))
            raise BadInput(f"a law cannot use {_spelled(ufunc, method)}, whose derivative is not known; valid: {known}")
        values = [_value(one) for one in inputs]
        result = ufunc(*values)
        slopes: dict[int, Any] = {}
        for at, one in enumerate(inputs):
            if isinstance(one, Dual) and one.slopes:
                partial = RULES[ufunc][at](*values, result)
                for name, slope in one.slopes.items():
                    part = _times(partial, slope)
                    slopes[name] = slopes[name] + part if name in slopes else part
        return Dual(result, slopes)

    def __array_function__(self, function: Callable[..., Any], types: Any, args: Any, kwargs: Any) -> Any:
        if function is np.where and len(args) == 3 and not kwargs:
            test, a, b = args
            chosen, slopes = _value(test), {}
            for name in {**getattr(a, "slopes", {}), **getattr(b, "slopes", {})}:
                sides = (side.slopes.get(name, 0.0) if isinstance(side, Dual) else 0.0 for side in (a, b))
                slopes[name] = np.where(chosen, *sides)
            return Dual(np.where(chosen, _value(a), _value(b)), slopes)
        raise BadInput(f"a law cannot use np.{function.__name__}: write it with elementwise arithmetic and np.where")


def _value(one: Any) -> Any:
    return one.value if isinstance(one, Dual) else one


def _times(partial: Any, slope: Any) -> Any:
    """Their product, without a pass over the array where one of them is the number 1."""
    if isinstance(partial, float) and partial == 1:
        return slope
    return partial if isinstance(slope, float) and slope == 1 else partial * slope


def _spelled(ufunc: np.ufunc, method: str) -> str:
    return f"np.{ufunc.__name__}" + ("" if method == "__call__" else f".{method}")


def _log(a: Any) -> Any:
    return np.log(np.maximum(a, 0) + np.where(a > 0, 0.0, 1.0))  # 0^b is 0 whatever b: no slope there


RULES: dict[np.ufunc, tuple[Callable[..., Any], ...]] = {
    np.add: (lambda a, b, y: 1.0, lambda a, b, y: 1.0),
    np.subtract: (lambda a, b, y: 1.0, lambda a, b, y: -1.0),
    np.multiply: (lambda a, b, y: b, lambda a, b, y: a),
    np.true_divide: (lambda a, b, y: 1 / b, lambda a, b, y: -y / b),
    np.power: (lambda a, b, y: b * a ** (b - 1), lambda a, b, y: y * _log(a)),
    np.negative: (lambda a, y: -1.0,),
    np.positive: (lambda a, y: 1.0,),
    np.exp: (lambda a, y: y,),
    np.exp2: (lambda a, y: y * np.log(2),),
    np.expm1: (lambda a, y: y + 1,),
    np.log: (lambda a, y: 1 / a,),
    np.log2: (lambda a, y: 1 / (a * np.log(2)),),
    np.log10: (lambda a, y: 1 / (a * np.log(10)),),
    np.log1p: (lambda a, y: 1 / (1 + a),),
    np.logaddexp: (lambda a, b, y: np.exp(a - y), lambda a, b, y: np.exp(b - y)),
    np.sqrt: (lambda a, y: 0.5 / y,),
    np.square: (lambda a, y: 2 * a,),
    np.reciprocal: (lambda a, y: -y * y,),
    np.tanh: (lambda a, y: 1 - y * y,),
    np.absolute: (lambda a, y: np.sign(a),),
    np.maximum: (lambda a, b, y: 1.0 * (a >= b), lambda a, b, y: 1.0 * (b > a)),
    np.minimum: (lambda a, b, y: 1.0 * (a <= b), lambda a, b, y: 1.0 * (b < a)),
    special.expit: (lambda a, y: y * (1 - y),),
}
"""By function: the derivative by each argument, of the arguments' values and the result."""

PLAIN = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal, np.isfinite, np.isnan, np.sign}
"""Functions whose derivative is zero: they give plain arrays."""
