"""What train and distil share: data, evaluation, resume state and the loop around an objective."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from ministral_jax.config import Looped, PruneStage
from ministral_jax.data.pipeline import PackedData, batches, held_out, prepare
from ministral_jax.evaluation import make_evaluate
from ministral_jax.models.spec import ModelSpec
from ministral_jax.parallel import Placement
from ministral_jax.samples import write_samples
from ministral_jax.stages.job import Job, Params, Result
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


def train_batches(job: Job, data: PackedData, start: int = 0, stop: int | None = None) -> Batches:
    """Global batches of the stage; this host reads its own rows of them."""
    stage: Looped | PruneStage = job.stage
    count = stage.batch.sequences
    rows = batches(data, "train", count, stage.seed, start, stop, job.placement.rows(count))
    return _placed(job.placement, rows, count)


def held_out_batches(job: Job, data: PackedData) -> Batches:
    """A pass over the held-out rows."""
    stage: Looped | PruneStage = job.stage
    count = stage.batch.sequences
    return _placed(job.placement, held_out(data, count, stage.evaluate.rows, job.placement.rows(count)), count)


def _placed(placement: Placement, rows: Iterator[Any], count: int) -> Batches:
    try:
        for batch in rows:
            yield placement.place(batch, count)
    finally:
        getattr(rows, "close", lambda: None)()


def run_loop(
    job: Job,
    params: Params,
    loss: LossFn,
    flops_per_token: float,
    frozen: tuple[str, ...] = (),
    teacher: tuple[ModelSpec, Params] | None = None,
    clock: Clock | None = None,
) -> Result:
    """Train `params` by `loss` for the stage's steps, then save them.

    `loss` is called with the frozen part of the parameters and, under `"teacher"`, the teacher's.
    """
    stage: Looped = job.stage
    data = open_data(job)
    trainable, fixed = split_frozen(params, frozen)
    del params
    teacher_spec, teacher_params = teacher or (None, None)
    constants = {**fixed, "teacher": teacher_params}
    rate, optimizer = learning_rate(stage.optimizer, stage.steps), make_optimizer(stage.optimizer, stage.steps)
    update = make_step(
        job.placement.rules.scoped(loss),
        optimizer,
        rate,
        stage.batch.microbatches,
        state_shardings(trainable, optimizer),
    )
    evaluator = make_evaluate(job.spec, stage.compute, job.placement, teacher_spec, job.teacher_placement)
    predictions: list[Any] = []

    def evaluate(state: Any) -> dict[str, float]:
        params = {**state["params"], **fixed}
        figures, predictions[:] = evaluator(params, teacher_params, held_out_batches(job, data))
        return figures

    store = ResumeStore(job.directory / "state", stage.checkpoint.keep, stage.checkpoint.keep_every)
    try:
        abstract = abstract_state(trainable, optimizer)
        state, start = restore(store, abstract) or (init_state(trainable, optimizer), None)
        del trainable
        outcome: Outcome = fit(
            job.name,
            state,
            start,
            lambda state, batch: update(state, constants, batch),
            lambda first: train_batches(job, data, first),
            evaluate,
            _schedule(stage, flops_per_token),
            stage.guard,
            partial(StageLog, job.directory),
            store,
            clock,
        )
    finally:
        store.close()
    files = job.save({**outcome.state["params"], **fixed})
    write_samples(job.directory / "samples.json", data, stage.batch.sequences, stage.evaluate.rows, predictions)
    store.delete()
    tokens = stage.steps * stage.batch.tokens
    return Result(outcome.metrics, tokens, stage.steps, outcome.seconds, files, {"data": data_details(data)})


def _schedule(stage: Looped, flops_per_token: float) -> Schedule:
    return Schedule(
        steps=stage.steps,
        evaluate_every=stage.evaluate.every,
        save_every=stage.checkpoint.every,
        tokens_per_step=stage.batch.tokens,
        flops_per_step=flops_per_token * stage.batch.tokens,
    )
