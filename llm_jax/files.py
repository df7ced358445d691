"""Small file helpers that must survive a kill at any moment, here and in a bucket, and the folder of caches.

A run directory may be a folder of Google Cloud Storage, gs://BUCKET/NAME. Its paths are epath's, which have pathlib's interface; where
objects are no files, the difference is in here:

- An object is written whole or not at all, so that nothing is renamed; but it cannot grow, and takes about one write a second.
- There are no locks; an object that must not exist is created by exactly one of those who try (the precondition of generation 0).
- Each answer takes some 50 ms, so that many are asked for at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

from llm_jax.settings import BadInput

T = TypeVar("T")
Answer = TypeVar("Answer")

BUCKETS = "gs://"
ANSWER_SECONDS, BYTES_PER_SECOND = 60.0, 1e6
"""Of a bucket, after which a request counts as failed: this, and the time of its bytes on a slow line."""
AT_ONCE = 32
"""Requests to a bucket."""
POLL_SECONDS, POLL_BUCKET_SECONDS = 1.0, 10.0


def as_path(text: str | Path) -> Path:
    """The path that a text names, which may be gs://BUCKET/NAME. Paths are returned as they are.

    Raises BadInput for what is neither that nor local, and where the packages that buckets need are not installed.
    """
    if not isinstance(text, str):
        return text
    match = re.match(r"([A-Za-z][\w+.-]*):(//|(?<=gs:)/)/*", text)
    if match is None:
        return Path(text)
    if match[0] != BUCKETS:
        raise BadInput(f'"{text}" is no local path and no bucket; did you mean "{BUCKETS}{text[match.end() :]}"?')
    bucket, _, name = text.removeprefix(BUCKETS).partition("/")
    if not bucket or not name.strip("/"):
        raise BadInput(f'"{text}" names no folder of a bucket; give one, such as {BUCKETS}{bucket or "BUCKET"}/run')
    return _bucket_path(text)


def in_bucket(path: Path) -> bool:
    """Whether a path is one of a bucket."""
    return not isinstance(path, Path)


def absolute(path: Path) -> Path:
    """The same path from the root, for whatever working folder."""
    return path if in_bucket(path) else path.resolve()


def here(folder: Path) -> Path:
    """`folder`, or one of this machine in the place of a bucket's: for logs that programs append to, whom nobody else reads."""
    return cache_dir() / "runs" / str(folder).removeprefix(BUCKETS) if in_bucket(folder) else folder


