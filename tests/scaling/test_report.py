"""The report: one page that says what was measured, and nothing that was not."""

import csv
import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from simulated import chinchilla

from scaling import allocation_figures, drawing, figures, report

PARAMETERS = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
BUDGETS = (1e15, 3e15, 1e16)
TARGET = 1e17
NAMES = ("isoflop", "frontier", "surface", "law", "curves", "residuals", "profiles", "corner")
VOID = {"meta", "br", "hr", "img", "link", "input"}


def law(n, d):
    return chinchilla(n, d, PARAMETERS)


def best_size(c):
    """Hoffmann et al. 2022, eq. 4."""
    p = PARAMETERS
    g = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
    return g * (c / 6) ** (p["beta"] / (p["alpha"] + p["beta"]))


def make_trials(rng):
    trials = []
    for budget in BUDGETS:
        for depth, share in enumerate((0.28, 0.53, 1.0, 1.9, 3.6), start=3):
            n = round(best_size(budget) * share)
            d = round(budget / (6 * n))
            se = 0.006
            trials.append(
                {
                    "id": rng.bytes(6).hex(), "status": "done", "depth": depth, "N_params": n, "D_tokens": d,
                    "N_non_embedding": n - 500_000, "C_flops": 6.0 * n * d, "budget": budget, "epochs": d / 2e8,
                    "tokens_per_step": 65_536, "peak_lr": 3e-3 / depth, "num_steps": d // 65_536, "loss_se": se,
                    "loss": law(n, d) + rng.normal(0, se), "bits_per_byte": 1.21, "seconds": d / 4e5,
                    "tokens_per_second": 4e5, "reason": "", "first_step": 0,
                }
            )  # fmt: skip
    return trials


def make_isoflop(trials):
    found = []
    for budget in BUDGETS:
        at = [t for t in trials if t["budget"] == budget]
        c2, c1, c0 = np.polyfit([np.log(t["N_params"]) for t in at], [t["loss"] for t in at], 2)
        n = float(np.exp(-c1 / (2 * c2)))
        row = {"budget": budget, "coefficients": [c2, c1, c0], "N_opt": n, "N_opt_interval": [n / 1.25, n * 1.3]}
        found.append(row | {"D_opt": budget / 6 / n, "loss_opt": float(c0 - c1**2 / (4 * c2)), "edge": None})
    return found


