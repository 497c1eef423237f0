"""Logit distillation: the student learns the teacher's next-token distribution; the vision tower is frozen."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ministral_jax.distillation.kl import Hidden, LossOptions
from ministral_jax.distillation.sharded import LossHead
from ministral_jax.errors import UserError
from ministral_jax.evaluation import hidden
from ministral_jax.manifest import read_manifest
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Compute, head_matrix
from ministral_jax.stages.job import Job, Params, Result, fresh_params, load_stage
from ministral_jax.stages.looped import run_loop
from ministral_jax.training.goodput import Clock
from ministral_jax.training.state import LossFn

FROZEN = ("vision",)


def run(job: Job) -> Result:
    stage, clock = job.stage, Clock()
    check_same_tokenizer(job)
    # In the dtype it computes in: the parameters would be cast to that at every use.
    teacher_dtype = jnp.dtype(stage.compute.dtype)
    teacher_spec, teacher_params = load_stage(job.run_dir / stage.teacher, teacher_dtype, job.teacher_placement)
    heads = LossHead(job.placement, job.teacher_placement.rules)
    loss = distillation(job.spec, teacher_spec, stage.compute, stage.loss, heads)
    length = stage.batch.length
    flops = 3 * job.spec.flops_per_token(length) + teacher_spec.flops_per_token(length)
    return run_loop(job, _student(job, teacher_params), loss, flops, FROZEN, (teacher_spec, teacher_params), clock)


def distillation(
    student_spec: ModelSpec, teacher_spec: ModelSpec, compute: Compute, options: LossOptions, heads: LossHead
) -> LossFn:
    """The objective: `(trainable, frozen, batch)`, with the teacher's parameters under `frozen["teacher"]`."""
    student, teacher = VLM(student_spec, compute), VLM(teacher_spec, compute)
    taught = (heads.teacher_rules or heads.placement.rules).scoped(hidden)

    def loss(params, frozen, batch):
        constants = dict(frozen)
        teacher_params = constants.pop("teacher")
        targets = Hidden(taught(teacher, teacher_params, batch), head_matrix(teacher_params))
        states, head = hidden(student, {**params, **constants}, batch), head_matrix(params)
        mask = batch["loss_mask"]
        total, metrics = heads.distillation_loss(states, head, targets, batch["labels"], mask, options)
        return total, {**metrics, "loss": (total, mask.sum())}

    return loss


def _student(job: Job, teacher_params: Params) -> Params:
    """The source's parameters; from scratch, a fresh decoder and projector around the teacher's vision tower."""
    if job.source is not None:
        return load_stage(job.source, placement=job.placement)[1]
    params = fresh_params(job.spec, job.stage.seed, job.placement)
    shardings = job.placement.params(job.spec)

    def lend(taught, ours, sharding):
        return jax.device_put(taught.astype(ours.dtype), sharding)

    lent = {k: jax.tree.map(lend, teacher_params[k], params[k], shardings[k]) for k in FROZEN if k in params}
    return {**params, **lent}


def check_same_tokenizer(job: Job) -> None:
    """A teacher that was trained on other token ids teaches noise."""
    from ministral_jax.data.tokenizer import load_tokenizer

    taught = (read_manifest(job.run_dir / job.stage.teacher) or {}).get("data", {}).get("tokenizer_digest")
    ours = load_tokenizer(job.stage.data.tokenizer, job.data_root).digest
    if taught is not None and taught != ours:
        raise UserError(
            f"stages.{job.name}.data.tokenizer has digest {ours[:12]}, teacher {job.stage.teacher!r} was trained with "
            f"{taught[:12]}; both must use the same vocabulary"
        )
