"""What `llm-jax fit` says of a table, to programs and to people."""

import json

import numpy as np
import pytest
from simulated import TRUTH, chinchilla, runs

from scaling.analysis import analyse
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
