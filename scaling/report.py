"""report.html: one self-contained page on a scaling experiment, and its figures as SVG, PNG and CSV.

A report is a list of sections. A section is a function of the Content that yields blocks, each a piece of HTML or a
Plot; one whose data are missing yields nothing. To add to a report, add to SECTIONS.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from llm_jax import files
from scaling import allocation_figures, checklist, comparison_figures, drawing, figures, fit_figures, goodput, tables
from scaling.drawing import Plot, is_number
from scaling.interactive import SCRIPT
from scaling.page import (
    CSS,
    PAGE,
    Cell,
    card,
    count,
    duration,
    formula_html,
    html_table,
    interval,
    loss_text,
    number,
    percent,
    symbol,
    tile,
)
from scaling.progress import progress


@dataclass(frozen=True)
class Content:
    """Everything a report shows; None or empty where a step has not been run."""

    title: str
    """The experiment's name."""
    docstring: str
    """The experiment file's own description."""
    trials: list[dict[str, Any]]
    """Rows of the ledger: id, status (done, failed, running), depth, N_params, N_non_embedding, D_tokens,
    C_flops (6ND), budget, epochs, tokens_per_step, peak_lr, num_steps, loss, loss_se, bits_per_byte, seconds,
    tokens_per_second, reason, first_step (steps taken over from a shared trunk); perhaps attempts, goodput, time (wall seconds by
    phase, scaling/goodput.py)."""
    curves: dict[str, dict[str, list[float]]]
    """Trial id -> tokens, loss (training, nats a token), and perhaps eval_tokens, eval_loss."""
    fit: dict[str, Any] | None
    """law, formula, n, objective {name, value}, parameters {NAME: {value, interval [low, high] or None, unbounded}},
    warnings. Perhaps in a parameter: intervals {"bootstrap": [low, high], "profile": ..., "Hessian": ...}, an end None where
    there is none. Perhaps, for the checklist: source (paper and equation), columns (that the law reads), held (names),
    search {optimizer, starts, agreeing (a share)}, bootstrap {samples, by (what is resampled, in words)}. Perhaps
    conventions: [{count (in words), exponents {NAME: [value, low, high]}}]."""
    isoflop: list[dict[str, Any]]
    """Per budget: budget, coefficients [c2, c1, c0] of loss in ln N, N_opt, N_opt_interval, D_opt, loss_opt,
    edge (None, low, high)."""
    bands: dict[str, Any] | None
    """Along the efficient frontier: C, N_opt, N_low, N_high, D_opt, D_low, D_high, loss, loss_low, loss_high."""
    forecast: dict[str, Any] | None
    """registered_at, target {N, D, C}, prediction {loss, interval, level}, config_fingerprint, git, ledger_sha256."""
    verify: dict[str, Any] | None
    """measured, error_relative (signed, a fraction), inside, standard_error."""
    entropy: float | None
    """The true irreducible loss of a synthetic source, nats a token."""
    warnings: list[str]
    facts: dict[str, str]
    """Provenance, by name."""
    profiles: list[dict[str, Any]] = field(default_factory=list)
    """Per parameter: parameter, value, values, increase (of -2 log likelihood over its least), threshold,
    interval [low, high], an end None where the increase never reaches the threshold."""
    samples: dict[str, list[float]] = field(default_factory=dict)
    """Bootstrap: parameter -> its natural value in each resample, the same resamples for all."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Side by side, as in compare.record; empty where the trials are one group."""
    by: str = ""
    """The column of the trials that names their group."""
    setup: dict[str, Any] = field(default_factory=dict)
    """experiment.json: config {model, data, train}, ladder, data (fingerprint), tokenizer_sha256; empty for a bare table."""


Block = str | Plot
Section = Callable[[Content], Iterable[Block]]


# Sections


def heading(content: Content) -> Iterator[Block]:
    """The title, and the docstring of the experiment."""
    summary, _, rest = content.docstring.strip().partition("\n\n")
    yield f"<h1>{escape(content.title)}</h1>"
    if summary:
        yield f'<p class="lead">{escape(summary)}</p>'
    if rest.strip():
        yield f'<pre class="doc">{escape(rest.strip())}</pre>'


