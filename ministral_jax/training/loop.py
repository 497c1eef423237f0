"""The one training loop. Objectives differ in the step they bring and in where batches come from."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax

from ministral_jax.config import GuardConfig
from ministral_jax.distributed.processes import Preempted, poll, saving
from ministral_jax.errors import UserError
from ministral_jax.training.checkpoint import ResumeStore
from ministral_jax.training.goodput import Clock
from ministral_jax.training.metrics import ProgressLine, StageLog, mean, peak_flops

Tree = Any
Batch = dict[str, Any]


class Diverged(UserError):
    """The loss is not a number any more, or far above what it was; the newest checkpoint is from before."""


@dataclass(frozen=True)
class Schedule:
    """How long the loop runs and what it does on the way; all in steps, counted after the update."""

    steps: int
    evaluate_every: int
    save_every: int
    tokens_per_step: int
    """0 where a step draws its tokens itself; its metrics then say how many, as `tokens_drawn`."""
    flops_per_step: float

    def evaluates_at(self, step: int) -> bool:
        """At 0, at powers of two while they are below `evaluate_every`, at its multiples, and at the end."""
        early = step < self.evaluate_every and step & (step - 1) == 0
        return early or step % self.evaluate_every == 0 or step == self.steps

    def saves_at(self, step: int) -> bool:
        return step % self.save_every == 0 and step < self.steps

    def seen(self, step: int) -> dict[str, int]:
        """`tokens` trained on until a step, where that is known ahead."""
        return {"tokens": step * self.tokens_per_step} if self.tokens_per_step else {}


@dataclass(frozen=True)
class Position:
    """Where a loop stands; what is kept beside a saved state."""

    step: int = 0
    evaluated: bool = False
    """Whether the evaluation due at `step` was done."""
    skipped: int = 0
    """Batches left out before the next one, by rolling back: step n + 1 trains on batch n + skipped."""
    seconds: float = 0.0
    """Spent over all attempts."""

    def note(self) -> dict[str, Any]:
        return {"evaluated": self.evaluated, "skipped": self.skipped, "seconds": self.seconds}


@dataclass(frozen=True)
class Outcome:
    """What a finished loop leaves: the state, its last evaluation, and seconds spent over all attempts."""

    state: Tree
    metrics: dict[str, float]
    seconds: float


def restore(store: ResumeStore, abstract: Tree) -> tuple[Tree, Position] | None:
    """The newest good state and where it stands, or None."""
    if (step := store.latest) is None:
        return None
    state, note = store.restore(abstract)
    return state, Position(step=step, **note)


def fit(
    name: str,
    state: Tree,
    start: Position | None,
    step: Callable[[Tree, Batch], tuple[Tree, dict[str, Any]]],
    batches: Callable[[int], Iterator[Batch]],
    evaluate: Callable[[Tree], dict[str, float]],
    schedule: Schedule,
    guard: GuardConfig,
    open_log: Callable[[int | None, bool], StageLog],
    store: ResumeStore,
    clock: Clock | None = None,
) -> Outcome:
    """Run `step` until `schedule.steps`.

    Args:
        state: training state to begin with, and
        start: where it stands when it was restored from `store`.
        step: one update, `(state, batch) -> (state, metrics)`; it may consume the state it is given.
        batches: the data from a batch on; batch n depends on n alone.
        evaluate: held-out figures of a state.
        clock: has run since the stage began.

    Raises:
        Diverged: the loss of a step is NaN, infinite or a spike, and `guard` does not allow to roll back (again).
            Nothing of that step is saved.
        Preempted: the job was asked to stop. The state is saved, at the same step by all processes.
    """
    loop = _Loop(name, step, batches, evaluate, schedule, guard, open_log, store, clock or Clock())
    return loop.run(state, start)


class _Loop:
    """`fit`, cut into the pieces of a step."""

    def __init__(self, name, step, batches, evaluate, schedule, guard, open_log, store, clock):
        self.step, self.batches, self.evaluate = step, batches, evaluate
        self.schedule, self.guard, self.store, self.clock = schedule, guard, store, clock
        self.name, self.open_log = name, open_log
        self.begun = time.monotonic()
        self.figures: dict[str, float] = {}
        self.rollbacks = 0
        self.pending: tuple[int, Any] | None = None

    def run(self, state: Tree, start: Position | None) -> Outcome:
        self.at = start or Position()
        self.spent = self.at.seconds
        self.saved = None if start is None else start.step
        self.state = state
        self.abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        self._open(self.saved)
        try:
            while True:
                try:
                    self._advance()
                    break
                except _Bad as bad:
                    self._roll_back(bad)
        except Preempted:
            self._save_and_stop()
            raise
        finally:
            self._close()
        return Outcome(self.state, self.figures, self._seconds())

    def _open(self, resumed: int | None) -> None:
        self.log = self.open_log(resumed, self.at.evaluated)
        self.line = ProgressLine(self.name, self.schedule.steps, self.at.step)
        self.report = _Reporter(self.log, self.line, self.schedule, self.guard)
        self.stream = self.batches(self.at.step + self.at.skipped)
        self.clock.begin_attempt(self.log, self.at.step)
        self.first = True

    def _close(self) -> None:
        getattr(self.stream, "close", lambda: None)()
        self.clock.write(self.at.step)
        self.log.close()
        self.line.close()

    def _advance(self) -> None:
        """From where the loop stands to the end."""
        if self.schedule.evaluates_at(self.at.step) and not self.at.evaluated:
            self._evaluation()
        while self.at.step < self.schedule.steps:
            poll(f"step {self.at.step + 1}", slow=self.first)
            self._one_step()
            if self.schedule.evaluates_at(self.at.step) or self.schedule.saves_at(self.at.step):
                self._read_pending()
            if self.schedule.evaluates_at(self.at.step):
                self._evaluation()
            if self.schedule.saves_at(self.at.step):
                self._save()
        self.store.wait()
        if not self.figures:  # stopped between the last step and the manifest
            self._evaluation()

    def _one_step(self) -> None:
        self.clock.switch("data")
        batch = next(self.stream)
        self.clock.switch("compile" if self.first else "step")
        self.state, metrics = self.step(self.state, batch)
        self.clock.switch("step")
        self.first = False
        self.at = replace(self.at, step=self.at.step + 1, evaluated=False)
        self._read_pending()  # the device already works on this step while the last one's figures are read
        self.pending = (self.at.step, metrics)
        self.clock.write_sometimes(self.at.step)

    def _read_pending(self) -> None:
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self.report.train(*pending)

    def _evaluation(self) -> None:
        self.clock.switch("evaluate")
        self.figures = self.evaluate(self.state)
        self.log.write("eval", self.at.step, {**self.schedule.seen(self.at.step), **self.figures})
        self.at = replace(self.at, evaluated=True)
        self._resume_clock()

    def _save(self) -> None:
        self.clock.switch("checkpoint")
        poll(f"saving step {self.at.step}", slow=True)
        self.store.save(self.at.step, self.state, replace(self.at, seconds=self._seconds()).note())
        self.saved = self.at.step
        self._resume_clock()

    def _resume_clock(self) -> None:
        self.clock.write(self.at.step)
        self.clock.switch("step")
        self.report.restart_clock()

    def _save_and_stop(self) -> None:
        saving()
        self.clock.switch("checkpoint")
        self._read_pending()
        if self.saved != self.at.step:
            self.store.save(self.at.step, self.state, replace(self.at, seconds=self._seconds()).note())
        self.store.wait()

    def _roll_back(self, bad: _Bad) -> None:
        """To the newest saved state, past the batches since then."""
        self.store.wait()
        self.rollbacks += 1
        found = None
        if self.guard.action == "rollback" and self.rollbacks <= self.guard.rollbacks:
            del self.state
            found = restore(self.store, self.abstract)
        if found is None:
            raise self._diverged(bad)
        self.state, position = found
        skipped = position.skipped + bad.step - position.step
        self._close()
        self.pending = None
        self.at = replace(position, skipped=skipped)
        self.saved = position.step
        self._open(position.step)
        self.log.write("rollback", position.step, {"loss": bad.loss, "from": bad.step, "skipped": skipped})
        self.line.say(f"{bad}; back to step {position.step}, its batches up to step {bad.step} are left out")

    def _diverged(self, bad: _Bad) -> Diverged:
        kept = self.store.latest
        safe = (
            f"the state of step {kept} is kept in {self.store.directory}"
            if kept is not None
            else "no state was saved yet"
        )
        tried = f" after {self.guard.rollbacks} rollbacks" if self.rollbacks > self.guard.rollbacks > 0 else ""
        return Diverged(f"{bad}{tried}; {safe}; a lower optimizer.lr or optimizer.clip may help")

    def _seconds(self) -> float:
        return self.spent + time.monotonic() - self.begun


class _Bad(Exception):
    """A step's loss that must not be trained on."""

    def __init__(self, step: int, loss: float, usual: float | None):
        much = "" if usual is None else f", over {loss / usual:.1f} times its usual {usual:.4g}"
        super().__init__(f"the loss is {loss} at step {step}{much}")
        self.step, self.loss = step, loss


