"""llm-jax VERB: one thin function a verb.

Each verb's options are a dataclass; numerics are imported inside the verbs, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json as jsonlib
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from llm_jax.config import BadInput, Config, Data, Model, Train, did_you_mean, field_names, to_dict

Options = TypeVar("Options")
RunFolder = Annotated[Positional[Path], arg(metavar="RUN")]
Json = Annotated[bool, arg(help="Print one JSON object and nothing else.")]


@dataclass(frozen=True)
class TrainOptions:
    """Train one model: an experiment's base config, or the defaults."""

    experiment: Annotated[Positional[Path | None], arg(metavar="EXPERIMENT.py")] = None
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    run: Path | None = None
    """The run directory; default runs/NAME-train. A run that was stopped goes on."""
    json: Json = False


@dataclass(frozen=True)
class SweepOptions:
    """Train every trial of an experiment; what is there already is not trained again."""

    experiment: Annotated[Positional[Path], arg(metavar="EXPERIMENT.py")]
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    axis: UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """NAME VALUE [VALUE ...]: replaces the experiment's axes; several are combined by product. NAME is any field by its dotted
    name, or depth (rung of the ladder), or compute (FLOPs: D = C / 6N)."""
    run: Path | None = None
    """The run directory; default runs/NAME."""
    workers: int = 1
    """Processes that train beside each other."""
    dry_run: bool = False
    """List the trials and stop."""
    json: Json = False


@dataclass(frozen=True)
class StatusOptions:
    """Show the trials of a run."""

    run: RunFolder
    watch: bool = False
    """Show it again every two seconds until all trials have ended."""
    json: Json = False


@dataclass(frozen=True)
class FitOptions:
    """Fit a scaling law to a run, or to any CSV with columns N_params, D_tokens, loss."""

    table: Annotated[Positional[Path], arg(metavar="RUN|TABLE.csv")]
    law: str = "chinchilla"
    objective: str = "huber:1e-3"
    """huber:DELTA in log space, or lsq."""
    where: str = ""
    """Rows to keep, for instance 'excluded_by_paper == 0 and N_params > 1e6'."""
    bootstrap: int = 1000
    """Resamples for the intervals; 0 for none."""
    json: Json = False


@dataclass(frozen=True)
class ForecastOptions:
    """Register the loss of a larger run before it trains."""

    run: RunFolder
    compute: float | None = None
    """FLOPs of the run to forecast; default: the experiment's own target."""
    depth: float | None = None
    """Rung of the ladder; default: the one nearest the law's optimum."""
    level: float = 0.9
    """Of the prediction interval."""
    json: Json = False


@dataclass(frozen=True)
class VerifyOptions:
    """Train the run that was forecast, and score the forecast."""

    run: RunFolder
    json: Json = False


@dataclass(frozen=True)
class ReportOptions:
    """Write RUN/report.html with all figures, and print what was found."""

    run: RunFolder
    json: Json = False


@dataclass(frozen=True)
class DataOptions:
    """Prepare data and say what it holds."""

    experiment: Annotated[Positional[Path | None], arg(metavar="EXPERIMENT.py")] = None
    model: Model = Model()
    data: Data = Data()
    check: bool = False
    """Compare every file with the checksum taken when it was written."""
    json: Json = False