def verdict(content: Content) -> Iterator[Block]:
    """Where the experiment stands, in numbers."""
    tiles = [tile_trials(content)]
    if content.fit:
        tiles.append(tile_law(content.fit))
    if content.forecast:
        tiles.append(tile_forecast(content.forecast))
        tiles.append(tile_measured(content.forecast, content.verify))
    yield f'<div class="tiles">{"".join(tiles)}</div>'


def tile_trials(content: Content) -> str:
    """How many trials are done, and whether any failed."""
    done, total = len(figures.finished(content.trials)), len(content.trials)
    failed = sum(t.get("status") == "failed" for t in content.trials)
    budgets = {t["budget"] for t in content.trials if t.get("budget")}
    notes = [f"{len(budgets)} budgets" if len(budgets) > 1 else "", f"{failed} failed" if failed else ""]
    if not total:
        return tile("Trials", "none", "No trial has been run yet.", "bad")
    if not done:
        notes.append("No trial has finished with a loss, so there is nothing to plot or fit.")
    elif not content.fit:
        notes.append("no law fitted yet")
    return tile("Trials", f"{done} of {total} done", "; ".join(filter(None, notes)), "" if done else "bad")


def tile_law(fit: dict[str, Any]) -> str:
    """The law with its numbers in place, and each with its interval."""
    value = f'<span class="formula">{formula_html(fit["formula"], fit["parameters"])}</span>'
    each = (f'<span class="whole">{symbol(k)} = {interval_text(p)}</span>' for k, p in fit["parameters"].items())
    note = f"{', '.join(each)}. Law “{escape(fit['law'])}” on {fit['n']} trials; <i>N</i> counts all parameters."
    return tile("Fitted law, nats per token", value, note, "wide")


def interval_text(parameter: dict[str, Any]) -> str:
    """1.69 [1.6, 1.8], or what is wrong with it."""
    shown = interval(parameter.get("interval"), none="[no interval]")
    shown += " <b>unbounded</b>" if parameter.get("unbounded") else ""
    return f"{number(parameter['value'])} {shown}"


def tile_forecast(forecast: dict[str, Any]) -> str:
    """The loss that was registered, for which run, and when."""
    target, prediction = forecast["target"], forecast["prediction"]
    low, high = prediction["interval"]
    note = f"{100 * prediction['level']:g} % interval, registered <time>{escape(str(forecast['registered_at']))}</time>"
    note += f" for <i>N</i> = {count(target['N'])}, <i>D</i> = {count(target['D'])}"
    note += f", <i>C</i> = {number(target['C'], 3)} FLOPs"
    value = f'{loss_text(prediction["loss"])} <span class="interval">[{loss_text(low)}, {loss_text(high)}]</span>'
    return tile("Forecast, nats per token", value, note)


def tile_measured(forecast: dict[str, Any], verify: dict[str, Any] | None) -> str:
    """The loss that was measured, and whether it fell inside."""
    if not verify:
        return tile("Measured", "not yet", "The target has not been trained.")
    error = verify.get("standard_error")
    value = loss_text(verify["measured"])
    value += f' <span class="interval">± {loss_text(error)}</span>' if is_number(error) else ""
    level = f"{100 * forecast['prediction']['level']:g} %"
    place = "Inside" if verify["inside"] else "Outside"
    mark = "✓" if verify["inside"] else "✗"
    note = f"<b>{mark} {place} the {level} interval</b>; relative error {percent(verify['error_relative'])}"
    return tile("Measured, nats per token", value, note, "good" if verify["inside"] else "bad")


def warnings(content: Content) -> Iterator[Block]:
    """What to beware of, each warning once."""
    told = dict.fromkeys([*content.warnings, *(content.fit or {}).get("warnings", ())])
    if told:
        items = "".join(f"<li>{escape(w)}</li>" for w in told)
        yield f'<div class="warnings"><h2>Warnings</h2><ul>{items}</ul></div>'


