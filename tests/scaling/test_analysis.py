"""What `llm-jax fit` says of a table, to programs and to people."""

import json

import numpy as np
import pytest
from simulated import TRUTH, chinchilla, runs

from llm_jax.settings import BadInput
from scaling import report
from scaling.analysis import analyse
from scaling.content import of_analysis
from scaling.tables import Table


def strict(text):
    """JSON as it is defined: without NaN and Infinity, which Python would read."""

    def refuse(name):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def test_json_carries_the_law_its_numbers_and_their_intervals():
    """Programs read nothing else, and other languages read no NaN."""
    found = analyse(runs(noise=0.005), "chinchilla", "huber:1e-3", ci="bootstrap:50")
    record = strict(found.to_json())
    assert {name: one["value"] for name, one in record["parameters"].items()} == found.fit.parameters
    assert all(tuple(one["interval"]) == found.by_method["bootstrap"][k] for k, one in record["parameters"].items())
    for name, (low, high) in found.bootstrap.intervals.items():
        assert found.by_method["bootstrap"][name] == pytest.approx((low, high), rel=0.02)
    assert all(set(one) == {"value", "interval", "unbounded"} for one in record["parameters"].values())
    assert (record["law"], record["n"]) == ("chinchilla", 15)
    assert record["objective"] == {"name": "huber:1e-3", "value": found.fit.value}
    assert set(record) == {"law", "n", "objective", "parameters", "warnings"}
    assert [one["budget"] for one in found.to_dict()["isoflop"]] == pytest.approx([1e11, 3e11, 1e12])


def test_a_parameter_at_its_bound_is_called_unbounded():
    """Its value is where the search ended, not what the data says."""
    table = runs(lambda n, d: chinchilla(n, d, {**TRUTH, "E": 0.0, "alpha": 0.3, "beta": 0.2}))
    record = strict(analyse(table, "chinchilla", "huber:1e-3", ci="none").to_json())
    assert {name for name, one in record["parameters"].items() if one["unbounded"]} == {"E"}
    assert all(one["interval"] is None for one in record["parameters"].values())


def test_every_warning_is_told_once():
    """Those of the fit, of the isoFLOP curves, and of repeated data, in the text as in the JSON."""
    table = runs(noise=0.002, budgets=(1e11, 1e13))
    status = np.where(np.arange(10) == 3, "failed", "done")
    table = Table({**table.columns, "epochs": np.where(np.arange(10) == 1, 9.5, 1.0), "status": status})
    found = analyse(table, "chinchilla", "huber:1e-3", ci="none")
    assert any("1 of 10 rows are left out" in warning for warning in found.fit.warnings)
    edges = [one["edge"] for one in found.to_dict()["isoflop"]]
    assert edges == [None, "high"]
    assert any("add larger shapes" in warning for warning in found.warnings)
    assert any("1 trials repeat their data more than 4 times, one 9.5 times" in warning for warning in found.warnings)
    told = [line for line in found.summary().splitlines() if "warning:" in line]
    assert told == [f"  warning: {warning}" for warning in found.warnings]


@pytest.mark.filterwarnings("error::UserWarning")  # a layout that collapsed
@pytest.mark.parametrize("law", ["kaplan", "kaplan-n", "kaplan-d", "overtraining", "bnsl", "isoflop"])
def test_every_law_can_be_reported(law, tmp_path):
    """A report that only knows one law would break on the second experiment; the runs are drawn beside each."""
    table = runs(noise=0.003)
    found = analyse(table, law)
    rows = [dict(zip(table.columns, row, strict=True)) for row in zip(*table.columns.values(), strict=True)]
    trials = [row | {"id": f"{i}", "status": "done"} for i, row in enumerate(rows)]
    content = report.Content(
        title=law, docstring="", trials=trials, curves={}, forecast=None, verify=None, entropy=None, warnings=[], facts={},
        **of_analysis(found),
    )  # fmt: skip
    page = report.write(content, tmp_path).read_text(encoding="utf-8")
    assert law in page
    assert strict(found.to_json())["parameters"].keys() == found.parameters.keys()


def test_three_ways_to_intervals_stand_side_by_side():
    """Whoever reads one method alone cannot see that they differ; the first, in JSON too, is the one that holds in simulation."""
    found = analyse(runs(noise=0.005, budgets=(1e11, 3e11, 1e12, 3e12)), "chinchilla")
    assert list(found.by_method) == ["profile", "hessian", "bootstrap"]
    record = strict(found.to_json())
    alpha = record["parameters"]["alpha"]
    assert alpha["interval"] == alpha["intervals"]["profile"] == list(found.by_method["profile"]["alpha"])
    lines = found.summary().splitlines()
    assert all(f"95 % by {method}" in lines[1] for method in found.by_method)
    (line,) = (line for line in lines if line.startswith("  alpha "))
    assert line.count("[") == 3
    assert sum("correlations" in line for line in lines) == 1
    (line,) = (line for line in lines if line.startswith("    alpha "))
    assert line.split()[1] == f"{found.found[0].correlations_PxP[0, 3]:.2f}" == "1.00"


def test_open_ends_are_open_by_every_method():
    """An interval with two ends beside the word unbounded would be read as bounded; JSON has null there."""
    truth = {**TRUTH, "E": 0.0, "alpha": 0.3, "beta": 0.2}
    table = runs(lambda n, d: chinchilla(n, d, truth), 0.003, (1e11, 3e11, 1e12, 3e12, 1e13, 3e13))
    found = analyse(table, "chinchilla")
    assert "E" in found.unbounded
    record = strict(found.to_json())["parameters"]["E"]
    assert record["unbounded"] and record["interval"][0] is None and np.isfinite(record["interval"][1])
    assert "unbounded below, to" in found.summary()


def test_what_is_held_is_shown_as_held():
    """A number without an interval must not look like one that was forgotten."""
    found = analyse(runs(noise=0.005), "chinchilla", hold={"E": 0.55})
    assert any(line.split() == ["E", "0.55", "held"] for line in found.summary().splitlines())
    assert strict(found.to_json())["parameters"]["E"]["interval"] is None


def test_a_cluster_is_refused_where_it_has_no_meaning():
    """A procedure resamples budgets; silence would let the user believe otherwise."""
    with pytest.raises(BadInput, match="--cluster has no meaning"):
        analyse(runs(), "isoflop", cluster="seed")
    with pytest.raises(BadInput, match="by bootstrap alone, not by profile"):
        analyse(runs(), "isoflop", ci="profile")


def test_trials_without_a_budget_have_no_isoflop_minima():
    """Runs of equal tokens have like compute by accident; the column that would name their budget is empty."""
    table = runs(noise=0.003)
    empty = Table({**table.columns, "budget": np.full(len(table), "")})
    assert "isoFLOP minimum" in analyse(table, "chinchilla", ci="none").summary()
    assert "isoFLOP minimum" not in analyse(empty, "chinchilla", ci="none").summary()