def make_content(seed=0):
    rng = np.random.default_rng(seed)
    trials = make_trials(rng)
    curves = {}
    for t in trials:
        tokens = np.arange(1, 401) * t["D_tokens"] / 400
        loss = np.minimum(8.3, law(t["N_params"], tokens)) + rng.normal(0, 0.04, 400)
        curves[t["id"]] = {"tokens": tokens.tolist(), "loss": loss.tolist()}
        curves[t["id"]] |= {"eval_tokens": [t["D_tokens"]], "eval_loss": [t["loss"]]}
    trials[4] |= {"status": "failed", "loss": None, "loss_se": None, "reason": "loss is not finite at step 812 <nan>"}
    c = np.geomspace(BUDGETS[0], 2 * TARGET, 60)
    n = best_size(c)
    d, loss, wide = c / 6 / n, law(n, c / 6 / n), 1 + 0.08 * (1 + np.log(c / BUDGETS[0]))
    bands = {
        "C": c,
        "N_opt": n,
        "N_low": n / wide,
        "N_high": n * wide,
        "D_opt": d,
        "D_low": d / wide,
        "D_high": d * wide,
    }
    bands |= {"loss": loss, "loss_low": loss * (1 - 0.05 * (wide - 1)), "loss_high": loss * (1 + 0.05 * (wide - 1))}
    predicted = float(law(best_size(TARGET), TARGET / 6 / best_size(TARGET)))
    interval = {k: [0.93 * v, 1.06 * v] for k, v in PARAMETERS.items()}
    return report.Content(
        title="isoflop_books <5 × 3>",
        docstring="isoFLOP curves on books: which size?\n\n    llm-jax sweep isoflop.py\n\nOne H100 & 40 minutes.",
        trials=trials,
        curves=curves,
        fit={
            "law": "chinchilla",
            "formula": "L = E + A / N^alpha + B / D^beta",
            "n": 14,
            "objective": {"name": "huber:1e-3", "value": 0.000123},
            "parameters": {k: {"value": v, "interval": interval[k], "unbounded": False} for k, v in PARAMETERS.items()},
            "warnings": ["the residuals of the smallest budget are above 0.5 %"],
        },
        isoflop=make_isoflop([t for t in trials if t["loss"]]),
        bands={k: v.tolist() for k, v in bands.items()},
        forecast={
            "registered_at": "2026-11-20T12:00:00Z",
            "target": {"N": best_size(TARGET), "D": TARGET / 6 / best_size(TARGET), "C": TARGET},
            "prediction": {"loss": predicted, "interval": [predicted - 0.03, predicted + 0.035], "level": 0.9},
            "config_fingerprint": "0123456789ab",
            "git": "b65ade4",
            "ledger_sha256": "ab" * 32,
        },
        verify={
            "measured": predicted + 0.014,
            "error_relative": 0.014 / predicted,
            "inside": True,
            "standard_error": 0.004,
        },
        entropy=1.71,
        warnings=["1 of 15 trials failed"],
        facts={"hardware": "1 × NVIDIA H100", "total compute": "7.0×10¹⁶ FLOPs"},
        profiles=[
            {
                "parameter": name,
                "value": value,
                "values": (value * np.linspace(0.9, 1.1, 21)).tolist(),
                "increase": (np.linspace(-3, 3, 21) ** 2).tolist(),
                "threshold": 3.841,
                "interval": [0.93 * value, None if name == "beta" else 1.06 * value],
            }
            for name, value in PARAMETERS.items()
        ],
        samples={name: (value * rng.lognormal(0, 0.05, 300)).tolist() for name, value in PARAMETERS.items()},
    )


@pytest.fixture(scope="module")
def content():
    return make_content()


@pytest.fixture(scope="module")
def folder(content, tmp_path_factory):
    return report.write(content, tmp_path_factory.mktemp("report")).parent


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def read(folder, name, series):
    with (folder / "figures" / f"{name}.csv").open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["series"] == series]


def numbers(rows, name):
    return [float(row[name]) for row in rows]


