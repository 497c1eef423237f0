"""Logit distillation: the student learns the teacher's next-token distribution; the vision tower is frozen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ministral_jax.data.pipeline import PackedData
from ministral_jax.errors import UserError
from ministral_jax.losses.chunked import LossOptions
from ministral_jax.losses.evaluation import hidden
from ministral_jax.losses.head import LossHead
from ministral_jax.losses.targets import Targets
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Compute, head_matrix, param_shardings
from ministral_jax.stages.job import Job, Params, Result, fresh_params, load_stage
from ministral_jax.stages.looped import open_data, run_loop
from ministral_jax.stages.manifest import digest, finished
from ministral_jax.teachers.store import open_store
from ministral_jax.teachers.teacher import Teacher, online, stored
from ministral_jax.training.goodput import Clock
from ministral_jax.training.state import LossFn

FROZEN = ("vision",)


def run(job: Job) -> Result:
    stage, clock = job.stage, Clock()
    data = open_data(job)
    check_same_tokenizer(job, data)
    teacher = open_teacher(job, data)
    heads = LossHead(job.placement, job.teacher_placement.rules)
    loss = distillation(job.spec, stage.compute, stage.loss, heads, teacher.targets)
    flops = 3 * job.spec.flops_per_token(stage.batch.length) + teacher.flops_per_token
    return run_loop(job, data, _student(job, teacher), loss, flops, FROZEN, teacher, clock)


def distillation(
    student_spec: ModelSpec,
    compute: Compute,
    options: LossOptions,
    heads: LossHead,
    targets: Callable[[Params, dict[str, Any]], Targets],
) -> LossFn:
    """The objective: `(trainable, frozen, batch)`, with the teacher's arrays under `frozen["teacher"]`, of which and of
    the batch `targets` makes what to learn."""
    student = VLM(student_spec, compute)

    def loss(params, frozen, batch):
        constants = dict(frozen)
        taught = targets(constants.pop("teacher"), batch)
        states, head = hidden(student, {**params, **constants}, batch), head_matrix(params)
        mask = batch["loss_mask"]
        total, metrics = heads.distillation_loss(states, head, taught, batch["labels"], mask, options)
        return total, {**metrics, "loss": (total, mask.sum())}

    return loss


def open_teacher(job: Job, data: PackedData) -> Teacher:
    """The stage's teacher: a model beside the student, or what was recorded of one."""
    return _online(job) if isinstance(job.stage.teacher, str) else _stored(job, data)


def _online(job: Job) -> Teacher:
    stage = job.stage
    # In the dtype it computes in: the parameters would be cast to that at every use.
    dtype = jnp.dtype(stage.compute.dtype)
    spec, params = load_stage(_teacher_directory(job), dtype, job.teacher_placement)
    return online(spec, params, stage.compute, job.teacher_placement, stage.batch.length)


def _stored(job: Job, data: PackedData) -> Teacher:
    recorder = job.run_dir / job.stage.teacher_stage
    settings = finished(recorder).config
    reader = open_store(settings["store"] or str(recorder / "store"))
    reader.check(
        teacher_digest=digest(_teacher_directory(job)),
        tokenizer_digest=data.tokenizer.digest,
        data_digest=data.digest,
        length=data.length,
        vocab=job.spec.vocab,
    )
    return stored(reader, job.teacher_placement)


def _teacher_directory(job: Job) -> Path:
    """The finished stage whose model teaches."""
    directory = job.run_dir / job.stage.teacher_stage
    if isinstance(job.stage.teacher, str):
        return directory
    return job.run_dir / finished(directory).config["from"]


def _student(job: Job, teacher: Teacher) -> Params:
    """The source's parameters; from scratch, a fresh decoder and projector around the teacher's vision tower."""
    if job.source is not None:
        return load_stage(job.source, placement=job.placement)[1]
    params = fresh_params(job.spec, job.stage.seed, job.placement)
    shardings = param_shardings(job.spec, job.placement)
    lender = teacher.constants
    if any(part in params and part not in lender for part in FROZEN):
        lender = load_stage(_teacher_directory(job), jnp.dtype(job.stage.compute.dtype), job.teacher_placement)[1]

    def lend(taught, ours, sharding):
        return jax.device_put(taught.astype(ours.dtype), sharding)

    lent = {k: jax.tree.map(lend, lender[k], params[k], shardings[k]) for k in FROZEN if k in params}
    return {**params, **lent}


def check_same_tokenizer(job: Job, data: PackedData) -> None:
    """A teacher that was trained on other token ids teaches noise."""
    name = _teacher_directory(job).name
    data_of_teacher = finished(job.run_dir / name).data
    ours = data.tokenizer.digest
    taught = data_of_teacher.tokenizer_digest if data_of_teacher else None
    if taught is not None and taught != ours:
        raise UserError(
            f"stages.{job.name}.data.tokenizer has digest {ours[:12]}, teacher {name!r} was trained with "
            f"{taught[:12]}; both must use the same vocabulary"
        )
