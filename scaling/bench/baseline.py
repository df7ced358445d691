"""Regressions of speed: `llm-jax bench compare BASELINE.json` runs benches again and compares ratios, from which the machine cancels out.

A baseline is the device that it was made on and a list of benches: the arguments of a bench verb, and the ratio of its --json that
counts, of which more is better. On a GPU that is `mfu` of bench train and `ratio` of bench moe, on a CPU `cpu_mfu` and `cpu_ratio`, with
"cores": 1.

    {"device": "NVIDIA H100 80GB HBM3", "cores": null, "benches": [
      {"bench": "train", "arguments": ["--model.num_layers", "12"], "ratio": "mfu", "value": 0.41, "spread": 0.004, "passes": 3}]}

On two cores that others used too (load 3.5 to 6), ratios by the clock moved by 13 to 35 % from one process to the next (standard
deviation of seven), in a process on one core by 3 to 7 %, and those of CPU time at its best round by 1.6 to 3.0 %. So a bench is a process
of its own that is kept to one core; all are run in turn, in several passes; the median counts; and passes are added where noise leaves the
verdict open.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_jax import files
from llm_jax.settings import BadInput, did_you_mean, from_dict
from scaling.progress import progress

LIMIT = 0.05
"""A ratio that has fallen by more is a regression."""
FEWEST, MOST = 3, 7
"""Passes of a bench: the first until its median is told from the limit, and no more than the other."""
SURE = 2.0
"""Standard errors that tell it."""
LEAST_SPREAD = 0.005
"""Relative standard deviation that is believed of few passes at least."""
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Bench:
    """One bench of a baseline, and what came of it when the file was written."""

    bench: str
    arguments: tuple[str, ...]
    ratio: str
    """Where it is in the verb's --json, dotted, such as mfu or peers.nanodo.ratio; more is better."""
    value: float | None = None
    """Median over `passes`; None in a list that is not yet measured."""
    spread: float | None = None
    """Standard deviation of a pass, relative."""
    passes: int | None = None

    @property
    def name(self) -> str:
        """What a person would type after `llm-jax bench`."""
        return " ".join([self.bench, *self.arguments])


@dataclass(frozen=True)
class Baseline:
    """A baseline file."""

    benches: tuple[Bench, ...]
    device: str | None = None
    cores: int | None = None
    """Of the CPU that a bench may use; None: all."""


def read(path: Path, verbs: Sequence[str]) -> Baseline:
    """A baseline file whose benches are among `verbs`. BadInput for one that is none."""
    try:
        tree = files.read_json(path)
    except FileNotFoundError:
        near = sorted(str(one) for one in path.parent.glob("*.json")) if path.parent.is_dir() else []
        raise BadInput(f"{path}: there is no such baseline{did_you_mean(str(path), near) if near else ''}") from None
    except ValueError as error:
        raise BadInput(f"{path} is no JSON: {error}") from None
    items = tree.get("benches") if isinstance(tree, dict) else None
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise BadInput(f'{path} is no baseline: it needs "benches", a list of objects')
    for number, item in enumerate(items):
        if missing := {"bench", "arguments", "ratio"} - set(item):
            raise BadInput(f'{path}: benches[{number}] lacks "{min(missing)}"')
        if item["bench"] not in verbs:
            raise BadInput(f'{path}: "{item["bench"]}" is no bench{did_you_mean(str(item["bench"]), verbs)}')
        if not isinstance(item["arguments"], list) or not all(isinstance(word, str) for word in item["arguments"]):
            raise BadInput(f"{path}: benches[{number}].arguments must be a list of strings")
    benches = tuple(from_dict(Bench, item, f"{path}: benches[{i}].") for i, item in enumerate(items))
    return dataclasses.replace(from_dict(Baseline, {**tree, "benches": ()}, f"{path}: "), benches=benches)


def compare(path: Path, verbs: Sequence[str], write: bool = False) -> dict[str, Any]:
    """`llm-jax bench compare`: each bench again, with `now`, its relative `change`, what noise `resolves` (two standard errors of the
    change) and whether it `regressed`. With `write` the file is given this machine's device and values.

    BadInput for a file that is none, one that was made on another device, and a bench that does not run.
    """
    baseline = read(path, verbs)
    here = device()
    if not write:
        if baseline.device != here:
            raise BadInput(
                f'{path} was made on "{baseline.device}" and this is "{here}"; --write gives it the values of this machine'
            )
        if unmeasured := [one.name for one in baseline.benches if one.value is None]:
            raise BadInput(f'{path} has no value for "{unmeasured[0]}"; --write measures it')
    passes = _passes(baseline, write)
    rows = [_row(one, found) for one, found in zip(baseline.benches, passes, strict=True)]
    if write:
        measured = [
            dataclasses.replace(one, value=statistics.median(found), spread=round(spread(found), 4), passes=len(found))
            for one, found in zip(baseline.benches, passes, strict=True)
        ]
        tree = {"device": here, "cores": baseline.cores, "benches": [dataclasses.asdict(one) for one in measured]}
        files.write_json(path, tree)
    regressed = 0 if write else sum(row["regressed"] for row in rows)
    return {"baseline": str(path), "device": here, "written": write, "regressed": regressed, "benches": rows}


