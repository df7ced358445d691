"""The checklist of Li, Kudugunta and Zettlemoyer 2025, «(Mis)Fitting: A Survey of Scaling Laws» (arXiv:2502.18969), filled in.

Its four parts are theirs: the hypothesis, the training, the data taken from it, the fit. An answer is read from what the
run recorded; where it recorded nothing the answer is None, and the report says «not known».
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from scaling.drawing import Row, column, is_number
from scaling.page import count, formula_html, interval, loss_text, number, percent, symbol

COUNTED = {
    "C_6N_matrices": "6ND without embeddings and head",
    "C_with_attention": "that and attention",
    "C_full": "every matrix product",
    "C_hoffmann": "Hoffmann et al. 2022, Appendix F",
}
"""Columns of a ledger that count compute by other conventions (scaling/cost.py)."""


class Answer(NamedTuple):
    """One line of the checklist; `answer` is HTML, None where the run does not say."""

    part: str
    question: str
    answer: str | None


class Run(NamedTuple):
    """What the questions are asked of, as in report.Content."""

    fit: Row
    trials: Sequence[Row]
    """All; `done` are those with a loss."""
    done: Sequence[Row]
    setup: Row
    """experiment.json: config {model, data, train}, ladder, data, tokenizer_sha256; empty for a bare table."""
    forecast: Row
    verify: Row
    facts: dict[str, str]

    def setting(self, room: str) -> Row:
        """One of model, data, train of the configuration."""
        return self.setup.get("config", {}).get(room, {})


def spread(rows: Iterable[Row], name: str, text: Callable[[Any], str] = count) -> str | None:
    """10.3k to 165k, over the rows that have it; one value where all have the same."""
    values = column(rows, name)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = text(float(values.min())), text(float(values.max()))
    return low if low == high else f"{low} to {high}"


def joined(*parts: str | None, by: str = "; ") -> str | None:
    """The parts that are known."""
    return by.join(filter(None, parts)) or None


# The hypothesis


def form(run: Run) -> str | None:
    """The formula, the law's name and where it was published."""
    if not run.fit:
        return None
    return joined(formula_html(run.fit["formula"]), f"“{escape(run.fit['law'])}”", escape(run.fit.get("source", "")))


def variables(run: Run) -> str | None:
    """Read from the formula: every name that is not a parameter."""
    if not run.fit:
        return None
    target, _, right = run.fit["formula"].partition(",")[0].partition("=")
    letters = dict.fromkeys(re.findall(r"\b[A-Za-z]\w*", right))
    meaning = {
        "N": "<i>N</i> (parameters)", "D": "<i>D</i> (training tokens)", "C": "<i>C</i> (compute)",
        "N_params": "<i>N</i> (parameters)", "D_tokens": "<i>D</i> (training tokens)", "C_flops": "<i>C</i> (compute)",
        "N_eff": "effective <i>N</i>", "D_eff": "effective <i>D</i>", "lr": "learning rate", "batch": "batch",
    }  # fmt: skip
    given = run.fit.get("columns") or [x for x in letters if x not in run.fit["parameters"] and x not in ("e", "ln")]
    shown = ", ".join(meaning.get(x, symbol(x)) for x in given)
    what = "the loss" if target.strip() == "L" else escape(target.strip())
    return f"{what}, from {shown}" if shown else None


def fitted(run: Run) -> str | None:
    """How many parameters were free, and what the others were held at."""
    if not run.fit:
        return None
    held = set(run.fit.get("held", ()))
    free = [name for name in run.fit["parameters"] if name not in held]
    kept = ", ".join(
        f"{symbol(n)} = {number(run.fit['parameters'][n]['value'])}" for n in run.fit["parameters"] if n in held
    )
    return joined(f"{len(free)}: {', '.join(map(symbol, free))}", f"held: {kept}" if kept else "")


# The training


def models(run: Run) -> str | None:
    """Runs with a loss, how many sizes, and how many runs have none."""
    if not run.trials:
        return None
    lost = len(run.trials) - len(run.done)
    sizes = np.unique(column(run.done, "N_params"))
    sizes = sizes[np.isfinite(sizes)]
    return joined(
        f"{len(run.done)} runs with a loss" + (f", {len(sizes)} sizes" if len(sizes) else ""),
        f"{lost} without" if lost else "",
    )


