"""report.html: one self-contained page on a scaling experiment, and its figures as SVG, PNG and CSV.

A report is a list of sections. A section is a function of the Content that yields blocks, each a piece of HTML or a Plot;
one whose data are missing yields nothing. To add to a report, add to SECTIONS.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from scaling import drawing, figures
from scaling.drawing import Plot, eng, is_number


@dataclass(frozen=True)
class Content:
    """Everything a report shows; None or empty where a step has not been run."""

    title: str
    """The experiment's name."""
    docstring: str
    """The experiment file's own description."""
    trials: list[dict[str, Any]]
    """Rows of the ledger: id, status (done, failed, running), depth, N_params, N_non_embedding, D_tokens, C_flops (= 6ND),
    budget, epochs, tokens_per_step, peak_lr, num_steps, loss, loss_se, bits_per_byte, seconds, tokens_per_second, reason, trunk."""
    curves: dict[str, dict[str, list[float]]]
    """Trial id -> tokens, loss (training, nats a token), and perhaps eval_tokens, eval_loss."""
    fit: dict[str, Any] | None
    """law, formula, n, objective {name, value}, parameters {NAME: {value, interval [low, high] or None, unbounded}}, warnings."""
    isoflop: list[dict[str, Any]]
    """Per budget: budget, coefficients [c2, c1, c0] of loss in ln N, N_opt, N_opt_interval, D_opt, loss_opt, edge (None, low, high)."""
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


Block = str | Plot
Section = Callable[[Content], Iterable[Block]]


# Text


def number(value: Any, digits: int = 4) -> str:
    """Significant digits as HTML: 1.234, or 1.234×10<sup>5</sup> where a plain number would be long; a dash where there is none."""
    if not is_number(value):
        return "–"
    plain = f"{value:.{digits}g}"
    if "e" not in plain:
        return plain.replace("-", "−")
    mantissa, exponent = plain.split("e")
    return f"{mantissa}×10<sup>{int(exponent)}</sup>".replace("-", "−")


def loss_text(value: Any) -> str:
    return f"{value:.4f}" if is_number(value) else "–"


def percent(fraction: float) -> str:
    return f"{100 * fraction:+.2f} %".replace("-", "−")