@dataclass(frozen=True)
class GenerateOptions:
    """Continue a text with a trained model."""

    run: RunFolder
    prompt: str = "def "
    tokens: int = 256
    """Tokens to add."""
    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Draw among the k likeliest only."""
    trial: str | None = None
    """Id, or its first digits; default: the trial with the lowest loss."""
    seed: int = 0
    json: Json = False


def train(options: TrainOptions) -> None:
    from llm_jax.config import fingerprint
    from scaling import ledger
    from scaling.experiment import Experiment

    base = _experiment(options)
    alone = Experiment(base.model, base.data, base.train, base.ladder)
    name = f"{options.experiment.stem if options.experiment else 'default'}-train"
    folder = options.run or Path("runs") / f"{name}-{fingerprint(alone.config)}"
    _run_trials(folder, name, alone, "", options.json)
    if not options.json:
        row = ledger.rows(folder)[0]
        print(
            f"loss {row['loss']:.4f} ± {row['loss_se']:.4f} nats per token, {row['bits_per_byte']:.4f} bits per byte; {folder}"
        )


def sweep(options: SweepOptions) -> None:
    from scaling import experiment as experiments

    base = _experiment(options)
    if options.axis:
        base = dataclasses.replace(base, axes=experiments.product(*(_axis(base, words) for words in options.axis)))
    folder = options.run or Path("runs") / options.experiment.stem
    if options.workers < 1:
        raise BadInput(f"--workers must be at least 1, got {options.workers}")
    if options.dry_run:
        rows = [{"id": one.id, **one.point, **one.counts} for one in experiments.trials(base)]
        _print_rows(rows, options.json)
        return
    _run_trials(
        folder, options.experiment.stem, base, experiments.load(options.experiment)[1], options.json, options.workers
    )


def _run_trials(folder: Path, name: str, experiment: Any, docstring: str, json: bool, workers: int = 1) -> None:
    from scaling import experiment as experiments
    from scaling import ledger

    trials = experiments.trials(experiment)
    prepared = _prepare(experiment.config)
    ledger.create(folder, name, docstring, experiment, trials, prepared)
    from scaling import launch

    others = launch.spawn_workers(folder, workers)
    try:
        launch.work(folder, prepared)
    finally:
        for other in others:
            other.wait()
    rows = [row for row in ledger.rows(folder) if row["id"] in {trial.id for trial in trials}]
    _print_rows(rows, json)


def work(folder: Path, index: int, workers: int) -> None:
    """A worker beside others; `sweep --workers` starts these."""
    from scaling import launch, ledger

    launch.share_cpus(index, workers)
    launch.work(folder, _prepare(ledger.base_config(folder)), index / workers)


def status(options: StatusOptions) -> None:
    import time

    from scaling import ledger

    ledger.describe(options.run)
    while True:
        rows = ledger.rows(options.run)
        if options.watch and sys.stdout.isatty():
            print("\033[2J\033[H", end="")
        _print_rows(rows, options.json)
        if not options.watch or all(row["status"] in ("done", "failed") for row in rows):
            return
        time.sleep(2)


def fit(options: FitOptions) -> None:
    from scaling import analysis

    found = analysis.fit_table(options.table, options.law, options.objective, options.where, options.bootstrap)
    print(found.to_json() if options.json else found.summary())


def forecast(options: ForecastOptions) -> None:
    from scaling import forecast as forecasting

    registered = forecasting.register(options.run, options.compute, options.depth, options.level)
    print(jsonlib.dumps(registered) if options.json else forecasting.describe(registered))


def verify(options: VerifyOptions) -> None:
    from scaling import forecast as forecasting
    from scaling import ledger

    ledger.describe(options.run)
    verdict = forecasting.verify(options.run, _prepare)
    print(jsonlib.dumps(verdict) if options.json else forecasting.describe_verdict(options.run, verdict))


def report(options: ReportOptions) -> None:
    from scaling import analysis

    path, summary = analysis.write_report(options.run)
    print(jsonlib.dumps({"report": str(path)}) if options.json else f"{summary}\n{path}")


def data(options: DataOptions) -> None:
    from llm_jax.data import prepare

    base = _experiment(options)
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


def generate(options: GenerateOptions) -> None:
    from llm_jax.generation import sampling
    from scaling import ledger

    ledger.describe(options.run)
    done = [row for row in ledger.rows(options.run) if row["status"] == "done"]
    if not done:
        raise BadInput(f"{options.run} has no finished trial; see llm-jax status {options.run}")
    ids = {row["id"]: row for row in done}
    if options.trial:
        chosen = [key for key in ids if key.startswith(options.trial)]
        if len(chosen) != 1:
            raise BadInput(
                f'--trial "{options.trial}" names {len(chosen)} finished trials{did_you_mean(options.trial, ids)}'
            )
    else:
        chosen = [min(ids, key=lambda key: ids[key]["loss"])]
    trial = next(one for one in ledger.trials(options.run) if one.id == chosen[0])
    text = sampling.continue_text(
        trial.config,
        _prepare(trial.config),
        ledger.trial_folder(options.run, trial.id),
        options.prompt,
        options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
    )
    print(
        jsonlib.dumps({"trial": trial.id, "prompt": options.prompt, "text": text})
        if options.json
        else options.prompt + text
    )


VERBS: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "train": (TrainOptions, train),
    "sweep": (SweepOptions, sweep),
    "status": (StatusOptions, status),
    "fit": (FitOptions, fit),
    "forecast": (ForecastOptions, forecast),
    "verify": (VerifyOptions, verify),
    "report": (ReportOptions, report),
    "data": (DataOptions, data),
    "generate": (GenerateOptions, generate),
}


def _experiment(options: Any) -> Any:
    """The experiment that the options name, with the command line's config in place of its own."""
    from scaling.experiment import DERIVED, Experiment, load

    base = load(options.experiment)[0] if options.experiment else Experiment()
    changed = dataclasses.replace(
        base, model=options.model, data=options.data, train=getattr(options, "train", base.train)
    )
    before, after = _flat(to_dict(base.config)), _flat(to_dict(changed.config))
    given = {name for name in after if before[name] != after[name]}
    for point in () if getattr(options, "axis", None) else changed.axes:
        ruled = set(point) - set(DERIVED)
        if "depth" in point:
            ruled |= set(base.ladder.shape(float(point["depth"])))
        if "compute" in point:
            ruled.add("train.tokens")
        if clash := sorted(given & ruled):
            raise BadInput(f"--{clash[0]} is set by an axis of {options.experiment}; give other points with --axis")
    return changed


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _axis(experiment: Any, words: Sequence[str]) -> Any:
    """--axis NAME VALUE ...: values take the type of the field."""
    from scaling.experiment import DERIVED, axis

    if len(words) < 2:
        raise BadInput(f"--axis takes a name and at least one value, got {' '.join(words) or 'nothing'}")
    name, *values = words
    names = field_names(Config)
    if name not in (*names, *DERIVED):
        raise BadInput(f'axis "{name}" names no field{did_you_mean(name, [*names, *DERIVED])}')
    if name in DERIVED:
        try:
            return axis(name, [float(value) for value in values])
        except ValueError:
            raise BadInput(f"--axis {name} takes numbers, got {' '.join(values)}") from None
    parsed = []
    for value in values:
        one = _parse(
            _ConfigOptions,
            [f"--{name}", value],
            "axis",
            default=_ConfigOptions(experiment.model, experiment.data, experiment.train),
        )
        parsed.append(_flat(to_dict(Config(one.model, one.data, one.train)))[name])
    return axis(name, parsed)


