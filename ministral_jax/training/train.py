"""The one training loop. Objectives differ in what a `Learner` brings: its batches, its step and its evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self

import jax
from pydantic import Field, model_validator

from ministral_jax.distributed.processes import Preempted, Shapes, compiles, poll, saving, shapes_of
from ministral_jax.errors import UserError
from ministral_jax.settings import Frozen
from ministral_jax.training.checkpoint import CheckpointConfig, ResumeStore
from ministral_jax.training.due import Due
from ministral_jax.training.goodput import Clock
from ministral_jax.training.hooks import BadStep, Guard, GuardConfig, ProfileConfig, Profiler, Speed
from ministral_jax.training.log import StageLog, Track, mean
from ministral_jax.training.optimizer import OptimizerConfig, decay_begins, make_optimizer
from ministral_jax.training.progress import ProgressLine
from ministral_jax.training.scores import Overoptimised, Scores, Tasks
from ministral_jax.training.state import State, abstract_state, init_state

_SHOWN = 4
"""Held-out figures told as they come."""
StepMetrics = Mapping[str, tuple[Any, Any]]
"""(sum, count) by name, on the devices or on the host."""


class Steps(Frozen):
    """What the loop is told, whatever it trains on."""

    steps: int = Field(ge=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    track: Track = "tensorboard"
    """Where figures are shown beside metrics.jsonl; `wandb` and `trackio` when they are installed."""
    profile: ProfileConfig | None = None

    @model_validator(mode="after")
    def _profile_is_of_a_step(self) -> Self:
        if self.profile is not None and self.profile.start > self.steps:
            raise ValueError(f"profile.start = {self.profile.start} comes after the last of {self.steps} steps")
        return self


@dataclass(frozen=True)
class Schedule:
    """When a learner is evaluated, and what its steps cost."""

    evaluate_every: int
    updates: int
    """Of the optimiser in all steps: what its learning rate spans."""
    tokens_per_step: int = 0
    """0 where a step draws its tokens itself; its metrics then say how many, as `tokens_drawn`."""
    flops_per_step: float = 0.0
    evaluate_early: bool = True

    def evaluates_at(self, step: int, steps: int) -> bool:
        """At 0, at multiples of `evaluate_every`, at the end; `early`, at powers of two below the first multiple."""
        early = self.evaluate_early and step < self.evaluate_every and step & (step - 1) == 0
        return early or self.asks_at(step, steps)

    def asks_at(self, step: int, steps: int) -> bool:
        """Whether tasks are asked as well, which takes longer: at 0, at multiples of `evaluate_every`, at the end."""
        return step % self.evaluate_every == 0 or step == steps

    def grows_from(self, config: Steps) -> int | None:
        """The step up to which nothing depends on `config.steps`: from there a finished stage can go on to more. None
        where there is none."""
        begins = decay_begins(config.optimizer, self.updates)
        begins = None if self.updates < config.optimizer.warmup else begins  # which more steps would stretch
        return None if begins is None else begins * config.steps // self.updates

    def seen(self, step: int) -> dict[str, int]:
        """`tokens` trained on until a step, where that is known ahead."""
        return {"tokens": step * self.tokens_per_step} if self.tokens_per_step else {}


class Learner(Protocol):
    """What the loop drives. `state` is what `training.state.init_state` makes of the parameters."""

    @property
    def schedule(self) -> Schedule: ...

    def batches(self, first: int) -> Iterator[Any]:
        """The data from a batch on; batch n depends on n alone."""
        ...

    def step(self, state: State, batch: Any) -> tuple[State, StepMetrics]:
        """One step; it may consume the state it is given. `loss` is among its metrics."""
        ...

    def evaluate(self, state: State) -> dict[str, float]:
        """Held-out figures of a state."""
        ...

    def told(self, figures: dict[str, float]) -> list[str]:
        """Lines to be said of held-out figures, beside the first few."""
        ...


@dataclass(frozen=True)
class Position:
    """Where a loop stands, all in steps counted after the update; what is kept beside a saved state."""

    step: int = 0
    evaluated: bool = False
    """Whether the evaluation due at `step` was done."""
    skipped: int = 0
    """Batches left out before the next one, by rolling back: step n + 1 trains on batch n + skipped."""
    seconds: float = 0.0
    """Spent over all attempts."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What `Guard.note` told."""
    scores: dict[str, Any] = field(default_factory=dict)
    """What `Scores.note` told."""

    def note(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("evaluated", "skipped", "seconds", "guard", "scores")}


@dataclass(frozen=True)
class Outcome:
    """What a finished loop leaves."""

    state: State
    metrics: dict[str, float]
    """Of the last evaluation."""
    seconds: float
    """Over all attempts."""
    store: ResumeStore
    """The saved states, to be deleted when the result is safe."""


class Diverged(UserError):
    """The loss is not a number any more, or stays far above what it was; the newest checkpoint is from before."""


