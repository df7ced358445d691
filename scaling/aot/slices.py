"""`llm-jax aot`: the training step compiled for a TPU slice that is not there, and what it says of memory, exchanges and time.

The compiler is the one that a TPU machine has, libtpu, and needs no TPU. Its word on memory is exact: a program that it compiles
fits. Times are a roofline: the FLOPs of the products, the bytes that instructions move and those that devices exchange, each at the
published rate of the chip. The longest is the least that a step can take, their sum what it takes where nothing overlaps. No chip was
asked.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from llm_jax.config import Config
from llm_jax.settings import BadInput, override
from scaling.aot import hlo
from scaling.aot.footprint import footprint, roofline
from scaling.hardware import PEAK_FLOPS, Slice, tpu_slice

ENVIRONMENT = {
    # Nobody is asked for metadata that only a TPU machine has, and the host is alone.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # Programs are compiled and not run, so several processes may.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "JAX_PLATFORMS": "cpu",
}
RECOMPUTE = ("nothing", "elementwise", "hidden", "block")
"""From the fastest to the smallest."""


def prepare() -> None:
    """Sets the environment that libtpu needs on a machine without a TPU, before JAX is loaded. Raises BadInput without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        raise BadInput('aot compiles with libtpu, which is not installed: pip install "llm_jax[tpu]"')
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # an experiment's file may have imported it
        import jax

        jax.config.update("jax_platforms", "cpu")


def devices(topology: str) -> list[Any]:
    """Of a slice such as v5e:16x16. Raises BadInput, with the nearest, for one that there is not."""
    chip = tpu_slice(topology)
    from jax.experimental import topologies

    found = topologies.get_topology_desc(platform="tpu", topology_name=topology.lower(), **dict(chip.options))
    return list(found.devices)


