"""A stage that trains on packed rows: the programs of its objective, and the learner that the loop drives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ministral_jax.data.pipeline import Join
from ministral_jax.data.prepare import PackedData
from ministral_jax.distributed.processes import polled
from ministral_jax.losses.evaluation import Evaluate, make_evaluate
from ministral_jax.models.vlm import placed_params
from ministral_jax.stages.base import Job, Params, Program, Result
from ministral_jax.stages.image_answers import write_samples
from ministral_jax.stages.rows import (
    Batches,
    EvaluateConfig,
    Packing,
    RowStage,
    abstract_batch,
    data_details,
    evaluation_programs,
    held_out_batches,
    train_batches,
)
from ministral_jax.teachers.teacher import Teacher
from ministral_jax.training.goodput import Clock
from ministral_jax.training.log import check_tracker
from ministral_jax.training.optimizer import learning_rate, make_optimizer
from ministral_jax.training.state import (
    LossFn,
    Metrics,
    State,
    abstract_state,
    make_step,
    split_frozen,
    state_shardings,
)
from ministral_jax.training.train import Outcome, Schedule, Steps, train

FROZEN = ("vision",)
"""What a student keeps of its teacher as it is."""


class Looped(RowStage, Steps):
    """A stage that trains on packed rows."""

    evaluate: EvaluateConfig = EvaluateConfig()

    def prepare(self, job: Job[Any], packing: Packing) -> None:
        check_tracker(self.track, job.where)
        super().prepare(job, packing)


@dataclass(frozen=True)
class Objective:
    """What is learnt from a batch.

    loss: `(trainable, frozen, batch)`, with the teacher's arrays under `frozen["teacher"]`.
    frozen: top-level keys of the parameters that stay as they are.
    teacher: of which the arrays may be abstract.
    """

    loss: LossFn
    frozen: tuple[str, ...] = ()
    teacher: Teacher | None = None

    def flops_per_token(self, job: Job[Looped]) -> float:
        """Forward and backward through the model, and what the teacher adds."""
        own = 3 * job.spec.flops_per_token(job.stage.batch.length)
        return own + (self.teacher.flops_per_token if self.teacher else 0)


def loop_programs(job: Job[Looped], objective: Objective) -> dict[str, Program]:
    """The update, and the held-out evaluation."""
    stage, teacher = job.stage, objective.teacher
    trainable, fixed = split_frozen(placed_params(job.spec, job.placement), objective.frozen)
    constants = {**fixed, "teacher": teacher.constants if teacher else None}
    batch = abstract_batch(job) | (teacher.train_arrays if teacher else {})
    step = update_program(job, objective.loss, trainable, stage.steps, stage.batch.microbatches)
    return {
        "step": Program(step.function, (*step.arguments, constants, batch)),
        **evaluation_programs(job, job.spec, teacher),
    }


def update_program(job: Job[Any], loss: LossFn, trainable: Params, updates: int, microbatches: int) -> Program:
    """One update of the stage's optimiser, `updates` of which its learning rate spans: see `make_step`. Of its
    arguments the state alone; `trainable` may be abstract."""
    config = job.stage.optimizer
    rate, optimizer = learning_rate(config, updates), make_optimizer(config, updates)
    shardings = state_shardings(trainable, optimizer)
    step = make_step(job.placement.rules.scoped(loss), optimizer, rate, microbatches, shardings)
    return Program(step, (abstract_state(trainable, optimizer),))


@dataclass
class RowLearner:
    """Learns from packed rows; see `training.train.Learner`."""

    job: Job[Looped]
    data: PackedData
    update: Callable[..., tuple[State, Metrics]]
    schedule: Schedule
    fixed: Params
    teacher: Teacher | None
    evaluator: Evaluate
    examine: Callable[[Params], dict[str, float]] | None
    predictions: list[Any] = field(default_factory=list)
    """Of the last evaluation, `[B, T]` per batch: the most probable next tokens."""

    def batches(self, first: int) -> Batches:
        return train_batches(self.job, self.data, first, join=self._join("train"))

    def step(self, state: State, batch: Any) -> tuple[State, Metrics]:
        return self.update(state, {**self.fixed, "teacher": self._constants}, batch)

    def evaluate(self, state: State) -> dict[str, float]:
        params = {**state["params"], **self.fixed}
        rows = polled(held_out_batches(self.job, self.data, self._join("held_out")), "evaluating batch")
        figures, self.predictions = self.evaluator(params, self._constants, rows)
        return figures | (self.examine(params) if self.examine else {})

    @property
    def _constants(self) -> Params | None:
        return self.teacher.constants if self.teacher else None

    def _join(self, split: str) -> Join | None:
        if self.teacher is None:
            return None
        return self.teacher.join if split == "train" else self.teacher.held_out_join


def run_loop(
    job: Job[Any],
    data: PackedData,
    objective: Objective,
    params: Params,
    clock: Clock,
    examine: Callable[[Params], dict[str, float]] | None = None,
) -> Result:
    """Train `params` for the stage's steps, then save them. What `examine` finds joins the figures of every
    evaluation."""
    stage: Looped = job.stage
    programs = stage.programs(job)
    trainable, fixed = split_frozen(params, objective.frozen)
    del params
    teacher = objective.teacher
    schedule = Schedule(
        evaluate_every=stage.evaluate.every,
        evaluate_early=stage.evaluate.early,
        updates=stage.steps,
        tokens_per_step=stage.batch.tokens,
        flops_per_step=objective.flops_per_token(job) * stage.batch.tokens,
    )
    held_out = teacher.held_out if teacher else None
    evaluator = make_evaluate(job.spec, stage.compute, job.placement, held_out, job.teacher_placement.rules)
    update = programs["step"].function
    learner = RowLearner(job, data, update, schedule, fixed, teacher, evaluator, examine)
    outcome = train(learner, trainable, stage, job.directory, clock)
    return _finish(job, learner, outcome)


def _finish(job: Job[Any], learner: RowLearner, outcome: Outcome) -> Result:
    stage, data = job.stage, learner.data
    files = job.save({**outcome.state["params"], **learner.fixed})
    path = job.directory / "samples.json"
    write_samples(path, data, stage.batch.sequences, stage.evaluate.rows, learner.predictions)
    outcome.store.delete()
    tokens = stage.steps * stage.batch.tokens
    return Result(outcome.metrics, tokens, stage.steps, outcome.seconds, files, {"data": data_details(data)})
