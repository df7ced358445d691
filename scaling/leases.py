"""Leases: one holder at a time of a folder that several machines share, whichever of them dies.

FOLDER/attempt-1.json, attempt-2.json, ...: who held it, one file an attempt, the last one the holder's. An attempt begins by creating
the next number exclusively, which local file systems, NFS (version 3 on, see open(2)) and gs:// do for exactly one of those who try;
numbers are not used again. The holder writes its file anew every BEAT_SECONDS and says in it when it ends. It is over

- at once, where it has ended, or where its process on this machine is gone: the kernel knows, however that died;
- after SILENT_SECONDS without a beat where it is on another machine, by the clock that stamps the files of the folder.

A holder that was suspended for so long, or could not write for so long, may have been followed by another: it ends itself before
it writes anything else. File systems that do not create exclusively for all machines (buckets mounted by FUSE) do not hold this up.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_jax import files

BEAT_SECONDS = 10.0
SILENT_SECONDS = 120.0


@dataclass
class Lease:
    """Held by this process until the `with` of `take` ends."""

    path: Path
    about: dict[str, Any]
    """host, machine, pid, born (of the process), started and beat (seconds since 1970), and ended when it has."""
    facts: Callable[[], dict[str, Any]] = dict
    """What each beat tells beside that; called by another thread."""

    def write(self, **more: Any) -> None:
        """A beat."""
        files.write_json(self.path, self.about | self.facts() | {"beat": time.time()} | more)


def attempts(folder: Path) -> list[dict[str, Any]]:
    """What each attempt told last, the first first. One that a kill left empty has nothing but its "number"."""
    found = []
    for path in (path for path in files.children(folder) if path.match("attempt-*.json")):
        with contextlib.suppress(ValueError):
            number = int(path.stem.removeprefix("attempt-"))
            found.append({"number": number, "path": path} | _read(path))
    return sorted(found, key=lambda one: one["number"])


def _read(path: Path) -> dict[str, Any]:
    try:
        return files.find_json(path) or {}
    except json.JSONDecodeError:  # between its creation and its first bytes
        return {}


def held(attempt: dict[str, Any]) -> bool:
    """Whether the holder of an attempt is there, or may be."""
    if "ended" in attempt:
        return False
    if attempt.get("machine") == machine():
        return _born(attempt["pid"]) == attempt["born"]
    try:
        beat = files.modified(attempt["path"])
    except FileNotFoundError:
        return True  # it is being written; whoever asks asks again
    # Clocks of two machines differ: near the limit, the file system's own decides.
    return abs(time.time() - beat) < SILENT_SECONDS / 2 or files.clock(attempt["path"].parent) - beat < SILENT_SECONDS


@contextlib.contextmanager
def take(folder: Path) -> Iterator[Lease | None]:
    """Holds `folder` for this process; None where another holds it."""
    before = attempts(folder)
    if before and held(before[-1]):
        yield None
        return
    path = folder / f"attempt-{before[-1]['number'] + 1 if before else 1}.json"
    now = time.time()
    owner = {"host": socket.gethostname(), "machine": machine(), "pid": os.getpid(), "born": _born(os.getpid())}
    owner["thread"] = threading.get_ident()  # tells what two threads of this process write from each other
    lease = Lease(path, owner | {"started": now})
    folder.mkdir(parents=True, exist_ok=True)
    if not files.create(path, json.dumps(lease.about | {"beat": now})):
        yield None
        return
    over = threading.Event()
    beats = threading.Thread(target=_beat, args=(lease, over), name=f"lease of {folder.name}", daemon=True)
    beats.start()
    try:
        yield lease
    finally:
        over.set()
        beats.join()
        lease.write(ended=time.time())


def _beat(lease: Lease, over: threading.Event) -> None:
    """Writes beats until it is over. Ends the process where another may hold what it holds."""
    number = int(lease.path.stem.removeprefix("attempt-"))
    after = lease.path.with_name(f"attempt-{number + 1}.json")
    last = time.monotonic()
    while not over.wait(BEAT_SECONDS):
        try:
            if files.exists(after):
                _leave(f"another worker took {lease.path.parent} while this one was suspended")
            lease.write()
            last = time.monotonic()
        except OSError as error:
            if time.monotonic() - last > SILENT_SECONDS:
                _leave(f"{lease.path} could not be written for {SILENT_SECONDS:.0f} s ({error})")


def _leave(why: str) -> None:
    """No clean-up: whatever this process still wrote could be another's."""
    print(f"llm-jax: {why}; this one ends", file=sys.stderr, flush=True)
    os._exit(os.EX_TEMPFAIL)


def machine() -> str:
    """Equal for processes that see each other in /proc: the kernel's boot and the process namespace, or the host's name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _born(pid: int) -> int | None:
    """When a process of this machine began, in ticks of its kernel; None where there is none, or a zombie. Process ids are used again."""
    if not sys.platform.startswith("linux"):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        return 0
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(fields[18])
