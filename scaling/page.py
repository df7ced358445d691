"""What a report's page is made of: numbers as HTML, tiles, tables, figures, and the page around them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any, NamedTuple

from scaling import interactive
from scaling.drawing import GREEK, Plot, eng, is_number


def number(value: Any, digits: int = 4) -> str:
    """Significant digits as HTML: 1.234, or 1.2×10<sup>-5</sup> where plain would be long; a dash for no number."""
    if not is_number(value):
        return "∞" if value == math.inf else "−∞" if value == -math.inf else "–"
    plain = f"{value:.{digits}g}"
    if "e" not in plain:
        return plain.replace("-", "−")
    mantissa, exponent = plain.split("e")
    return f"{'' if mantissa == '1' else mantissa + '×'}10<sup>{int(exponent)}</sup>".replace("-", "−")


def count(value: Any) -> str:
    """4254208 -> 4.25M."""
    return eng(value) if is_number(value) else number(value)


def interval(ends: Any, text: Callable[[Any], str] = number, none: str = "–") -> str:
    """[low, high] as `text` writes numbers, with a sign of infinity for an end that is None; `none` where both are."""
    low, high = ends or (None, None)
    if low is None and high is None:
        return none
    return f"[{'−∞' if low is None else text(low)}, {'∞' if high is None else text(high)}]"


def loss_text(value: Any) -> str:
    """Nats per token to four decimals; a dash for no number."""
    return f"{value:.4f}" if is_number(value) else "–"


def percent(fraction: float) -> str:
    """0.0032 -> +0.32 %."""
    return f"{100 * fraction:+.2f} %".replace("-", "−")


def duration(seconds: Any) -> str:
    """45.0 s, 12 min, or 3 h 05 min; a dash for no number."""
    if not is_number(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def symbol(name: str) -> str:
    """alpha -> an italic α."""
    return f"<i>{escape(GREEK.get(name, name))}</i>"


def formula_html(formula: str, parameters: dict[str, Any] | None = None) -> str:
    """L = E + A / N^alpha as HTML: letters in italics, powers raised, numbers for the parameters that are given."""

    def word(match: re.Match[str]) -> str:
        name = match[2]
        given = parameters and parameters.get(name)
        shown = number(given["value"]) if given else symbol(name)
        return f"<sup>{shown}</sup>" if match[1] else shown

    text = re.sub(r"(\^?)\b([A-Za-z]\w*)\b", word, escape(formula))
    return re.sub(r"\s*/\s*", "\u2009/\u2009", text.replace("</", "\0")).replace("\0", "</").replace("+ −", "− ")


# Pieces


def tile(label: str, value: str, note: str, kind: str = "") -> str:
    """One number of the verdict; kind is good, bad, wide or nothing."""
    parts = {"label": label, "value": value, "note": note}
    inside = "".join(f'<p class="{name}">{text}</p>' for name, text in parts.items() if text)
    return f'<div class="tile {kind}">{inside}</div>'


class Cell(NamedTuple):
    """A cell that sorts by a number, None where there is none."""

    html: str
    value: Any


def html_cell(cell: str | Cell) -> str:
    """<td>, with the number it sorts by."""
    if isinstance(cell, str):
        return f"<td>{cell}</td>"
    value = repr(float(cell.value)) if is_number(cell.value) else ""
    return f'<td data-value="{value}">{cell.html}</td>'


def html_attributes(given: Mapping[str, str]) -> str:
    """{"class": "done"} -> ' class="done"'."""
    return "".join(f' {name}="{escape(value)}"' for name, value in given.items())


def html_table(
    head: Iterable[str],
    rows: Iterable[Iterable[str | Cell]],
    attributes: Iterable[Mapping[str, str]] = (),
    name: str = "",
) -> str:
    """Cells are HTML already; `attributes` are of each row. A table wider than the screen scrolls by itself."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    given = itertools.chain(attributes, itertools.repeat({}))
    body = "".join(
        f"<tr{html_attributes(own)}>{''.join(map(html_cell, row))}</tr>" for row, own in zip(rows, given, strict=False)
    )
    return f'<div class="scroll"><table class="{name}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def card(plot: Plot, drawing_svg: str) -> str:
    """A figure in the page. Inside HTML the parser supplies SVG's namespaces, so their addresses are left out."""
    inline = re.sub(r"<\?xml.*?\?>\s*", "", drawing_svg, flags=re.DOTALL)
    inline = re.sub(r"<style.*?</style>", "", inline, flags=re.DOTALL)  # its one rule is in CSS below
    inline = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", inline).replace("xlink:href", "href").replace("base64,\n", "base64,")
    inline = re.sub(r"<svg\b", f'<svg role="img" aria-label="{escape(plot.title)}"', inline, count=1)
    links = " · ".join(f'<a href="figures/{plot.name}.{kind}">{kind.upper()}</a>' for kind in ("png", "svg", "csv"))
    caption = f"<b>{escape(plot.title)}.</b> {escape(plot.caption)}"
    caption = f'<figcaption>{caption} <span class="links">{links}</span></figcaption>'
    kind = "card both" if plot.wide else "card"
    return f'<figure class="{kind}" id="figure-{plot.name}"><div class="paper">{inline.strip()}</div>{caption}</figure>'


