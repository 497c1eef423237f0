"""Where the figures of a stage go: metrics.jsonl is the truth, TensorBoard and the terminal are views of it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ministral_jax.files import read_jsonl

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
"""Dense bf16 FLOP/s of one chip, by the start of its `device_kind`; vendors' data sheets."""

LINE_SECONDS = 10.0
"""In a log, one progress line at most this often."""


def peak_flops() -> float | None:
    """Peak of all devices together, or None where it is not known (a CPU)."""
    kind = jax.devices()[0].device_kind
    matches = [peak for name, peak in PEAK_FLOPS.items() if kind.startswith(name)]
    return matches[0] * jax.device_count() if matches else None


def mean(metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Host values of (sum, count) pairs; nothing counted gives 0."""
    fetched = jax.device_get(dict(metrics))
    return {name: float(total) / max(float(count), 1.0) for name, (total, count) in fetched.items()}


class StageLog:
    """Metrics of one stage, written by the first process. Lines of steps after `resume_step` (a run that was killed)
    are dropped on opening, but for where their time went; and the evaluation of `resume_step` itself, unless it was
    `evaluated` before the state that is gone on from was saved."""

    def __init__(self, directory: Path, resume_step: int | None, evaluated: bool = True):
        self._path = directory / "metrics.jsonl"
        self._file: Any = None
        known = read_jsonl(self._path)
        self.attempts = max((r["attempt"] for r in known if r["kind"] == "time"), default=0)
        if jax.process_index() != 0:
            return
        from tensorboardX import SummaryWriter

        stands = (-1, False) if resume_step is None else (resume_step, evaluated)
        kept = [r for r in known if r["kind"] == "time" or (r["step"], r["kind"] == "eval") <= stands]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        os.replace(temporary, self._path)
        self._file = self._path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(directory / "events"), purge_step=(resume_step or 0) + 1)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def write_time(self, record: Mapping[str, Any]) -> None:
        """A record of `goodput`."""
        if self._file is not None:
            self._file.write(json.dumps({"kind": "time", "at": round(time.time(), 3), **record}) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._events.close()


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
            return
        if not self._shown:
            return
        now = time.monotonic()
        self._first = self._first or (done, now)  # what came before it was compiling
        if now - self._printed >= LINE_SECONDS or done == self._total:
            self._printed = now
            speed = (now - self._first[1]) / max(done - self._first[0], 1)
            left = f"  {speed * (self._total - done):.0f} s left" if done > self._first[0] else ""
            print(f"{self._title:>18}  {done}/{self._total}  {note}{left}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(f"{self._title}: {text}")
        elif self._shown:
            print(f"{self._title:>18}  {text}", file=sys.stderr, flush=True)

    def count(self, what: str, so_far: int) -> None:
        """Progress of work whose end is not known."""
        if self._bar is not None:
            self._bar.update(self._task, note=f"{what}: {so_far:,}")
        elif self._shown and (now := time.monotonic()) - self._printed >= LINE_SECONDS:
            self._printed = now
            print(f"{self._title:>18}  {what}: {so_far:,}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