def draw(content: Content) -> list[Plot]:
    """The figures, each where its data are there. Call it inside `drawing.style()`."""
    told = figures.outcome(content.forecast, content.verify)
    predict = figures.predictor(content.fit)
    fitted = {name: p["value"] for name, p in content.fit["parameters"].items()} if content.fit else {}
    drawn = (
        comparison_figures.comparison(content.trials, content.groups, content.by),
        allocation_figures.triptych(content.trials, content.isoflop, content.bands, told, predict),
        figures.frontier(content.trials, content.bands, told),
        allocation_figures.surface(content.trials, predict, content.bands, told, fitted.get("E", 0.0)),
        figures.law_panels(content.trials, content.fit, predict, told, content.entropy),
        figures.learning_curves(content.trials, content.curves),
        figures.residuals(content.trials, predict, told),
        fit_figures.profiles(content.profiles),
        fit_figures.corner(content.samples, fitted),
    )
    return [plot for plot in drawn if plot]


def plots(content: Content) -> Iterator[Block]:
    """The figures, under their heading."""
    if found := draw(content):
        yield "<h2>Figures</h2>"
        yield from found


def bounds(ends: Any) -> str:
    """[low, high] where both are there, "unbounded" at an end that is None; "none" without an interval."""
    if not ends:
        return "none"
    low, high = (number(end) if is_number(end) else "<b>unbounded</b>" for end in ends)
    return f"[{low}, {high}]"


def law(content: Content) -> Iterator[Block]:
    """The fitted parameters, an interval with every number."""
    fit = content.fit
    if not fit:
        return
    kinds = list(dict.fromkeys(kind for p in fit["parameters"].values() for kind in p.get("intervals", ())))
    rows = []
    for name, p in fit["parameters"].items():
        remark = "the data do not bound it" if p.get("unbounded") else ""
        ends = [bounds(p.get("intervals", {}).get(kind)) for kind in kinds]
        ends = ends or [interval(p.get("interval"), none="none")]
        rows.append((symbol(name), number(p["value"]), *ends, remark))
    yield f"<h2>Fitted law</h2><p>{formula_html(fit['formula'])}</p>"
    if content.entropy is not None:
        yield f"<p>True entropy of the source, which <i>E</i> estimates: {number(content.entropy)} nats per token.</p>"
    yield html_table(("parameter", "value", *(kinds or ("interval",)), ""), rows)
    objective = fit["objective"]
    name, least = escape(str(objective["name"])), number(objective["value"])
    yield f'<p class="note">Objective {name} = {least} over {fit["n"]} trials.</p>'


def side_by_side(content: Content) -> Iterator[Block]:
    """The law of each group, a line each."""
    fitted = [group for group in content.groups if group["fit"]]
    if not fitted:
        return
    names = list(dict.fromkeys(name for group in fitted for name in group["fit"]["parameters"]))
    rows = []
    for group in fitted:
        found = group["fit"]["parameters"]
        cells = (f"{number(found[n]['value'])} {interval(found[n]['interval'])}" if n in found else "" for n in names)
        rows.append((escape(group["name"]), str(group["fit"]["n"]), *cells))
    yield f"<h2>The law of each {escape(content.by)}</h2><p>{formula_html(fitted[0]['fit']['formula'])}</p>"
    yield html_table((content.by, "trials", *(drawing.GREEK.get(name, name) for name in names)), rows)
    if told := [f"{group['name']}: {group['reason']}" for group in content.groups if group["reason"]]:
        yield f'<p class="note">Not fitted: {escape("; ".join(told))}.</p>'


def counts(content: Content) -> Iterator[Block]:
    """The exponents under every count of N and C that the ledger has."""
    found = (content.fit or {}).get("conventions", [])
    names = list(dict.fromkeys(name for one in found for name in one["exponents"]))
    rows = []
    for one in found:
        ends = [one["exponents"].get(name) for name in names]
        cells = (f"{number(e[0], 3)} {interval(e[1:], lambda v: number(v, 3))}" if e else "" for e in ends)
        rows.append((escape(one["count"]), *cells))
    if rows:
        yield "<h2>Exponents under each count</h2>"
        heads = ("N* ~ C^a" if name == "a" else drawing.GREEK.get(name, name) for name in names)
        yield html_table(("N and C counted as", *heads), rows)


