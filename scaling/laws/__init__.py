"""Scaling laws by name. One law is one function; see law.py for how to write one."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.settings import BadInput, did_you_mean
from scaling.laws import dense, downstream, moe
from scaling.laws.law import FLOOR, Law, Parameter, by_function, exponent, fraction, law, positive, scale

__all__ = [
    "CHINCHILLA", "COUPLED", "FLOOR", "LAWS", "Law", "Parameter", "by_name", "exponent", "fraction", "law", "optimum",
    "positive", "scale",
]  # fmt: skip

CHINCHILLA, COUPLED = dense.chinchilla, dense.coupled

LAWS = {one.name: one for room in (dense, moe, downstream) for one in vars(room).values() if isinstance(one, Law)}

GREEK = ("alpha", "beta", "gamma", "delta", "eta", "theta", "kappa", "lam", "mu", "nu", "rho", "tau", "phi", "zeta")


def by_name(name: str, columns: Iterable[str] = ()) -> Law:
    """The law of that name, or the function of a Python file, "path/to/file.py:function", for a table of `columns`.

    BadInput with the nearest one where there is none.
    """
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        return _own(Path(path), function, set(columns))
    if name not in LAWS:
        raise BadInput(f'"{name}" names no scaling law{did_you_mean(name, LAWS)}')
    return LAWS[name]


def _own(path: Path, name: str, columns: set[str]) -> Law:
    """A user's law: arguments that are columns of the table are columns, all others are parameters.

    A parameter may state its kind as its default (scale(), exponent(), positive(LOW, HIGH), fraction()); without one,
    Greek names are exponents and all others scales in units of the target.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file, to take the law {name} from")
    spec = importlib.util.spec_from_file_location(f"law_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BadInput(f"{path}: {type(error).__name__}: {error}".splitlines()[0]) from error
    found = getattr(module, name, None)
    if isinstance(found, Law):
        return found
    if not inspect.isfunction(found):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value) or isinstance(value, Law)]
        raise BadInput(f'{path} has no function "{name}"{did_you_mean(name, functions)}')
    kinds: dict[str, Parameter] = {}
    for argument in inspect.signature(found).parameters.values():
        if isinstance(argument.default, Parameter):
            kinds[argument.name] = argument.default
        elif argument.name not in columns:
            kinds[argument.name] = exponent() if argument.name.lower().startswith(GREEK) else scale()
    read = [argument for argument in inspect.signature(found).parameters if argument not in kinds]
    if not read or not kinds:
        what = "column of the table among its arguments" if not read else "parameter: every argument is a column"
        raise BadInput(f"{path}: {name} has no {what}; columns: {', '.join(sorted(columns))}")
    formula = " ".join((inspect.getdoc(found) or name).split("\n")[0].split())
    return by_function(found, name, formula, str(path), read, kinds)


def optimum(parameters: Mapping[str, float], compute: float) -> tuple[float, float]:
    """(N*, D*) of least loss under C = 6 N D by the law "chinchilla" (Hoffmann et al. 2022, eq. 4).

    `compute` in FLOPs. BadInput where alpha or beta is not positive: there is then no optimum inside.
    """
    if missing := [name for name in ("A", "B", "alpha", "beta") if name not in parameters]:
        raise BadInput(f"a compute-optimal size needs a law with A, B, alpha and beta; this one has no {missing[0]}")
    a, b, alpha, beta = (float(parameters[name]) for name in ("A", "B", "alpha", "beta"))
    if not (compute > 0 and np.isfinite(compute)):
        raise BadInput(f"compute must be positive, in FLOPs; got {compute}")
    if not min(a, b, alpha, beta) > 0:
        numbers = f"A {a:.4g}, B {b:.4g}, alpha {alpha:.4g}, beta {beta:.4g}"
        raise BadInput(f"no compute-optimal size: all of A, B, alpha and beta must be positive, got {numbers}")
    balance = np.log(alpha * a / (beta * b))
    n_params = float(np.exp((balance + beta * np.log(compute / 6)) / (alpha + beta)))
    return n_params, compute / 6 / n_params


Predict = Callable[..., np.ndarray]


def best_split(predict: Predict, compute: float, n_low: float, n_high: float) -> tuple[float, float] | None:
    """(N*, D*) of least predict(N, D) under C = 6 N D by search between two sizes; None where it lies at an end.

    For laws of N_params and D_tokens without a formula for it. `compute` in FLOPs.
    """
    log_n: Any = np.linspace(np.log(n_low), np.log(n_high), 201)
    for _ in range(6):
        loss = predict(np.exp(log_n), compute / 6 / np.exp(log_n))
        at = int(np.argmin(loss))
        if at in (0, len(log_n) - 1) or not np.isfinite(loss[at]):
            return None
        log_n = np.linspace(log_n[at - 1], log_n[at + 1], 201)
    n_params = float(np.exp(log_n[100]))
    return n_params, compute / 6 / n_params
