"""What train and distil share: data, evaluation, resume state and the loop around an objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ministral_jax.config import Looped
from ministral_jax.data.pipeline import PackedData, batches, held_out, prepare
from ministral_jax.evaluation import make_evaluate
from ministral_jax.models.spec import ModelSpec
from ministral_jax.samples import write_samples
from ministral_jax.stages.job import Job, Params, Result
from ministral_jax.training.checkpoint import ResumeStore
from ministral_jax.training.loop import Schedule, fit
from ministral_jax.training.metrics import StageLog
from ministral_jax.training.optimizer import learning_rate, make_optimizer
from ministral_jax.training.state import LossFn, init_state, make_step, split_frozen


def open_data(job: Job) -> PackedData:
    """The packed rows of the stage's length; the cascade had them made before its first stage."""
    stage = job.stage
    return prepare(stage.data, stage.batch.length, job.spec.vision, job.data_root)


def data_details(data: PackedData) -> dict[str, str]:
    """What the manifest says of the data."""
    return {"digest": data.digest, "tokenizer_digest": data.tokenizer.digest}


def held_out_batches(job: Job, data: PackedData) -> list[dict[str, Any]]:
    stage = job.stage
    return list(held_out(data, stage.batch.sequences, stage.evaluate.rows))


def run_loop(
    job: Job,
    params: Params,
    loss: LossFn,
    flops_per_token: float,
    frozen: tuple[str, ...] = (),
    teacher: tuple[ModelSpec, Params] | None = None,
) -> Result:
    """Train `params` by `loss` for the stage's steps, then save them.

    `loss` is called with the frozen part of the parameters and, under `"teacher"`, the teacher's.
    """
    stage: Looped = job.stage
    data = open_data(job)
    evaluation = held_out_batches(job, data)
    trainable, fixed = split_frozen(params, frozen)
    teacher_spec, teacher_params = teacher or (None, None)
    constants = {**fixed, "teacher": teacher_params}

    rate = learning_rate(stage.optimizer, stage.steps)
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    update = make_step(loss, optimizer, rate, stage.batch.microbatches)
    evaluator = make_evaluate(job.spec, stage.compute, teacher_spec)
    predictions: list[Any] = []

    def evaluate(state: Any) -> dict[str, float]:
        figures, predictions[:] = evaluator({**state["params"], **fixed}, teacher_params, evaluation)
        return figures

    schedule = Schedule(
        steps=stage.steps,
        evaluate_every=stage.evaluate.every,
        save_every=stage.checkpoint.every,
        tokens_per_step=stage.batch.tokens,
        flops_per_step=flops_per_token * stage.batch.tokens,
    )
    store = ResumeStore(job.directory / "state", stage.checkpoint.keep)
    try:
        outcome = fit(
            job.name,
            init_state(trainable, optimizer),
            lambda state, batch: update(state, constants, batch),
            _stream(data, stage),
            evaluate,
            schedule,
            partial(StageLog, job.directory),
            store,
        )
    finally:
        store.close()
    job.save({**outcome.state["params"], **fixed})
    write_samples(job.directory / "samples.json", data, evaluation, predictions)
    store.delete()
    tokens = stage.steps * stage.batch.tokens
    return Result(outcome.metrics, tokens, stage.steps, outcome.seconds, {"data": data_details(data)})


def _stream(data: PackedData, stage: Looped) -> Callable[[int], Iterator[dict[str, Any]]]:
    return lambda start: batches(data, "train", stage.batch.sequences, stage.seed, start_step=start)