def train(
    learner: Learner, params: Any, config: Steps, directory: Path, clock: Clock, tasks: Tasks | None = None
) -> Outcome:
    """Train to `config.steps`, from the newest saved state in `directory`/state, or from `params`, which it consumes.

    Args:
        clock: has run since the stage began.
        tasks: asked beside the held-out figures, which their scores join; see `Schedule.asks_at`.

    Raises:
        Diverged: the loss or the gradient of a step is NaN or infinite, or the loss stays far above what is usual, and
            the guard does not allow to roll back (again). Nothing of such steps is saved.
        Overoptimised: a task's score has fallen while the loss fell, for as many evaluations as `tasks` has patience.
            The state is saved; more patience, or none, goes on from it.
        Preempted: the job was asked to stop. The state is saved, at the same step by all processes, unless its loss is
            a spike; `then` says from which step the same command goes on.
    """
    schedule, begun = learner.schedule, time.monotonic()
    grows_from = schedule.grows_from(config)
    with closing(ResumeStore(directory / "state", config.checkpoint.keep, grows_from)) as store:
        state: Any
        state, at, saved = _begin(params, make_optimizer(config.optimizer, schedule.updates), store)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        before = at.seconds - begun  # and with the time of day, the seconds of all attempts
        figures: dict[str, float] = {}
        attempt = _Attempt(learner, config, directory, clock, tasks)
        profiler = Profiler(config.profile, directory, lambda text: attempt.line.say(text))
        attempt.begin(at, saved)
        due = Due(config.checkpoint, config.steps, grows_from, saved)
        try:
            while True:
                try:
                    evaluates = schedule.evaluates_at(at.step, config.steps) and not at.evaluated
                    saves = due.at(at.step)
                    if evaluates or saves:
                        attempt.read_figures()
                    if evaluates:
                        figures = attempt.evaluate(state)
                        at = replace(at, evaluated=True)
                    if saves and attempt.guard.calm:
                        poll(f"saving step {at.step}", slow=True)
                        attempt.save(state, replace(at, seconds=before + time.monotonic()), store)
                        due.restart(at.step)
                    if (fall := attempt.fallen()) is not None:
                        if due.saved != at.step and attempt.guard.calm:
                            attempt.save(state, replace(at, seconds=before + time.monotonic()), store)
                        store.wait()
                        raise Overoptimised(f"{fall}; {_kept(store)}")
                    if at.step == config.steps:
                        break
                    poll(f"step {at.step + 1}", slow=not attempt.compiled)
                    profiler.before(at.step + 1)
                    state = attempt.step(state)
                    at = replace(at, step=at.step + 1, evaluated=False)
                    profiler.after(at.step, state)
                except BadStep as bad:
                    state = None  # not in memory beside the one that is restored
                    state, at = _roll_back(bad, abstract, store, config.guard, attempt.rollbacks + 1)
                    due.restart(at.step)
                    attempt.begin_again(at, bad)
            store.wait()
            if not figures:  # stopped between the last step and the manifest
                figures = attempt.evaluate(state)
        except Preempted as stop:
            saving()
            if due.saved != at.step and attempt.is_sound():
                attempt.save(state, replace(at, seconds=before + time.monotonic()), store)
            stop.then = _goes_on(store, directory.name)
            raise
        finally:
            profiler.close()
            attempt.end()
        return Outcome(state, figures, before + time.monotonic(), store)


def _goes_on(store: ResumeStore, stage: str) -> str:
    if (step := store.latest) is None:
        return f"no state was saved, the same command begins {stage} again"
    return f"the same command goes on from step {step} of {stage}"


def _begin(params: Any, optimizer: Any, store: ResumeStore) -> tuple[Any, Position, int | None]:
    """The newest saved state, where it stands, and that step; or a state made of `params`. They are consumed."""
    if (found := _restore(store, abstract_state(params, optimizer))) is None:
        return init_state(params, optimizer), Position(), None
    jax.tree.map(lambda x: x.delete(), params)  # else they would lie beside the state until the end
    return *found, found[1].step


def _restore(store: ResumeStore, abstract: Any) -> tuple[State, Position] | None:
    """The newest good state and where it stands, or None."""
    if (step := store.latest) is None:
        return None
    state, note = store.restore(abstract)
    return state, Position(step=step, **note)


def _roll_back(
    bad: BadStep, abstract: Any, store: ResumeStore, guard: GuardConfig, rollbacks: int
) -> tuple[State, Position]:
    """The newest saved state, past the batches since then.

    Raises:
        Diverged: there is none, the guard says stop, or it was done too often.
    """
    store.wait()
    may = guard.action == "rollback" and rollbacks <= guard.rollbacks
    if may and (found := _restore(store, abstract)) is not None:
        state, position = found
        return state, replace(position, skipped=position.skipped + bad.step - position.step)
    tried = f" after {guard.rollbacks} rollbacks" if rollbacks > guard.rollbacks > 0 else ""
    raise Diverged(f"{bad}{tried}; {_kept(store)}; a lower optimizer.lr or optimizer.clip may help") from None


