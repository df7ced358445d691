"""A model as a table that a person can check by hand: each part with its shape, parameters, FLOPs and activation memory.

All of it is read off llm_jax/parts.py, the list that the ledger's counts come from too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_jax import ladder
from llm_jax.config import Config, Model
from llm_jax.parts import Part, parts
from llm_jax.settings import BadInput
from scaling import cost


def explain(config: Config) -> dict[str, Any]:
    """{"parts": a row each, "per_token": training FLOPs by convention, "run": the ledger's counts of `config`}; JSON values.

    FLOPs are of one forward pass, a token. Activations are bytes of one microbatch, what the parts of all layers put out: XLA's plan
    of a training step on a CPU, with gradients and temporaries, took 1.6 to 2.1 times that on five models of 0.2 to 6 M parameters.
    Raises BadInput for a model that is counted and not trained.
    """
    model = config.model
    if model.counted:
        raise BadInput("model.family=ngram has no arrays and no products: its size is the number of counts in the data")
    resolved = ladder.resolve(config)
    context, prefix = config.data.context, config.data.prefix
    microbatch = int(resolved.train.tokens_per_step) // resolved.train.grad_accumulation
    rows = [
        {
            "part": part.name,
            "kind": part.kind,
            "shape": list(part.shape),
            "layers": part.times,
            "stored": part.stored,
            "N_params": part.params,
            "flops": part.flops,
            "activation_bytes": microbatch * part.times * part.outputs * _bytes(part, model),
        }
        for part in parts(model, context, prefix)
    ]
    return {
        "family": model.family,
        "context": context,
        "encoder_tokens": prefix if model.encodes else 0,
        "media_tokens": model.media.items * model.media.tokens if model.media.kind != "none" else 0,
        "tokens_per_microbatch": microbatch,
        "parts": rows,
        "per_token": cost.flops_per_token(model, context, prefix),
        "run": cost.counts(model, context, int(resolved.train.tokens), prefix),
    }


def _bytes(part: Part, model: Model) -> int:
    """Of a number: logits, the scores of attention and those of a router are float32 whatever the model computes in."""
    return 4 if model.dtype == "float32" or part.kind == "head" or part.name.endswith(("/scores", "/router")) else 2


def describe(found: Mapping[str, Any]) -> str:
    """The table of `explain`, with its sums, and the counts of a run below."""
    head = ("part", "shape", "layers", "parameters", "FLOPs/token", "activations")
    lines = [head]
    for row in found["parts"]:
        shape = " × ".join(map(str, row["shape"]))
        note = "" if row["stored"] else " (tied)" if row["kind"] == "head" else " (no array)"
        lines.append(
            (
                row["part"],
                shape + note,
                f"{row['layers']}",
                f"{row['N_params']:,}" if row["stored"] else "",
                f"{row['flops']:,}" if row["flops"] else "",
                _size(row["activation_bytes"]) if row["activation_bytes"] else "",
            )
        )
    sums = [sum(row[name] for row in found["parts"]) for name in ("N_params", "flops", "activation_bytes")]
    lines.append(("sum", "", "", f"{sums[0]:,}", f"{sums[1]:,}", _size(sums[2])))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    table = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    run, per_token = found["run"], found["per_token"]
    conventions = {"6N": "C_flops", **{name: f"C_{name}" for name in per_token if name != "6N"}}
    return "\n".join(
        [
            *table,
            "",
            "Parameters and activations are of all layers, FLOPs of their forward pass; training costs three times as many. "
            f"Activations: what the parts put out for one microbatch of {found['tokens_per_microbatch']:,} tokens.",
            f"N {run['N_params']:,}, active {run['N_active']:,}, without embeddings {run['N_non_embedding']:,}; D {run['D_tokens']:,}; "
            + (f"encoder of media {run['N_media']:,}; " if found["media_tokens"] else "")
            + (
                f"rows of {found['context']} tokens, of which {found['media_tokens']} are media: FLOPs are their mean"
                if found["media_tokens"]
                else f"rows of {found['context']} tokens, of which the encoder reads {found['encoder_tokens']}: FLOPs are their mean"
                if found["encoder_tokens"]
                else f"attention over {found['context']} positions"
            ),
            "training FLOPs a token, and C of the run:",
            *(f"  {name:14}{per_token[name]:>16,}{run[column]:>12.4g}" for name, column in conventions.items()),
        ]
    )


def _size(count: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
