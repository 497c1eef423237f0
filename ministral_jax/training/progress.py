"""How far a piece of work is: a live bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ministral_jax.console import log, say

LINE_SECONDS = 10.0
"""In a log, one progress line at most this often."""


class ProgressLine:
    """A live bar on a terminal, plain lines in a log."""

    def __init__(self, title: str, total: int, start: int = 0):
        self._title, self._total = title, total
        self._printed = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._bar: Progress | None = None
        self._shown = jax.process_index() == 0
        if sys.stderr.isatty() and self._shown:
            columns = (
                TextColumn("{task.description:>18}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(title, total=total or None, completed=start, note="")

    def update(self, done: int, note: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
        if not self._shown:
            return
        now = time.monotonic()
        self._first = self._first or (done, now)  # what came before it was compiling
        if now - self._printed >= LINE_SECONDS or done == self._total:
            self._printed = now
            speed = (now - self._first[1]) / max(done - self._first[0], 1)
            left = f"  {speed * (self._total - done):.0f} s left" if done > self._first[0] else ""
            self._line(f"{done}/{self._total}  {note}{left}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(f"{self._title}: {text}")
        if self._shown:
            self._line(text)

    def count(self, what: str, so_far: int) -> None:
        """Progress of work whose end is not known."""
        if self._bar is not None:
            self._bar.update(self._task, note=f"{what}: {so_far:,}")
        if self._shown and (now := time.monotonic()) - self._printed >= LINE_SECONDS:
            self._printed = now
            self._line(f"{what}: {so_far:,}")

    def _line(self, text: str) -> None:
        """A bar is shown on a terminal, lines are for a log."""
        (say if self._bar is None else log)(f"{self._title:>18}  {text}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
