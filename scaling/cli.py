"""llm-jax VERB: one thin function a verb.

Numerics are imported inside the verbs, so that --help answers at once.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json as jsonlib
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_jax.config import Config, Mesh
from llm_jax.settings import BadInput, did_you_mean, fingerprint
from llm_jax.training import hosts
from llm_jax.training.preemption import EXIT_STATUS, Preempted
from scaling.options import (
    AotOptions,
    AttentionOptions,
    BacktestOptions,
    BenchCompareOptions,
    BenchFitOptions,
    BenchMoeOptions,
    BenchSweepOptions,
    BenchTrainOptions,
    CalibrateOptions,
    DataOptions,
    ExplainOptions,
    FitOptions,
    ForecastOptions,
    GenerateOptions,
    PlanOptions,
    ReportOptions,
    StatusOptions,
    SweepOptions,
    TrainOptions,
    VerifyOptions,
)
from scaling.parsing import chosen_experiment, parse

if TYPE_CHECKING:
    from llm_jax.data.prepare import Prepared
    from scaling.experiment import Experiment, Trial


def train(options: TrainOptions) -> None:
    """Trains one model in a run directory of one trial."""
    from scaling import ledger
    from scaling.experiment import Experiment

    base, _ = chosen_experiment(options)
    hosts.connect(options.coordinator, options.num_processes, options.process_id)
    alone = Experiment(base.model, base.data, base.train, base.mesh, base.ladder)
    name = f"{options.experiment.stem if options.experiment else 'default'}-train"
    folder = options.run or Path("runs") / f"{name}-{fingerprint(alone.config)}"
    asked, prepared = _create(folder, name, alone, "")
    from scaling import launch  # loads JAX: only now that nothing was refused

    launch.work(folder, prepared)
    if not hosts.first():
        return
    _print_trials([row for row in ledger.rows(folder) if row["id"] in asked], options.json)
    if not options.json:
        row = ledger.rows(folder)[0]
        print(
            f"loss {row['loss']:.4f} ± {row['loss_se']:.4f} nats per token, {row['bits_per_byte']:.4f} bits per byte; {folder}"
        )


def sweep(options: SweepOptions) -> None:
    """Trains every trial of an experiment that has no result yet, by workers here or on a cluster."""
    from scaling import experiment as experiments
    from scaling import launchers, ledger

    experiment, docstring = chosen_experiment(options)
    folder = options.run or Path("runs") / options.experiment.stem
    if options.workers is not None and options.workers < 1:
        raise BadInput(f"--workers must be at least 1, got {options.workers}")
    resources = launchers.Resources(options.gpus, options.tpus, options.cpus, options.hours)
    if options.dry_run:
        rows = [{"id": one.id, **one.point, **one.counts} for one in experiments.trials(experiment)]
        _print_trials(rows, options.json)
        return
    launchers.ready(options.launcher)
    workers = options.workers
    if options.launcher == "local":
        together = options.coordinator is not None or experiment.mesh != Mesh()
        workers = workers or (1 if together else launchers.default_workers(*launchers.devices(), resources))
        if workers == 1:  # of this host; else each has devices of its own, and no other process
            hosts.connect(options.coordinator, options.num_processes, options.process_id)
        elif options.coordinator is not None:
            raise BadInput("--workers share one host; processes that train together are one worker: give --workers 1")
    asked, prepared = _create(folder, options.experiment.stem, experiment, docstring)
    if options.launcher == "slurm":
        jobs = launchers.submit_to_slurm(folder, options.workers, resources, options.sbatch)
        names = [job.job_id for job in jobs]
        said = f"{len(jobs)} workers in the queue, from job {names[0]}; llm-jax status {folder} --watch follows them"
        print(jsonlib.dumps({"run": str(folder), "jobs": names}) if options.json else said)
        return
    if options.launcher == "ray":
        launchers.run_on_ray(folder, options.workers, resources)
    else:
        launchers.run_here(folder, prepared, workers, resources)
        if workers == 1 and not hosts.first():
            return
    _print_trials([row for row in ledger.rows(folder) if row["id"] in asked], options.json)


def _create(folder: Path, name: str, experiment: Experiment, docstring: str) -> tuple[set[str], Prepared]:
    """The run directory, made or found; the ids of its trials that the experiment asks for, and its data."""
    from llm_jax.training import initial
    from scaling import experiment as experiments
    from scaling import ledger

    trials = experiments.trials(experiment)
    for trial in trials:
        if trial.config.train.init_from:
            initial.plan(trial.config)
    if experiment.mesh != Mesh():  # which fits whatever there is
        from llm_jax.training import mesh

        for trial in trials:
            mesh.check(trial.config)
    prepared = _prepare(experiment.config)
    ledger.create(folder, name, docstring, experiment, trials, prepared)
    return {trial.id for trial in trials}, prepared


def _prepare(config: Config) -> Prepared:
    from scaling import launchers

    return launchers.prepared_data(config)


def _print_trials(rows: Sequence[Mapping[str, Any]], json: bool) -> None:
    from scaling import tables

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(jsonlib.dumps({"trials": tables.finite(rows)}) if json else tables.terminal_text(rows, width))


def work(folder: Path, index: int, workers: int) -> None:
    """A worker beside others; `sweep --workers` starts these."""
    from scaling import launchers

    launchers.share_cpus(index, workers)
    launchers.work(folder, index, workers)


def status(options: StatusOptions) -> None:
    """Prints the trials of a run; with --watch again until all have ended."""
    from scaling import goodput, ledger

    ledger.describe(options.run)
    while True:
        rows = ledger.rows(options.run)
        if options.watch and sys.stdout.isatty():
            print("\033[2J\033[H", end="")
        _print_trials(rows, options.json)
        if not options.json:
            count = Counter(row["status"] for row in rows)
            print(", ".join(f"{number} {state}" for state, number in count.items()))
            if time_went := goodput.describe(goodput.total(row["time"] for row in rows)):
                print(time_went)
        if not options.watch or all(row["status"] in ledger.ENDED for row in rows):
            return
        time.sleep(2)


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
    if options.table.is_dir() and not options.where:
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


def verify(options: VerifyOptions) -> None:
    """Trains the run that was forecast and prints how the forecast did."""
    from scaling import forecast as forecasting
    from scaling import ledger

    ledger.describe(options.run)
    verdict = forecasting.verify(options.run, _prepare)
    print(jsonlib.dumps(verdict) if options.json else forecasting.describe_verdict(options.run, verdict))


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


def bench_fit(options: BenchFitOptions) -> None:
    """Times fits and bootstraps and prints what was found."""
    # For matrices this small the threads of OpenBLAS only wait for each other; SciPy's L-BFGS-B takes up to ten times longer
    # with them. It is read when NumPy is loaded.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from scaling import bench as benchmarks
    from scaling import tables

    found = benchmarks.bench_fit(options.table, options.where, options.full)
    print(jsonlib.dumps(tables.finite(found)) if options.json else benchmarks.describe(found))


def bench_train(options: BenchTrainOptions) -> None:
    """Times a training step and prints what was found."""
    from scaling import experiment as experiments
    from scaling import peers, tables, throughput

    checkouts = peers.parse(options.peer)
    base, _ = chosen_experiment(options)
    point = {"depth": options.depth} if options.depth is not None else {}
    config = experiments.trial(base.config, base.ladder, point).config
    found = peers.bench(config, checkouts) if checkouts else throughput.bench_train(config)
    describe = peers.describe if checkouts else throughput.describe
    print(jsonlib.dumps(tables.finite(found)) if options.json else describe(found))


def bench_moe(options: BenchMoeOptions) -> None:
    """Times a mixture beside its dense twin and prints what was found."""
    from llm_jax import ladder
    from scaling import mixture, tables

    base, _ = chosen_experiment(options)
    said = options.experiment is not None or base.config != Config()
    config = ladder.resolve(mixture.with_experts(base.config if said else mixture.default()))
    found = mixture.bench_moe(config)
    print(jsonlib.dumps(tables.finite(found)) if options.json else mixture.describe(found))


def bench_compare(options: BenchCompareOptions) -> int:
    """Runs the benches of a baseline and prints how they did. Returns 1 where one is slower."""
    from scaling import baseline, tables

    benches = [name.removeprefix("bench ") for name in VERBS if name.startswith("bench ") and name != "bench compare"]
    found = baseline.compare(options.baseline, benches, options.write)
    print(jsonlib.dumps(tables.finite(found)) if options.json else baseline.describe(found))
    return 1 if found["regressed"] else 0


def bench_sweep(options: BenchSweepOptions) -> None:
    """Times a sweep and single trials and prints what was found."""
    from scaling import sweep_speed, tables

    found = sweep_speed.bench_sweep(options.experiment, options.alone)
    print(jsonlib.dumps(tables.finite(found)) if options.json else sweep_speed.describe(found))


def aot(options: AotOptions) -> int:
    """Compiles a training step for a TPU slice and prints what was found; 1 where it does not fit."""
    from scaling import aot as ahead
    from scaling import experiment as experiments
    from scaling import hardware, tables

    hardware.tpu_slice(options.topology)
    ahead.prepare()
    base, _ = chosen_experiment(options)
    point = {"depth": options.depth} if options.depth is not None else {}
    config = experiments.trial(base.config, base.ladder, point).config
    if options.find:
        from scaling import mesh_search
        from scaling.progress import progress

        with progress("aot", options.tries, " programs") as update:
            best = mesh_search.find(
                config, options.topology, options.batches, options.tries, lambda done, _, what: update(done, what)
            )
        print(jsonlib.dumps(tables.finite(best)) if options.json else mesh_search.describe(best))
        return 0 if best["best"] else 1
    found = ahead.aot(config, options.topology, options.quick)
    print(jsonlib.dumps(tables.finite(found)) if options.json else ahead.describe(found))
    return 0 if found["fits"] else 1


def report(options: ReportOptions) -> None:
    """Writes the report and prints its summary and its path."""
    from scaling import content

    path, summary = content.write_report(options.run)
    print(jsonlib.dumps({"report": str(path)}) if options.json else f"{summary}\n{path}")


def data(options: DataOptions) -> None:
    """Prepares data and prints counts, tokenizer and folder."""
    from llm_jax.data import prepare

    base, _ = chosen_experiment(options)
    prepared = _prepare(base.config)
    bad = prepare.check(prepared) if options.check else []
    if bad:
        raise BadInput(f"{bad[0]} is not what was written; delete {prepared.folder} to prepare it again")
    values = {field.name: getattr(prepared, field.name) for field in dataclasses.fields(prepared)}
    values["folder"] = str(prepared.folder)
    if options.json:
        print(jsonlib.dumps(values))
        return
    for split in ("train", "validation"):
        tokens, size = prepared.tokens[split], prepared.bytes[split]
        print(
            f"{split:11}{prepared.documents[split]:>10,} documents {tokens:>14,} tokens {size:>14,} bytes {size / tokens:6.3f} a token"
        )
    print(f"tokenizer  {prepared.tokenizer_kind}, {prepared.vocab_size} ids, {prepared.tokenizer_sha256[:12]}")
    if prepared.entropy is not None:
        print(f"entropy    {prepared.entropy:.6f} nats per token, exact")
    print(f"folder     {prepared.folder}{'; all checksums match' if options.check else ''}")


def explain(options: ExplainOptions) -> None:
    """Prints the parts of a model, their sums, and what a run of it costs by each convention."""
    from llm_jax.settings import override
    from scaling import explain as explaining

    base, _ = chosen_experiment(options)
    config = override(base.config, base.ladder.shape(options.depth)) if options.depth is not None else base.config
    found = explaining.explain(config)
    print(jsonlib.dumps(found) if options.json else explaining.describe(found))


def _trained(run: Path, prefix: str | None) -> Trial:
    """The finished trial of a run whose id begins so, or the one with the lowest loss."""
    from scaling import ledger

    ledger.describe(run)
    losses = {row["id"]: row["loss"] for row in ledger.rows(run) if row["status"] == "done"}
    if not losses:
        raise BadInput(f"{run} has no finished trial; see llm-jax status {run}")
    chosen = [key for key in losses if key.startswith(prefix)] if prefix else [min(losses, key=lambda key: losses[key])]
    if len(chosen) != 1:
        raise BadInput(f'--trial "{prefix}" names {len(chosen)} finished trials{did_you_mean(str(prefix), losses)}')
    return next(trial for trial in ledger.trials(run) if trial.id == chosen[0])


def generate(options: GenerateOptions) -> None:
    """Prints a prompt and how a trained model goes on; of a model trained on pairs, a source and its target."""
    from llm_jax.generation import pairs, sampling
    from scaling import ledger

    trial = _trained(options.run, options.trial)
    trained = trial.config, _prepare(trial.config), ledger.trial_folder(options.run, trial.id)
    of_pairs = trial.config.data.source == "pairs"
    if of_pairs:
        text = pairs.transduce_text(*trained, options.prompt, width=options.beam)
    else:
        text = sampling.continue_text(
            *trained,
            options.prompt,
            options.tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            seed=options.seed,
            media=options.media,
        )
    if options.json:
        print(jsonlib.dumps({"trial": trial.id, "prompt": options.prompt, "text": text}))
    else:
        print(text if of_pairs else options.prompt + text)


def attention(options: AttentionOptions) -> None:
    """Draws the attention maps of a trained model for one text, and prints where; with --json the weights too."""
    from llm_jax import files
    from llm_jax.generation import maps
    from scaling import attention_figures, drawing, ledger

    trial = _trained(options.run, options.trial)
    out = options.out or options.run / "attention.png"
    writers: dict[str, Callable[..., str | bytes]] = {".png": drawing.png, ".svg": drawing.svg}
    if out.suffix not in writers:
        raise BadInput(f'--out "{out}" must end in .png or .svg')
    if not out.parent.is_dir():
        raise BadInput(f"--out: there is no folder {out.parent}")
    folder = ledger.trial_folder(options.run, trial.id)
    found = maps.maps_of_text(trial.config, _prepare(trial.config), folder, options.prompt)
    with drawing.style():
        plot = attention_figures.attention_plot(found, options.prompt)
    files.write_atomic(out, writers[out.suffix](plot))
    if not options.json:
        print(f"{plot.caption}\n{out}")
        return
    shown = {
        one.name: {"queries": one.queries, "keys": one.keys, "weights": one.weights_LxNxTxS.round(6).tolist()}
        for one in found
    }
    print(jsonlib.dumps({"trial": trial.id, "prompt": options.prompt, "figure": str(out), "maps": shown}))


VERBS: dict[str, tuple[Any, Callable[[Any], int | None]]] = {
    "train": (TrainOptions, train),
    "sweep": (SweepOptions, sweep),
    "status": (StatusOptions, status),
    "fit": (FitOptions, fit),
    "backtest": (BacktestOptions, backtest),
    "forecast": (ForecastOptions, forecast),
    "verify": (VerifyOptions, verify),
    "plan": (PlanOptions, plan),
    "calibrate": (CalibrateOptions, calibrate),
    "bench fit": (BenchFitOptions, bench_fit),
    "bench train": (BenchTrainOptions, bench_train),
    "bench sweep": (BenchSweepOptions, bench_sweep),
    "bench moe": (BenchMoeOptions, bench_moe),
    "bench compare": (BenchCompareOptions, bench_compare),
    "aot": (AotOptions, aot),
    "report": (ReportOptions, report),
    "data": (DataOptions, data),
    "explain": (ExplainOptions, explain),
    "generate": (GenerateOptions, generate),
    "attention": (AttentionOptions, attention),
}


def _usage() -> str:
    lines = [
        "usage: llm-jax VERB [OPTIONS]",
        "",
        "sweep → fit → forecast → verify: scaling experiments on language models.",
        "",
    ]
    for name, (options, _) in VERBS.items():
        lines.append(f"  {name:15}{(options.__doc__ or '').splitlines()[0]}")
    return "\n".join([*lines, "", "llm-jax VERB --help shows a verb's options."])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb. Returns the exit status: 0, 1 where aot finds that a program does not fit or bench compare one slower, 2 for bad input,
    75 when told to leave, 130 when interrupted, 141 for a closed pipe."""
    try:
        status = _main(list(sys.argv[1:] if argv is None else argv))
    except Exception:
        hosts.leave(1)
        raise
    if status:
        hosts.leave(status)
    return status


def _main(words: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot draw a letter is no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if words else 2
    try:
        if words[0] == "--version":
            from llm_jax import __version__

            print(__version__)
            return 0
        if words[0] == "work":
            work(Path(words[1]), int(words[2]), int(words[3]))
            return 0
        name = words[0] if words[0] in VERBS else " ".join(words[:2])
        if name not in VERBS:
            raise BadInput(f'"{name}" is no verb{did_you_mean(name, VERBS)}')
        kind, verb = VERBS[name]
        return verb(parse(kind, words[len(name.split()) :], name)) or 0
    except BadInput as error:
        print(f"llm-jax: {error}", file=sys.stderr)
        return 2
    except Preempted as error:
        print(f"llm-jax: told to leave {error}; the same command goes on from what is saved", file=sys.stderr)
        return EXIT_STATUS
    except KeyboardInterrupt:
        print("llm-jax: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
