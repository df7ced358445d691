"""Points that say what they are: in the markup always, and in a browser where one is installed."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from xml.etree import ElementTree

import numpy as np
import pytest
from test_report import make_content

from scaling import drawing, report
from scaling.drawing import Plot

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def content():
    return make_content()


@pytest.fixture(scope="module")
def page(content, tmp_path_factory):
    return report.write(content, tmp_path_factory.mktemp("report")).read_text(encoding="utf-8")


def test_every_point_of_a_trial_says_which_trial_it_is(content, page):
    """A point that names its neighbour is worse than one that says nothing."""
    done = {t["id"]: t for t in content.trials if t["status"] == "done"}
    for name in ("isoflop", "frontier", "surface", "residuals", "law"):
        figure = page[page.index(f'id="figure-{name}"') :]
        figure = figure[: figure.index("</figure>")]
        told = re.findall(r'<g class="tip" data-trial="(\w+)"><title>([^<]*)</title>', figure)
        assert sorted(trial for trial, _ in told) == sorted(list(done) * (2 if name == "law" else 1))
        for trial, text in told:
            t = done[trial]
            lines = text.split("\n")
            assert lines[0] == trial
            assert lines[1] == f"N = {drawing.eng(t['N_params'])}, D = {drawing.eng(t['D_tokens'])}"
            assert lines[3] == f"loss {t['loss']:.4f} ± {t['loss_se']:.4f}"
    rows = re.findall(r'<tr class="\w+" data-trial="(\w+)">', page)
    assert sorted(rows) == sorted(t["id"] for t in content.trials)


def test_a_tip_stands_at_its_own_point_though_others_are_missing():
    """Matplotlib leaves out points that are not finite; the tips after them must not slip."""
    with drawing.style():
        figure, (axes,) = drawing.new_figure()
        x = np.array([1.0, np.nan, 3.0, 2.0])
        drawing.dots(axes, x, np.ones(4), ["r", "g", "b", "k"], [(str(i), f"point {i}") for i in range(4)])
        svg = drawing.svg(Plot("one", "", "", figure, []))
    found = re.findall(r'data-trial="(\d)"><title>point (\d)</title>.*?<use [^>]*?x="([\d.]+)"', svg, flags=re.DOTALL)
    assert [(a, b) for a, b, _ in found] == [("0", "0"), ("2", "2"), ("3", "3")]
    at = [float(x) for _, _, x in found]
    assert at[0] < at[2] < at[1]


@pytest.mark.parametrize("hostile", ['"><script>alert(1)</script>', "a'b\"c,d%20e\n<f>&amp;", "кривая № 1"])
def test_a_tip_is_text_whatever_it_holds(hostile):
    with drawing.style():
        figure, (axes,) = drawing.new_figure()
        drawing.dots(axes, [1.0, 2.0], np.ones(2), ["r", "g"], [(hostile, hostile), ("b", "b")])
        svg = drawing.svg(Plot("one", "", "", figure, []))
    ElementTree.fromstring(svg)
    assert "<script>" not in svg
    assert f"<title>{escape(hostile)}</title>" in svg
    assert "tip:" not in svg


def test_cells_sort_by_their_numbers_and_not_by_their_text(content, page):
    """As text 9.8M comes after 12M, and 6×10^15 before 3×10^14."""
    (table,) = re.findall(r'<table class="trials sortable">.*?</table>', page, flags=re.DOTALL)
    head = re.findall(r"<th>(.*?)</th>", table)
    by_id = {t["id"]: t for t in content.trials}
    names = {"N": "N_params", "D": "D_tokens", "C = 6ND": "C_flops", "loss": "loss", "time": "seconds"}
    for trial, row in re.findall(r'<tr class="\w+" data-trial="(\w+)">(.*?)</tr>', table, flags=re.DOTALL):
        cells = re.findall(r'<td(?: data-value="([^"]*)")?>', row)
        for shown, name in names.items():
            value = by_id[trial][name]
            assert cells[head.index(shown)] == ("" if value is None else repr(float(value)))


PROBE = """<script>
const out = {}, svg = document.querySelector(".paper svg"), box = document.querySelector(".tip-box");
const mark = svg.querySelectorAll(".tip")[2], at = mark.getBoundingClientRect();
const point = (type, away) => svg.dispatchEvent(new PointerEvent(type, {
  clientX: at.left + at.width / 2 + away, clientY: at.top + at.height / 2, pointerType: "mouse", bubbles: true}));
out.stops = svg.querySelectorAll('.tip[tabindex="0"]').length;
point("pointermove", 1);
out.hover = [box.hidden, box.textContent, mark.getAttribute("aria-label"), document.querySelector("tr.on").dataset.trial];
point("pointerleave", 0);
out.left = box.hidden;
svg.querySelector('.tip[tabindex="0"]').focus();
const first = box.textContent;
document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
out.keys = [first, box.textContent, ...[...svg.querySelectorAll(".tip")].slice(0, 2).map(m => m.getAttribute("aria-label"))];
const table = document.querySelector("table.sortable"), heads = [...table.tHead.rows[0].cells];
const loss = heads.findIndex(h => h.textContent === "loss"), button = heads[loss].querySelector("button");
const column = () => [...table.tBodies[0].rows].map(r => r.cells[loss].dataset.value);
button.click(); out.up = column(); button.click(); out.down = column();
const pre = document.createElement("pre"); pre.id = "probe"; pre.textContent = JSON.stringify(out); document.body.append(pre);
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="needs Chromium or Chrome on the PATH")
def test_in_a_browser_points_answer_and_the_table_sorts(page, tmp_path):
    """Pointer, keyboard and table as a reader uses them; markup alone cannot show that the script runs."""
    path = tmp_path / "probe.html"
    path.write_text(page.replace("</body>", PROBE), encoding="utf-8")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        "--dump-dom",
    ]
    dom = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=300, check=True).stdout
    (found,) = re.findall(r'<pre id="probe">(.*?)</pre>', dom, flags=re.DOTALL)
    out = json.loads(unescape(found))
    hidden, told, label, row = out["hover"]
    assert (hidden, told) == (False, label)
    assert told.split("\n")[0] == row
    assert out["left"] is True
    assert out["stops"] == 1  # one stop of the tab key a figure
    assert out["keys"][:2] == out["keys"][2:]
    up, down = ([float(v) for v in out[k] if v] for k in ("up", "down"))
    assert up == sorted(up) and down == up[::-1] and len(up) == 14
    assert out["up"][-1] == out["down"][-1] == ""  # the trial without a loss is last either way
