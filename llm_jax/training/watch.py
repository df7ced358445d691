"""Where the wall time of a run goes, and which of its calls take too long."""

from __future__ import annotations

import contextlib
import socket
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_jax import files

SLOW = 10.0
"""Times the median of its run: a call that takes longer is named."""
LEAST_SECONDS = 5.0
"""A call of less is named by nobody: where calls take milliseconds, ten times that, or a second, is a busy machine's noise."""
ENOUGH_CALLS = 5
"""Before so many, a median says little."""
GUARD_SECONDS = 0.5
BEAT_SECONDS, SILENT_SECONDS = 5.0, 30.0
"""Of the processes that train one model together."""


def say(line: str) -> None:
    """A line on standard error."""
    print(f"llm-jax: {line}", file=sys.stderr, flush=True)


class Watch:
    """The phases of one process's part of a run, and a thread that names a call that hangs. Close it to end the thread.

    Phases are of the host's time: start (parameters, checkpoint), step, data (only while the device had nothing to do),
    evaluation, checkpoint (only what steps wait for); compile is what the first call takes beyond the median of the others. A call,
    the steps dispatched at once, takes from the end of the one before to its own, without the phases between. The first call is
    never judged, since it compiles, nor is any phase but step.

    Where `processes` train one model together, all wait for the slowest: each writes beats to the folder `beats`, and whoever
    names a call names the others that are silent or behind.
    """

    def __init__(
        self,
        name: str = "",
        say: Callable[[str], None] = say,
        beats: Path | None = None,
        process: int = 0,
        processes: int = 1,
    ):
        self._name, self._say = f"{name} on {socket.gethostname()}".strip(), say
        self._beats = beats if processes > 1 else None
        self._process = process
        self._lock = threading.Lock()
        self._phase, self._since = "start", time.monotonic()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._call = 0.0  # seconds of phase step since the last call ended, up to `_since`
        self._first_call: tuple[float, int] | None = None  # seconds, steps
        self._per_step: list[float] = []
        self._under_way: deque[int] = deque()  # steps of calls dispatched
        self._from_step: int | None = None
        self._step = 0
        self._named = 0.0  # seconds after which the call under way was named last
        self._slow: list[dict[str, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._guard, name="watch", daemon=True)
        self._thread.start()

    def enter(self, phase: str, hidden: bool = False) -> None:
        """From now on time is of `phase`. `hidden`: what ends now went on beside a call, and was time of steps."""
        with self._lock:
            now, was = time.monotonic(), "step" if hidden else self._phase
            self._seconds[was] += now - self._since
            if was == "step":
                self._call += now - self._since
            self._phase, self._since = phase, now

    def begin(self, step: int) -> None:
        """The run starts, or goes on, after `step` steps."""
        with self._lock:
            self._from_step = self._step = step

    def dispatch(self, n: int, hidden: bool) -> None:
        """A call of `n` steps is about to be; `hidden` as for `enter`."""
        self.enter("step", hidden)
        with self._lock:
            self._under_way.append(n)

    def finish(self) -> float:
        """The first of the calls dispatched has ended. Returns the seconds a step of it took; says so where that is too many."""
        self.enter("step")
        with self._lock:
            n, seconds = self._under_way.popleft(), self._call
            typical = self._typical()
            self._call = self._named = 0.0
            self._step += n
            if self._first_call is None:
                self._first_call = (seconds, n)
            else:
                self._per_step.append(seconds / n)
        if typical is not None and seconds > max(SLOW * typical * n, LEAST_SECONDS):
            self._slow.append({"step": self._step, "seconds": seconds, "median": typical * n})
            self._say(f"slow: {self._steps(self._step - n, n)} took {_beside(seconds, typical * n)}")
        return seconds / n

    def _typical(self) -> float | None:
        """The median of the calls, seconds a step; None before there are enough."""
        return statistics.median(self._per_step) if len(self._per_step) >= ENOUGH_CALLS else None

    def _steps(self, step: int, n: int) -> str:
        return f"{self._name}: steps {step} to {step + n}"

    def snapshot(self) -> dict[str, Any]:
        """from_step, step, seconds by phase, and the slow calls: what an attempt at a trial records."""
        with self._lock:
            seconds = self._seconds.copy()
            seconds[self._phase] += time.monotonic() - self._since
            if self._first_call:
                first, n = self._first_call
                seconds["compile"] = max(0.0, first - n * statistics.median(self._per_step or [0.0]))
                seconds["step"] -= seconds["compile"]
            told = {"step": self._step, "seconds": dict(seconds), "slow": list(self._slow)}
            return told if self._from_step is None else {"from_step": self._from_step} | told

    def close(self) -> None:
        """Ends the thread."""
        self._over.set()
        self._thread.join()

    def _guard(self) -> None:
        told = 0.0
        while not self._over.wait(GUARD_SECONDS):
            now = time.monotonic()
            if self._beats and now - told >= BEAT_SECONDS:
                told = now
                with contextlib.suppress(OSError):  # the next will do
                    about = {"host": socket.gethostname(), "step": self._step, "phase": self._phase}
                    files.write_json(self._beats / f"{self._process}.json", about)
            with self._lock:
                typical = self._typical()
                judged = self._phase == "step" and self._under_way and typical is not None
                if not judged:
                    continue
                seconds, n, step = self._call + now - self._since, self._under_way[0], self._step
                assert typical is not None
                if seconds < max(SLOW * typical * n, LEAST_SECONDS, 2 * self._named):
                    continue
                self._named = seconds
            line = f"hang? {self._steps(step, n)} have been running for {_beside(seconds, typical * n)}"
            self._say("; ".join([line, *(behind(self._beats, self._process, step) if self._beats else ())]))


def _beside(seconds: float, median: float) -> str:
    return f"{seconds:.1f} s, where the median of the run is {median:.2g} s"


def behind(beats: Path, process: int, step: int) -> list[str]:
    """Of the processes that write beats, those that are silent, or have taken fewer steps than `step`; in words."""
    found = []
    here = files.modified(beats / f"{process}.json")  # stamped by the clock that stamps the others
    paths = [path for path in files.children(beats) if path.suffix == ".json"]
    for path in sorted(paths, key=lambda path: int(path.stem)):
        about, silent = files.read_json(path), here - files.modified(path)
        who = f"process {path.stem} on {about['host']}"
        if silent > SILENT_SECONDS:
            found.append(f"{who} has been silent for {silent:.0f} s, last at step {about['step']} in {about['phase']}")
        elif about["step"] < step:
            found.append(f"{who} is behind, at step {about['step']} in {about['phase']}")
    return found