@dataclass(frozen=True)
class _ConfigOptions:
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()


def _prepare(config: Config) -> Any:
    from llm_jax.data import prepare
    from scaling.progress import progress

    with progress("data", 1.0, "") as update:
        return prepare.prepare(config, lambda what, done, total: update(done / total if total else 0.0, what))


def _print_rows(rows: Sequence[dict[str, Any]], json: bool) -> None:
    if json:
        clean = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
        print(jsonlib.dumps({"trials": clean}))
        return
    columns = {
        "id": "{}",
        "status": "{}",
        "depth": "{:g}",
        "N_params": "{:,}",
        "D_tokens": "{:,}",
        "C_flops": "{:.2e}",
        "tokens_per_step": "{:,}",
        "peak_lr": "{:.2e}",
        "loss": "{:.4f}",
        "bits_per_byte": "{:.4f}",
        "tokens_per_second": "{:,.0f}",
        "reason": "{}",
    }
    shown = [name for name in columns if any(row.get(name) not in (None, "") for row in rows)]
    table = [shown]
    for row in rows:
        empty = [
            row.get(name) is None or (isinstance(row.get(name), float) and math.isnan(row[name])) for name in shown
        ]
        table.append(["" if none else columns[name].format(row[name]) for name, none in zip(shown, empty, strict=True)])
    widths = [max(len(line[i]) for line in table) for i in range(len(shown))]
    for line in table:
        print(
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
        )