def aot(cfg: Config, topology: str, quick: bool = False) -> dict[str, Any]:
    """What the compiler makes of a resolved config's training step; see `describe`. Numbers are of a device and an optimizer step.

    `quick` is the compiler's least effort. Raises BadInput where the config has no mesh on this slice or no step to compile.
    """
    import jax

    if quick:
        jax.config.update("jax_exec_time_optimization_effort", -1.0)

    from llm_jax.training import mesh as meshes
    from llm_jax.training import programs

    chip, there = tpu_slice(topology), devices(topology)
    mesh = meshes.make(cfg, there)
    sizes = meshes.sizes_of(mesh)
    kernel = has_kernel(cfg, sizes)
    tokens, used = cfg.rows_per_step * cfg.data.context, math.prod(sizes.values())
    reckoned = footprint(cfg, sizes, kernel)
    found: dict[str, Any] = {
        "topology": topology.lower(),
        "devices": len(there),
        "idle": len(there) - used,
        "mesh": {name: size for name, size in sizes.items() if size > 1},
        "n_params": _params(cfg),
        "tokens_per_step": tokens,
        "rows_per_device": cfg.rows_per_step / used * sizes["tensor"] * sizes["sequence"] / cfg.train.grad_accumulation,
        "grad_accumulation": cfg.train.grad_accumulation,
        "recompute": cfg.model.recompute,
        "attention": "splash" if kernel else "plain",
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "effort": getattr(jax.config, "jax_exec_time_optimization_effort"),  # noqa: B009 (mypy does not know it)
        "hbm_bytes": chip.hbm_bytes,
        "flops": reckoned.flops,
        "extra_flops": reckoned.extra_flops,
    }
    began = time.perf_counter()
    try:
        compiled = programs.lower(cfg, mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found |= {"fits": False, "compile_seconds": time.perf_counter() - began, "peak_bytes": None}
        found["said"] = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        if wanted := re.search(r"\(([\d.]+)([KMGT])\) exceeds", found["said"]):
            # Of all that lives at the worst moment, arguments too: with the batch it grows as the peak of programs that fit.
            found["peak_bytes"] = int(float(wanted[1]) * 2.0 ** {"K": 10, "M": 20, "G": 30, "T": 40}[wanted[2]])
        found["advice"] = advice(cfg, sizes, chip, topology, there)
        return found
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    program, entry = hlo.parse(compiled.as_text())
    kinds: dict[str, dict[str, float]] = defaultdict(lambda: {"count": 0, "bytes": 0, "received_bytes": 0})
    for one in hlo.collectives(program, entry):
        kinds[one.kind]["count"] += int(one.times)
        kinds[one.kind]["bytes"] += int(one.times * one.size)
        kinds[one.kind]["received_bytes"] += int(one.received)
    moved, received = hlo.traffic(program, entry), sum(kind["received_bytes"] for kind in kinds.values())
    by_resource = roofline(reckoned.flops + reckoned.extra_flops, moved, received, chip)
    step = max(by_resource.values())
    peak = memory.peak_memory_in_bytes
    return found | {
        "fits": peak <= chip.hbm_bytes,
        "compile_seconds": seconds,
        "peak_bytes": peak,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "program_bytes": memory.generated_code_size_in_bytes,
        "collectives": dict(kinds),
        "hbm_traffic_bytes": moved,
        "seconds": by_resource,
        "bound": max(by_resource, key=lambda name: by_resource[name]),
        "step_seconds_roofline": step,
        "step_seconds_no_overlap": sum(by_resource.values()),
        "tokens_per_second": tokens / step,
        "mfu": reckoned.flops * used / len(there) * chip.devices_per_chip / (step * PEAK_FLOPS[chip.chip]),
    }


def has_kernel(cfg: Config, sizes: Mapping[str, int]) -> bool:
    """Whether attention on a TPU is the splash kernel for such a mesh."""
    from llm_jax.kernels import splash
    from llm_jax.models.attention import exchanges

    model, context = cfg.model, cfg.data.context
    whole = exchanges(model.num_heads, model.kv_heads, sizes["tensor"], sizes["sequence"])
    parts = 1 if whole else sizes["sequence"]
    return model.family == "transformer" and splash.fits(context, context, model.head_width, parts)


def _params(cfg: Config) -> int:
    from llm_jax import parts

    return parts.num_params(cfg.model)


def changes(cfg: Config, sizes: Mapping[str, int], count: int) -> list[dict[str, Any]]:
    """Overrides that make a program smaller, each with those before it, in the order of what they cost."""
    found: list[dict[str, Any]] = []
    if sizes["data"] > 1 and cfg.model.d_model % (sizes["data"] * sizes["fsdp"]) == 0:
        found.append({"mesh.data": 1, "mesh.fsdp": sizes["data"] * sizes["fsdp"]})
    if not cfg.model.scan_layers and cfg.model.family == "transformer":
        found.append({"model.scan_layers": True})
    if cfg.model.family == "transformer":
        found += [{"model.recompute": one} for one in RECOMPUTE[RECOMPUTE.index(cfg.model.recompute) + 1 :]]
    rows, across = cfg.rows_per_step, math.prod(sizes[name] for name in ("data", "fsdp", "expert"))
    pieces = [n for n in (2, 4, 8, 16, 32, 64) if n > cfg.train.grad_accumulation and rows % (n * across) == 0]
    found += [{"train.grad_accumulation": n} for n in pieces]
    if rows > across * cfg.train.grad_accumulation:
        found.append({"train.tokens_per_step": across * cfg.data.context, "train.grad_accumulation": 1})
    if cfg.model.attends and not cfg.model.experts.number:
        widths = [n for n in (2, 4, 8, 16) if n > sizes["tensor"] and count % (n * sizes["fsdp"]) == 0]
        found += [
            {"mesh.data": -1, "mesh.fsdp": max(1, sizes["fsdp"] * sizes["data"] // n), "mesh.tensor": n} for n in widths
        ]
    return found


def advice(cfg: Config, sizes: Mapping[str, int], chip: Slice, topology: str, there: list[Any]) -> dict[str, Any]:
    """What would make it fit: the first changes, together, with which the reckoned memory is within nine tenths of the device's.

    {"overrides", "reckoned_bytes"}, and empty overrides where none of them is enough.
    """
    from llm_jax.training import mesh as meshes

    together: dict[str, Any] = {}
    for change in changes(cfg, sizes, len(there)):
        try:
            wanted = override(cfg, together | change)
            shape = meshes.sizes(wanted, len(there))
        except BadInput:
            continue
        together |= change
        reckoned = footprint(wanted, shape, has_kernel(wanted, shape)).memory
        if reckoned <= 0.9 * chip.hbm_bytes:
            return {"overrides": together, "reckoned_bytes": reckoned}
    return {"overrides": {}, "reckoned_bytes": None}


def describe(found: Mapping[str, Any]) -> str:
    """The table for people."""
    mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items()) or "one device"
    lines = [
        f"{found['topology']}, {found['devices']} devices as {mesh}; N {found['n_params']:,}, {found['tokens_per_step']:,} tokens a step,"
        f" {found['rows_per_device']:g} rows a device; recompute {found['recompute']}; {found['attention']} attention",
        f"jax {found['jax']}, libtpu {found['libtpu']}, compiled in {found['compile_seconds']:.0f} s"
        f" (effort {found['effort']:g}); compiled and not run: no chip was asked",
        "",
    ]
    if found["idle"]:
        lines.insert(1, f"{found['idle']} devices stay idle: there are not rows for all; raise train.tokens_per_step")
    if not found["fits"]:
        return "\n".join([*lines, *_refused(found)])
    needed, share = found["peak_bytes"], found["peak_bytes"] / found["hbm_bytes"]
    lines += [
        "of a device",
        f"memory                   {_gib(needed)} of {_gib(found['hbm_bytes'])}, {100 * share:.0f} %:"
        f" arguments {_gib(found['argument_bytes'])},"
        f" temporaries {_gib(found['temporary_bytes'])}, program {_gib(found['program_bytes'])}",
        f"FLOPs              {found['flops']:.4g} of the model's products, attention in full,"
        f" and {found['extra_flops']:.3g} computed again",
    ]
    lines += [
        f"{kind:19}{one['count']:,} a step, {_gib(one['bytes'])}, of which it receives {_gib(one['received_bytes'])}"
        for kind, one in sorted(found["collectives"].items())
    ]
    times = "; ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in found["seconds"].items())
    lines += [
        f"roofline           {1e3 * found['step_seconds_roofline']:.1f} ms a step at least, bound by {found['bound']};"
        f" {1e3 * found['step_seconds_no_overlap']:.1f} ms if nothing overlaps ({times})",
        f"                   {found['tokens_per_second']:,.0f} tokens a second on all devices,"
        f" {100 * found['mfu']:.0f} % of the peak, at most",
    ]
    return "\n".join(lines)


def _refused(found: Mapping[str, Any]) -> list[str]:
    lines = ["does not fit: " + found["said"]]
    if found["peak_bytes"]:
        lines.append(f"a device would need {_gib(found['peak_bytes'])} and has {_gib(found['hbm_bytes'])}")
    wanted = found["advice"]
    if wanted["overrides"]:
        words = " ".join(f"--{name} {value}" for name, value in wanted["overrides"].items())
        lines.append(f"would fit, by a reckoning of {_gib(wanted['reckoned_bytes'])}: {words}")
    else:
        lines.append(
            "no mesh of these devices would do, however small the batch: take a larger slice or a smaller model"
        )
    return lines


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