class Outline(HTMLParser):
    """Collects what a browser would complain about or follow."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.wrong = [], [], [], set(), []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append((tag, self.getpos()))


def test_the_page_is_one_file_that_asks_no_network(page):
    """It is opened offline, mailed and archived: whatever it needed from elsewhere would be missing there."""
    assert "http:" not in page
    assert "https:" not in page
    assert not re.search(r"@import|url\((?!#)", page)
    outline = Outline(page)
    assert not outline.tags & {"link", "img", "iframe", "object", "base"}
    assert "default-src 'none'" in page  # and a browser would refuse it
    (script,) = re.findall(r"<script[^>]*>(.*?)</script>", page, flags=re.DOTALL)
    assert not re.search(r"fetch|XMLHttp|WebSocket|import\(|sendBeacon|eval\(", script)
    own = r"#.+|figures/\w+\.(png|svg|csv)|data:image/png;base64,[\w+/=]+"  # colour bars are images inside the SVG
    assert [link for link in outline.links if not re.fullmatch(own, link)] == []


def test_the_page_is_well_formed_and_its_ids_are_unique(page):
    """Several inline SVGs that share ids show each other's glyphs and clip each other's lines."""
    outline = Outline(page)
    assert outline.wrong == []
    assert outline.open == []
    assert len(outline.ids) == len(set(outline.ids))
    used = {link[1:] for link in outline.links if link[0] == "#"} | set(re.findall(r"url\(#([^)]+)\)", page))
    assert len(used) > 50
    assert used <= set(outline.ids)


def test_every_figure_comes_as_png_svg_and_csv(folder, page):
    """A paper takes the SVG, a README the PNG, and a reader who doubts them the CSV."""
    assert {p.stem for p in (folder / "figures").iterdir()} == set(NAMES)
    for name in NAMES:
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(folder / "figures" / f"{name}.svg").getroot().tag.endswith("svg")
        assert f'id="figure-{name}"' in page
        for kind in ("png", "svg", "csv"):
            assert (folder / "figures" / f"{name}.{kind}").stat().st_size > 0
            assert f'href="figures/{name}.{kind}"' in page


def test_the_csv_files_hold_the_numbers_that_went_in(folder, content):
    """To the last bit: someone will fit them again."""
    done = {t["id"]: t for t in content.trials if t["status"] == "done"}
    ledger = {"N": "N_params", "D": "D_tokens", "C": "C_flops", "loss": "loss", "loss_se": "loss_se"}
    for name in ("isoflop", "frontier", "surface", "law", "residuals"):
        rows = read(folder, name, "trial")
        assert {r["id"] for r in rows} == set(done)
        for short, long in ledger.items():
            assert numbers(rows, short) == [done[r["id"]][long] for r in rows]
    for short, long in {"C": "C", "loss": "loss", "loss_low": "loss_low", "loss_high": "loss_high"}.items():
        assert numbers(read(folder, "frontier", "frontier"), short) == content.bands[long]
    for letter in "ND":
        rows = read(folder, "isoflop", f"law {letter}*")
        assert numbers(rows, letter) == content.bands[f"{letter}_opt"]
        assert numbers(rows, f"{letter}_high") == content.bands[f"{letter}_high"]
    minima = read(folder, "isoflop", "minimum")
    assert numbers(minima, "N") == [m["N_opt"] for m in content.isoflop]
    assert numbers(minima, "N_low") == [m["N_opt_interval"][0] for m in content.isoflop]
    curve = content.curves[content.trials[0]["id"]]
    rows = [r for r in read(folder, "curves", "training") if r["id"] == content.trials[0]["id"]]
    assert (numbers(rows, "tokens"), numbers(rows, "loss")) == (curve["tokens"], curve["loss"])


def test_tokens_of_a_minimum_have_the_interval_of_its_parameters_turned_round(folder, content):
    """Along a budget D = C / 6N: the least N goes with the most D."""
    rows = read(folder, "isoflop", "isoFLOP minimum D*")
    for row, m in zip(rows, content.isoflop, strict=True):
        low, high = m["N_opt_interval"]
        np.testing.assert_allclose(float(row["D_high"]) * low * 6, m["budget"], rtol=1e-12)
        np.testing.assert_allclose(float(row["D_low"]) * high * 6, m["budget"], rtol=1e-12)
        assert float(row["D_low"]) < float(row["D"]) < float(row["D_high"])


def test_residuals_are_percent_of_the_law(folder):
    rows = read(folder, "residuals", "trial")
    expected = law(np.array(numbers(rows, "N")), np.array(numbers(rows, "D")))
    np.testing.assert_allclose(numbers(rows, "predicted"), expected, rtol=1e-12)
    np.testing.assert_allclose(
        numbers(rows, "residual_percent"), 100 * (numbers(rows, "loss") / expected - 1), atol=1e-10
    )


def test_the_same_content_gives_the_same_bytes(content, folder, tmp_path):
    """A report that changes by itself cannot be committed or compared."""
    again = report.write(content, tmp_path).parent
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert [f for f in files if (folder / f).read_bytes() != (again / f).read_bytes()] == []


def test_text_is_escaped_and_any_script_survives(content, page, tmp_path):
    """Titles, descriptions, reasons and facts come from files and exceptions: they are text, whatever they hold."""
    assert "isoflop_books &lt;5 × 3&gt;" in page
    assert "step 812 &lt;nan&gt;" in page
    assert "One H100 &amp; 40 minutes." in page
    hostile = '<b onclick="x">\'&'
    fit = content.fit | {"warnings": [hostile], "law": hostile}
    trials = [t | {"reason": hostile, "id": hostile} for t in content.trials[:1]]
    russian = "Кривые равной стоимости"
    shown = dataclasses.replace(
        report.Content(
            russian, f"Описание: {hostile}\n\n{hostile}", trials, {}, fit, [], None, None, None, None, [], {}
        ),
        warnings=[hostile + "2"],
        facts={hostile: hostile},
    )
    text = report.write(shown, tmp_path).read_text(encoding="utf-8")
    assert russian in text
    assert "<b onclick" not in text
    assert text.count("&lt;b onclick=&quot;x&quot;&gt;&#x27;&amp;") >= 9
    assert Outline(text).wrong == []


def headline(page):
    """The page's text above the figures, without tags."""
    return re.sub(r"<[^>]+>", "", page[page.index("<body>") : page.index("Figures</h2>")])


