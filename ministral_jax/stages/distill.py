"""Logit distillation: the student learns the teacher's next-token distribution; the vision tower is frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Literal

from pydantic import Field

from ministral_jax.distributed.placement import Rules
from ministral_jax.errors import UserError
from ministral_jax.models.block import Compute, Exported
from ministral_jax.models.quantized import check_fp8
from ministral_jax.models.spec import ModelSpec
from ministral_jax.stages import teaching
from ministral_jax.stages.asking import TASK_FIGURES
from ministral_jax.stages.base import Graph, Job, ModelRef, Program, Result, Stage, fresh_params, load_stage
from ministral_jax.stages.figures import HELD_OUT, KL, Curve
from ministral_jax.stages.looped import FROZEN, Objective, loop_programs, run_loop
from ministral_jax.stages.rows import Packing, first_row, open_data
from ministral_jax.teachers.teacher import Teacher
from ministral_jax.training.goodput import Clock


class Distill(teaching.Taught):
    """Make the student's next-token distribution equal the teacher's. The vision tower is frozen."""

    figures: ClassVar = (KL, *HELD_OUT, *TASK_FIGURES)
    curve: ClassVar = Curve("kl")
    distils: ClassVar = True
    incidental: ClassVar = teaching.Taught.incidental | {"baseline", "baseline_lr"}

    do: Literal["distill"]
    model: ModelRef | None = None
    teacher: teaching.AnyTeacher = Field()
    """The stage whose model teaches, or `{store: the record stage}`."""
    teacher_sharding: Rules | None = None
    """Where the teacher lies; None is like the student."""
    quantize: Literal["fp8"] | None = None
    """Train and evaluate what an export in `format: fp8` holds: what the decoder's linear layers multiply is rounded,
    and gradients pass through the rounding as if it were not there."""
    baseline: bool = False
    """Also run `<stage>-scratch`: same shape, data, tokens and teacher, but decoder and projector drawn at random."""
    baseline_lr: float | None = Field(default=None, gt=0)
    """Learning rate of the baseline; None is the stage's, though random weights may want another one."""

    @property
    def computed(self) -> Compute:
        return self.compute if self.quantize is None else Exported(**asdict(self.compute))

    def check_sizes(self, spec: ModelSpec, graph: Graph, where: str) -> None:
        super().check_sizes(spec, graph, where)
        if self.quantize is not None and self.compute.matmul is not None:
            raise UserError(
                f"{where}.quantize = {self.quantize} and {where}.compute.matmul = {self.compute.matmul} round the same "
                "products, each in its way; leave one of them out"
            )

    def prepare(self, job: Job[Distill], packing: Packing) -> None:
        check_fp8(self.quantize, f"{job.where}.quantize")
        super().prepare(job, packing)

    def companions(self, name: str, stages: Mapping[str, Stage], sizes: Callable[[], ModelSpec]) -> Mapping[str, Stage]:
        """The baseline, equal but for its first weights, and its learning rate where it has one: it reads the very
        rows. No score at a task stops it."""
        if not self.baseline:
            return {}
        before = stages.get(self.source or "")
        changes: dict[str, Any] = {"baseline": False, "baseline_lr": None, "first_row": first_row(self, stages)}
        # what it is compared with at the same step must not be missing, nor end the run
        changes["evaluate"] = self.evaluate.model_copy(update={"patience": None})
        if self.baseline_lr is not None:
            changes["optimizer"] = self.optimizer.model_copy(update={"lr": self.baseline_lr})
        if isinstance(before, Distill) and before.baseline:
            changes |= {"source": scratch_name(self.source or "")}
        else:
            changes |= {"source": None, "model": sizes().model_dump(mode="json")}
        return {scratch_name(name): self.model_copy(update=changes)}

    def objective(self, job: Job[Distill], teacher: Teacher) -> Objective:
        return Objective(teaching.teacher_loss(job, teacher), FROZEN, teacher)

    def programs(self, job: Job[Distill]) -> dict[str, Program]:
        return loop_programs(job, self.objective(job, teaching.described_teacher(job)))

    def run(self, job: Job[Distill]) -> Result:
        clock, data = Clock(), open_data(job)
        job = job.with_tokens(data.tokenizer)
        teacher = teaching.open_teacher(job, data)
        if self.source is not None:
            params = load_stage(job.source, placement=job.placement)[1]
        else:  # from scratch, around the teacher's vision tower
            params = teaching.vision_of_teacher(job, teacher, fresh_params(job.spec, self.seed, job.placement))
        teacher = teaching.sharing_tower(job, teacher, params)
        return run_loop(job, data, self.objective(job, teacher), params, clock)


def scratch_name(stage: str) -> str:
    """Of a distil stage's baseline."""
    return f"{stage}-scratch"