def parameters(run: Run) -> str | None:
    """Range of N, and whether embeddings are counted in."""
    shown = spread(run.done, "N_params")
    if not shown:
        return None
    bare = spread(run.done, "N_non_embedding")
    how = (
        "all are counted, a tied embedding once" if run.setup else "<b>not known</b> whether embeddings are among them"
    )
    return joined(shown, how, f"without embeddings and head {bare}" if bare else "")


def tokens(run: Run) -> str | None:
    """Range of D, and of D / N."""
    shown = spread(run.done, "D_tokens")
    if not shown:
        return None
    ratio = [
        {"per": t["D_tokens"] / t["N_params"]} for t in run.done if t.get("N_params") and is_number(t.get("D_tokens"))
    ]
    per = spread(ratio, "per", lambda v: number(v, 3))
    return joined(shown, f"{per} for each parameter" if per else "")


def compute(run: Run) -> str | None:
    """Range of C in FLOPs, and how it was counted: 6ND is checked against the table and not believed."""
    shown = spread(run.done, "C_flops", lambda v: number(v, 3))
    if not shown:
        return None
    budgets = {t["budget"] for t in run.done if t.get("budget")}
    n, d, c = (column(run.done, name) for name in ("N_params", "D_tokens", "C_flops"))
    known = np.isfinite(n * d * c)
    how = "<b>not known</b> by which convention"
    if known.any() and np.allclose(6 * n[known] * d[known], c[known], rtol=1e-3):
        how = "counted as 6<i>ND</i>"
    elif known.any():
        how = f"not 6<i>ND</i> of the counts above; {how}"
    also = [words for name, words in COUNTED.items() if np.isfinite(column(run.done, name)).any()]
    return joined(
        f"{shown} FLOPs", how, f"{len(budgets)} budgets" if len(budgets) > 1 else "",
        f"also recorded as {', '.join(also)}" if also else "",
    )  # fmt: skip


def data(run: Run) -> str | None:
    """Source, fingerprint and context."""
    given = run.setting("data")
    if not given:
        return escape(run.facts["data"]) if "data" in run.facts else None
    where = escape(", ".join([given["source"], *given.get("files", ())]))
    print_ = run.setup.get("data")
    return joined(
        where,
        f"fingerprint {escape(str(print_))}" if print_ else "",
        f"rows of {given['context']} tokens" if "context" in given else "",
    )


def repetition(run: Run) -> str | None:
    """How many runs saw data more than once, and the range of epochs."""
    epochs = column(run.done, "epochs")
    epochs = epochs[np.isfinite(epochs)]
    if not len(epochs):
        return None
    shown = spread(run.done, "epochs", lambda v: number(v, 2))
    repeated = int((epochs > 1).sum())
    return f"{f'{repeated} runs see data again' if repeated else 'none'}; {shown} epochs"


def tokenizer(run: Run) -> str | None:
    """Its kind, size and hash."""
    given, model = run.setting("data"), run.setting("model")
    if not given.get("tokenizer"):
        return escape(run.facts["tokenizer"]) if "tokenizer" in run.facts else None
    sha = str(run.setup.get("tokenizer_sha256", ""))[:12]
    size = f"{model['vocab_size']:,} entries" if "vocab_size" in model else ""
    return joined(escape(given["tokenizer"]), size, f"SHA-256 {escape(sha)}" if sha else "")


def shape(run: Run) -> str | None:
    """Depth, how width follows it, and the kind of block."""
    model, ladder = run.setting("model"), run.setup.get("ladder")
    if not model:
        return None
    depth = spread(run.done, "depth", lambda v: number(v, 3))
    wide = f"width {ladder['aspect']} × depth" if ladder and "aspect" in ladder else ""
    heads = f"{ladder['num_heads']} heads" if ladder and ladder.get("num_heads") else ""
    kind = ", ".join(str(model[k]) for k in ("mlp", "norm", "positions") if model.get(k))
    return joined(
        f"depth {depth}" if depth else "", wide, heads, f"decoder with {escape(kind)}" if kind else "", by=", "
    )


def optimizer(run: Run) -> str | None:
    """Its settings, the same for all runs."""
    train = run.setting("train")
    if not train:
        return None
    names = {
        "beta1": "β₁",
        "beta2": "β₂",
        "epsilon": "ε",
        "weight_decay": "weight decay",
        "clip_norm": "gradients clipped at",
    }
    return "AdamW, " + ", ".join(f"{label} {number(train[name])}" for name, label in names.items() if name in train)


