"""The one training loop. Objectives differ in the step they bring and in where batches come from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from ministral_jax.errors import UserError
from ministral_jax.training.checkpoint import ResumeStore
from ministral_jax.training.metrics import ProgressLine, StageLog, mean, peak_flops

Tree = Any
Batch = dict[str, Any]


class Diverged(UserError):
    """The loss is not a number any more; the newest checkpoint is from before."""


@dataclass(frozen=True)
class Schedule:
    """How long the loop runs and what it does on the way; all in steps, counted after the update."""

    steps: int
    evaluate_every: int
    save_every: int
    tokens_per_step: int
    flops_per_step: float

    def evaluates_at(self, step: int) -> bool:
        """At 0, at powers of two while they are below `evaluate_every`, at its multiples, and at the end."""
        early = step < self.evaluate_every and step & (step - 1) == 0
        return early or step % self.evaluate_every == 0 or step == self.steps

    def saves_at(self, step: int) -> bool:
        return step % self.save_every == 0 and step < self.steps


@dataclass(frozen=True)
class Outcome:
    """What a finished loop leaves: the state, its last evaluation, and seconds spent over all attempts."""

    state: Tree
    metrics: dict[str, float]
    seconds: float


def fit(
    name: str,
    state: Tree,
    step: Callable[[Tree, Batch], tuple[Tree, dict[str, Any]]],
    batches: Callable[[int], Iterator[Batch]],
    evaluate: Callable[[Tree], dict[str, float]],
    schedule: Schedule,
    open_log: Callable[[int | None], StageLog],
    store: ResumeStore,
) -> Outcome:
    """Run `step` until `schedule.steps`, going on from the newest saved state.

    Args:
        state: initial training state; replaced by the saved one where there is one.
        step: one update, `(state, batch) -> (state, metrics)`; it may consume the state it is given.
        batches: the data from a step on; batch n depends on n alone.
        evaluate: held-out figures of a state.

    Raises:
        Diverged: the loss of a step is NaN or infinite. Nothing of that step is saved.
    """
    begun, spent, start = time.monotonic(), 0.0, None
    if store.latest is not None:
        state, note = store.restore(jax.eval_shape(lambda: state))
        start, spent = store.latest, note["seconds"]
    log, line = open_log(start), ProgressLine(name, schedule.steps, start or 0)
    report = _Reporter(log, line, schedule, store)
    figures: dict[str, float] = {}

    def evaluation(done: int, state: Tree) -> None:
        nonlocal figures
        figures = evaluate(state)
        log.write("eval", done, {"tokens": done * schedule.tokens_per_step, **figures})
        report.restart_clock()

    stream = batches(start or 0)
    try:
        if start is None:
            evaluation(0, state)
        pending: tuple[int, Any] | None = None
        for done in range((start or 0) + 1, schedule.steps + 1):
            state, metrics = step(state, next(stream))
            if pending is not None:  # the device already works on this step while the last one's figures are read
                report.train(*pending)
            pending = (done, metrics)
            if schedule.evaluates_at(done) or schedule.saves_at(done):
                report.train(*pending)
                pending = None
            if schedule.evaluates_at(done):
                evaluation(done, state)
            if schedule.saves_at(done):
                store.save(done, state, {"seconds": spent + time.monotonic() - begun})
                report.restart_clock()
        store.wait()
        if not figures:  # killed between the last step and the manifest
            figures = evaluate(state)
    finally:
        getattr(stream, "close", lambda: None)()
        log.close()
        line.close()
    return Outcome(state, figures, spent + time.monotonic() - begun)


class _Reporter:
    """Turns the figures of a step into a log record and a progress line; stops the run when the loss is no number."""

    def __init__(self, log: StageLog, line: ProgressLine, schedule: Schedule, store: ResumeStore):
        self._log, self._line, self._schedule, self._store = log, line, schedule, store
        self._peak = peak_flops()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Speed is measured from the next step's figures on: what happened before them was not a step."""
        self._since: tuple[int, float] | None = None

    def train(self, step: int, metrics: dict[str, Any]) -> None:
        values = mean(metrics)
        if not math.isfinite(values["loss"]):
            kept = self._store.latest
            safe = (
                f"the state of step {kept} is kept in {self._store.directory}"
                if kept is not None
                else "no state was saved yet"
            )
            raise Diverged(
                f"the loss is {values['loss']} at step {step}; {safe}; a lower optimizer.lr or optimizer.clip may help"
            )
        now = time.monotonic()
        note = f"loss {values['loss']:.4f}"
        if self._since is not None:
            rate = (step - self._since[0]) / (now - self._since[1])
            values["tokens_per_second"] = self._schedule.tokens_per_step * rate
            note += f"  {values['tokens_per_second']:,.0f} tokens/s"
            if self._peak is not None:
                values["mfu"] = self._schedule.flops_per_step * rate / self._peak
                note += f"  MFU {values['mfu']:.1%}"
        else:
            self._since = (step, now)
        self._log.write("train", step, {"tokens": step * self._schedule.tokens_per_step, **values})
        self._line.update(step, note)
