"""A stage that trains on packed rows: the programs of its objective, and the learner that the loop drives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ministral_jax.data.prepare import PackedData
from ministral_jax.losses.evaluation import make_evaluate
from ministral_jax.losses.held_out import HeldOut
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import placed_params
from ministral_jax.stages import rows
from ministral_jax.stages.asking import InLoop, check_loop_tasks, check_shown, loop_tasks, told_tasks
from ministral_jax.stages.base import Graph, Job, Params, Program, Result
from ministral_jax.stages.figures import told
from ministral_jax.stages.image_answers import write_samples
from ministral_jax.teachers.apart import READ, Apart
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
from ministral_jax.training.train import Schedule, Steps, train

Examine = Callable[[Params], dict[str, float]]
FROZEN = ("vision",)
"""What a student keeps of its teacher as it is."""


class LoopEvaluateConfig(InLoop, rows.EvaluateConfig):
    """Held-out evaluation at step 0, at multiples of `every`, and at the last step; and tasks."""


class Looped(rows.RowStage, Steps):
    """A stage that trains on packed rows."""

    evaluate: LoopEvaluateConfig = LoopEvaluateConfig()

    @property
    def rows_read(self) -> int:
        return self.steps * self.batch.sequences

    def check_sizes(self, spec: ModelSpec, graph: Graph, where: str) -> None:
        super().check_sizes(spec, graph, where)
        if self.evaluate.tasks is not None:
            check_shown(self.evaluate.tasks.names, spec, f"{where}.evaluate.tasks")

    def prepare(self, job: Job[Any], packing: rows.Packing) -> None:
        check_tracker(self.track, job.where)
        super().prepare(job, packing)
        check_loop_tasks(job, lambda: packing.rows(job).tokenizer)


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


def loop_programs(job: Job[Looped], objective: Objective) -> dict[str, Program]:
    """The update, and the held-out evaluation."""
    stage, teacher = job.stage, objective.teacher
    trainable, fixed = split_frozen(placed_params(job.spec, job.placement), objective.frozen)
    constants = {**fixed, "teacher": teacher.constants if teacher else None}
    batch = rows.abstract_batch(job, stage.batch.microbatches) | (teacher.train_arrays if teacher else {})
    step = update_program(job, objective.loss, trainable, stage.steps, stage.batch.microbatches)
    taught = {} if teacher is None or teacher.apart is None else {"teacher": _reading(job, teacher.apart)}
    return taught | {
        "step": Program(step.function, (*step.arguments, constants, batch)),
        **rows.evaluation_programs(job, job.spec, teacher),
    }


def _reading(job: Job[Looped], apart: Apart) -> Program:
    """What a teacher on a mesh of its own does for a batch."""
    batch = rows.abstract_batch(job, job.stage.batch.microbatches, apart.own)
    batch = {name: one for name, one in batch.items() if name in READ}
    return Program(apart.read, (apart.params, batch), mesh=apart.own.mesh)


def update_program(job: Job[Any], loss: LossFn, trainable: Params, updates: int, microbatches: int) -> Program:
    """One update of the stage's optimiser, `updates` of which its learning rate spans: see `make_step`. Of its
    arguments the state alone; `trainable` may be abstract."""
    config = job.stage.optimizer
    rate, optimizer = learning_rate(config, updates), make_optimizer(config, updates)
    shardings = state_shardings(trainable, optimizer)
    step = make_step(job.placement.rules.scoped(loss), optimizer, rate, microbatches, shardings)
    return Program(step, (abstract_state(trainable, optimizer),))


class RowLearner:
    """Learns from packed rows; see `training.train.Learner`."""

    def __init__(self, job: Job[Any], data: PackedData, objective: Objective, fixed: Params, examine: Examine | None):
        stage: Looped = job.stage
        self.job, self.data, self.fixed, self.examine, self.teacher = job, data, fixed, examine, objective.teacher
        self.update = stage.programs(job)["step"].function
        # forward and backward through the model, and what the teacher adds
        flops = 3 * job.spec.flops_per_token(stage.batch.length)
        flops += self.teacher.flops_per_token if self.teacher else 0
        tokens = stage.batch.tokens
        self.schedule = Schedule(stage.evaluate.every, stage.steps, tokens, flops * tokens, stage.evaluate.early)
        self.constants = self.teacher.constants if self.teacher else None
        held_out = self.teacher.held_out if self.teacher else None
        rules, context = job.teacher_placement.rules, self.teacher.context if self.teacher else None
        self.evaluator = make_evaluate(job.spec, stage.computed, job.placement, held_out, rules, context)
        self.predictions: list[Any] = []
        """Of the last evaluation, `[B, T]` per batch: the most probable next tokens."""
        self.found = HeldOut()
        """By the last evaluation."""

    def batches(self, first: int) -> rows.Batches:
        join, microbatches = self.teacher.join if self.teacher else None, self.job.stage.batch.microbatches
        return self._taught(rows.train_batches(self.job, self.data, first, join=join, microbatches=microbatches))

    def _taught(self, batches: rows.Batches) -> rows.Batches:
        """With what a teacher on a mesh of its own hands over."""
        return batches if self.teacher is None or self.teacher.apart is None else self.teacher.apart.taught(batches)

    def step(self, state: State, batch: Any) -> tuple[State, Metrics]:
        return self.update(state, {**self.fixed, "teacher": self.constants}, batch)

    def params(self, state: State) -> Params:
        """All parameters of the model."""
        return {**state["params"], **self.fixed}

    def evaluate(self, state: State) -> dict[str, float]:
        params = self.params(state)
        join = self.teacher.held_out_join if self.teacher else None
        batches = self._taught(rows.held_out_batches(self.job, self.data, join))
        self.found, self.predictions = self.evaluator(params, self.constants, batches)
        return self.found.figures | (self.examine(params) if self.examine else {})

    def told(self, figures: dict[str, float]) -> list[str]:
        return [*told_tasks(figures), *told(self.job.stage.figures, figures)]


def run_loop(
    job: Job[Any], data: PackedData, objective: Objective, params: Params, clock: Clock, examine: Examine | None = None
) -> Result:
    """Train `params` for the stage's steps, then save them. What `examine` finds joins the figures of every
    evaluation."""
    stage: Looped = job.stage
    trainable, fixed = split_frozen(params, objective.frozen)
    del params
    learner = RowLearner(job, data, objective, fixed, examine)
    tasks = loop_tasks(job, data.tokenizer, learner.params)
    outcome = train(learner, trainable, stage, job.directory, clock, tasks)
    files = job.save(learner.params(outcome.state))
    path = job.directory / "samples.json"
    write_samples(path, data, stage.batch.sequences, stage.evaluate.rows, learner.predictions)
    outcome.store.delete()
    tokens = stage.steps * stage.batch.tokens
    details = {"data": rows.data_details(data), "held_out": learner.found.details()}
    return Result(outcome.metrics, tokens, stage.steps, outcome.seconds, files, details)
