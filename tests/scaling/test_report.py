"""The report: one page that says what was measured, and nothing that was not."""

import csv
import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from scaling import drawing, figures, report

PARAMETERS = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
BUDGETS = (1e15, 3e15, 1e16)
TARGET = 1e17
NAMES = ("isoflop", "frontier", "law", "optimum", "curves", "residuals")
VOID = {"meta", "br", "hr", "img", "link", "input"}


def law(n, d):
    p = PARAMETERS
    return p["E"] + p["A"] / n ** p["alpha"] + p["B"] / d ** p["beta"]


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
                    "id": rng.bytes(6).hex(), "status": "done", "depth": depth, "N_params": n, "N_non_embedding": n - 500_000,
                    "D_tokens": d, "C_flops": 6.0 * n * d, "budget": budget, "epochs": d / 2e8, "tokens_per_step": 65_536,
                    "peak_lr": 3e-3 / depth, "num_steps": d // 65_536, "loss": law(n, d) + rng.normal(0, se), "loss_se": se,
                    "bits_per_byte": 1.21, "seconds": d / 4e5, "tokens_per_second": 4e5, "reason": "", "trunk": "",
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
    bands = {"C": c, "N_opt": n, "N_low": n / wide, "N_high": n * wide, "D_opt": d, "D_low": d / wide, "D_high": d * wide}
    bands |= {"loss": loss, "loss_low": loss * (1 - 0.05 * (wide - 1)), "loss_high": loss * (1 + 0.05 * (wide - 1))}
    predicted = float(law(best_size(TARGET), TARGET / 6 / best_size(TARGET)))
    interval = {k: [0.93 * v, 1.06 * v] for k, v in PARAMETERS.items()}
    return report.Content(
        title="isoflop_books <5 × 3>",
        docstring="isoFLOP curves on English books: which size is best?\n\n    llm-jax sweep experiments/isoflop_books.py\n\nOne H100 & 40 minutes.",
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
        verify={"measured": predicted + 0.014, "error_relative": 0.014 / predicted, "inside": True, "standard_error": 0.004},
        entropy=1.71,
        warnings=["1 of 15 trials failed"],
        facts={"hardware": "1 × NVIDIA H100", "total compute": "7.0×10¹⁶ FLOPs"},
    )  # fmt: skip
