"""Trials side by side on one device: threads of one process, lanes, each of which trains a trial.

While one reads rows, saves or evaluates, the device works for the other; and calls of one program are joined into one, in which a GPU runs
kernels of both at once. A small model does not fill it: most of its kernels take as long to start as to run.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

PATIENCE_SECONDS = 0.05
"""That a call waits for one to be joined with, while the device still works on those before. Lanes of one program keep in step from
then on, as both wait for the same calls; one that evaluates or saves is not waited for longer than this."""

Call = Callable[[Any, Any, Any, int], tuple[Any, Any]]
"""call(state, batches, learning_rates, n) -> (state, metrics), as of step.make_train_call."""


class _Offer:
    """A call that may be joined: its arguments, and what came of it; neither result nor error where its own thread is to run it alone."""

    def __init__(self, arguments: tuple[Any, ...]):
        self.arguments = arguments
        self.settled = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None


class Lanes:
    """Where the lanes of a process meet. `joined` counts the calls that were joined, two at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._trained: Counter[Hashable] = Counter()
        self._offers: dict[Hashable, _Offer] = {}
        self.joined = 0

    @contextlib.contextmanager
    def join(self, program: Hashable, alone: Call, joined: Callable[..., Any]) -> Iterator[Call]:
        """For a trial of `program`: a call like `alone`, by step.make_joined_call's `joined` of two where another lane trains one too."""
        with self._lock:
            self._trained[program] += 1
        try:
            yield lambda *arguments: self._call(program, alone, joined, arguments)
        finally:
            with self._lock:
                self._trained[program] -= 1
                if offer := self._offers.pop(program, None):  # nobody is left to join it
                    offer.settled.set()

    def _call(self, program: Hashable, alone: Call, joined: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        mine = None
        with self._lock:
            offer = self._offers.pop(program, None)
            if offer is None and self._trained[program] > 1:
                mine = self._offers[program] = _Offer(arguments)
        if offer is not None and offer.arguments[-1] == arguments[-1]:
            try:
                *pairs, n = zip(offer.arguments, arguments, strict=True)
                offer.result, result = joined(*pairs, n[0])
                with self._lock:
                    self.joined += 2
                return result
            except BaseException as error:
                offer.error = error  # its state may be donated already: it cannot run alone
                raise
            finally:
                offer.settled.set()
        if offer is not None:  # of another number of steps, as at the end of a run
            offer.settled.set()
        if mine is not None and not mine.settled.wait(PATIENCE_SECONDS):
            with self._lock:
                taken = self._offers.get(program) is not mine
                if not taken:
                    del self._offers[program]
            if taken:
                mine.settled.wait()
        if mine is not None and mine.error:
            raise mine.error
        return mine.result if mine is not None and mine.result is not None else alone(*arguments)
