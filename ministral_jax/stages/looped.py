"""What the stages that train share: data, evaluation, resume state and the loop around an objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax

from ministral_jax.config import DataStage, Looped, PruneStage, Steps
from ministral_jax.data.pipeline import Join, PackedData, batches, held_out, prepare
from ministral_jax.distributed.placement import Placement
from ministral_jax.distributed.processes import polled
from ministral_jax.losses.evaluation import make_evaluate
from ministral_jax.stages.image_answers import write_samples
from ministral_jax.stages.job import Job, Params, Result
from ministral_jax.teachers.teacher import Teacher
from ministral_jax.training.checkpoint import ResumeStore
from ministral_jax.training.goodput import Clock
from ministral_jax.training.loop import Outcome, Schedule, fit, restore
from ministral_jax.training.metrics import StageLog
from ministral_jax.training.optimizer import learning_rate, make_optimizer
from ministral_jax.training.state import (
    LossFn,
    abstract_state,
    init_state,
    make_step,
    split_frozen,
    state_shardings,
)

Batches = Iterator[dict[str, Any]]


def open_data(job: Job) -> PackedData:
    """The packed rows of the stage's length; the cascade had them made before its first stage."""
    stage = job.stage
    return prepare(stage.data, stage.batch.length, job.spec.vision, job.data_root)


def data_details(data: PackedData) -> dict[str, str]:
    """What the manifest says of the data."""
    return {"digest": data.digest, "tokenizer_digest": data.tokenizer.digest}


def train_batches(
    job: Job, data: PackedData, start: int = 0, stop: int | None = None, join: Join | None = None
) -> Batches:
    """Global batches of the stage; this host reads its own rows of them, and what `join` adds to these."""
    stage: DataStage = job.stage
    count = stage.batch.sequences
    rows = batches(data, "train", count, stage.seed, start, stop, job.placement.rows(count), join)
    return _placed(job.placement, rows, count)


def held_out_batches(job: Job, data: PackedData, join: Join | None = None) -> Batches:
    """A pass over the held-out rows."""
    stage: Looped | PruneStage = job.stage
    count = stage.batch.sequences
    rows = held_out(data, count, stage.evaluate.rows, job.placement.rows(count), join)
    return _placed(job.placement, rows, count)


def _placed(placement: Placement, rows: Iterator[Any], count: int) -> Batches:
    """The next batch goes to the devices, in a thread, while they work on this one."""

    def fetch() -> dict[str, Any] | None:
        batch = next(rows, None)
        return None if batch is None else placement.place(batch, count)

    try:
        with ThreadPoolExecutor(1, "placing") as ahead:
            coming = ahead.submit(fetch)
            while (batch := coming.result()) is not None:
                coming = ahead.submit(fetch)
                yield batch
    finally:
        getattr(rows, "close", lambda: None)()


def run_loop(
    job: Job,
    data: PackedData,
    params: Params,
    loss: LossFn,
    flops_per_token: float,
    frozen: tuple[str, ...] = (),
    teacher: Teacher | None = None,
    clock: Clock | None = None,
    examine: Callable[[Params], dict[str, float]] | None = None,
) -> Result:
    """Train `params` by `loss` for the stage's steps, then save them.

    `loss` is called with the frozen part of the parameters and, under `"teacher"`, the teacher's constants. What
    `examine` finds joins the figures of every evaluation.
    """
    stage: Looped = job.stage
    trainable, fixed = split_frozen(params, frozen)
    del params
    taught = teacher.constants if teacher else None
    join, held_out_join = (teacher.join, teacher.held_out_join) if teacher else (None, None)
    constants = {**fixed, "teacher": taught}
    update = make_update(job, loss, trainable, stage.steps, stage.batch.microbatches)
    held_out_teacher = teacher.held_out if teacher else None
    evaluator = make_evaluate(job.spec, stage.compute, job.placement, held_out_teacher, job.teacher_placement.rules)
    predictions: list[Any] = []

    def evaluate(state: Any) -> dict[str, float]:
        params = {**state["params"], **fixed}
        rows = polled(held_out_batches(job, data, held_out_join), "evaluating batch")
        figures, predictions[:] = evaluator(params, taught, rows)
        return figures | (examine(params) if examine else {})

    outcome, store = run_steps(
        job,
        trainable,
        stage.steps,
        lambda state, batch: update(state, constants, batch),
        lambda first: train_batches(job, data, first, join=join),
        evaluate,
        _schedule(stage, flops_per_token),
        clock,
    )
    files = job.save({**outcome.state["params"], **fixed})
    write_samples(job.directory / "samples.json", data, stage.batch.sequences, stage.evaluate.rows, predictions)
    store.delete()
    tokens = stage.steps * stage.batch.tokens
    return Result(outcome.metrics, tokens, stage.steps, outcome.seconds, files, {"data": data_details(data)})


def make_update(job: Job, loss: LossFn, trainable: Params, updates: int, microbatches: int) -> Any:
    """One update of the stage's optimiser, `updates` of which its learning rate spans: see `make_step`."""
    config = job.stage.optimizer
    rate, optimizer = learning_rate(config, updates), make_optimizer(config, updates)
    shardings = state_shardings(trainable, optimizer)
    return make_step(job.placement.rules.scoped(loss), optimizer, rate, microbatches, shardings)


def run_steps(
    job: Job,
    trainable: Params,
    updates: int,
    step: Callable[[Any, Any], tuple[Any, Any]],
    batches: Callable[[int], Iterator[Any]],
    evaluate: Callable[[Any], dict[str, float]],
    schedule: Schedule,
    clock: Clock | None = None,
) -> tuple[Outcome, ResumeStore]:
    """`fit` from the newest saved state of the stage, or from `trainable`. The store is to be deleted when the result
    is saved."""
    stage: Steps = job.stage
    optimizer = make_optimizer(stage.optimizer, updates)
    store = ResumeStore(job.directory / "state", stage.checkpoint.keep, stage.checkpoint.keep_every)
    try:
        abstract = abstract_state(trainable, optimizer)
        if (found := restore(store, abstract)) is not None:
            state, start = found
            jax.tree.map(lambda x: x.delete(), trainable)  # else it would lie beside the state until the end
        else:
            state, start = init_state(trainable, optimizer), None
        log = partial(StageLog, job.directory)
        return fit(job.name, state, start, step, batches, evaluate, schedule, stage.guard, log, store, clock), store
    finally:
        store.close()


def _schedule(stage: Looped, flops_per_token: float) -> Schedule:
    return Schedule(
        steps=stage.steps,
        evaluate_every=stage.evaluate.every,
        save_every=stage.checkpoint.every,
        tokens_per_step=stage.batch.tokens,
        flops_per_step=flops_per_token * stage.batch.tokens,
    )
