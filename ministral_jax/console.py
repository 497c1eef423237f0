"""Lines for whoever watches: on stderr, and in the log of the run, which outlives the terminal."""

from __future__ import annotations

import atexit
import sys
import time
from contextlib import suppress
from pathlib import Path

from ministral_jax.places import Lines

_log: Lines | None = None


def log_to(path: Path) -> None:
    """Append all that is said from now on to a file."""
    global _log
    _log = Lines(path)
    atexit.register(flush)


def flush() -> None:
    """All of the log is written."""
    if _log is not None:
        with suppress(OSError):
            _log.flush()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
    log(text)


def log(text: str) -> None:
    """To the log alone, with the time of day: for what the terminal shows in another way."""
    if _log is not None:
        with suppress(OSError):  # a full disk ends a run where its results cannot be written, not here
            _log.add(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")
