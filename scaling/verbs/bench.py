"""Verbs that time."""

from __future__ import annotations

import json as jsonlib
import os
from collections.abc import Callable
from typing import Any

from llm_jax.config import Config
from llm_jax.settings import BadInput
from scaling.options import (
    BenchCompareOptions,
    BenchFitOptions,
    BenchMoeOptions,
    BenchSweepOptions,
    BenchTrainOptions,
)
from scaling.parsing import chosen_experiment


def bench_fit(options: BenchFitOptions) -> None:
    """Times fits and bootstraps and prints what was found."""
    # For matrices this small the threads of OpenBLAS only wait for each other; SciPy's L-BFGS-B takes up to ten times longer
    # with them. It is read when NumPy is loaded.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from scaling import tables
    from scaling.bench import fits

    found = fits.bench_fit(options.table, options.where, options.full)
    print(jsonlib.dumps(tables.finite(found)) if options.json else fits.describe(found))


def bench_train(options: BenchTrainOptions) -> None:
    """Times a training step and prints what was found."""
    from scaling import experiment as experiments
    from scaling import tables
    from scaling.bench import peers, training

    checkouts = peers.parse(options.peer)
    base, _ = chosen_experiment(options)
    point = {"depth": options.depth} if options.depth is not None else {}
    config = experiments.trial(base.config, base.ladder, point).config
    if checkouts and (options.lanes != 1 or options.alone):
        raise BadInput("--peer times one trial on one device: leave out --lanes and --alone")
    found = peers.bench(config, checkouts) if checkouts else training.bench_train(config, options.lanes, options.alone)
    describe = peers.describe if checkouts else training.describe
    print(jsonlib.dumps(tables.finite(found)) if options.json else describe(found))


def bench_moe(options: BenchMoeOptions) -> None:
    """Times a mixture beside its dense twin and prints what was found."""
    from llm_jax import ladder
    from scaling import tables
    from scaling.bench import mixture

    base, _ = chosen_experiment(options)
    said = options.experiment is not None or base.config != Config()
    config = ladder.resolve(mixture.with_experts(base.config if said else mixture.default()))
    found = mixture.bench_moe(config)
    print(jsonlib.dumps(tables.finite(found)) if options.json else mixture.describe(found))


def bench_compare(options: BenchCompareOptions) -> int:
    """Runs the benches of a baseline and prints how they did. Returns 1 where one is slower."""
    from scaling import tables
    from scaling.bench import baseline

    found = baseline.compare(options.baseline, list(BENCHES), options.write)
    print(jsonlib.dumps(tables.finite(found)) if options.json else baseline.describe(found))
    return 1 if found["regressed"] else 0


def bench_sweep(options: BenchSweepOptions) -> None:
    """Times a sweep and single trials and prints what was found."""
    from scaling import tables
    from scaling.bench import sweeps

    found = sweeps.bench_sweep(options.experiment, options.alone)
    print(jsonlib.dumps(tables.finite(found)) if options.json else sweeps.describe(found))


BENCHES: dict[str, tuple[Any, Callable[[Any], int | None]]] = {
    "fit": (BenchFitOptions, bench_fit),
    "train": (BenchTrainOptions, bench_train),
    "sweep": (BenchSweepOptions, bench_sweep),
    "moe": (BenchMoeOptions, bench_moe),
}
"""What `bench compare` can run."""