def rate(run: Run) -> str | None:
    """Schedule and range of the peak learning rate, and whether a rule set it."""
    train, peak = run.setting("train"), spread(run.done, "peak_lr", lambda v: number(v, 3))
    shown = (
        f"peak {peak}" + by_rule(train, "peak_lr", ", by rule from <i>N</i>, <i>D</i> and the batch") if peak else ""
    )
    schedule = ""
    if train.get("schedule"):
        end = number(train.get("final_lr", 0.0))
        decay = f", decay over the last {100 * train['decay_fraction']:g} %" if train["schedule"] == "wsd" else ""
        schedule = f"{escape(train['schedule'])} to {end} of the peak at each run’s own last step{decay}"
    return joined(schedule, shown)


def by_rule(train: Row, name: str, text: str) -> str:
    """The text, where the setting was left to the rule."""
    return text if train.get(name) == "rule" else ""


def batch(run: Run) -> str | None:
    """Range of tokens a step, and whether a rule set it."""
    shown = spread(run.done, "tokens_per_step")
    return (
        f"{shown} tokens" + by_rule(run.setting("train"), "tokens_per_step", ", by rule from <i>D</i>")
        if shown
        else None
    )


def warmup(run: Run) -> str | None:
    """Range of warm-up steps, and whether a rule set it."""
    shown = spread(run.done, "warmup_steps", lambda v: number(v, 9))
    rule = by_rule(
        run.setting("train"), "warmup_steps", ", by rule: as many tokens as parameters, at most a fifth of the run"
    )
    return f"{shown} steps{rule}" if shown else None


def seeds(run: Run) -> str | None:
    """One for all runs, or how many."""
    found = {int(t["seed"]) for t in run.done if is_number(t.get("seed"))}
    if not found:
        return None
    return f"one, {found.pop()}, for all runs" if len(found) == 1 else f"{len(found)}"


# The data


def metric(run: Run) -> str | None:
    """What the loss is, and its unit."""
    if not run.setup:
        return None
    bits = np.isfinite(column(run.done, "bits_per_byte")).any()
    return "cross-entropy, nats per token" + (", with bits per byte beside it" if bits else "")


def evaluation(run: Run) -> str | None:
    """Size of the held-out set, and the standard error that comes of it."""
    given = run.setting("data")
    if "eval_tokens" not in given:
        return None
    share = f"of {100 * given['val_fraction']:g} % of the documents, held out" if "val_fraction" in given else ""
    error = column(run.done, "loss_se")
    wide = (
        f"standard error {loss_text(float(np.nanmedian(error)))}, shared by all runs"
        if np.isfinite(error).any()
        else ""
    )
    return joined(joined(f"{given['eval_tokens']:,} fixed tokens", share, by=" "), wide)


def checkpoints(run: Run) -> str | None:
    """Which loss of a run was taken; unknown of a bare table."""
    if not run.setup:
        return None
    return "one a run: its last step, after the learning rate has decayed"


def changed(run: Run) -> str | None:
    """Whether losses were smoothed or interpolated; unknown of a bare table."""
    return "no: losses as measured, not smoothed or interpolated" if run.setup else None


# The fit


def objective(run: Run) -> str | None:
    """What was minimised, in words, and its least value."""
    if not run.fit:
        return None
    name, *words = str(run.fit["objective"]["name"]).split(":")
    what = {"huber": "Huber", "l1": "absolute errors", "lsq": "half of squared errors"}.get(name)
    if not what:
        return escape(str(run.fit["objective"]["name"]))
    delta = f", δ = {escape(words[0])}" if name == "huber" and words else ""
    of = "of the values as they are" if "linear" in words else "of the log of the loss"
    scale = ", the width of the noise fitted with it" if "scale" in words else ""
    least = number(run.fit["objective"]["value"])
    return f"{what}{delta}, {of}, summed over runs{scale}; {least} at the minimum"


def algorithm(run: Run) -> str | None:
    """The optimizer of the fit."""
    name = run.fit.get("search", {}).get("optimizer")
    return escape(name) if name else None