def cache_dir() -> Path:
    """$LLM_JAX_CACHE, or llm_jax below the user's cache folder: prepared data and compiled programs."""
    if "LLM_JAX_CACHE" in os.environ:
        return Path(os.environ["LLM_JAX_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm_jax"


# Reading and writing


def exists(path: Path) -> bool:
    """Whether a file or folder is there. OSError where a bucket does not say."""
    if not in_bucket(path):
        return path.exists()
    try:
        _ask(path, "_info")
    except FileNotFoundError:
        return False
    return True


def is_dir(path: Path) -> bool:
    """Whether a folder is there. OSError where a bucket does not say."""
    if not in_bucket(path):
        return path.is_dir()
    try:
        return _ask(path, "_info")["type"] == "directory"
    except FileNotFoundError:
        return False


def children(folder: Path) -> list[Path]:
    """What is in a folder, by name; nothing where there is none."""
    try:
        if in_bucket(folder):
            # A folder that somebody made by hand holds an object of its own name.
            own, found = str(folder).removeprefix(BUCKETS), _ask(folder, "_ls", detail=False)
            return [folder / name[len(own) + 1 :] for name in sorted({one.rstrip("/") for one in found} - {own})]
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_bytes(path: Path) -> bytes:
    """All of a file. FileNotFoundError where there is none."""
    # One request: epath would ask for the size first, and what is written anew between the two has another.
    return _ask(path, "_cat_file") if in_bucket(path) else path.read_bytes()


def write_atomic(path: Path, content: str | bytes) -> None:
    """The file holds the old content or the new, never a part: written aside, synced, then renamed."""
    content = content.encode() if isinstance(content, str) else content
    if in_bucket(path):
        _ask(path, "_pipe_file", content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id: on another machine of a shared file system, another process has that.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with open(aside, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)


def create(path: Path, content: str) -> bool:
    """Makes a file of a folder; False where it is there. Of all who try, on whatever machine, one gets True.

    A kill may leave a local one empty.
    """
    if in_bucket(path):
        try:
            _ask(path, "_pipe_file", content.encode(), mode="create")
        except FileExistsError:
            # Perhaps it was made by a try of ours whose answer was lost.
            return read_bytes(path) == content.encode()
        return True
    try:
        with open(path, "x") as f:
            f.write(content)
    except FileExistsError:
        return False
    return True


def write_first(path: Path, content: str) -> bool:
    """write_atomic of a file that is not there; False where it is. A local one wants a lock around it."""
    if in_bucket(path):
        return create(path, content)
    if path.exists():
        return False
    write_atomic(path, content)
    return True


def json_text(value: Any) -> str:
    """A JSON file's content."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not there; see write_atomic."""
    write_atomic(path, json_text(value))


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(read_bytes(path))


def find_json(path: Path) -> Any:
    """The value of a JSON file; None where there is no such file."""
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


class Lines:
    """Appends lines to a text file, from `kept` on. An object of a bucket gets them when it is flushed or closed, all anew."""

    def __init__(self, path: Path, kept: str):
        write_atomic(path, kept)
        self._path, self._all, self._flushed = path, io.StringIO(), True
        self._file = self._all if in_bucket(path) else open(path, "a", buffering=1)  # noqa: SIM115 (closed by close)
        self._all.write(kept if in_bucket(path) else "")

    def write(self, line: str) -> None:
        """A local file has it at once."""
        self._file.write(line + "\n")
        self._flushed = self._file is not self._all

    def flush(self) -> None:
        """Whoever reads the file finds all lines."""
        if not self._flushed:
            write_atomic(self._path, self._all.getvalue())
            self._flushed = True

    def close(self) -> None:
        """Flushes first."""
        self.flush()
        self._file.close()


def copy_files(folder: Path, to: Path) -> None:
    """Copies the files of a local folder; nothing where `to` is the same."""
    if to != folder:
        for path in folder.iterdir():
            write_atomic(to / path.name, path.read_bytes())


# Clocks, locks, many at once


def modified(path: Path) -> float:
    """When a file was written last, in seconds since 1970 by the clock that stamps the files of its folder."""
    return _ask(path, "_info")["mtime"].timestamp() if in_bucket(path) else path.stat().st_mtime


def clock(folder: Path) -> float:
    """The time by the clock that stamps the files of a folder."""
    if in_bucket(folder):
        path = folder / f".now-{secrets.token_hex(4)}"
        write_atomic(path, "")
        try:
            return modified(path)
        finally:
            _ask(path, "_rm_file")
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".now-") as f:
        return os.fstat(f.fileno()).st_mtime


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds an advisory lock on `path`; yields False at once where another process holds it and `wait` is False.

    The kernel drops the lock when its holder dies, however it dies, so that no stale claim ever has to be guessed at. It holds among
    the processes of one machine; what machines share is held by scaling/leases.py. A bucket has none: see write_first.
    """
    if in_bucket(path):
        yield True
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def for_each(ask: Callable[[T], Answer], things: Iterable[T], folder: Path) -> list[Answer]:
    """[ask(thing) for thing in things] about a folder; of a bucket's, many at once."""
    if not in_bucket(folder):
        return [ask(thing) for thing in things]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(ask, things))


def poll_seconds(folder: Path) -> float:
    """How long to wait before a folder is looked at again: each look at a bucket costs, in time and money."""
    return POLL_BUCKET_SECONDS if in_bucket(folder) else POLL_SECONDS


# Buckets


class Refused(OSError, BadInput):
    """A bucket cannot be reached, or not with the rights of this user."""


def _bucket_path(text: str) -> Path:
    """BadInput where gcsfs is not installed, through which epath, and so Orbax, reads and writes."""
    os.environ.setdefault("EPATH_USE_TF", "0")  # where TensorFlow is installed, epath would take that
    # Else each request would ask first what kind a bucket is, which takes rights that a user may not have.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import fsspec
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise BadInput(
            f'{BUCKETS} needs {error.name}; install it with: pip install "llm_jax[gs]", or give a local --run'
        ) from None
    from etils import epath

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it tells what it raises, at length
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False  # what others write must be seen
    return cast(Path, epath.Path(text))


def _ask(path: Path, method: str, *args: Any, **kwargs: Any) -> Any:
    """What a method of gcsfs says of an object, in bounded time. All that can go wrong becomes an OSError, with one line."""
    import asyncio

    import fsspec

    fs = fsspec.filesystem("gcs")
    # Nobody's lease hangs on a read, which may be of many bytes.
    patience = (10 if method == "_cat_file" else 1) * ANSWER_SECONDS + sum(map(len, args)) / BYTES_PER_SECOND

    async def answer() -> Any:
        return await asyncio.wait_for(getattr(fs, method)(str(path), *args, **kwargs), patience)

    try:
        return fsspec.asyn.sync(fs.loop, answer)
    except FileNotFoundError:
        if method == "_pipe_file":
            raise Refused(f"{path}: there is no such bucket, or none that you may see") from None
        raise FileNotFoundError(f"{path} is not there") from None
    except FileExistsError:
        raise
    except TimeoutError:
        raise TimeoutError(f"{path}: no answer in {patience:.0f} s") from None
    except Exception as error:  # of gcsfs, of its credentials, of its HTTP client
        said = " ".join(str(error).split())[:200] or type(error).__name__
        if re.search(r"Forbidden|Anonymous|credentials|, 401|, 403", said):
            said += "; log in with: gcloud auth application-default login"
        raise Refused(f"{path}: {said}") from error
