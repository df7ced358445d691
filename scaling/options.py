"""What the command line of llm-jax takes: a dataclass a verb, which scaling/parsing.py fills.

Nothing heavy is imported here, so that --help answers at once.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec

from llm_jax import files
from llm_jax.config import Data, Mesh, Model, Train
from llm_jax.settings import BadInput


def _path(words: list[str]) -> Path:
    """tyro would make a page of a ValueError; this is one line."""
    try:
        return files.as_path(words[0])
    except BadInput as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


AnyPath = Annotated[
    Path,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=_path,
        is_instance=lambda value: isinstance(value, PurePath),
        str_from_instance=lambda path: [str(path)],
    ),
]
"""A local path, or one of a bucket."""
RunFolder = Annotated[Positional[AnyPath], arg(metavar="RUN")]
Json = Annotated[bool, arg(help="Print one JSON object and nothing else.")]


@dataclass(frozen=True)
class TrainOptions:
    """Train one model: an experiment's base config, or the defaults."""

    experiment: Annotated[Positional[Path | None], arg(metavar="EXPERIMENT.py")] = None
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    mesh: Mesh = Mesh()
    run: AnyPath | None = None
    """The run directory, perhaps gs://BUCKET/NAME; default runs/NAME-train. A run that was stopped goes on."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes that train together, one a host; not needed where Cloud TPU, Slurm (srun), Open MPI or
    Kubernetes has started them. Each runs the same command but for --process_id."""
    num_processes: int | None = None
    """Of that job; 1 trains alone, whatever the launcher has started."""
    process_id: int | None = None
    """Of this one, from 0."""
    json: Json = False


@dataclass(frozen=True)
class SweepOptions:
    """Train every trial of an experiment; what is there already is not trained again."""

    experiment: Annotated[Positional[Path], arg(metavar="EXPERIMENT.py")]
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    mesh: Mesh = Mesh()
    axis: UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """NAME VALUE [VALUE ...]: replaces the experiment's axes; several are combined by product. NAME is any field by its dotted
    name, or depth (rung of the ladder), or compute (FLOPs: D = C / 6N)."""
    run: AnyPath | None = None
    """The run directory, perhaps gs://BUCKET/NAME; default runs/NAME."""
    workers: int | None = None
    """Processes that train beside each other. Default: one for each GPU or TPU chip, here or of the Ray cluster, where there are any;
    else one here and in Slurm, one for each CPU of a Ray cluster."""
    launcher: Literal["local", "ray", "slurm"] = "local"
    """Where workers run: here, as tasks of a Ray cluster ($RAY_ADDRESS), or as an array of Slurm jobs. On other machines the run
    directory must be in a bucket or on a file system that all of them share."""
    gpus: int | None = None
    """Of each worker, on each of its hosts; default 1, and all of them for one worker here, or for one of several hosts on Ray. For
    Slurm they must be given."""
    tpus: int | None = None
    """TPU chips of each worker; default as for GPUs."""
    hosts: int | None = None
    """Of each worker, on Ray or Slurm: one process on each of so many nodes, which train each trial together."""
    topology: str | None = None
    """TPU slice of each worker, on Ray, such as v5e:4x4: its hosts train each trial together."""
    cpus: int | None = None
    """Of each worker on Ray (default 1) or Slurm (default 4)."""
    hours: float | None = None
    """Of a Slurm job, default 24; one whose time is up goes back into the queue."""
    sbatch: tuple[str, ...] = ()
    """NAME=VALUE ...: more options of Slurm's sbatch, such as partition=gpu account=lab."""
    dry_run: bool = False
    """List the trials and stop."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes that train together, one a host; not needed where Cloud TPU, Slurm (srun), Open MPI or
    Kubernetes has started them. Each runs the same command but for --process_id."""
    num_processes: int | None = None
    """Of that job; 1 trains alone, whatever the launcher has started."""
    process_id: int | None = None
    """Of this one, from 0."""
    json: Json = False


@dataclass(frozen=True)
class StatusOptions:
    """Show the trials of a run."""

    run: RunFolder
    watch: bool = False
    """Show it again every two seconds, of a bucket every twenty, until all trials have ended."""
    json: Json = False


