"""Next-token training from random initialisation: where a parent comes from when there is none to import."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from ministral_jax.losses.evaluation import hidden
from ministral_jax.losses.head import LossHead
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Compute, head_matrix
from ministral_jax.stages.asking import TASK_FIGURES
from ministral_jax.stages.base import Job, ModelRef, Params, Program, Result, fresh_params
from ministral_jax.stages.figures import HELD_OUT, Curve
from ministral_jax.stages.looped import Looped, Objective, loop_programs, run_loop
from ministral_jax.stages.rows import open_data
from ministral_jax.training.goodput import Clock
from ministral_jax.training.state import LossFn


class Train(Looped):
    """Next-token training of every parameter, the vision tower included, from random initialisation."""

    figures: ClassVar = (*HELD_OUT, *TASK_FIGURES)
    curve: ClassVar = Curve("ce")
    begins_anew: ClassVar = True

    do: Literal["train"]
    model: ModelRef

    def objective(self, job: Job[Train]) -> Objective:
        return Objective(next_token_loss(job.spec, self.compute, LossHead(job.placement)))

    def programs(self, job: Job[Train]) -> dict[str, Program]:
        return loop_programs(job, self.objective(job))

    def run(self, job: Job[Train]) -> Result:
        clock, data = Clock(), open_data(job)
        return run_loop(job, data, self.objective(job), fresh_params(job.spec, self.seed, job.placement), clock)


def next_token_loss(spec: ModelSpec, compute: Compute, heads: LossHead) -> LossFn:
    """Cross-entropy of the counted labels; parts of the model may come in frozen."""
    model = VLM(spec, compute)

    def loss(params: Params, frozen: Params, batch: dict[str, Any]) -> Any:
        fixed = {key: tree for key, tree in frozen.items() if key != "teacher"}
        states = hidden(model, {**params, **fixed}, batch)
        total, metrics = heads.cross_entropy(states, head_matrix(params), batch["labels"], batch["loss_mask"])
        return total, {**metrics, "loss": metrics["ce"]}

    return loss