def starts(run: Run) -> str | None:
    """How many, and what share of them reached the same minimum."""
    search = run.fit.get("search", {})
    if "starts" not in search:
        return None
    agree = (
        f"{100 * search['agreeing']:.0f} % of them reach the same minimum" if is_number(search.get("agreeing")) else ""
    )
    return joined(f"{search['starts']} starts spread over the ranges that the data make plausible", agree)


def points(run: Run) -> str | None:
    """How many runs with a loss the fit used."""
    if not run.fit:
        return None
    left = len(run.done) - run.fit["n"]
    return (
        f"{run.fit['n']}" + (", all that have a loss" if not left else f" of {len(run.done)}")
        if run.done
        else str(run.fit["n"])
    )


def intervals(run: Run) -> str | None:
    """Their kind, and what was resampled how often where it is a bootstrap."""
    if not run.fit:
        return None
    kinds = dict.fromkeys(kind for p in run.fit["parameters"].values() for kind in p.get("intervals") or ())
    quoted = next((kind for kind in kinds if kind != "bootstrap"), "")
    boot = run.fit.get("bootstrap")
    if boot:
        drawn = f"bootstrap of {boot['samples']:,} resamples"
        return joined(f"{quoted} likelihood" if quoted == "profile" else quoted, drawn, escape(boot.get("by", "")))
    given = [p for p in run.fit["parameters"].values() if p.get("interval")]
    return "given; <b>not known</b> how many resamples" if given else "none"


def validation(run: Run) -> str | None:
    """The forecast beyond the fitted runs, and what was measured there."""
    if not run.forecast:
        return "no forecast registered" if run.setup else None
    target, prediction = run.forecast["target"], run.forecast["prediction"]
    most = np.nanmax(column(run.done, "C_flops"), initial=0)
    far = f" at {number(target['C'] / most, 2)} times the largest compute" if most > 0 else ""
    shown = f"forecast{far}, registered before the run: {loss_text(prediction['loss'])} {interval(prediction['interval'], loss_text)}"
    if not run.verify:
        return f"{shown}; not measured yet"
    place = "inside" if run.verify["inside"] else "outside"
    return f"{shown}; measured {loss_text(run.verify['measured'])}, {place}, {percent(run.verify['error_relative'])}"


def code(run: Run) -> str | None:
    """Commit and versions."""
    names = {k: v for k, v in run.facts.items() if k in ("git commit", "versions", "code")}
    commit = run.forecast.get("git")
    return joined(f"commit {escape(str(commit)[:12])}" if commit else "", *(escape(v) for v in names.values()))


Question = tuple[str, Callable[[Run], str | None]]
PARTS: dict[str, tuple[Question, ...]] = {
    "Hypothesis": (("Form of the law", form), ("What it relates", variables), ("Parameters fitted", fitted)),
    "Training": (
        ("Models trained", models),
        ("Parameters N", parameters),
        ("Training tokens D", tokens),
        ("Compute C", compute),
        ("Training data", data),
        ("Data repeated", repetition),
        ("Tokenizer", tokenizer),
        ("Shape, and how it grows", shape),
        ("Optimizer", optimizer),
        ("Learning rate", rate),
        ("Batch", batch),
        ("Warm-up", warmup),
        ("Seeds", seeds),
    ),
    "Data taken from it": (
        ("Metric", metric),
        ("Evaluation set", evaluation),
        ("Checkpoints of each run", checkpoints),
        ("Values changed before the fit", changed),
    ),
    "Fit": (
        ("Objective", objective),
        ("Algorithm", algorithm),
        ("Starts", starts),
        ("Points used", points),
        ("Intervals", intervals),
        ("Checked by extrapolation", validation),
        ("Code and versions", code),
    ),
}


def answers(
    *,
    fit: Row | None,
    trials: Sequence[Row],
    setup: Row,
    forecast: Row | None = None,
    verify: Row | None = None,
    facts: dict[str, str] | None = None,
) -> list[Answer]:
    """Every line of the checklist, in order; the arguments are as in report.Content."""
    done = [t for t in trials if t.get("status", "done") == "done" and is_number(t.get("loss"))]
    run = Run(fit or {}, trials, done, setup, forecast or {}, verify or {}, facts or {})
    return [Answer(part, question, answer(run)) for part, asked in PARTS.items() for question, answer in asked]
