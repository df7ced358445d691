"""Verbs that read tables of runs."""

from __future__ import annotations

import functools
import json as jsonlib

from llm_jax.settings import BadInput
from scaling.options import (
    BacktestOptions,
    CalibrateOptions,
    FitOptions,
    ForecastOptions,
    PlanOptions,
    ReportOptions,
)


def fit(options: FitOptions) -> None:
    """Fits a law to a table and prints what was found. In a run directory the answer is kept as fit.json."""
    from llm_jax import files
    from scaling import analysis, tables

    if options.list:
        print(analysis.listing())
        return
    if options.table is None:
        raise BadInput("fit needs a RUN or a TABLE.csv; see llm-jax fit --help")
    table = analysis.read_table(options.table, options.where)
    analyse = functools.partial(
        analysis.analyse,
        law=options.law,
        objective=options.objective,
        ci=options.ci,
        hold=analysis.held(options.hold),
        cluster=options.cluster,
    )
    if options.by:
        from scaling import compare

        groups = compare.by_column(table, options.by, analyse)
        print(groups.to_json() if options.json else groups.summary())
        return
    found = analyse(table)
    if files.is_dir(options.table) and not options.where:
        files.write_json(options.table / "fit.json", tables.finite(found.to_dict()))
    print(found.to_json(options.conventions) if options.json else found.summary(options.conventions))


def backtest(options: BacktestOptions) -> None:
    """Prints how forecasts of a table's larger runs from its smaller ones would have done."""
    from scaling import backtest as backtesting

    found = backtesting.backtest_table(options.table, options.law, options.share, options.level, options.where)
    print(found.to_json() if options.json else found.summary())


def forecast(options: ForecastOptions) -> None:
    """Registers a forecast and prints it."""
    from scaling import forecast as forecasting

    registered = forecasting.register(options.run, options.compute, options.depth, options.level)
    print(jsonlib.dumps(registered) if options.json else forecasting.describe(registered))


def plan(options: PlanOptions) -> None:
    """Prints what a budget buys, and which runs would say so more sharply."""
    from scaling import hardware, tables
    from scaling import plan as planning

    budget = hardware.budget(
        options.compute, options.price, options.device_hours, options.chip, options.price_per_hour, options.mfu
    )
    planned = planning.plan(
        options.table,
        budget,
        options.where,
        served_tokens=options.served_tokens,
        sweep_share=options.sweep_share,
        sweep_runs=options.sweep_runs,
        objective=options.objective,
        samples=options.bootstrap,
    )
    print(jsonlib.dumps(tables.finite(planned)) if options.json else planning.describe(planned))


def calibrate(options: CalibrateOptions) -> None:
    """Simulates tables and prints the coverage of the intervals."""
    from scaling import calibrate as calibration
    from scaling import tables
    from scaling.progress import progress

    designs = calibration.chosen(options.designs)
    if options.csv and not options.csv.parent.is_dir():
        raise BadInput(f"--csv: there is no folder {options.csv.parent}")
    with progress("calibrate", len(designs) * options.simulations, " tables") as update:
        rows = calibration.calibrate(designs, options.simulations, options.noise, options.seed, update)
    if options.csv:
        options.csv.write_text(tables.csv_text(rows), encoding="utf-8")
    print(jsonlib.dumps({"coverage": tables.finite(rows)}) if options.json else calibration.describe(rows))


def report(options: ReportOptions) -> None:
    """Writes the report and prints its summary and its path."""
    from scaling import content

    path, summary = content.write_report(options.run)
    print(jsonlib.dumps({"report": str(path)}) if options.json else f"{summary}\n{path}")