def minima(content: Content) -> Iterator[Block]:
    """The best size of each budget."""
    rows = []
    for m in content.isoflop:
        ends = interval(m.get("N_opt_interval"), count)
        place = f"at the {escape(m['edge'])} edge of the sizes tried" if m.get("edge") else "inside"
        n, d = m.get("N_opt"), m.get("D_opt")
        per = number(d / n, 3) if n and d else "–"
        rows.append((number(m["budget"], 3), count(n), ends, count(d), per, loss_text(m.get("loss_opt")), place))
    if rows:
        yield "<h2>Minima of the isoFLOP curves</h2>"
        yield html_table(("C (FLOPs)", "N*", "interval", "D*", "D*/N*", "loss (nats/token)", "minimum"), rows)


def state(t: dict[str, Any]) -> str:
    """The status of a trial, with the reason where it failed."""
    reason = f'<span class="reason">{escape(str(t["reason"]))}</span>' if t.get("reason") else ""
    return escape(str(t["status"])) + reason


def per_parameter(t: dict[str, Any]) -> float | None:
    """D / N of a trial."""
    n, d = t.get("N_params"), t.get("D_tokens")
    return d / n if n and d else None


def measured(t: dict[str, Any]) -> str:
    """The loss of a trial ± its standard error."""
    return loss_text(t.get("loss")) + (f" ± {loss_text(t['loss_se'])}" if is_number(t.get("loss_se")) else "")


Column = tuple[Callable[[dict[str, Any]], Any] | None, Callable[[dict[str, Any]], str]]


def plain(name: str, text: Callable[[Any], str]) -> Column:
    """A column that shows one number of the ledger, and sorts by it."""
    return lambda t: t.get(name), lambda t: text(t.get(name))


TRIAL_COLUMNS: dict[str, Column] = {
    "trial": (None, lambda t: f"<code>{escape(str(t['id']))}</code>"),
    "status": (None, state),
    "depth": plain("depth", number),
    "N": plain("N_params", count),
    "N non-emb.": plain("N_non_embedding", count),
    "D": plain("D_tokens", count),
    "D/N": (per_parameter, lambda t: number(per_parameter(t), 3)),
    "C = 6ND": plain("C_flops", lambda v: number(v, 3)),
    "loss": (lambda t: t.get("loss"), measured),
    "bits/byte": plain("bits_per_byte", loss_text),
    "epochs": plain("epochs", lambda v: number(v, 3)),
    "batch": plain("tokens_per_step", count),
    "peak LR": plain("peak_lr", lambda v: number(v, 3)),
    "steps": plain("num_steps", lambda v: number(v, 9)),
    "tokens/s": plain("tokens_per_second", count),
    "time": plain("seconds", duration),
    "goodput": plain("goodput", lambda v: "" if v is None else f"{100 * v:.0f} %"),
    "attempts": plain("attempts", lambda v: number(v, 9)),
    "from trunk": (
        lambda t: t.get("first_step"),
        lambda t: f"{number(t['first_step'], 9)} steps" if t.get("first_step") else "",
    ),
}
"""Name -> (what to sort by, None for the text itself; the cell)."""


def trials(content: Content) -> Iterator[Block]:
    """Every trial, those that failed with their reason."""
    if not content.trials:
        return
    order = sorted(content.trials, key=lambda t: (t.get("budget") or 0, t.get("N_params") or 0, t["id"]))
    rows = [[Cell(text(t), value(t)) if value else text(t) for value, text in TRIAL_COLUMNS.values()] for t in order]
    attributes = [{"class": str(t["status"]), "data-trial": " ".join(str(t["id"]).split())} for t in order]
    yield "<h2>Trials</h2>"
    yield html_table(TRIAL_COLUMNS, rows, attributes, "trials sortable")
    note = "N: total parameters, tied embedding counted once; C in FLOPs; batch in tokens; "
    note += "loss in nats per token on the held-out set, ± the standard error of the evaluation."
    yield f'<p class="note">{note}</p>'


