"""Being told to leave: SIGTERM, as spot machines, Slurm and Kubernetes send it some seconds before they kill.

A run that is told saves a checkpoint at the end of the call of steps under way, and its process exits with EXIT_STATUS, which says to
whatever started it: start me again. The time it takes is that of up to two calls, of train.steps_per_call steps each, and of the
checkpoint; where that is more than the grace given, the kill finds the last checkpoint of train.checkpoint_every, and nothing is lost
but the steps since.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator

EXIT_STATUS = os.EX_TEMPFAIL
"""75 of sysexits.h: «temporary failure; try again»."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""SIGUSR2 is what submitit has Slurm send before the time of a job is up."""


class Preempted(Exception):
    """The run was told to leave, and has saved where it is."""


@contextlib.contextmanager
def noticed() -> Iterator[Callable[[], bool]]:
    """Holds off SIGNALS, and yields told(): whether one has come, for the loop to ask once a call.

    Where several processes train together (jax.distributed), all of them ask equally often, and are told at the same time,
    whichever of them got the signal. What the signals did before is put back in the end.

    told() raises KeyboardInterrupt where Ctrl-C has come and its own was lost: Python prints and forgets what is raised in a finalizer or
    in the callback of a weak reference, of which JAX runs many while it traces.
    """
    with _interrupted() as interrupted, _told() as told:

        def ask() -> bool:
            if interrupted.is_set():
                raise KeyboardInterrupt
            return told()

        yield ask


@contextlib.contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """Whether SIGINT has come, which still raises KeyboardInterrupt where it comes; where nobody else handles it."""
    came = threading.Event()
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not default or threading.current_thread() is not threading.main_thread():
        yield came
        return

    def interrupt(number, frame):
        came.set()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def _told() -> Iterator[Callable[[], bool]]:
    import jax
    from jax.experimental import multihost_utils

    came = threading.Event()
    if jax.process_count() > 1:
        # JAX's own service has SIGTERM; it tells all processes at one count, later than that of any when it came.
        asked = itertools.count()
        handler = signal.signal(signal.SIGUSR2, lambda *_: signal.raise_signal(signal.SIGTERM))

        def told() -> bool:  # JAX says so once
            if multihost_utils.reached_preemption_sync_point(next(asked)):
                came.set()
            return came.is_set()

        try:
            yield told
        finally:
            signal.signal(signal.SIGUSR2, handler if handler is not None else signal.SIG_DFL)
        return
    if threading.current_thread() is not threading.main_thread():  # Python's signals are of the main thread
        yield came.is_set
        return
    before = {number: signal.signal(number, lambda *_: came.set()) for number in SIGNALS}
    try:
        yield came.is_set
    finally:
        for number, was in before.items():
            signal.signal(number, was if was is not None else signal.SIG_DFL)