@dataclass(frozen=True)
class FitOptions:
    """Fit a scaling law to a run, or to any CSV with the columns that the law reads."""

    table: Annotated[Positional[AnyPath | None], arg(metavar="RUN|TABLE.csv")] = None
    law: str = "chinchilla"
    """A name that --list shows, or a function of your own, path/to/file.py:function."""
    objective: str = ""
    """huber:DELTA, l1 or lsq, each with :scale for noise of fitted width, :log or :linear; default: that of the law's paper."""
    where: str = ""
    """Rows to keep, for instance 'excluded_by_paper == 0 and N_params > 1e6'."""
    ci: str = "all"
    """Ways to the 95 % intervals: profile, hessian, bootstrap, bootstrap:N for N resamples, all side by side, or none."""
    cluster: str = ""
    """A column, such as seed or trunk, whose equal values mark rows that share their noise."""
    by: str = ""
    """A column, such as family: fit the rows of each of its values, and show the groups side by side."""
    conventions: bool = False
    """Also show the exponents under every count of N and C that the table has."""
    hold: tuple[str, ...] = ()
    """NAME=VALUE ...: parameters that are given, not fitted."""
    list: bool = False
    """List all laws with formula and columns, and stop."""
    json: Json = False


@dataclass(frozen=True)
class BacktestOptions:
    """Forecast a table's larger runs from its smaller ones, and compare with what was measured."""

    table: Annotated[Positional[AnyPath], arg(metavar="RUN|TABLE.csv")]
    law: str = "chinchilla"
    """A law of N_params and D_tokens, by name or as path/to/file.py:function."""
    share: float = 0.1
    """Rows up to this share of the largest compute are fitted, the others are forecast."""
    level: float = 0.9
    """Of the prediction intervals."""
    where: str = ""
    """Rows to keep, for instance 'excluded_by_paper == 0 and N_params > 1e6'."""
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
class PlanOptions:
    """Say what a budget buys by the fitted law: best N and D, cost of other sizes, serving, and the next sweep."""

    table: Annotated[Positional[AnyPath], arg(metavar="RUN|TABLE.csv")]
    compute: float | None = None
    """FLOPs of the run to plan, 6 N D; or give --price or --device_hours."""
    price: float | None = None
    """What the run may cost, with --chip and --price_per_hour."""
    device_hours: float | None = None
    """Hours of one chip times the chips, with --chip."""
    chip: str | None = None
    """For instance a100, h100, h200, b200, mi300x, tpu-v5e or tpu-v6e."""
    price_per_hour: float | None = None
    """Of one chip; no price is known here."""
    mfu: float = 0.4
    """Model FLOPs utilisation: the share of the chip's dense bf16 peak that training reaches."""
    served_tokens: float | None = None
    """Tokens to be served in the model's life; also finds the model of the same loss that costs least in all."""
    sweep_share: float = 0.1
    """Of the budget, for the next sweep."""
    sweep_runs: int = 8
    """At most, in the next sweep."""
    objective: str = "huber:1e-3"
    """As for llm-jax fit."""
    where: str = ""
    """Rows to keep, as for llm-jax fit."""
    bootstrap: int = 1000
    """Resamples for the intervals."""
    json: Json = False


@dataclass(frozen=True)
class VerifyOptions:
    """Train the run that was forecast, and score the forecast."""

    run: RunFolder
    json: Json = False


@dataclass(frozen=True)
class CalibrateOptions:
    """Measure on simulated tables how often the intervals of a fit hold the truth."""

    simulations: int = 1000
    """Tables a design; the bootstrap gets one in twenty."""
    designs: tuple[str, ...] = ()
    """Parts of names, such as isoflop-20 or grid-60-student3-epoch; default: all."""
    noise: float = 0.01
    """Of the loss, relative."""
    seed: int = 0
    csv: Path | None = None
    """Also write the rows there."""
    json: Json = False


@dataclass(frozen=True)
class BenchFitOptions:
    """Time fits of scaling laws against the loop over SciPy of published analyses."""

    table: Annotated[Positional[AnyPath | None], arg(metavar="RUN|TABLE.csv")] = None
    """Runs to fit Chinchilla's law to; default: 240 simulated ones with 1 % noise."""
    where: str = ""
    """Rows to keep, as for llm-jax fit."""
    full: bool = False
    """Time all of SciPy's 4,500 starts and 4,000 bootstraps, not a random sample of each that is scaled up."""
    json: Json = False


