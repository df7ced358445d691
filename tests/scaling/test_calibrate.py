"""The harness that measures coverage must itself be right, and the default intervals must pass it."""

import csv
import json

import numpy as np
import pytest
from scipy import stats

from llm_jax.settings import BadInput
from scaling import calibrate, cli
from scaling.calibrate import DESIGNS, EXPONENTS, TRUTHS, Design, chosen, columns, describe, intervals, simulate
from scaling.profile import profile_ends
from scaling.robust import robust, wald_ends

SMALL = Design("isoflop", 20, "normal", "epoch")


@pytest.mark.parametrize(
    "name", ["isoflop-20-normal-hoffmann", "grid-20-student3-epoch", "isoflop-60-student3-hoffmann"]
)
def test_profile_covers_at_its_level(name):
    """300 tables: what a method that holds would do in 999 of 1,000 runs of this test."""
    (design,) = chosen([name])
    truth_Q = np.array([TRUTHS[design.truth][key] for key in EXPONENTS])
    found = robust(calibrate.LAW, *simulate(design, 300, 0.01, (7, 0, 0)))
    low_SxQ, high_SxQ = profile_ends(found, [3, 4], 0.95)
    covered_Q = ((low_SxQ <= truth_Q) & (truth_Q <= high_SxQ)).sum(0)
    least, most = stats.binom.ppf([0.0005, 0.9995], 300, 0.95)
    assert ((least <= covered_Q) & (covered_Q <= most)).all()
    assert np.isfinite(high_SxQ - low_SxQ).all()


def test_intervals_of_half_the_width_are_caught():
    """Half as wide as they should be, 95 % intervals hold 67 % of the truths: a harness that let that pass measures nothing."""
    log_KxR, target_SxR = simulate(SMALL, 300, 0.01, (8, 0, 0))
    low, high = (end[:, 3:] for end in wald_ends(robust(calibrate.LAW, log_KxR, target_SxR), 0.95))
    half = {"half": ((3 * low + high) / 4, (low + 3 * high) / 4)}
    rows = calibrate._rows(SMALL, 0.01, [half])
    assert all(row["coverage"] < 0.8 for row in rows)
    assert "0 of 2 within 93 to 97 %" in describe(rows)


def test_tables_are_what_they_say():
    """Rows, compute and noise of the designs, written out once more."""
    for design in DESIGNS:
        n_params, d_tokens = columns(design)
        assert len(n_params) == len(d_tokens) == design.rows
        if design.layout == "isoflop":
            assert len(np.unique(np.round(np.log(n_params * d_tokens), 6))) == {20: 4, 60: 6, 240: 12}[design.rows]
    log_KxR, target_SxR = simulate(SMALL, 4000, 0.01, (0,))
    n_params, d_tokens = np.exp(log_KxR)
    truth = np.log(1.8172 + 482.01 / n_params**0.3478 + 2085.43 / d_tokens**0.3658)
    np.testing.assert_allclose(target_SxR.mean(0), truth, atol=1e-3)
    np.testing.assert_allclose((target_SxR - truth).std(), 0.01, rtol=0.02)
    _, heavy_SxR = simulate(Design("isoflop", 20, "student3", "epoch"), 4000, 0.01, (0,))
    assert np.mean(np.abs(heavy_SxR - truth) > 0.05) == pytest.approx(2 * stats.t.sf(5, 3), rel=0.1)
    _, uneven_SxR = simulate(Design("isoflop", 20, "uneven", "epoch"), 4000, 0.01, (0,))
    spread_R = (uneven_SxR - truth).std(0)
    assert spread_R[0] / spread_R[-1] == pytest.approx(1e4**0.2, rel=0.1)


def test_an_infinite_interval_covers_and_is_counted():
    """ "The data gives no bound" is a true answer; how often it is given must be seen."""
    ends = {"profile": (np.full((10, 2), -np.inf), np.full((10, 2), 9.0))}
    rows = calibrate._rows(SMALL, 0.01, [ends])
    assert [row["coverage"] for row in rows] == [1, 1] and [row["unbounded"] for row in rows] == [1, 1]
    assert rows[0]["coverage_se"] > 0
    assert "100.0 ± 3.4, 100 % open" in describe(rows)


def test_a_design_does_not_depend_on_the_others():
    """The table in the README must come out again when one line of it is run alone; processes must not share noise."""
    grid = Design("grid", 20, "normal", "epoch")
    both, alone = calibrate.calibrate([SMALL, grid], 6), calibrate.calibrate([grid], 6)
    assert both[len(alone) :] == alone
    first, second = simulate(SMALL, 2, 0.01, (0, 0, 0))[1], simulate(SMALL, 2, 0.01, (0, 0, 250))[1]
    assert not np.isclose(first, second).any()


def test_all_three_methods_are_measured():
    """The bootstrap on one table in twenty, and that of uncertainty.py itself."""
    ends = intervals(SMALL, 21, 0.01, (0, 0, 0))
    assert {method: low.shape for method, (low, _) in ends.items()} == {
        "profile": (21, 2),
        "hessian": (21, 2),
        "bootstrap": (2, 2),
    }
    assert all((low < high).all() for low, high in ends.values())


def test_designs_are_chosen_by_parts_of_their_names():
    """A slip of the finger must not run for ten minutes."""
    assert len(chosen([])) == len(DESIGNS) == 30
    assert {one.rows for one in chosen(["isoflop-20", "grid-60"])} == {20, 60}
    assert len(chosen(["isoflop-20", "grid-60"])) == 10
    with pytest.raises(BadInput, match='did you mean "isoflop"'):
        chosen(["isoflp-20"])
    with pytest.raises(BadInput, match="no design is all of"):
        chosen(["20-60"])
    with pytest.raises(BadInput, match="at least 2"):
        calibrate.calibrate([SMALL], 1)
    with pytest.raises(BadInput, match="noise"):
        calibrate.calibrate([SMALL], 2, noise=0)


def test_the_verb_writes_what_it_prints(tmp_path, capsys):
    """CSV and JSON hold the same rows."""
    path = tmp_path / "coverage.csv"
    words = ["calibrate", "--simulations", "3", "--designs", "isoflop-20-normal-epoch", "--csv", str(path)]
    assert cli.main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["coverage"]
    with path.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [float(row["coverage"]) for row in written] == [row["coverage"] for row in rows]
    assert {row["method"] for row in rows} == {"profile", "hessian", "bootstrap"}
    assert cli.main(["calibrate", "--simulations", "3", "--csv", str(tmp_path / "none" / "x.csv")]) == 2