def test_the_headline_says_what_was_forecast_and_what_came(content, page):
    text = headline(page)
    low, high = content.forecast["prediction"]["interval"]
    for said in (
        f"{content.forecast['prediction']['loss']:.4f}",
        f"[{low:.4f}, {high:.4f}]",
        f"{content.verify['measured']:.4f}",
    ):
        assert said in text
    assert "registered 2026-11-20T12:00:00Z" in text
    assert "Inside the 90 % interval; relative error +0.32 %" in text
    assert "L = 1.69 + 406.4\u2009/\u2009N0.34 + 410.7\u2009/\u2009D0.28" in text
    assert "E = 1.69 [1.572, 1.791]" in text
    assert "1 of 15 trials failed" in text
    assert "the residuals of the smallest budget are above 0.5 %" in text


def test_a_missed_forecast_and_an_unbounded_parameter_are_told(content, tmp_path):
    """The page must not be kinder than the numbers."""
    parameters = content.fit["parameters"] | {
        "alpha": {"value": 0.3, "interval": [0.1, float("inf")], "unbounded": True}
    }
    verify = content.verify | {"inside": False, "error_relative": -0.05}
    changed = dataclasses.replace(content, verify=verify, fit=content.fit | {"parameters": parameters}, curves={})
    text = headline(report.write(changed, tmp_path).read_text(encoding="utf-8"))
    assert "Outside the 90 % interval; relative error −5.00 %" in text
    assert "Inside" not in text
    assert "α = 0.3 [0.1, ∞] unbounded" in text


@pytest.mark.parametrize(
    ("missing", "figures_left", "said"),
    [
        ({"trials": [], "curves": {}, "isoflop": [], "bands": None}, set(), "No trial has been run yet."),
        ({"isoflop": [], "bands": None}, {"isoflop", "frontier", "law", "curves"}, "no law fitted yet"),
        ({"isoflop": [], "bands": None, "curves": {}}, {"isoflop", "frontier", "law"}, "14 of 15 done"),
        ({"bands": None}, {"isoflop", "frontier", "law", "curves"}, "14 of 15 done"),
    ],
)
def test_a_report_of_half_an_experiment_leaves_out_what_is_missing(content, tmp_path, missing, figures_left, said):
    """One looks at a sweep while it runs; the page must stand after every step."""
    steps = {"fit": None, "forecast": None, "verify": None, "entropy": None, "warnings": [], "facts": {}}
    steps |= {"profiles": [], "samples": {}}
    page = report.write(dataclasses.replace(content, **steps, **missing), tmp_path).read_text(encoding="utf-8")
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == figures_left
    assert said in page
    outline = Outline(page)
    assert (outline.wrong, outline.open) == ([], [])
    assert "None" not in page


def test_a_sweep_of_which_everything_failed_still_has_a_page(content, tmp_path):
    """That is when one needs the reasons most."""
    failed = [
        t | {"status": "failed", "loss": None, "loss_se": None, "reason": f"reason {i}"}
        for i, t in enumerate(content.trials)
    ]
    empty = report.Content("all failed", "", failed, {}, None, [], None, None, None, None, [], {})
    page = report.write(empty, tmp_path).read_text(encoding="utf-8")
    assert "0 of 15 done" in page
    assert "nothing to plot or fit" in page
    assert all(f"reason {i}<" in page for i in range(15))


