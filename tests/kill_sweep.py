"""Twenty kills: a sweep killed with -9 at random moments ends with the ledger of an undisturbed one.

    python tests/kill_sweep.py [KILLS] [SEED]

Prints both hashes and exits with 1 where they differ. Five minutes on two cores for twenty.
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scaling import ledger

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "quickstart.py"
AXES = ["--axis", "depth", "1", "2", "3", "--axis", "compute", "1e10", "3e10", "--train.checkpoint_every", "64"]


def sweep(folder: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "scaling.cli",
        "sweep",
        str(EXPERIMENT),
        "--run",
        str(folder),
        "--workers",
        "2",
        *AXES,
    ]


def main(kills: int = 20, seed: int = 0) -> int:
    moment = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        start = time.monotonic()
        subprocess.run(sweep(whole), check=True, capture_output=True)
        length = time.monotonic() - start
        restarts = done = 0
        while done < kills:
            process = subprocess.Popen(
                sweep(killed), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            time.sleep(moment.uniform(3, max(6.0, length / 4)))
            if process.poll() is None:
                subprocess.run(["pkill", "-9", "-s", str(process.pid)], check=False)  # both workers
                process.send_signal(signal.SIGKILL)
                done += 1
            elif done < kills:  # it ended: undo its last trial, so that there is something to kill
                results = sorted(killed.glob("trials/*/result.json"), key=lambda path: path.stat().st_mtime)
                for result in results[len(results) // 2 :]:
                    result.unlink()
                    for path in sorted(result.parent.rglob("*"), reverse=True):
                        if path.name != "trial.json":
                            path.unlink() if path.is_file() else path.rmdir()
                restarts += 1
            process.wait()
        subprocess.run(sweep(killed), check=True, capture_output=True)
        same = ledger.sha256(whole) == ledger.sha256(killed)
        table = (whole / "table.csv").read_bytes() == (killed / "table.csv").read_bytes()
        print(
            f"{kills} kills, {restarts} restarts: {ledger.sha256(whole)[:16]} undisturbed, {ledger.sha256(killed)[:16]} killed"
        )
        print(f"ledger {'identical' if same else 'DIFFERENT'}, table {'identical' if table else 'DIFFERENT'}")
        return 0 if same and table else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
