"""Lines for whoever watches: on stderr, and in the log of the run, which outlives the terminal."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

_log: IO[str] | None = None


def log_to(path: Path) -> None:
    """Append all that is said from now on to a file."""
    global _log
    _log = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
    log(text)


def log(text: str) -> None:
    """To the log alone, with the time of day: for what the terminal shows in another way."""
    if _log is not None:
        with suppress(OSError):  # a full disk ends a run where its results cannot be written, not here
            _log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