def where_time_went(content: Content) -> Iterator[Block]:
    """Goodput of the run, and what the rest of its time was."""
    time = goodput.total(t.get("time") or {} for t in content.trials)
    if not (wall := sum(time.values())):
        return
    rows = [(goodput.PHASES[phase], duration(s), f"{100 * s / wall:.1f} %") for phase, s in time.items()]
    yield f"<h2>Where the time went</h2><p>Goodput {100 * (goodput.share(time) or 0):.1f} %.</p>"
    yield html_table(("phase", "time", "share"), rows)
    note = "Wall time of all trials, one beside another counted twice, from the first attempt at each to its end."
    yield f'<p class="note">{note}</p>'


def misfitting(content: Content) -> Iterator[Block]:
    """The checklist for studies of scaling laws, as far as the run can fill it in."""
    found = checklist.answers(
        fit=content.fit,
        trials=content.trials,
        setup=content.setup,
        forecast=content.forecast,
        verify=content.verify,
        facts=content.facts,
    )
    known = sum(one.answer is not None for one in found)
    yield '<h2 id="checklist">Checklist of «(Mis)Fitting: A Survey of Scaling Laws»</h2>'
    yield f'<p class="note">Li, Kudugunta and Zettlemoyer 2025, arXiv:2502.18969. Filled in from the run: {known} of {len(found)}.</p>'
    parts = []
    for part, group in itertools.groupby(found, key=lambda one: one.part):
        lines = "".join(f"<dt>{escape(one.question)}</dt><dd>{one.answer or NOT_KNOWN}</dd>" for one in group)
        parts.append(f'<div class="part"><h3>{escape(part)}</h3><dl class="facts">{lines}</dl></div>')
    yield f'<div class="checklist">{"".join(parts)}</div>'


NOT_KNOWN = '<span class="unknown">not known</span>'


def provenance(content: Content) -> Iterator[Block]:
    """Where the numbers come from: data, versions, hardware, hashes."""
    facts, registered = dict(content.facts), content.forecast or {}
    for name, label in (("config_fingerprint", "config"), ("git", "git commit"), ("ledger_sha256", "ledger SHA-256")):
        if registered.get(name):
            facts[f"{label} at the forecast"] = str(registered[name])
    if facts:
        items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
        yield f'<h2>Provenance</h2><dl class="facts">{items}</dl>'


def save(plot: Plot, shelf: Path) -> str:
    """Write the figure's three files and return its place in the page."""
    picture = drawing.svg(plot)
    (shelf / f"{plot.name}.svg").write_text(picture, encoding="utf-8")
    (shelf / f"{plot.name}.png").write_bytes(drawing.png(plot))
    (shelf / f"{plot.name}.csv").write_text(tables.csv_text(plot.rows), encoding="utf-8")
    return card(plot, picture)


SECTIONS: tuple[Section, ...] = (
    heading,
    verdict,
    warnings,
    plots,
    law,
    side_by_side,
    minima,
    counts,
    trials,
    where_time_went,
    provenance,
    misfitting,
)


def write(content: Content, folder: Path) -> Path:
    """Write folder/report.html and folder/figures/NAME.{png,svg,csv}; return the path of the page.

    The same content gives the same bytes. The page holds its figures inside and asks nothing of a network.
    """
    with drawing.style():
        blocks = [block for section in SECTIONS for block in section(content)]
    shelf = folder / "figures"
    shelf.mkdir(parents=True, exist_ok=True)
    body = []
    with progress("report", len(blocks), " parts") as update:
        for is_text, group in itertools.groupby(enumerate(blocks), key=lambda item: isinstance(item[1], str)):
            parts = []
            for i, block in group:
                parts.append(block if isinstance(block, str) else save(block, shelf))
                update(i + 1, "")
            html = "\n".join(parts)
            body.append(html if is_text else f'<div class="figures">{html}</div>')
    path = folder / "report.html"
    files.write_atomic(path, PAGE.format(title=escape(content.title), css=CSS, script=SCRIPT, body="\n".join(body)))
    return path
