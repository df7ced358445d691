"""The training call for devices that need not be there: from a config and shapes alone, as loop.train would run it."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from llm_jax.config import Config
from llm_jax.settings import BadInput
from llm_jax.training import loop
from llm_jax.training import mesh as meshes


def lower(cfg: Config, mesh: Mesh) -> jax.stages.Lowered:
    """The compiled call of loop.train for a resolved `cfg` on a mesh, lowered and not compiled. Raises BadInput for models that have no
    training step, and for those with media, whose batches only data can tell."""
    if cfg.model.counted:
        raise BadInput(f"model.family={cfg.model.family} is counted, not trained: there is no step to compile")
    if cfg.model.media.kind != "none":
        raise BadInput("steps with media are not compiled ahead; give model.media.kind=none and data.source=stdlib")
    call, _ = loop.compiled_call(cfg.model, loop.program(cfg.train), cfg.data.prefix, mesh)
    return call.lower(*arguments(cfg, mesh))


def arguments(cfg: Config, mesh: Mesh) -> tuple[Any, ...]:
    """Shapes and shardings of what the call takes: state, batches of CxBx..., learning rates and the number of steps."""
    shapes = loop.abstract_state(cfg.model, loop.program(cfg.train))
    state = meshes.with_shardings(shapes, meshes.state_shardings(mesh, cfg.model, shapes))
    rows, data = (cfg.train.steps_per_call, cfg.rows_per_step), cfg.data
    batches = {"tokens": ((*rows, data.context + 1), "int32")}
    if data.source == "pairs" or data.document_mask:
        batches["segments"] = ((*rows, data.context), "int32")
    if data.source == "pairs":
        batches["weights"] = ((*rows, data.context - data.prefix), "float32")
    spread, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)
    return (
        state,
        {name: jax.ShapeDtypeStruct(*one, sharding=spread) for name, one in batches.items()},
        jax.ShapeDtypeStruct(rows[:1], "float32", sharding=whole),
        jax.ShapeDtypeStruct((), "int32", sharding=whole),
    )
