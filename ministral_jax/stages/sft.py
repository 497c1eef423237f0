"""Supervised fine-tuning: the model learns what the assistant says; a teacher may say it too."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, ClassVar, Literal

from pydantic import Field

from ministral_jax.alignment.examine import GenerateConfig
from ministral_jax.distributed.placement import Rules
from ministral_jax.losses.head import LossHead
from ministral_jax.stages.asking import TASK_FIGURES
from ministral_jax.stages.base import Job, ModelRef, Program, Result, load_stage
from ministral_jax.stages.figures import ANSWERS, HELD_OUT, KL, Curve
from ministral_jax.stages.looped import FROZEN, Objective, loop_programs, run_loop
from ministral_jax.stages.prompts import check_prompts, generate_programs, open_examiner
from ministral_jax.stages.rows import Packing, open_data
from ministral_jax.stages.teaching import Taught, described_teacher, open_teacher, sharing_tower, teacher_loss
from ministral_jax.stages.train import next_token_loss
from ministral_jax.teachers.teacher import Teacher
from ministral_jax.training.goodput import Clock


class SFT(Taught):
    """Learn what the assistant says in conversations, with or without a teacher. The vision tower is frozen.

    With a teacher the loss is the distillation loss, `loss.ce_weight` the share of the cross-entropy.
    """

    figures: ClassVar = (*ANSWERS, *HELD_OUT, KL, *TASK_FIGURES)
    curve: ClassVar = Curve("ce", "ce")

    do: Literal["sft"]
    source: str = Field(alias="from")
    model: ModelRef | None = None
    teacher_sharding: Rules | None = None
    generate: GenerateConfig | None = None

    def prepare(self, job: Job[Any], packing: Packing) -> None:
        if self.generate is not None:
            check_prompts(job, packing.progress)
        super().prepare(job, packing)

    def objective(self, job: Job[SFT], teacher: Teacher | None) -> Objective:
        heads = LossHead(job.placement, job.teacher_placement.rules)
        loss = next_token_loss(job.spec, self.compute, heads) if teacher is None else teacher_loss(job, teacher)
        return Objective(loss, FROZEN, teacher)

    def programs(self, job: Job[SFT]) -> dict[str, Program]:
        found = loop_programs(job, self.objective(job, None if self.teacher is None else described_teacher(job)))
        return found | generate_programs(job, self.generate)

    def run(self, job: Job[SFT]) -> Result:
        clock, data = Clock(), open_data(job)
        job = job.with_tokens(data.tokenizer)
        teacher = None if self.teacher is None else open_teacher(job, data)
        params = load_stage(job.source, placement=job.placement)[1]
        objective = self.objective(job, None if teacher is None else sharing_tower(job, teacher, params))
        with ExitStack() as stack:
            examine = None
            if self.generate is not None:
                examiner = stack.enter_context(open_examiner(job, self.generate))
                examine = lambda params: examiner.examine(params)[0]
            return run_loop(job, data, objective, params, clock, examine)
