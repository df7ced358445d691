"""Progress on standard error: a bar with rate and time left on a terminal, one line a minute elsewhere, nothing under two seconds.

And the data of a config, prepared under it.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_jax.config import Config
    from llm_jax.data.prepare import Prepared

DELAY_SECONDS, LINE_SECONDS = 2.0, 60.0


@contextlib.contextmanager
def progress(description: str, total: float, unit: str) -> Iterator[Callable[[float, str], None]]:
    """Yields update(done, note): `done` counts up to `total`."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(
            total=total,
            desc=description,
            unit=unit,
            unit_scale=True,
            delay=DELAY_SECONDS,
            dynamic_ncols=True,
            file=sys.stderr,
        ) as bar:

            def update(done: float, note: str = "") -> None:
                bar.set_postfix_str(note, refresh=False)
                bar.update(done - bar.n)

            yield update
        return

    start = said = time.monotonic()

    def line(done: float, note: str = "") -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= LINE_SECONDS and done:
            said = now
            left = (total - done) * (now - start) / done
            rate = f"{_short(done / (now - start))}{unit}/s"
            print(
                f"{description}: {100 * done / total:.0f} %, {rate}, {left / 60:.1f} min left{', ' + note if note else ''}",
                file=sys.stderr,
                flush=True,
            )

    yield line


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.1f}"


def prepared_data(config: Config) -> Prepared:
    """The data of a config, prepared where that has not been done, with progress."""
    from llm_jax.data import prepare

    with progress("data", 1.0, "") as update:
        return prepare.prepare(config, lambda what, done, total: update(done / total if total else 0.0, what))