CSS = """
:root{color-scheme:light dark;--page:#fbfbfa;--ink:#1c1c1e;--soft:#63636b;--line:#e3e3e0;--tile:#fff;--link:#0b5cad;
--on:#fff3c4;--good:#0a7d50;--bad:#b3261e;--warn:#8a5a00;--warn-page:#fff6e0;--warn-line:#edd294}
@media (prefers-color-scheme:dark){:root{
--page:#141416;--ink:#ececee;--soft:#a2a2ab;--line:#323238;--tile:#1d1d21;--link:#7db7f5;
--on:#4a3f14;--good:#57cf9d;--bad:#ff8a80;--warn:#f2c665;--warn-page:#2a2415;--warn-line:#5b4a1e}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 20px 64px}
h1{font-size:30px;line-height:1.2;margin:0 0 8px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:20px;margin:40px 0 12px}
h3{font-size:15px;margin:20px 0 8px}
p{margin:0 0 12px}
a{color:var(--link)}
.lead{font-size:18px;color:var(--soft);max-width:48em}
.doc{white-space:pre-wrap;overflow-wrap:anywhere;color:var(--soft);margin:0 0 16px;
font:13px/1.5 ui-monospace,Menlo,Consolas,monospace}
.note,.label,.links,figcaption{font-size:14px;color:var(--soft)}
.tiles{display:flex;flex-wrap:wrap;gap:16px;margin:24px 0 0}
.tile{flex:1 1 260px;min-width:0;padding:14px 16px;
background:var(--tile);border:1px solid var(--line);border-top-width:3px;border-radius:10px}
.tile p{margin:0}
.tile .value{font-size:24px;line-height:1.35;font-variant-numeric:tabular-nums;margin:2px 0 4px}
.tile .interval{font-size:17px;color:var(--soft);white-space:nowrap}
.tile.wide{flex:3 1 560px}
.whole,time{white-space:nowrap}
.good{border-top-color:var(--good)}.good b{color:var(--good)}
.bad{border-top-color:var(--bad)}.bad b{color:var(--bad)}
.formula{font-family:"STIX Two Text","Times New Roman",Georgia,serif;line-height:1.6}
sup{font-size:.68em;line-height:0}
.warnings{background:var(--warn-page);border:1px solid var(--warn-line);border-radius:10px;
padding:12px 18px;margin:24px 0 0}
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
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:10px;background:var(--tile);
width:fit-content;max-width:100%;margin:0 0 12px}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft)}
th:first-child,td:first-child,th:last-child,td:last-child{text-align:left}
tbody tr:last-child td{border-bottom:0}
tr.failed td{color:var(--bad)}tr.running td{color:var(--soft)}
td .reason{display:block;white-space:normal;width:15em}
.trials th:nth-child(2),.trials td:nth-child(2){text-align:left}
code{font:12.5px ui-monospace,Menlo,Consolas,monospace}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:4px 20px;margin:0;font-size:14px}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.checklist .facts{grid-template-columns:15em 1fr}
.unknown{color:var(--warn);font-style:italic}
@media (max-width:760px){
main{padding:24px 14px 48px}h1{font-size:25px}.figures{grid-template-columns:1fr}
.tile.wide{flex-basis:260px}.both svg{min-width:640px}.paper{padding:8px}
.facts,.checklist .facts{grid-template-columns:1fr}dd{margin-bottom:8px}}
@media print{.links{display:none}.card,.tile,.part{break-inside:avoid}h2,h3{break-after:avoid}
main{max-width:none;padding:0}.scroll{overflow:visible;border:0}.trials{font-size:6.5pt}.trials code{font-size:6pt}
.trials th,.trials td{padding:2px 3px}th button{padding:0;margin:0}}
"""
CSS = interactive.CSS + CSS

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""