def test_a_single_trial_can_be_drawn(content, tmp_path):
    """The first minute of a sweep: every axis then spans a single value."""
    one = content.trials[:1]
    curves = {one[0]["id"]: {"tokens": [1e6], "loss": [5.0]}}
    report.write(report.Content("one", "", one, curves, None, [], None, None, None, None, [], {}), tmp_path)
    assert {p.stem for p in (tmp_path / "figures").glob("*.svg")} == {"isoflop", "frontier", "law", "curves"}


def test_a_minimum_at_the_edge_is_hollow_and_kept_from_the_optimum(content):
    """A parabola whose bottom was not measured only bounds the best size; drawn as a minimum it would mislead."""
    minima = [content.isoflop[0] | {"edge": "low", "N_opt": 1.0, "N_opt_interval": None}, *content.isoflop[1:]]
    with drawing.style():
        plot = allocation_figures.triptych(content.trials, minima, content.bands, [], None)
    smallest = min(t["N_params"] for t in content.trials if t["budget"] == BUDGETS[0])
    hollow = [
        c for c in plot.figure.axes[0].collections if np.allclose(c.get_offsets()[0], [smallest, c.get_offsets()[0][1]])
    ]
    white = [c for c in hollow if len(c.get_offsets()) == 1 and tuple(c.get_facecolor()[0]) == (1, 1, 1, 1)]
    assert len(white) == 1
    assert "1 of 3 budgets" in plot.caption
    assert [r["edge"] for r in plot.rows if r["series"] == "minimum"] == ["low", "", ""]
    assert [r["C"] for r in plot.rows if r["series"] == "isoFLOP minimum N*"] == list(BUDGETS[1:])
    assert "Left out: 1" in plot.caption


def single_points(axes):
    return [tuple(c.get_offsets()[0]) for c in axes.collections if len(c.get_offsets()) == 1]


def test_star_and_diamond_stand_where_forecast_and_measurement_do(content):
    told = figures.outcome(content.forecast, content.verify)
    with drawing.style():
        predict = figures.predictor(content.fit)
        isoflop = allocation_figures.triptych(content.trials, content.isoflop, content.bands, told, predict)
        frontier = figures.frontier(content.trials, content.bands, told)
    target, loss = content.forecast["target"], content.forecast["prediction"]["loss"]
    for plot, letter in ((isoflop, "N"), (frontier, "C")):
        drawn = single_points(plot.figure.axes[0])
        assert (target[letter], loss) in drawn
        assert (target[letter], content.verify["measured"]) in drawn


def test_a_budget_has_one_colour_in_all_figures(content):
    """Else the eye compares the wrong curves."""
    told = figures.outcome(content.forecast, content.verify)
    with drawing.style():
        plots = [
            allocation_figures.triptych(content.trials, content.isoflop, content.bands, told, None),
            figures.frontier(content.trials, content.bands, told),
            figures.residuals(content.trials, figures.predictor(content.fit), told),
        ]
    colors = []
    for plot in plots:
        (dots,) = (c for c in plot.figure.axes[0].collections if len(getattr(c, "get_offsets", list)()) == 14)
        colors.append(dots.get_facecolor().tolist())
    assert colors[0] == colors[1] == colors[2]
    assert len({tuple(c) for c in colors[0]}) == len(BUDGETS)


def test_no_label_covers_another_or_leaves_the_figure(content):
    """Labels that collide are the first thing a reader sees."""
    with drawing.style():
        plots = report.draw(content)
        assert [plot.name for plot in plots] == list(NAMES)
        for plot in plots:
            plot.figure.draw_without_rendering()
            texts = [axes.xaxis.label for axes in plot.figure.axes] + [axes.yaxis.label for axes in plot.figure.axes]
            for axes in plot.figure.axes:
                for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
                    ticks = axis.get_major_ticks()
                    texts += [t.label1 for t in ticks if t.label1.get_visible() and low <= t.get_loc() <= high]
                    texts += [t.label2 for t in ticks if t.label2.get_visible() and low <= t.get_loc() <= high]
            texts += [text for key in plot.figure.legends for text in key.get_texts()]
            texts = [t for t in texts if t.get_text()]
            assert len(texts) > 8
            boxes = [t.get_window_extent() for t in texts]
            canvas = plot.figure.bbox.padded(0.5)
            for i, box in enumerate(boxes):
                assert canvas.contains(*box.min) and canvas.contains(*box.max), (plot.name, texts[i].get_text())
                over = [texts[j].get_text() for j in range(i) if box.padded(-0.5).overlaps(boxes[j].padded(-0.5))]
                assert not over, (plot.name, texts[i].get_text(), over)


