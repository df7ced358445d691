"""Verbs about one model: its data, its size, what it writes, where it would run."""

from __future__ import annotations

import dataclasses
import json as jsonlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llm_jax.settings import BadInput, did_you_mean
from scaling.options import (
    AotOptions,
    AttentionOptions,
    DataOptions,
    ExplainOptions,
    GenerateOptions,
)
from scaling.parsing import chosen_experiment
from scaling.progress import prepared_data

if TYPE_CHECKING:
    from scaling.experiment import Trial


def data(options: DataOptions) -> None:
    """Prepares data and prints counts, tokenizer and folder."""
    from llm_jax.data import prepare

    base, _ = chosen_experiment(options)
    prepared = prepared_data(base.config)
    bad = prepare.check(prepared) if options.check else []
    if bad:
        raise BadInput(f"{bad[0]} is not what was written; delete {prepared.folder} to prepare it again")
    values = {field.name: getattr(prepared, field.name) for field in dataclasses.fields(prepared)}
    values["folder"] = str(prepared.folder)
    if options.json:
        print(jsonlib.dumps(values))
        return
    for split in ("train", "validation"):
        tokens, size = prepared.tokens[split], prepared.bytes[split]
        print(
            f"{split:11}{prepared.documents[split]:>10,} documents {tokens:>14,} tokens {size:>14,} bytes {size / tokens:6.3f} a token"
        )
    print(f"tokenizer  {prepared.tokenizer_kind}, {prepared.vocab_size} ids, {prepared.tokenizer_sha256[:12]}")
    if prepared.entropy is not None:
        print(f"entropy    {prepared.entropy:.6f} nats per token, exact")
    print(f"folder     {prepared.folder}{'; all checksums match' if options.check else ''}")


def explain(options: ExplainOptions) -> None:
    """Prints the parts of a model, their sums, and what a run of it costs by each convention."""
    from llm_jax.settings import override
    from scaling import explain as explaining

    base, _ = chosen_experiment(options)
    config = override(base.config, base.ladder.shape(options.depth)) if options.depth is not None else base.config
    found = explaining.explain(config)
    print(jsonlib.dumps(found) if options.json else explaining.describe(found))


def _trained(run: Path, prefix: str | None) -> Trial:
    """The finished trial of a run whose id begins so, or the one with the lowest loss."""
    from scaling import ledger

    ledger.describe(run)
    losses = {row["id"]: row["loss"] for row in ledger.rows(run) if row["status"] == "done"}
    if not losses:
        raise BadInput(f"{run} has no finished trial; see llm-jax status {run}")
    chosen = [key for key in losses if key.startswith(prefix)] if prefix else [min(losses, key=lambda key: losses[key])]
    if len(chosen) != 1:
        raise BadInput(f'--trial "{prefix}" names {len(chosen)} finished trials{did_you_mean(str(prefix), losses)}')
    return next(trial for trial in ledger.trials(run) if trial.id == chosen[0])


def generate(options: GenerateOptions) -> None:
    """Prints a prompt and how a trained model goes on; of a model trained on pairs, a source and its target."""
    from llm_jax.generation import pairs, sampling
    from scaling import ledger

    trial = _trained(options.run, options.trial)
    trained = trial.config, prepared_data(trial.config), ledger.trial_folder(options.run, trial.id)
    of_pairs = trial.config.data.source == "pairs"
    if of_pairs:
        text = pairs.transduce_text(*trained, options.prompt, width=options.beam)
    else:
        text = sampling.continue_text(
            *trained,
            options.prompt,
            options.tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            seed=options.seed,
            media=options.media,
        )
    if options.json:
        print(jsonlib.dumps({"trial": trial.id, "prompt": options.prompt, "text": text}))
    else:
        print(text if of_pairs else options.prompt + text)


def attention(options: AttentionOptions) -> None:
    """Draws the attention maps of a trained model for one text, and prints where; with --json the weights too."""
    from llm_jax import files
    from llm_jax.generation import maps
    from scaling import attention_figures, drawing, ledger

    trial = _trained(options.run, options.trial)
    out = options.out or options.run / "attention.png"
    writers: dict[str, Callable[..., str | bytes]] = {".png": drawing.png, ".svg": drawing.svg}
    if out.suffix not in writers:
        raise BadInput(f'--out "{out}" must end in .png or .svg')
    if not out.parent.is_dir():
        raise BadInput(f"--out: there is no folder {out.parent}")
    folder = ledger.trial_folder(options.run, trial.id)
    found = maps.maps_of_text(trial.config, prepared_data(trial.config), folder, options.prompt)
    with drawing.style():
        plot = attention_figures.attention_plot(found, options.prompt)
    files.write_atomic(out, writers[out.suffix](plot))
    if not options.json:
        print(f"{plot.caption}\n{out}")
        return
    shown = {
        one.name: {"queries": one.queries, "keys": one.keys, "weights": one.weights_LxNxTxS.round(6).tolist()}
        for one in found
    }
    print(jsonlib.dumps({"trial": trial.id, "prompt": options.prompt, "figure": str(out), "maps": shown}))


def aot(options: AotOptions) -> int:
    """Compiles a training step for a TPU slice and prints what was found; 1 where it does not fit."""
    from scaling import experiment as experiments
    from scaling import hardware, tables
    from scaling.aot import slices

    hardware.tpu_slice(options.topology)
    slices.prepare()
    base, _ = chosen_experiment(options)
    point = {"depth": options.depth} if options.depth is not None else {}
    config = experiments.trial(base.config, base.ladder, point).config
    if options.find:
        from scaling.aot import search
        from scaling.progress import progress

        with progress("aot", options.tries, " programs") as update:
            best = search.find(
                config, options.topology, options.batches, options.tries, lambda done, _, what: update(done, what)
            )
        print(jsonlib.dumps(tables.finite(best)) if options.json else search.describe(best))
        return 0 if best["best"] else 1
    found = slices.aot(config, options.topology, options.quick)
    print(jsonlib.dumps(tables.finite(found)) if options.json else slices.describe(found))
    return 0 if found["fits"] else 1
