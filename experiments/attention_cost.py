"""What does a longer context cost? Time and memory of a training step: full attention, a sliding window of 256, and an LSTM.

    python experiments/attention_cost.py                  # writes runs/attention_cost/attention_cost.{png,svg,json}
    python experiments/attention_cost.py --device cpu     # a small model, contexts up to 4,096

A step is compiled whole, with gradient, optimizer and update, and sees the same number of tokens at every context, so that the rows get
fewer as they get longer. The LSTM has as many layers, and the width in steps of 8 at which its parameters are nearest to the
Transformers'. Full attention is cuDNN's kernel on a GPU, which computes the square of positions and never keeps it; there the plain
products that keep it are measured too. Time is the median of ten steps or more after two of warm-up; memory is what the compiled
program says that it needs: parameters, optimizer, activations. A family ends at the first context that the device has no memory for,
and the table says so. Exponents are straight lines through the logarithms of the four largest contexts, with 95 % intervals of
Student's t: where a curve still bends they describe its end, and no law.

Measured 2026-11-22 on one H100, jax 0.11.2, bfloat16, 12.7 M parameters, 16,384 tokens a step, five minutes in two calls;
microseconds and KiB a token:

    context             256            1,024          4,096          16,384         time ~ context^
    plain products      0.465   125    0.684   223    1.52    655    4.95   2,383   0.57 [0.18, 0.96]
    full attention      0.392    89    0.409    89    0.527    89    0.904     89   0.20 [-0.05, 0.44]
    window of 256       0.392    89    0.389    89    0.403    89    0.412     90   0.013 [-0.008, 0.033]
    LSTM                2.25     85    7.20     85    24.3     85    124       85   0.96 [0.71, 1.20]

A kernel that never stores the square turns its memory into nothing and its time into a factor of 2.3 at 16,384 tokens. The LSTM does the
same work a token at every context, but one step after the other, of ever fewer rows: its time is that of the steps and no arithmetic.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from llm_jax.config import Model, Train

WINDOW = 256
PLAIN = "plain products"
SIZES: dict[
    str, tuple[Model, int, tuple[int, ...]]
] = {  # what a device does in some minutes: a Transformer, tokens a step, contexts
    "gpu": (
        Model(num_layers=4, d_model=512, num_heads=8, dtype="bfloat16"),
        16_384,
        (256, 1024, 4096, 16_384),
    ),
    "cpu": (Model(num_layers=2, d_model=64, num_heads=2), 4096, (256, 512, 1024, 2048, 4096)),
}
WARM_UP, STEPS, SECONDS, MOST_STEPS = 2, 10, 1.0, 50
"""At least STEPS, and up to MOST_STEPS until SECONDS have passed."""
FITTED = 4
"""Largest contexts that an exponent is fitted to."""


def families(full: Model) -> dict[str, Model]:
    """The models to compare, of about equal parameters."""
    from llm_jax import kernels
    from llm_jax.parts import num_params

    widths = [replace(full, family="lstm", d_model=width) for width in range(8, 2 * full.d_model, 8)]
    lstm = min(widths, key=lambda model: abs(num_params(model) - num_params(full)))
    plain = {PLAIN: full} if kernels.used() else {}
    return {**plain, "full attention": full, f"window of {WINDOW}": replace(full, window=WINDOW), "LSTM": lstm}


def memory_limit() -> float:
    """Bytes that the first device has for a program; of a CPU what the machine has free."""
    import jax

    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024.0 * int(lines["MemAvailable"].split()[0])


def measure(model: Model, context: int, tokens: int, limit: float, plain: bool = False) -> dict[str, Any]:
    """Seconds of one training step of `tokens` tokens in rows of `context`, and bytes that it needs; `plain` keeps attention from its
    kernel. Raises MemoryError beyond `limit` or where the device says that it is full."""
    import jax
    import jax.numpy as jnp

    from llm_jax.models import families, transformer
    from llm_jax.models.attention import attend_plain
    from llm_jax.training.optimizer import adamw
    from llm_jax.training.pretrain import loss_fn
    from llm_jax.training.step import init_state, make_train_step
    from scaling import cost

    train = Train()
    optimizer = adamw(train)
    step = jax.jit(make_train_step(loss_fn(model, train), optimizer), donate_argnums=0)

    def new_state():
        return init_state(families.init(model, jax.random.key(0)), optimizer.init, seed=0)

    rows = np.random.default_rng(0).integers(0, model.vocab_size, (tokens // context, context + 1), dtype=np.int32)
    batch, rate = {"tokens": jnp.asarray(rows)}, jnp.float32(1e-4)
    try:
        with mock.patch.object(transformer, "attend", attend_plain) if plain else contextlib.nullcontext():
            traced = step.lower(jax.eval_shape(new_state), batch, rate)
        compiled = traced.compile()
        needs = compiled.memory_analysis()
        size = needs.argument_size_in_bytes + needs.output_size_in_bytes - needs.alias_size_in_bytes
        size += needs.temp_size_in_bytes
        if size > limit:
            raise MemoryError(f"needs {size / 2**30:.1f} GiB of {limit / 2**30:.1f}")
        state, seconds = jax.jit(new_state)(), []
        while len(seconds) < WARM_UP + STEPS or (
            sum(seconds[WARM_UP:]) < SECONDS and len(seconds) < WARM_UP + MOST_STEPS
        ):
            start = time.perf_counter()
            state, metrics = compiled(state, batch, rate)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - start)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError("the device ran out of memory") from error
    timed = seconds[WARM_UP:]
    return {
        "context": context,
        "rows": tokens // context,
        "steps": len(timed),
        "seconds": statistics.median(timed),
        "seconds_per_token": statistics.median(timed) / tokens,
        "bytes": size,
        "bytes_per_token": size / tokens,
        "flops_per_token": cost.flops_per_token(model, context)["full"],
    }


def exponent(contexts: list[int], values: list[float]) -> dict[str, float] | None:
    """The slope of log(value) over log(context) at the FITTED largest contexts, with its 95 % interval; None below three."""
    from scipy import stats

    x, y = np.log(contexts[-FITTED:]), np.log(values[-FITTED:])
    if len(x) < 3:
        return None
    line = stats.linregress(x, y)
    half = float(stats.t.ppf(0.975, len(x) - 2)) * float(line.stderr)
    slope = float(line.slope)
    return {"value": slope, "low": slope - half, "high": slope + half, "intercept": float(line.intercept), "n": len(x)}


def _write_beside(panel: Any, x: float, texts: list[tuple[float, str, str]]) -> None:
    """Each text above its point (x, y), and none over another: lines that end together have theirs stacked."""
    points = panel.figure.dpi / 72
    lowest = -np.inf
    for y, text, color in sorted(texts):
        at = max(panel.transData.transform((x, y))[1] / points + 5, lowest + 9)
        panel.annotate(
            text,
            (x, y),
            (-4, at - panel.transData.transform((x, y))[1] / points),
            textcoords="offset points",
            ha="right",
            fontsize=7,
            color=color,
        )
        lowest = at


def draw(found: dict[str, Any]) -> Any:
    """Time and memory a token against context, with the fitted lines dashed over the contexts that they were fitted to."""
    from scaling import drawing
    from scaling.comparison_figures import HUES, SHAPES

    figure, panels = drawing.new_figure(2, height=2.9)
    entries, rows = {}, []
    for panel, quantity, unit, label in (
        (panels[0], "seconds_per_token", 1e-6, "time a token (µs)"),
        (panels[1], "bytes_per_token", 1024, "memory a token (KiB)"),
    ):
        values, texts = [], []
        for i, (name, family) in enumerate(found["families"].items()):
            if not family["points"]:
                continue
            x = np.array([point["context"] for point in family["points"]], np.float64)
            y = np.array([point[quantity] for point in family["points"]]) / unit
            panel.plot(x, y, color=HUES[i], marker=SHAPES[i], ms=4, mew=0)
            entries[name] = drawing.key(HUES[i], SHAPES[i])
            values += [*y]
            rows += drawing.series(name, context=x, **{quantity: y * unit})
            if fit := family["exponents"][quantity]:
                ends = x[[-fit["n"], -1]]
                line = np.exp(fit["intercept"]) * ends ** fit["value"] / unit
                panel.plot(ends, line, color=HUES[i], linestyle=drawing.DASHED, linewidth=0.8)
                value, low, high = (round(fit[end], 2) + 0.0 for end in ("value", "low", "high"))  # no -0.00
                texts.append((y[-1], f"{value:.2f} [{low:.2f}, {high:.2f}]", HUES[i]))
        if values:
            drawing.set_log_axis(panel.xaxis, [*found["contexts"]], lambda value: f"{value:,.0f}")
            panel.set_xticks(found["contexts"], [f"{c // 1024}k" if c >= 1024 else str(c) for c in found["contexts"]])
            drawing.set_log_axis(panel.yaxis, values, drawing.eng)
            panel.margins(y=0.12)
        _write_beside(panel, max(found["contexts"]), texts)
        panel.set(xlabel="context (tokens)", ylabel=label)
    drawing.legend(figure, entries, 3)
    caption = (
        f"One training step of {found['tokens_per_step']:,} tokens on {found['device']}: time and memory a token against context, and "
        f"the slopes over the {FITTED} largest contexts with 95 % intervals."
    )
    return drawing.Plot("attention_cost", "Cost of context", caption, figure, rows, wide=True)


def run(sizes: tuple[Model, int, tuple[int, ...]]) -> dict[str, Any]:
    """Measures every family at every context that it has memory for, and prints a line each."""
    import jax

    from llm_jax.parts import num_params
    from llm_jax.settings import to_dict

    model, tokens, contexts = sizes
    limit = memory_limit()
    device = jax.devices()[0].device_kind
    found: dict[str, Any] = {"device": device, "jax": jax.__version__, "tokens_per_step": tokens, "contexts": contexts}
    found["families"] = {}
    print(f"{device}, {limit / 2**30:.1f} GiB, jax {jax.__version__}, {tokens:,} tokens a step, {model.dtype}")
    print(
        "family             parameters  context  rows    ms a step  us a token   GiB  KiB a token  TFLOP/s", flush=True
    )
    for name, one in families(model).items():
        points: list[dict[str, Any]] = []
        family = {"model": to_dict(one), "n_params": num_params(one), "points": points, "stopped": None}
        for context in contexts:
            start = f"{name:18} {num_params(one):>10,} {context:8,}"
            try:
                point = measure(one, context, tokens, limit, plain=name == PLAIN)
            except MemoryError as error:
                family["stopped"] = {"context": context, "reason": str(error)}
                print(f"{start}  stopped: {error}", flush=True)
                break
            points.append(point)
            rate = point["flops_per_token"] / point["seconds_per_token"] / 1e12
            print(
                f"{start} {point['rows']:5}{1e3 * point['seconds']:13.2f}{1e6 * point['seconds_per_token']:12.3f}"
                f"{point['bytes'] / 2**30:6.2f}{point['bytes_per_token'] / 1024:13.1f}{rate:9.3f}",
                flush=True,
            )
        family["exponents"] = {
            quantity: exponent([point["context"] for point in points], [point[quantity] for point in points])
            for quantity in ("seconds_per_token", "bytes_per_token")
        }
        found["families"][name] = family
    for name, family in found["families"].items():
        for quantity, fit in family["exponents"].items():
            if fit:
                print(f"{name:18} {quantity:18} ~ context^{fit['value']:.3f} [{fit['low']:.3f}, {fit['high']:.3f}]")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=SIZES, help="default: what JAX finds; a TPU takes the sizes of a GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/attention_cost"))
    options = parser.parse_args()
    import jax

    if options.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    found = run(SIZES["cpu" if jax.default_backend() == "cpu" else "gpu"])

    from llm_jax import files
    from scaling import drawing

    options.out.mkdir(parents=True, exist_ok=True)
    files.write_json(options.out / "attention_cost.json", found)
    with drawing.style():
        plot = draw(found)
    for suffix, written in ((".png", drawing.png(plot)), (".svg", drawing.svg(plot))):
        files.write_atomic(options.out / f"attention_cost{suffix}", written)
    print(json.dumps({"written": str(options.out)}))


if __name__ == "__main__":
    main()