def test_the_law_is_read_from_its_formula(content):
    """The page prints the formula and the figures draw it: they must be one."""
    n, d = np.array([1e6, 3e7]), np.array([2e8, 1e9])
    np.testing.assert_allclose(figures.predictor(content.fit)(n, d), law(n, d), rtol=1e-14)
    power = {"formula": "L = (N_c / N)^alpha_N", "parameters": {"N_c": {"value": 8.8e13}, "alpha_N": {"value": 0.076}}}
    np.testing.assert_allclose(figures.predictor(power)(n, d), (8.8e13 / n) ** 0.076, rtol=1e-14)
    for other in ("L = E + A / unknown^alpha", "alpha = E + A / N", "L = E + A * lr, lr = B * N^alpha", "three steps"):
        assert figures.predictor(content.fit | {"formula": other}) is None
    assert figures.predictor(None) is None


def test_smoothing_keeps_means():
    """Bins average what they hold and lose nothing: a flat curve stays flat, and weights add up."""
    rng = np.random.default_rng(0)
    tokens = np.sort(rng.uniform(1e3, 1e6, 5000))
    x, y = figures.binned(tokens, np.full(5000, 3.5))
    assert len(x) <= 160
    np.testing.assert_allclose(y, 3.5, rtol=1e-12)
    assert np.all(np.diff(x) > 0)
    x, y = figures.binned(np.array([1e3, 1e5]), np.array([4.0, 2.0]))
    np.testing.assert_allclose(x, [1e3, 1e5], rtol=1e-12)
    assert y.tolist() == [4.0, 2.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(4_254_208, "4.25M"), (999_999, "1M"), (512, "512"), (1e3, "1k"), (2.5e12, "2.5T"), (3e9, "3B"), (0.5, "0.5")],
)
def test_counts_have_three_digits_and_a_suffix(value, text):
    assert drawing.eng(value) == text


def test_ticks_are_round_inside_and_never_crowded():
    for low, high in ((1e6, 3e6), (2.2e5, 8e8), (1e12, 1e24), (4.1e6, 4.3e6)):
        ticks = drawing.log_ticks(low, high)
        assert 2 <= len(ticks) <= 8
        assert all(low <= t <= high for t in ticks)


def test_importing_the_report_does_not_import_matplotlib():
    """`llm-jax --help` answers in under half a second; matplotlib alone takes as long."""
    code = "import sys, scaling.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_intervals_stand_side_by_side_and_open_ends_are_called_so(content):
    """Three methods that disagree are the finding; one of them alone would hide it."""
    kinds = {"bootstrap": [0.3, 0.4], "profile": [0.3, None], "Hessian": None}
    parameters = {"alpha": content.fit["parameters"]["alpha"] | {"intervals": kinds}}
    (table,) = (
        b
        for b in report.law(dataclasses.replace(content, fit=content.fit | {"parameters": parameters}))
        if "<table" in b
    )
    assert re.findall(r"<th>(.*?)</th>", table) == ["parameter", "value", *kinds, ""]
    assert re.findall(r"<td>(.*?)</td>", table)[2:5] == ["[0.3, 0.4]", "[0.3, <b>unbounded</b>]", "none"]


def test_the_page_ends_with_the_checklist(page):
    """What the run did not record is said to be not known: a blank would read as a detail that did not matter."""
    tail = page[page.index('id="checklist"') :]
    assert "<h2" not in tail[3:]
    answers = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", tail)
    known = sum("unknown" not in answer for _, answer in answers)
    assert f"Filled in from the run: {known} of {len(answers)}." in tail
    assert dict(answers)["Optimizer"] == '<span class="unknown">not known</span>'
    assert dict(answers)["Points used"] == "14, all that have a loss"