def duration(seconds: Any) -> str:
    if not is_number(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


GREEK = {"alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "kappa": "κ", "epsilon": "ε", "lambda": "λ", "sigma": "σ"}


def formula_html(formula: str, parameters: dict[str, Any] | None = None) -> str:
    """L = E + A / N^alpha as HTML: letters in italics, powers raised, and numbers for parameters where they are given."""

    def word(match: re.Match[str]) -> str:
        name = match[2]
        if parameters and name in parameters:
            shown = number(parameters[name]["value"])
        else:
            shown = f"<i>{GREEK.get(name, name)}</i>"
        return f"<sup>{shown}</sup>" if match[1] else shown

    text = re.sub(r"(\^?)\b([A-Za-z]\w*)\b", word, escape(formula))
    return re.sub(r"\s*/\s*", "\u2009/\u2009", text.replace("</", "\0")).replace("\0", "</").replace("+ −", "− ")


# Sections


def heading(content: Content) -> Iterator[Block]:
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


def tile(label: str, value: str, note: str, kind: str = "") -> str:
    return f'<div class="tile {kind}"><p class="label">{label}</p><p class="value">{value}</p><p class="note">{note}</p></div>'


def tile_trials(content: Content) -> str:
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
    value = f'<span class="formula">{formula_html(fit["formula"], fit["parameters"])}</span>'
    note = f"Law “{escape(fit['law'])}” on {fit['n']} trials; intervals below. <i>L</i> in nats per token, <i>N</i> total parameters."
    return tile("Fitted law", value, note, "wide")


def tile_forecast(forecast: dict[str, Any]) -> str:
    target, prediction = forecast["target"], forecast["prediction"]
    low, high = prediction["interval"]
    note = f"{100 * prediction['level']:g} % interval, registered {escape(str(forecast['registered_at']))} for "
    note += f"<i>N</i> = {eng(target['N'])}, <i>D</i> = {eng(target['D'])}, <i>C</i> = {number(target['C'], 3)} FLOPs"
    value = f'{loss_text(prediction["loss"])} <span class="interval">[{loss_text(low)}, {loss_text(high)}]</span>'
    return tile("Forecast, nats per token", value, note)


def tile_measured(forecast: dict[str, Any], verify: dict[str, Any] | None) -> str:
    if not verify:
        return tile("Measured", "not yet", "The target has not been trained.")
    error = verify.get("standard_error")
    value = loss_text(verify["measured"]) + (f' <span class="interval">± {loss_text(error)}</span>' if is_number(error) else "")
    level = f"{100 * forecast['prediction']['level']:g} %"
    place = "Inside" if verify["inside"] else "Outside"
    mark = "✓" if verify["inside"] else "✗"
    note = f"<b>{mark} {place} the {level} interval</b>; relative error {percent(verify['error_relative'])}"
    return tile("Measured, nats per token", value, note, "good" if verify["inside"] else "bad")


def warnings(content: Content) -> Iterator[Block]:
    told = [*content.warnings, *(content.fit or {}).get("warnings", ())]
    told = list(dict.fromkeys(told))
    if told:
        items = "".join(f"<li>{escape(w)}</li>" for w in told)
        yield f'<div class="warnings"><h2>Warnings</h2><ul>{items}</ul></div>'


def plots(content: Content) -> Iterator[Block]:
    """The seven figures, each where its data are there."""
    told = figures.outcome(content.forecast, content.verify)
    predict = figures.predictor(content.fit)
    drawn = (
        figures.isoflop(content.trials, content.isoflop, told, predict),
        figures.frontier(content.trials, content.bands, told),
        figures.law_panels(content.trials, content.fit, predict, told, content.entropy),
        figures.optimum(content.bands, content.isoflop, told),
        figures.learning_curves(content.trials, content.curves),
        figures.residuals(content.trials, predict, told),
    )
    found = [plot for plot in drawn if plot]
    if found:
        yield "<h2>Figures</h2>"
        yield from found


def law(content: Content) -> Iterator[Block]:
    """The fitted parameters, an interval with every number."""
    fit = content.fit
    if not fit:
        return
    rows = []
    for name, p in fit["parameters"].items():
        low, high = p.get("interval") or (None, None)
        shown = f"[{number(low)}, {number(high)}]" if is_number(low) or is_number(high) else "none"
        if p.get("unbounded"):
            shown += " <b>the data do not bound it</b>"
        rows.append((f"<i>{escape(GREEK.get(name, name))}</i>", number(p["value"]), shown))
    yield f"<h2>Fitted law</h2><p>{formula_html(fit['formula'])}</p>"
    if content.entropy is not None:
        yield f"<p>The true entropy of the source is {number(content.entropy)} nats per token; <i>E</i> should find it.</p>"
    yield html_table(("parameter", "value", "interval"), rows)
    objective = fit["objective"]
    yield f'<p class="note">Objective {escape(str(objective["name"]))} = {number(objective["value"])} over {fit["n"]} trials.</p>'


def minima(content: Content) -> Iterator[Block]:
    """The best size of each budget."""
    rows = []
    for m in content.isoflop:
        low, high = m.get("N_opt_interval") or (None, None)
        interval = f"[{eng(low)}, {eng(high)}]" if is_number(low) and is_number(high) else "–"
        known = is_number(m.get("N_opt"))
        place = f"at the {escape(m['edge'])} edge of the sizes tried" if m.get("edge") else "inside"
        size, tokens = (eng(m["N_opt"]), eng(m["D_opt"])) if known else ("–", "–")
        per = number(m["D_opt"] / m["N_opt"], 3) if known else "–"
        rows.append((number(m["budget"], 3), size, interval, tokens, per, loss_text(m.get("loss_opt")), place))
    if rows:
        yield "<h2>Minima of the isoFLOP curves</h2>"
        yield html_table(("C (FLOPs)", "N*", "interval", "D*", "D*/N*", "loss (nats/token)", "minimum"), rows)


def trials(content: Content) -> Iterator[Block]:
    """Every trial, those that failed with their reason."""
    if not content.trials:
        return
    names = "trial,status,depth,N,N non-emb.,D,D/N,C = 6ND,epochs,batch,peak LR,steps,loss,bits/byte,tokens/s,time,remarks"
    rows, kinds = [], []
    for t in sorted(content.trials, key=lambda t: (t.get("budget") or 0, t.get("N_params") or 0, t["id"])):
        n, d = t.get("N_params"), t.get("D_tokens")
        size, non_embedding, tokens = (eng(v) if is_number(v) else "–" for v in (n, t.get("N_non_embedding"), d))
        error = f" ± {loss_text(t['loss_se'])}" if is_number(t.get("loss_se")) else ""
        remarks = [str(t.get("reason") or ""), f"trunk {t['trunk']}" if t.get("trunk") else ""]
        batch, speed = (eng(t[k]) if is_number(t.get(k)) else "–" for k in ("tokens_per_step", "tokens_per_second"))
        cells = [f"<code>{escape(str(t['id']))}</code>", escape(str(t["status"])), number(t.get("depth")), size, non_embedding, tokens]
        cells += [number(d / n, 3) if n and d else "–", number(t.get("C_flops"), 3), number(t.get("epochs"), 3), batch]
        cells += [number(t.get("peak_lr"), 3), number(t.get("num_steps"), 9), loss_text(t.get("loss")) + error]
        cells += [loss_text(t.get("bits_per_byte")), speed, duration(t.get("seconds")), escape("; ".join(filter(None, remarks)))]
        rows.append(cells)
        kinds.append(escape(str(t["status"])))
    yield "<h2>Trials</h2>"
    yield html_table(names.split(","), rows, kinds)
    yield '<p class="note">N: total parameters, tied embedding counted once; batch in tokens; loss in nats per token on the held-out set, ± standard error of the evaluation.</p>'


def provenance(content: Content) -> Iterator[Block]:
    facts = dict(content.facts)
    for key, label in (("config_fingerprint", "forecast: config"), ("git", "forecast: git"), ("ledger_sha256", "forecast: ledger SHA-256")):
        if content.forecast and content.forecast.get(key):
            facts.setdefault(label, str(content.forecast[key]))
    if facts:
        items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
        yield f'<h2>Provenance</h2><dl class="facts">{items}</dl>'


SECTIONS: tuple[Section, ...] = (heading, verdict, warnings, plots, law, minima, trials, provenance)


# The page


def html_table(head: Iterable[str], rows: Iterable[Iterable[str]], kinds: Iterable[str] = ()) -> str:
    """Cells are HTML already. A table wider than the screen scrolls by itself."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
        for row, kind in zip(rows, itertools.chain(kinds, itertools.repeat("")), strict=False)
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def card(plot: Plot, drawing_svg: str) -> str:
    """A figure in the page. Inside HTML the parser supplies SVG's namespaces, so their addresses are left out."""
    inline = re.sub(r"<\?xml.*?\?>\s*", "", drawing_svg, flags=re.DOTALL)
    inline = re.sub(r"<style.*?</style>", "", inline, flags=re.DOTALL)  # its one rule is in CSS below
    inline = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", inline).replace("xlink:href", "href")
    inline = re.sub(r"<svg\b", f'<svg role="img" aria-label="{escape(plot.title)}"', inline, count=1)
    links = " · ".join(f'<a href="figures/{plot.name}.{kind}">{kind.upper()}</a>' for kind in ("png", "svg", "csv"))
    caption = f'<figcaption><b>{escape(plot.title)}.</b> {escape(plot.caption)} <span class="links">{links}</span></figcaption>'
    kind = "card both" if plot.wide else "card"
    return f'<figure class="{kind}" id="figure-{plot.name}"><div class="paper">{inline.strip()}</div>{caption}</figure>'


CSS = """
:root{color-scheme:light dark;--page:#fbfbfa;--ink:#1c1c1e;--soft:#63636b;--line:#e3e3e0;--tile:#fff;--link:#0b5cad;
--good:#0a7d50;--bad:#b3261e;--warn:#8a5a00;--warn-page:#fff6e0;--warn-line:#edd294}
@media (prefers-color-scheme:dark){:root{--page:#141416;--ink:#ececee;--soft:#a2a2ab;--line:#323238;--tile:#1d1d21;--link:#7db7f5;
--good:#57cf9d;--bad:#ff8a80;--warn:#f2c665;--warn-page:#2a2415;--warn-line:#5b4a1e}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 20px 64px}
h1{font-size:30px;line-height:1.2;margin:0 0 8px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:20px;margin:40px 0 12px}
p{margin:0 0 12px}
a{color:var(--link)}
.lead{font-size:18px;color:var(--soft);max-width:48em}
.doc{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.5 ui-monospace,Menlo,Consolas,monospace;color:var(--soft);margin:0 0 16px}
.note,.label,.links,figcaption{font-size:14px;color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:16px;margin:24px 0 0}
.tile{background:var(--tile);border:1px solid var(--line);border-radius:10px;padding:14px 16px;border-top:3px solid var(--line)}
.tile p{margin:0}
.tile .value{font-size:24px;line-height:1.35;font-variant-numeric:tabular-nums;margin:2px 0 4px}
.tile .interval{font-size:17px;color:var(--soft);white-space:nowrap}
.tile.wide{grid-column:span 2}
.good{border-top-color:var(--good)}.good b{color:var(--good)}
.bad{border-top-color:var(--bad)}.bad b{color:var(--bad)}
.formula{font-family:"STIX Two Text","Times New Roman",Georgia,serif;line-height:1.6}
sup{font-size:.68em;line-height:0}
.warnings{background:var(--warn-page);border:1px solid var(--warn-line);border-radius:10px;padding:12px 18px;margin:24px 0 0}
.warnings h2{margin:0 0 4px;font-size:16px;color:var(--warn)}
.warnings ul{margin:0;padding-left:20px}
.figures{display:grid;grid-template-columns:1fr 1fr;gap:24px}
.card{margin:0;min-width:0}
.both{grid-column:1/-1}
.paper{background:#fff;border:1px solid var(--line);border-radius:10px;padding:12px;overflow-x:auto}
.paper svg{display:block;width:100%;height:auto}
.paper svg *{stroke-linejoin:round;stroke-linecap:butt}
figcaption{margin:8px 4px 0}
figcaption b{color:var(--ink)}
.links{white-space:nowrap}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:10px;background:var(--tile);width:fit-content;max-width:100%;margin:0 0 12px}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft)}
th:first-child,td:first-child,th:last-child,td:last-child{text-align:left}
tbody tr:last-child td{border-bottom:0}
tr.failed td{color:var(--bad)}tr.running td{color:var(--soft)}
code{font:12.5px ui-monospace,Menlo,Consolas,monospace}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:4px 20px;margin:0;font-size:14px}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media (max-width:760px){main{padding:24px 14px 48px}h1{font-size:25px}.figures{grid-template-columns:1fr}
.tile.wide{grid-column:auto}.both svg{min-width:640px}.paper{padding:8px}.facts{grid-template-columns:1fr}dd{margin-bottom:8px}}
@media print{.links{display:none}.card,.tile{break-inside:avoid}}
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def write(content: Content, folder: Path) -> Path:
    """Write folder/report.html and folder/figures/NAME.{png,svg,csv}; return the path of the page.

    The same content gives the same bytes. The page holds its figures inside and asks nothing of a network.
    """
    with figures.style():
        blocks = [block for section in SECTIONS for block in section(content)]
    shelf = folder / "figures"
    shelf.mkdir(parents=True, exist_ok=True)
    body = []
    for is_plot, group in itertools.groupby(blocks, key=lambda block: isinstance(block, Plot)):
        if not is_plot:
            body += list(group)
            continue
        cards = []
        for plot in group:
            picture = drawing.svg(plot)
            (shelf / f"{plot.name}.svg").write_text(picture, encoding="utf-8")
            (shelf / f"{plot.name}.png").write_bytes(drawing.png(plot))
            (shelf / f"{plot.name}.csv").write_text(drawing.table(plot), encoding="utf-8")
            cards.append(card(plot, picture))
        body.append(f'<div class="figures">{"".join(cards)}</div>')
    path = folder / "report.html"
    path.write_text(PAGE.format(title=escape(content.title), css=CSS, body="\n".join(body)), encoding="utf-8")
    return path
