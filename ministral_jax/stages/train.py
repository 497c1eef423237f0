"""Next-token training from random initialisation: where a parent comes from when there is none to import."""

from __future__ import annotations

from ministral_jax.distillation.sharded import LossHead
from ministral_jax.evaluation import hidden
from ministral_jax.models.vlm import VLM, head_matrix
from ministral_jax.stages.job import Job, Result, fresh_params
from ministral_jax.stages.looped import open_data, run_loop
from ministral_jax.training.goodput import Clock


def run(job: Job) -> Result:
    stage = job.stage
    model, head, clock = VLM(job.spec, stage.compute), LossHead(job.placement), Clock()

    def loss(params, frozen, batch):
        states = hidden(model, params, batch)
        total, metrics = head.cross_entropy(states, head_matrix(params), batch["labels"], batch["loss_mask"])
        return total, {**metrics, "loss": metrics["ce"]}

    params = fresh_params(job.spec, stage.seed, job.placement)
    flops = 3 * job.spec.flops_per_token(stage.batch.length)
    return run_loop(job, open_data(job), params, loss, flops, clock=clock)
