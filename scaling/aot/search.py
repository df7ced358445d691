"""`llm-jax aot --find`: the mesh, the microbatches and the recomputation with which a model trains fastest on a TPU slice.

Every candidate is reckoned (footprint.py), which takes a millisecond; those that come out fastest and fit are compiled, and the
compiler's memory and exchanges decide.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_jax.config import Config
from llm_jax.settings import BadInput, override
from scaling.aot import slices
from scaling.aot.footprint import Footprint, footprint
from scaling.hardware import Slice, tpu_slice

SPARE = 0.95
"""Share of a device's memory that a candidate may be reckoned to need."""
TENSOR = (1, 2, 4, 8)
MICROBATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Candidate:
    """A config that has a mesh on the slice, and what it was reckoned to need."""

    config: Config
    overrides: Mapping[str, Any]
    sizes: Mapping[str, int]
    needs: Footprint

    def seconds(self, chip: Slice) -> tuple[float, float]:
        """A token: of the slowest resource, and of all, which orders those that one resource bounds alike."""
        by_resource = self.needs.seconds(chip).values()
        tokens = self.config.rows_per_step * self.config.data.context
        return max(by_resource) / tokens, sum(by_resource) / tokens


def candidates(cfg: Config, count: int, batches: Sequence[int] = ()) -> Iterator[Candidate]:
    """Of a resolved config on `count` devices, all of which take part; `batches` in place of its train.tokens_per_step."""
    from llm_jax.training import mesh as meshes

    model = cfg.model
    powers = [2**n for n in range(count.bit_length()) if count % 2**n == 0]
    experts = [n for n in powers if model.experts.number % n == 0 and n <= model.experts.number] or [1]
    recompute = slices.RECOMPUTE if model.family == "transformer" else (model.recompute,)
    choices = (batches or (int(cfg.train.tokens_per_step),), powers, TENSOR, experts, MICROBATCHES, recompute)
    for tokens, fsdp, tensor, expert, pieces, again in itertools.product(*choices):
        if count % (fsdp * tensor * expert) or tokens % (cfg.data.context * pieces * (count // tensor)):
            continue
        wanted = {
            "mesh.data": count // (fsdp * tensor * expert),
            "mesh.fsdp": fsdp,
            "mesh.tensor": tensor,
            "mesh.expert": expert,
            "train.tokens_per_step": tokens,
            "train.grad_accumulation": pieces,
            "model.recompute": again,
        }
        try:
            config = override(cfg, wanted)
            sizes = meshes.sizes(config, count, all_of_them=True)
        except BadInput:
            continue
        yield Candidate(config, wanted, sizes, footprint(config, sizes, slices.has_kernel(config, sizes)))


def find(
    cfg: Config,
    topology: str,
    batches: Sequence[int] = (),
    tries: int = 3,
    note: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[str, Any]:
    """{"candidates", "reckoned_to_fit", "tried", "best"}: how many, and `slices.aot` of those that were compiled, each with its "overrides"
    and what was reckoned; the best has the most tokens a second, and of equals the least to overlap. None where none fits.

    Compiled are the fastest until `tries` have fitted, twice as many at most. Where one does not fit, none that needs more is tried.
    """
    if tries < 1:
        raise BadInput(f"--tries must be at least 1, got {tries}")
    chip, count = tpu_slice(topology), len(slices.devices(topology))
    found = list(candidates(cfg, count, batches))
    if not found:
        raise BadInput(f"no mesh of {count} devices divides {cfg.rows_per_step} rows; give --batches, in tokens")
    limit = SPARE * chip.hbm_bytes
    fitting = sorted((one for one in found if one.needs.memory <= limit), key=lambda one: one.seconds(chip))
    tried: list[dict[str, Any]] = []
    for one in fitting:
        fits = sum(compiled["fits"] for compiled in tried)
        if fits == tries or len(tried) == 2 * tries:
            break
        if one.needs.memory >= limit:
            continue
        note(fits, tries, " ".join(f"{name} {size}" for name, size in one.sizes.items() if size > 1))
        compiled = slices.aot(one.config, topology, quick=True)
        if not compiled["fits"]:
            limit = one.needs.memory
        reckoned = {"reckoned_bytes": one.needs.memory, "reckoned_seconds": max(one.needs.seconds(chip).values())}
        tried.append(compiled | reckoned | {"overrides": dict(one.overrides)})
    good = [one for one in tried if one["fits"]]
    best = max(good, key=lambda one: (one["tokens_per_second"], -one["step_seconds_no_overlap"])) if good else None
    return {
        "topology": topology.lower(),
        "candidates": len(found),
        "reckoned_to_fit": len(fitting),
        "tried": tried,
        "best": best,
    }


def describe(found: Mapping[str, Any]) -> str:
    """The table for people, and the best as words for the command line."""
    head = (
        "mesh",
        "tokens",
        "microbatches",
        "recompute",
        "GiB",
        "reckoned",
        "step",
        "reckoned",
        "tokens/s",
        "MFU",
        "no overlap",
    )
    lines = [head]
    for one in sorted(found["tried"], key=lambda one: -one.get("tokens_per_second", 0)):
        needed = f"{one['peak_bytes'] / 2**30:.1f}" if one["fits"] else "too much"
        lines.append(
            (
                " x ".join(f"{name} {size}" for name, size in one["mesh"].items()),
                f"{one['tokens_per_step']:,}",
                f"{one['grad_accumulation']}",
                one["recompute"],
                needed,
                f"{one['reckoned_bytes'] / 2**30:.1f}",
                f"{1e3 * one['step_seconds_roofline']:.0f} ms" if one["fits"] else "",
                f"{1e3 * one['reckoned_seconds']:.0f} ms",
                f"{one['tokens_per_second']:,.0f}" if one["fits"] else "",
                f"{100 * one['mfu']:.0f} %" if one["fits"] else "",
                f"{1e3 * one['step_seconds_no_overlap']:.0f} ms" if one["fits"] else "",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    told = (
        f"{found['topology']}: {found['candidates']:,} candidates, {found['reckoned_to_fit']:,} reckoned to fit,"
        f" {len(found['tried'])} compiled and not run; times are rooflines, the least that a step can take"
    )
    if found["best"] is None:
        return "\n".join([told, "", *text, "", "none fits: take a larger slice, or a smaller batch by --batches"])
    words = " ".join(f"--{name} {value}" for name, value in found["best"]["overrides"].items())
    return "\n".join([told, "", *text, "", f"fastest: {words}"])
