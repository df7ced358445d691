"""Marks of a figure that say what they are: as a title in the SVG, and in the page under the pointer.

A mark's text travels through matplotlib as a link, the one thing it writes for each point of a scatter, and `mark` turns
the links into titled groups. Without JavaScript a browser shows the titles; with it SCRIPT shows them at once, under a
mouse, a finger or the arrow keys, and lights up the same trial in every figure and in the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import Any
from urllib.parse import quote, unquote

LINK = "tip:"


def tell(artist: Any, tips: Iterable[tuple[str, str]]) -> None:
    """Give each point of a scatter its tip: (id of a trial or "", text)."""
    artist.set_urls([f"{LINK}{quote(trial, safe='')},{quote(text, safe='')}" for trial, text in tips])


def mark(svg: str) -> str:
    """<a href="tip:ID,TEXT"> around a mark -> <g class="tip" data-trial="ID"><title>TEXT</title>."""

    def group(match: re.Match[str]) -> str:
        trial, text = (escape(unquote(part)) for part in match.group(1, 2))
        trial = f' data-trial="{trial}"' if trial else ""
        return f'<g class="tip"{trial}><title>{text}</title>{match[3]}</g>'

    return re.sub(rf'<a [^>]*xlink:href="{LINK}([^",]*),([^"]*)"[^>]*>(.*?)</a>', group, svg, flags=re.DOTALL)


SCRIPT = r"""
(() => {
"use strict";
const REACH = 24; // pixels around a mark that count as on it
const box = document.createElement("div");
box.className = "tip-box";
box.setAttribute("role", "status");
box.hidden = true;
document.body.append(box);
let shown = null;
const same = (mark) => mark.dataset.trial
  ? document.querySelectorAll(`[data-trial="${CSS.escape(mark.dataset.trial)}"]`) : [mark];
const middle = (mark) => {
  const r = mark.getBoundingClientRect();
  return [r.left + r.width / 2, r.top + r.height / 2];
};
const hide = () => {
  if (shown) for (const each of same(shown)) each.classList.remove("on");
  shown = null;
  box.hidden = true;
};
const show = (mark) => {
  if (mark === shown) return;
  hide();
  if (!mark) return;
  const [x, y] = middle(mark);
  shown = mark;
  for (const each of same(mark)) each.classList.add("on");
  box.textContent = mark.getAttribute("aria-label");
  box.hidden = false;
  const width = document.documentElement.clientWidth, above = y - 14 - box.offsetHeight;
  box.style.left = Math.max(6, Math.min(x - box.offsetWidth / 2, width - box.offsetWidth - 6)) + scrollX + "px";
  box.style.top = (above < 6 ? y + 14 : above) + scrollY + "px";
};
for (const svg of document.querySelectorAll(".paper svg")) {
  const marks = [...svg.querySelectorAll(".tip")];
  if (!marks.length) continue;
  svg.setAttribute("role", "group");
  const focus = (i) => {
    for (const each of marks) each.setAttribute("tabindex", -1);
    marks[i].setAttribute("tabindex", 0);
    marks[i].focus();
  };
  marks.forEach((mark, i) => {
    const title = mark.querySelector("title");
    mark.setAttribute("aria-label", title.textContent);
    title.remove(); // or the browser would show it too
    mark.setAttribute("role", "img");
    mark.setAttribute("tabindex", i ? -1 : 0); // one stop a figure; the arrows do the rest
    mark.addEventListener("focus", () => show(mark));
    mark.addEventListener("blur", hide);
    mark.addEventListener("keydown", (event) => {
      const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      focus((i + step + marks.length) % marks.length);
    });
  });
  const point = (event) => {
    let best = null, least = REACH;
    for (const mark of marks) {
      const [x, y] = middle(mark), away = Math.hypot(x - event.clientX, y - event.clientY);
      if (away <= least) [best, least] = [mark, away];
    }
    show(best);
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
}
document.addEventListener("pointerdown", (event) => event.target.closest(".paper svg") || hide());
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    const key = (row) => {
      const cell = row.cells[column];
      if (!("value" in cell.dataset)) return cell.textContent;
      return cell.dataset.value === "" ? null : Number(cell.dataset.value);
    };
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const each of heads) each.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => { // what is missing comes last, whichever the direction
        if (a === null || b === null) return (a === null) - (b === null);
        return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en"));
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}
})();
"""

CSS = """
.tip-box{position:absolute;z-index:9;max-width:min(22em,calc(100vw - 12px));padding:7px 11px;pointer-events:none;
white-space:pre-line;background:var(--ink);color:var(--page);border-radius:7px;
font-size:13px;line-height:1.4;font-variant-numeric:tabular-nums;box-shadow:0 2px 10px #0004}
.tip-box::first-line{font-weight:600}
.tip{transform-box:fill-box;transform-origin:center}
.tip.on{transform:scale(1.7);filter:drop-shadow(0 0 1px #000)}
.tip:focus{outline:none}
tr.on td{background:var(--on)}
th button{all:unset;cursor:pointer;padding:6px 12px;margin:-6px -12px}
th button:hover{color:var(--ink)}
th button:focus-visible{outline:2px solid var(--link);outline-offset:-4px;border-radius:6px}
th[aria-sort]{color:var(--ink)}
th[aria-sort] button::after{content:" ↑"}
th[aria-sort=descending] button::after{content:" ↓"}
@media print{.tip-box{display:none}.tip.on{transform:none;filter:none}tr.on td{background:none}}
"""
