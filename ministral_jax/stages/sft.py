"""Supervised fine-tuning: the model learns what the assistant says; a teacher may say it too."""

from __future__ import annotations

from contextlib import ExitStack

from ministral_jax.alignment.examine import Examiner
from ministral_jax.alignment.rollout import Sampler
from ministral_jax.losses.head import LossHead
from ministral_jax.stages.distill import FROZEN, check_same_tokenizer, distillation, open_teacher
from ministral_jax.stages.job import Job, Result, load_stage
from ministral_jax.stages.looped import open_data, run_loop
from ministral_jax.stages.online import open_stage_prompts
from ministral_jax.stages.train import next_token_loss
from ministral_jax.training.goodput import Clock


def run(job: Job) -> Result:
    stage, clock, data = job.stage, Clock(), open_data(job)
    heads = LossHead(job.placement, job.teacher_placement.rules)
    flops = 3 * job.spec.flops_per_token(stage.batch.length)
    if stage.teacher is None:
        teacher, loss = None, next_token_loss(job.spec, stage.compute, heads)
    else:
        check_same_tokenizer(job, data)
        teacher = open_teacher(job, data)
        loss = distillation(job.spec, stage.compute, stage.loss, heads, teacher.targets)
        flops += teacher.flops_per_token
    assert job.source is not None
    params = load_stage(job.source, placement=job.placement)[1]
    with ExitStack() as stack:
        examine = None
        if stage.generate is not None:
            prompts, given = open_stage_prompts(job), stage.generate
            sampler = Sampler(job.spec, stage.compute, job.placement, prompts.tokenizer, given.temperature)
            examine = stack.enter_context(Examiner(sampler, prompts, given, job.directory)).figures
        return run_loop(job, data, params, loss, flops, FROZEN, teacher, clock, examine)