def spread(found: Sequence[float]) -> float:
    """Relative standard deviation of a pass, LEAST_SPREAD or more."""
    return max(LEAST_SPREAD, statistics.stdev(found) / statistics.median(found) if len(found) > 1 else 0.0)


def resolves(one: Bench, found: Sequence[float]) -> float:
    """SURE standard errors of the relative change from the baseline to the median of these passes. A median's is 1.25 times a mean's."""
    then = (one.spread or LEAST_SPREAD) ** 2 / one.passes if one.value is not None and one.passes else 0.0
    return SURE * 1.25 * (max(spread(found), one.spread or 0.0) ** 2 / len(found) + then) ** 0.5


def open_still(one: Bench, found: Sequence[float], write: bool) -> bool:
    """Whether another pass is wanted: too few, or noise leaves it open on which side of the limit it is, up to MOST. A baseline
    that is written is measured until it would resolve half the limit."""
    if len(found) < FEWEST:
        return True
    if len(found) >= MOST:
        return False
    if write or one.value is None:
        return resolves(dataclasses.replace(one, value=None, spread=None), found) > LIMIT / 2
    change = statistics.median(found) / one.value - 1
    return abs(change + LIMIT) < resolves(one, found)


def _passes(baseline: Baseline, write: bool) -> list[list[float]]:
    """The ratio of each bench in each of its passes, all benches in turn."""
    found: list[list[float]] = [[] for _ in baseline.benches]
    with tempfile.TemporaryDirectory() as cache, progress("bench compare", FEWEST * len(found), " benches") as update:
        for number in range(MOST):
            for one, values in zip(baseline.benches, found, strict=True):
                if open_still(one, values, write):
                    values.append(_ratio(one, _run(one, baseline.cores, number, cache)))
                    update(min(sum(map(len, found)), FEWEST * len(found)), one.bench)
    return found


def _run(one: Bench, cores: int | None, number: int, cache: str) -> dict[str, Any]:
    """The --json of a bench in a process of its own. Its programs are kept in `cache`, as the next pass needs them too."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    if cores:
        environment |= dict.fromkeys(THREADS, str(cores))

    command = [sys.executable, "-m", "scaling.cli", "bench", one.bench, *one.arguments, "--json"]
    with _kept_to(cores, number):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise BadInput(f"bench {one.name}: {said.removeprefix('llm-jax: ')}")
    return json.loads(done.stdout)


@contextlib.contextmanager
def _kept_to(cores: int | None, number: int) -> Iterator[None]:
    """Processes that are started meanwhile may use so many cores, the next ones in the next pass: one that another process holds is not
    to decide."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    usable = os.sched_getaffinity(0)
    ring = sorted(usable) * 2
    first = number * cores % len(usable)
    os.sched_setaffinity(0, ring[first : first + min(cores, len(usable))])
    try:
        yield
    finally:
        os.sched_setaffinity(0, usable)


def _ratio(one: Bench, record: Mapping[str, Any]) -> float:
    value: Any = record
    for key in one.ratio.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise BadInput(f'bench {one.bench} --json has no "{one.ratio}"{did_you_mean(one.ratio, _numbers(record))}')
        value = value[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise BadInput(f'"{one.ratio}" of bench {one.name} is {value} here; a ratio must be positive')
    return float(value)


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all numbers in a record."""
    names = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            names += _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            names.append(prefix + key)
    return names


def device() -> str:
    """training.device_name() by a process that ends: this one must not hold the GPU that the benches need."""
    code = "from scaling.bench.training import device_name; print(device_name())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise BadInput(f"JAX finds no device: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return done.stdout.strip().splitlines()[-1]


def _row(one: Bench, found: Sequence[float]) -> dict[str, Any]:
    now = statistics.median(found)
    change = None if one.value is None else now / one.value - 1
    return {
        "bench": one.name,
        "ratio": one.ratio,
        "baseline": one.value,
        "now": now,
        "change": change,
        "resolves": resolves(one, found),
        "passes": list(found),
        "regressed": change is not None and change < -LIMIT,
    }


def describe(found: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"{found['device']}: {found['baseline']}",
        "",
        f"{'ratio':20} {'baseline':>9} {'now':>9} {'change':>8} {'±':>7} {'passes':>6}",
    ]
    for row in found["benches"]:
        then = "" if row["baseline"] is None else f"{row['baseline']:.4f}"
        change = "" if row["change"] is None else f"{100 * row['change']:+.1f} %"
        said = "  SLOWER" if row["regressed"] and not found["written"] else ""
        lines.append(
            f"{row['ratio']:20} {then:>9} {row['now']:>9.4f} {change:>8} {100 * row['resolves']:>5.1f} % {len(row['passes']):>6}"
            f"  bench {row['bench']}{said}"
        )
    noisy = [row for row in found["benches"] if row["resolves"] > LIMIT]
    if noisy:
        lines += ["", f"{len(noisy)} of them too noisy to tell {100 * LIMIT:.0f} %: the machine is busy"]
    verdict = (
        "written"
        if found["written"]
        else f"{found['regressed']} of {len(found['benches'])} slower by more than {100 * LIMIT:.0f} %"
    )
    return "\n".join([*lines, "", verdict])
