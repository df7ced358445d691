"""Small file helpers that must survive a kill at any moment, and the folder of caches."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """$LLM_JAX_CACHE, or llm_jax below the user's cache folder: prepared data and compiled programs."""
    if "LLM_JAX_CACHE" in os.environ:
        return Path(os.environ["LLM_JAX_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm_jax"


def write_atomic(path: Path, content: str | bytes) -> None:
    """The file holds the old content or the new, never a part: written aside, synced, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id: on another machine of a shared file system, another process has that.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with open(aside, "wb") as f:
        f.write(content.encode() if isinstance(content, str) else content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not there; see write_atomic."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds an advisory lock on `path`; yields False at once where another process holds it and `wait` is False.

    The kernel drops the lock when its holder dies, however it dies, so that no stale claim ever has to be guessed at. It holds among
    the processes of one machine; what machines share is held by scaling/leases.py.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
