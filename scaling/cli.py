"""llm-jax VERB: which verbs there are, and how they end.

Numerics are imported inside the verbs, so that --help answers at once.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from llm_jax import files
from llm_jax.settings import BadInput, did_you_mean
from llm_jax.training import hosts
from llm_jax.training.preemption import EXIT_STATUS, Preempted
from scaling.options import (
    AotOptions,
    AttentionOptions,
    BacktestOptions,
    BenchCompareOptions,
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
from scaling.parsing import parse
from scaling.verbs import bench, fits, models, runs

VERBS: dict[str, tuple[Any, Callable[[Any], int | None]]] = {
    "train": (TrainOptions, runs.train),
    "sweep": (SweepOptions, runs.sweep),
    "status": (StatusOptions, runs.status),
    "fit": (FitOptions, fits.fit),
    "backtest": (BacktestOptions, fits.backtest),
    "forecast": (ForecastOptions, fits.forecast),
    "verify": (VerifyOptions, runs.verify),
    "plan": (PlanOptions, fits.plan),
    "calibrate": (CalibrateOptions, fits.calibrate),
    **{f"bench {name}": one for name, one in bench.BENCHES.items()},
    "bench compare": (BenchCompareOptions, bench.bench_compare),
    "aot": (AotOptions, models.aot),
    "report": (ReportOptions, fits.report),
    "data": (DataOptions, models.data),
    "explain": (ExplainOptions, models.explain),
    "generate": (GenerateOptions, models.generate),
    "attention": (AttentionOptions, models.attention),
}


def _usage(group: str = "") -> str:
    """All verbs, or those of two words of which `group` is the first."""
    verb = f"{group} VERB".lstrip()
    lines = [f"usage: llm-jax {verb} [OPTIONS]", ""]
    if not group:
        lines += ["sweep → fit → forecast → verify: scaling experiments on language models.", ""]
    for name, (options, _) in VERBS.items():
        if name.startswith(f"{group} ".lstrip()):
            lines.append(f"  {name:15}{(options.__doc__ or '').splitlines()[0]}")
    return "\n".join([*lines, "", f"llm-jax {verb} --help shows a verb's options."])


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
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(_usage())
            return 0 if words else 2
        if words[0] == "--version":
            from llm_jax import __version__

            print(__version__)
            return 0
        if words[0] == "work":
            runs.work(files.as_path(words[1]), int(words[2]), int(words[3]))
            return 0
        name = words[0] if words[0] in VERBS else " ".join(words[:2])
        asked = words[1:2] in ([], ["-h"], ["--help"])
        if asked and any(one.startswith(f"{words[0]} ") for one in VERBS):
            print(_usage(words[0]))
            return 0 if words[1:] else 2
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
