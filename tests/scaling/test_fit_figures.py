"""The figures of what the data leave open, and of the fitted surface: drawn where the numbers are."""

import numpy as np
import pytest
from simulated import CHINCHILLA, TRUTH, chinchilla, runs

from scaling import allocation_figures, drawing, fit_figures
from scaling.figures import predictor

PROFILE = {"parameter": "A", "value": 10.0, "values": [5.0, 10.0, 20.0], "increase": [9.0, 0.0, 9.0], "threshold": 3.84}


def profile_panel(**changes):
    with drawing.style():
        plot = fit_figures.profiles([PROFILE | changes])
    return plot, plot.figure.axes[0]


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ([7.0, 14.0], None),
        ([7.0, None], "unbounded above"),
        ([None, 14.0], "unbounded below"),
        ([None, None], "unbounded"),
    ],
)
def test_a_profile_says_where_the_data_give_no_end(interval, said):
    """An interval that stops at the end of a grid looks like knowledge; «unbounded» is the answer then."""
    plot, axes = profile_panel(interval=interval)
    assert [text.get_text() for text in axes.texts] == ([said] if said else [])
    drawn = {line.get_xdata()[0] for line in axes.lines if line.get_linestyle() not in ("-", "None")}
    assert drawn - {0} == {end for end in interval if end is not None}
    assert ("Not bounded" in plot.caption) == bool(said)
    (row,) = (r for r in plot.rows if r["series"] == "interval")
    assert [row["low"], row["high"]] == interval


def test_the_threshold_is_drawn_where_it_is():
    _, axes = profile_panel(interval=[7.0, 14.0], threshold=2.71)
    assert [2.71, 2.71] in [list(line.get_ydata()) for line in axes.lines]


def correlated(rng, n=4000):
    """A and alpha on one ridge, as in every fit of a power law: log A = 14 alpha + small noise."""
    alpha = rng.normal(0.35, 0.06, n)
    return {
        "A": np.exp(14 * alpha + rng.normal(0, 0.2, n)),
        "alpha": alpha,
        "E": np.maximum(rng.normal(0.5, 0.4, n), 1e-6),
        "held": np.full(n, 2.0),
    }


def test_the_corner_prints_the_correlation_of_what_its_axes_show():
    """The ridge of log A against alpha is what makes both intervals wide; of A itself the correlation is far lower."""
    samples = correlated(np.random.default_rng(0))
    with drawing.style():
        plot = fit_figures.corner(samples, {"A": 134.0, "alpha": 0.35, "E": 0.5, "held": 2.0})
    expected = np.corrcoef(np.log(samples["A"]), samples["alpha"])[0, 1]
    found = {(r["of"], r["with"]): r["r"] for r in plot.rows if r["series"] == "correlation"}
    np.testing.assert_allclose(found["A", "alpha"], expected, rtol=1e-12)
    assert expected > np.corrcoef(samples["A"], samples["alpha"])[0, 1] + 0.05
    printed = [text.get_text() for axes in plot.figure.axes for text in axes.texts]
    assert f"{expected:+.2f}" in printed
    assert len(found) == len(printed) == 3  # of three that move; what was held has no correlation
    scales = {axes.get_xlabel(): axes.get_xscale() for axes in plot.figure.axes if axes.get_xlabel()}
    assert scales == {"$A$": "log", r"$\alpha$": "linear", "$E$": "linear"}


def test_a_corner_of_many_resamples_stays_small():
    """100,000 bootstraps must not make a page of a hundred megabytes."""
    with drawing.style():
        plot = fit_figures.corner(correlated(np.random.default_rng(0), 30_000), {})
        svg = drawing.svg(plot)
    assert len([r for r in plot.rows if r["series"] == "resample"]) == fit_figures.DRAWN
    assert "30,000 resamples" in plot.caption
    assert len(svg) < 600_000


def test_one_parameter_has_no_corner_and_no_profile_has_no_figure():
    assert fit_figures.corner({"E": [1.0, 2.0, 3.0]}, {}) is None
    assert fit_figures.corner({}, {}) is None
    assert fit_figures.profiles([]) is None


def surface(bands=None):
    table = runs()
    trials = [
        {"id": str(i), "status": "done", **{name: float(values[i]) for name, values in table.columns.items()}}
        for i in range(len(table))
    ]
    fit = {"formula": CHINCHILLA.formula, "parameters": {name: {"value": value} for name, value in TRUTH.items()}}
    with drawing.style():
        return allocation_figures.surface(trials, predictor(fit), bands, [], TRUTH["E"])


def test_the_surface_is_the_law_and_its_frontier_the_best_size_at_each_budget():
    """Off by one cell of the grid in log N at most: a frontier beside the valley would sell the wrong model."""
    plot = surface()
    law = [r for r in plot.rows if r["series"] == "law"]
    n, c, loss = (np.array([r[k] for r in law]) for k in ("N", "C", "loss"))
    np.testing.assert_allclose(loss, chinchilla(n, c / (6 * n)), rtol=1e-12)
    frontier = [r for r in plot.rows if r["series"] == "frontier"]
    c, n = (np.array([r[k] for r in frontier]) for k in ("C", "N"))
    p = TRUTH  # Hoffmann et al. 2022, eq. 4
    g = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
    best = g * (c / 6) ** (p["beta"] / (p["alpha"] + p["beta"]))
    step = np.diff(np.log(sorted({r["N"] for r in law})))[0]
    assert len(c) > 20
    assert np.abs(np.log(n / best)).max() <= step


def test_the_frontier_of_the_surface_is_the_one_with_a_band_where_there_is_one():
    bands = {"C": [1e11, 1e12], "N_opt": [1e5, 3e5], "N_low": [8e4, 2e5], "N_high": [2e5, 5e5]}
    rows = [r for r in surface(bands).rows if r["series"] == "frontier"]
    assert [r["N"] for r in rows] == bands["N_opt"]