def _plain_numbers(words: Sequence[str]) -> list[str]:
    """1e9 becomes 1000000000 where a setting is given: fields that count are integers."""
    plain, of_setting = [], False
    for word in words:
        if word.startswith("--"):
            of_setting = word.startswith(("--model.", "--data.", "--train."))
        elif of_setting and re.fullmatch(r"\d+(\.\d+)?[eE]\+?\d+", word) and float(word).is_integer():
            word = str(int(float(word)))
        plain.append(word)
    return plain


def _parse(kind: type[Options], words: Sequence[str], verb: str, default: Options | None = None) -> Options:
    """tyro's parser; what it refuses becomes one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found, unknown = tyro.cli(
                kind,
                args=_plain_numbers(words),
                default=default,
                prog=f"llm-jax {verb}",
                use_underscores=True,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise BadInput(_one_line(said.getvalue())) from None
    if unknown:
        flags = [name.replace("_", "-") if "." not in name else name for name in _flags(kind)]
        word = next((word for word in unknown if word.startswith("-")), unknown[0])
        if word.startswith("-"):
            raise BadInput(f'"{word}" is no option of {verb}{did_you_mean(word, flags)}')
        raise BadInput(f'{verb} does not take "{word}"; see llm-jax {verb} --help')
    assert found is not None  # only a default that is None could be
    return found


def _flags(kind: Any) -> list[str]:
    names = []
    for field in dataclasses.fields(kind):
        nested = {"model": Model, "data": Data, "train": Train}.get(field.name)
        names += (
            [f"--{field.name}.{name}" for name in field_names(nested)]
            if nested and "Positional" not in str(field.type)
            else [f"--{field.name}"]
        )
    return names


def _one_line(box: str) -> str:
    """The message of tyro's box of text."""
    lines = [line.strip("│ ").strip() for line in box.splitlines()]
    body: list[str] = []
    for line in lines:
        if line.startswith("╭"):
            continue
        if line.startswith(("──", "╰")):
            break
        body.append(line)
    text = re.sub(r"\s+", " ", " ".join(body)).strip()
    return (
        re.sub(r"^Error parsing (?:model|data|train)(?:\.synthetic)?: ", "", text)
        or "the arguments are off; see --help"
    )


def _usage() -> str:
    lines = [
        "usage: llm-jax VERB [OPTIONS]",
        "",
        "sweep → fit → forecast → verify: scaling experiments on language models.",
        "",
    ]
    for name, (options, _) in VERBS.items():
        lines.append(f"  {name:10}{(options.__doc__ or '').splitlines()[0]}")
    return "\n".join([*lines, "", "llm-jax VERB --help shows a verb's options."])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb. Returns the exit status: 0, 2 for input that cannot be used, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
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
        if words[0] not in VERBS:
            raise BadInput(f'"{words[0]}" is no verb{did_you_mean(words[0], VERBS)}')
        kind, verb = VERBS[words[0]]
        verb(_parse(kind, words[1:], words[0], _defaults(kind, words[1:])))
    except BadInput as error:
        print(f"llm-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("llm-jax: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _defaults(kind: Any, words: Sequence[str]) -> Any:
    """Options start from the experiment's own config, so that --help shows it and overrides change it."""
    names = {field.name for field in dataclasses.fields(kind)}
    path = next((word for word in words if word.endswith(".py")), None)
    if "experiment" not in names or path is None:
        return None
    from scaling.experiment import load

    base = load(path)[0]
    values = {"model": base.model, "data": base.data, "train": base.train}
    return kind(experiment=Path(path), **{name: value for name, value in values.items() if name in names})


if __name__ == "__main__":
    sys.exit(main())