def _kept(store: ResumeStore) -> str:
    step = store.latest
    return f"the state of step {step} is kept in {store.directory}" if step is not None else "no state was saved yet"


class _Attempt:
    """The loop from where it begins, or goes on, to where it ends or is rolled back: its data and its records."""

    def __init__(self, learner: Learner, config: Steps, directory: Path, clock: Clock, tasks: Tasks | None):
        self.learner, self.config, self.directory, self.clock, self.tasks = learner, config, directory, clock, tasks
        self.rollbacks = 0

    def begin(self, at: Position, resumed: int | None) -> None:
        schedule = self.learner.schedule
        self.at_step, self.compiled = at.step, set[Shapes]()
        self.pending: tuple[int, StepMetrics] | None = None
        self.log = StageLog(self.directory, resumed, at.evaluated, self.config.track)
        self.line = ProgressLine(self.directory.name, self.config.steps, at.step)
        self.guard, self.scores = Guard(self.config.guard, **at.guard), Scores(**at.scores)
        self.speed = Speed(schedule.tokens_per_step, schedule.flops_per_step)
        self.stream = self.learner.batches(at.step + at.skipped)
        self.clock.begin_attempt(self.log, at.step)

    def begin_again(self, at: Position, bad: BadStep) -> None:
        """After a roll-back to `at`."""
        self.end()
        self.rollbacks += 1
        self.begin(at, at.step)
        self.log.write("rollback", at.step, {"loss": bad.loss, "from": bad.step, "skipped": at.skipped})
        self.line.say(f"{bad}; back to step {at.step}, its batches up to step {bad.step} are left out")

    def end(self) -> None:
        getattr(self.stream, "close", lambda: None)()
        self.clock.write(self.at_step)
        self.log.close()
        self.line.close()

    def step(self, state: State) -> State:
        """Dispatch the next step; the device works on it while the figures of the one before are read."""
        self.clock.switch("data")
        batch = next(self.stream)
        self.clock.switch("step")
        if new := (shapes := shapes_of(batch)) not in self.compiled:
            compiles()
            self.read_figures()  # else the speed of the step before would hold what follows
            self.clock.switch("compile")
        state, metrics = self.learner.step(state, batch)
        self.clock.switch("step")
        if new:
            self.compiled.add(shapes)
            self.speed.restart()
        self.at_step += 1
        self.read_figures()
        self.pending = (self.at_step, metrics)
        self.clock.write_sometimes(self.at_step)
        return state

    def read_figures(self) -> None:
        """Log the figures of the last step that was dispatched, which waits for it.

        Raises:
            BadStep: it must not be gone on from.
        """
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        values = mean(metrics)
        self.guard.check(step, values["loss"], values.get("gradient_norm", 0.0))
        values |= self.speed.of(step, values.get("tokens_drawn", 0.0))
        self.log.write("train", step, {**self.learner.schedule.seen(step), **values})
        note = f"reward {values['reward']:.3f}  " if "reward" in values else ""
        note += f"loss {values['loss']:.4f}"
        if "tokens_per_second" in values:
            note += f"  {values['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in values:
            note += f"  MFU {values['mfu']:.1%}"
        self.line.update(step, note)

    def is_sound(self) -> bool:
        """Whether the last step is one to go on from; its figures are logged if its numbers are."""
        try:
            self.read_figures()
        except BadStep:
            return False
        return self.guard.calm

    def evaluate(self, state: State) -> dict[str, float]:
        self.clock.switch("evaluate")
        figures = self.learner.evaluate(state)
        if self.tasks is not None and self.learner.schedule.asks_at(self.at_step, self.config.steps):
            figures = {**figures, **self.scores.add(self.at_step, figures, self.tasks.ask(state))}
        shown = [f"{name} {value:.4g}" for name, value in list(figures.items())[:_SHOWN]]
        for text in (f"held out, step {self.at_step}: {'  '.join(shown)}", *self.learner.told(figures)):
            self.line.say(text)
        self.log.write("eval", self.at_step, {**self.learner.schedule.seen(self.at_step), **figures})
        self._back_to_steps()
        return figures

    def fallen(self) -> str | None:
        """That a task's score has fallen for long enough, and what to do, in words."""
        return None if self.tasks is None else self.scores.fallen(self.tasks)

    def save(self, state: State, at: Position, store: ResumeStore) -> None:
        self.clock.switch("checkpoint")
        self.log.flush()  # before the state counts that is gone on from
        store.save(at.step, state, replace(at, guard=self.guard.note(), scores=self.scores.note()).note())
        self._back_to_steps()

    def _back_to_steps(self) -> None:
        self.clock.write(self.at_step)
        self.clock.switch("step")
        self.speed.restart()