@dataclass(frozen=True)
class BenchTrainOptions:
    """Time the training step of a model: tokens a second, utilisation, memory, compilation."""

    experiment: Annotated[Positional[Path | None], arg(metavar="EXPERIMENT.py")] = None
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    mesh: Mesh = Mesh()
    depth: float | None = None
    """Rung of the experiment's ladder; default: the base config, which no trial need have."""
    lanes: int = 1
    """Trials of this shape side by side, their calls joined: a sweep on a GPU has two for models up to a width of 512."""
    alone: bool = False
    """Beside a mesh: also each of its devices for itself, on the rows that it has of the mesh's; says how many times as fast all are."""
    peer: UseAppendAction[tuple[str, ...]] = ()
    """nanodo=CHECKOUT or nanogpt=CHECKOUT: also time that package's step on the same work, turn about; again for another."""
    json: Json = False


@dataclass(frozen=True)
class BenchMoeOptions:
    """Time the training step of a mixture of experts beside the dense model with as many active parameters.

    Without any setting: 8 experts of half the MLP's width, 2 a token, on a GPU in GPT-2 small's shape with 32 rows a step.
    """

    experiment: Annotated[Positional[Path | None], arg(metavar="EXPERIMENT.py")] = None
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    json: Json = False


@dataclass(frozen=True)
class BenchCompareOptions:
    """Run the benches of a baseline again; exit status 1 where a ratio has fallen by more than 5 %."""

    baseline: Annotated[Positional[Path], arg(metavar="BASELINE.json")]
    write: bool = False
    """Give the file the device and the values of this machine."""
    json: Json = False


@dataclass(frozen=True)
class AotOptions:
    """Compile the training step for a TPU slice that is not there: memory, collectives, time. Exit status 1 where it does not fit."""

    experiment: Annotated[Positional[Path | None], arg(metavar="EXPERIMENT.py")] = None
    topology: str = "v5e:4x4"
    """VERSION:CHIPS, such as v5e:16x16, v5p:4x8x8 (256 chips, sold as v5p-512), v6e:4x4 or tpu7x:2x2x1."""
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    mesh: Mesh = Mesh()
    depth: float | None = None
    """Rung of the experiment's ladder; default: the base config, which no trial need have."""
    quick: bool = False
    """Compile with the least effort: several times faster, and memory differs by a few percent."""
    find: bool = False
    """Search meshes, microbatches and model.recompute for the fastest that fits; the best by a reckoning are compiled."""
    batches: tuple[int, ...] = ()
    """Tokens a step to search too, in place of the experiment's train.tokens_per_step."""
    tries: int = 3
    """Of --find: programs that fit, after which it stops."""
    json: Json = False


@dataclass(frozen=True)
class BenchSweepOptions:
    """Time a whole sweep against starting one process a trial: trials an hour, compilation and start-up included."""

    experiment: Annotated[Positional[Path], arg(metavar="EXPERIMENT.py")]
    alone: int | None = None
    """Trials that are run in a process each, evenly spaced; default: all."""
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
class ExplainOptions:
    """Print a model as a table: each part with its shape, parameters, FLOPs and activation memory."""

    experiment: Annotated[Positional[Path | None], arg(metavar="EXPERIMENT.py")] = None
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    depth: float | None = None
    """Rung of the experiment's ladder; default: the base config, which no trial need have."""
    json: Json = False


@dataclass(frozen=True)
class GenerateOptions:
    """Continue a text with a trained model, or turn a source into its target."""

    run: RunFolder
    prompt: str = "def "
    """Text to continue, or a source; <media> in it stands for the next file of --media."""
    media: tuple[Path, ...] = ()
    """Pictures, or .wav files, of a model with an encoder of media."""
    tokens: int = 256
    """Tokens to add."""
    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Draw among the k likeliest only."""
    beam: int = 1
    """Of a model trained on pairs: hypotheses of a beam search; 1 takes the likeliest token. Tokens and draws are not read there."""
    trial: str | None = None
    """Id, or its first digits; default: the trial with the lowest loss."""
    seed: int = 0
    json: Json = False


@dataclass(frozen=True)
class AttentionOptions:
    """Draw who attends to whom in each head of a trained model, for one text."""

    run: RunFolder
    prompt: str
    """The text. Of a model trained on pairs, the source; the target is what the model makes of it."""
    out: Annotated[AnyPath | None, arg(metavar="FILE.png|.svg")] = None
    """Where the figure goes; default RUN/attention.png."""
    trial: str | None = None
    """Id, or its first digits; default: the trial with the lowest loss."""
    json: Json = False
