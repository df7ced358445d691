"""Groups side by side: each must be fitted to its own rows, and drawn as what it is."""

import functools
import json

import numpy as np
import pytest
from simulated import TRUTH, chinchilla, runs

from llm_jax.settings import BadInput
from scaling import analysis, cli, compare, comparison_figures, content, drawing, report, tables
from scaling.tables import Table

STEEP = {**TRUTH, "alpha": 0.45, "E": 0.7}
BUDGETS = (1e11, 3e11, 1e12, 3e12)
FIT = functools.partial(analysis.analyse, law="chinchilla")


def two_families():
    """Dense and recurrent runs under two laws, and one count of n-grams, which has no FLOPs."""
    dense = runs(noise=0.002, budgets=BUDGETS)
    recurrent = runs(lambda n, d: chinchilla(n, d, STEEP), 0.002, BUDGETS, seed=1)
    columns = {name: np.concatenate([dense.columns[name], recurrent.columns[name]]) for name in dense.columns}
    columns["family"] = np.array(["transformer"] * 20 + ["lstm"] * 20)
    last = {"N_params": 5e5, "D_tokens": 1e6, "C_flops": np.nan, "budget": np.nan, "loss": 9.0, "family": "ngram"}
    return Table({name: np.append(column, last[name]) for name, column in columns.items()})


def test_each_group_is_fitted_to_its_own_rows():
    """Rows of another family would move its exponents; the group that cannot be fitted is told, and why."""
    found = compare.by_column(two_families(), "family", functools.partial(FIT, ci="profile"))
    assert set(found.groups) == {"transformer", "lstm"}
    assert [min(one.table.column("loss")) for one in found.groups.values()] == sorted(
        min(one.table.column("loss")) for one in found.groups.values()
    )
    for name, truth in (("transformer", TRUTH), ("lstm", STEEP)):
        low, high = found.groups[name].intervals["alpha"]
        assert low <= truth["alpha"] <= high and high - low < 0.1
        assert found.groups[name].n == 20
    assert "needs one row more" in found.unfitted["ngram"]
    text = found.summary()
    assert sum(line.startswith(("transformer ", "lstm ")) for line in text.splitlines()) == 2
    assert "ngram: chinchilla has 5 parameters" in text
    record = json.loads(found.to_json())
    assert set(record["groups"]) == {"transformer", "lstm"} and record["by"] == "family"


def test_the_figure_shows_every_group_and_its_exponents():
    """A family that is left out of the comparison, or drawn with the line of another, is the worst that it could say."""
    table = two_families()
    found = compare.by_column(table, "family", FIT)
    groups = compare.record(found, content._bands(found))
    rows = [dict(zip(table.columns, row, strict=True)) for row in zip(*table.columns.values(), strict=True)]
    trials = tables.finite([row | {"id": f"{i}", "status": "done"} for i, row in enumerate(rows)])
    with drawing.style():
        plot = comparison_figures.comparison(trials, groups, "family")
    drawn = {(row["series"], row["family"]) for row in plot.rows}
    fitted = {(kind, name) for kind in ("trial", "frontier", "exponent") for name in ("transformer", "lstm")}
    assert drawn == fitted | {("trial", "ngram")}
    value = {(r["family"], r["parameter"]): r["value"] for r in plot.rows if r["series"] == "exponent"}
    assert value["lstm", "alpha"] == found.groups["lstm"].parameters["alpha"]
    dotted = [line for line in plot.figure.axes[0].lines if len(set(line.get_ydata())) == 1]
    assert [line.get_ydata()[0] for line in dotted] == [9.0]


def test_the_report_puts_groups_side_by_side(tmp_path):
    """And fits no one law through all of them."""
    table = two_families()
    found = compare.by_column(table, "family", FIT)
    rows = [dict(zip(table.columns, row, strict=True)) for row in zip(*table.columns.values(), strict=True)]
    trials = tables.finite([row | {"id": f"{i}", "status": "done"} for i, row in enumerate(rows)])
    page = report.write(
        report.Content(
            title="families", docstring="", trials=trials, curves={}, fit=None, isoflop=[], bands=None, forecast=None,
            verify=None, entropy=None, warnings=[], facts={}, by="family", groups=compare.record(found, content._bands(found)),
        ),
        tmp_path,
    ).read_text(encoding="utf-8")  # fmt: skip
    assert "The law of each family" in page and "Not fitted: ngram" in page
    assert (tmp_path / "figures/comparison.png").exists()


def test_the_command_line(capsys, tmp_path):
    """`fit --by` on any CSV, and one line for a column that is none."""
    path = tmp_path / "table.csv"
    table = two_families()
    rows = [dict(zip(table.columns, row, strict=True)) for row in zip(*table.columns.values(), strict=True)]
    path.write_text(tables.csv_text(tables.finite(rows)))
    assert cli.main(["fit", str(path), "--by", "family", "--ci", "none"]) == 0
    assert "lstm" in capsys.readouterr().out
    assert cli.main(["fit", str(path), "--by", "famly"]) == 2
    assert 'did you mean "family"' in capsys.readouterr().err
    with pytest.raises(BadInput, match="no group of family can be fitted"):
        compare.by_column(table.where("loss > 8.9"), "family", FIT)
