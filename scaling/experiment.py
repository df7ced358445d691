"""An experiment: a base config, the axes that vary it, and the larger run that its law is to forecast.

Axes are tuples of points, and a point is a dict of overrides by dotted name. Two names are no field: `depth`, the rung of the
ladder, which sets the shape, and `compute`, a budget C in FLOPs, which sets D = C / 6N, N active, for whatever shape the point has.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_jax import ladder
from llm_jax.config import Config, Data, Mesh, Model, Train
from llm_jax.ladder import Ladder
from llm_jax.parts import num_params_active
from llm_jax.settings import BadInput, did_you_mean, field_names, fingerprint, override
from scaling import cost

Point = Mapping[str, Any]
Axes = tuple[Point, ...]
DERIVED = ("depth", "compute")


def axis(name: str, values: Iterable[Any]) -> Axes:
    """One setting, several values."""
    return tuple({name: value} for value in values)


def product(*axes: Axes) -> Axes:
    """Every combination of the points of each."""
    return tuple(_merge(points) for points in itertools.product(*axes))


def zipped(*axes: Axes) -> Axes:
    """First with first, second with second; they must be equally long."""
    if len({len(points) for points in axes}) > 1:
        raise BadInput(
            f"zipped axes must be equally long, got {' and '.join(str(len(points)) for points in axes)} points"
        )
    return tuple(_merge(points) for points in zip(*axes, strict=True))


def chain(*axes: Axes) -> Axes:
    """The points of the first, then those of the second, ..."""
    return tuple(itertools.chain(*axes))


def isoflop(budgets: Iterable[float], depths: Iterable[float]) -> Axes:
    """Shapes of equal cost: (N, D) pairs with 6 N D = C for each budget C (Hoffmann et al. 2022, approach 2)."""
    return product(axis("compute", budgets), axis("depth", depths))


def _merge(points: Sequence[Point]) -> Point:
    merged: dict[str, Any] = {}
    for point in points:
        if twice := set(merged) & set(point):
            raise BadInput(f'the axis "{min(twice)}" is there twice')
        merged |= point
    return merged


@dataclass(frozen=True)
class Target:
    """The run to forecast: the rung of the ladder nearest the law's optimum at `compute`, or the rung `depth`."""

    compute: float
    depth: float | None = None


@dataclass(frozen=True)
class Experiment:
    """What a sweep trains: a base config, the axes that vary it, the law to fit and the run to forecast."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    mesh: Mesh = field(default_factory=Mesh)
    ladder: Ladder = field(default_factory=Ladder)
    axes: Axes = ({},)
    law: str = "chinchilla"
    forecast: Target | None = None

    @property
    def config(self) -> Config:
        """The base config, before axes and rules."""
        return Config(self.model, self.data, self.train, self.mesh)


@dataclass(frozen=True)
class Trial:
    """One run: its config with every rule resolved, and where on the axes it came from."""

    config: Config
    point: Point

    @property
    def id(self) -> str:
        """The fingerprint of the config."""
        return fingerprint(self.config)

    @property
    def counts(self) -> dict[str, float]:
        """N, D and C under each convention, by column of the ledger."""
        data = self.config.data
        return cost.counts(self.config.model, data.context, int(self.config.train.tokens), data.prefix)


def trial(base: Config, rungs: Ladder, point: Point) -> Trial:
    """Applies a point to the base config. Raises BadInput for an axis that names no field, or values that no config allows."""
    overrides: dict[str, Any] = {}
    for name, value in point.items():
        if name not in DERIVED and name not in field_names(Config):
            raise BadInput(f'axis "{name}" names no field{did_you_mean(name, [*field_names(Config), *DERIVED])}')
        overrides |= rungs.shape(float(value)) if name == "depth" else {} if name == "compute" else {name: value}
    config = override(base, overrides)
    if "compute" in point:
        if config.model.counted:
            raise BadInput(
                "model.family=ngram has no size before it is counted, so that compute sets no D; give train.tokens"
            )
        n_active = num_params_active(config.model, config.data.context, config.data.prefix)
        config = override(config, {"train.tokens": max(1, round(float(point["compute"]) / (6 * n_active)))})
    return Trial(ladder.resolve(config), dict(point))


def trials(experiment: Experiment) -> list[Trial]:
    """All trials, without repetition, in the order of the axes."""
    found = [trial(experiment.config, experiment.ladder, point) for point in experiment.axes]
    return list({one.id: one for one in found}.values())


def load(path: str | Path) -> tuple[Experiment, str]:
    """The `experiment` of a Python file, and the file's docstring. Raises BadInput where there is none."""
    path = Path(path)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path("experiments")
        known = [str(name) for name in sorted(folder.glob("*.py"))] if folder.is_dir() else []
        raise BadInput(f"{path}: no such experiment{did_you_mean(str(path), known) if known else ''}")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise BadInput(f"{path}: an experiment is a Python file, with the suffix .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of the file look themselves up there
    try:
        spec.loader.exec_module(module)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    found = getattr(module, "experiment", None)
    if not isinstance(found, Experiment):
        raise BadInput(f'{path}: names no "experiment" of type scaling.experiment.Experiment')
    return found, (module.__doc__ or "").strip()