class _Reporter:
    """Turns the figures of a step into a log record and a progress line; stops the run when the loss is bad."""

    def __init__(self, log: StageLog, line: ProgressLine, schedule: Schedule, guard: GuardConfig):
        self._log, self._line, self._schedule, self._guard = log, line, schedule, guard
        self._peak = peak_flops()
        self._recent: deque[float] = deque(maxlen=guard.window)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Speed is measured from the next step's figures on: what happened before them was not a step."""
        self._since: tuple[int, float] | None = None

    def train(self, step: int, metrics: dict[str, Any]) -> None:
        values = mean(metrics)
        self._check(step, values["loss"])
        now = time.monotonic()
        note = f"reward {values['reward']:.3f}  " if "reward" in values else ""
        note += f"loss {values['loss']:.4f}"
        if self._since is not None:
            rate = (step - self._since[0]) / (now - self._since[1])
            values["tokens_per_second"] = self._tokens(values) * rate
            values["tokens_per_second_per_device"] = values["tokens_per_second"] / jax.device_count()
            note += f"  {values['tokens_per_second']:,.0f} tokens/s"
            if self._peak is not None and self._schedule.flops_per_step:
                values["mfu"] = self._schedule.flops_per_step * rate / self._peak
                note += f"  MFU {values['mfu']:.1%}"
        else:
            self._since = (step, now)
        self._log.write("train", step, {**self._schedule.seen(step), **values})
        self._line.update(step, note)

    def _tokens(self, values: dict[str, float]) -> float:
        return self._schedule.tokens_per_step or values.get("tokens_drawn", 0.0)

    def _check(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise _Bad(step, loss, None)
        if self._guard.spike is not None and len(self._recent) == self._guard.window:
            usual = statistics.median(self._recent)
            if loss > self._guard.spike * usual:
                raise _Bad(step, loss, usual)
        self._recent.append(loss)
