"""Compiles every experiment of this folder for its TPU slice and writes plans.json and plans.md beside itself.

    python experiments/tpu/plans.py

It needs llm_jax[tpu] and no TPU: two CPU cores and four to ten minutes.
"""

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PLANS = {"dense_1b7": "v5e:16x16", "dense_8b": "v5e:16x16", "dense_70b": "v5p:4x8x8", "moe_8x7b": "v5p:4x4x8"}
COMMAND = "llm-jax aot experiments/tpu/{}.py --topology {} --quick --json"


def plan(name: str, topology: str) -> dict:
    """What `llm-jax aot` says of one."""
    words = COMMAND.format(name, topology).split()[1:]
    command = [sys.executable, "-m", "scaling.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parents[1])
    if done.returncode > 1:
        raise SystemExit(done.stderr)
    return {"experiment": name, **json.loads(done.stdout)}


def table(found: dict) -> str:
    """Markdown, a row a plan."""
    lines = [
        "# Training steps compiled for TPU slices",
        "",
        f"Compiled {found['date']} with jax {found['plans'][0]['jax']} and libtpu {found['plans'][0]['libtpu']} on a machine without a"
        " TPU, by `python experiments/tpu/plans.py`, which runs",
        f"`{COMMAND.format('NAME', 'TOPOLOGY')}`. No chip was touched: memory is the compiler's, times are rooflines at the",
        "chip's published rates: of a step at least the longest of products, memory and links, and their sum if nothing overlaps. All is",
        "of one device and one step.",
        "",
        "| experiment | topology | mesh | N | tokens a step | recompute | fits | peak GiB | of | FLOPs | received GiB | compute s"
        " | memory s | links s | step s at least | no overlap | MFU at most | compiled in s |",
        "|" + 18 * " --- |",
    ]
    for one in found["plans"]:
        received = sum(kind["received_bytes"] for kind in one["collectives"].values())
        cells = [
            one["experiment"],
            one["topology"],
            " x ".join(f"{name} {size}" for name, size in one["mesh"].items()),
            f"{one['n_params']:,}",
            f"{one['tokens_per_step']:,}",
            one["recompute"],
            "yes" if one["fits"] else "no",
            f"{one['peak_bytes'] / 2**30:.1f}",
            f"{one['hbm_bytes'] / 2**30:.2f}",
            f"{one['flops']:.3g}",
            f"{received / 2**30:.1f}",
            *(f"{one['seconds'][name]:.3f}" for name in ("compute", "hbm", "ici")),
            f"{one['step_seconds_roofline']:.3f}",
            f"{one['step_seconds_no_overlap']:.3f}",
            f"{100 * one['mfu']:.0f} %",
            f"{one['compile_seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Collectives of a step: times, and GiB of the whole arrays.", ""]
    for one in found["plans"]:
        kinds = (
            f"{kind} {many['count']:,}, {many['bytes'] / 2**30:.2f}"
            for kind, many in sorted(one["collectives"].items())
        )
        lines.append(f"- {one['experiment']}: {'; '.join(kinds)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = {"date": str(datetime.date.today()), "command": COMMAND, "plans": []}
    for name, topology in PLANS.items():
        found["plans"].append(plan(name, topology))
        print(name, found["plans"][-1]["fits"], flush=True)
    (HERE / "plans.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "plans.md").write_text(table(found))
