"""What `llm-jax fit` says of a table, to programs and to people."""

import dataclasses
import json

import numpy as np
import pytest
from simulated import TRUTH, chinchilla, runs

from scaling import report
from scaling.analysis import _bands, analyse
from scaling.tables import Table, finite


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
    assert all(tuple(one["interval"]) == found.bootstrap.intervals[k] for k, one in record["parameters"].items())
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


def test_bands_of_a_law_without_a_formula_for_its_optimum():
    """The search along the budget must give what Hoffmann et al. 2022, eq. 4, gives where both can be had."""
    table = runs(noise=0.003)
    exact, searched = (analyse(table, law, ci="bootstrap:60") for law in ("chinchilla", "coupled"))
    theta = np.append(exact.fit.theta, 0.0)  # gamma = 1: the same curve
    same = dataclasses.replace(searched.fit, theta=theta)
    boot = dataclasses.replace(searched.bootstrap, theta_SxP=np.pad(exact.bootstrap.theta_SxP, ((0, 0), (0, 1))))
    by_formula = _bands(exact, None)
    by_search = _bands(dataclasses.replace(searched, fit=same, bootstrap=boot), None)
    for name in ("C", "N_opt", "D_opt", "loss"):
        np.testing.assert_allclose(by_search[name], by_formula[name], rtol=2e-3)
    assert all(
        low <= n <= high for low, n, high in zip(*(by_search[k] for k in ("N_low", "N_opt", "N_high")), strict=True)
    )


@pytest.mark.parametrize("law", ["kaplan", "kaplan-n", "overtraining", "bnsl", "isoflop"])
def test_every_law_can_be_reported(law, tmp_path):
    """A report that only knows one law would break on the second experiment."""
    found = analyse(runs(noise=0.003), law, ci="bootstrap:20")
    content = report.Content(
        title=law, docstring="", trials=[], curves={}, fit=finite(found.to_dict()), isoflop=[], bands=_bands(found, None),
        forecast=None, verify=None, entropy=None, warnings=[], facts={},
    )  # fmt: skip
    page = report.write(content, tmp_path).read_text(encoding="utf-8")
    assert law in page
    assert strict(found.to_json())["parameters"].keys() == found.parameters.keys()
