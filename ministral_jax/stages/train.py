"""Next-token training from random initialisation: where a parent comes from when there is none to import."""

from __future__ import annotations

from ministral_jax.losses.evaluation import hidden
from ministral_jax.losses.head import LossHead
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Compute, head_matrix
from ministral_jax.stages.job import Job, Result, fresh_params
from ministral_jax.stages.looped import open_data, run_loop
from ministral_jax.training.goodput import Clock
from ministral_jax.training.state import LossFn


def run(job: Job) -> Result:
    stage = job.stage
    clock, loss = Clock(), next_token_loss(job.spec, stage.compute, LossHead(job.placement))
    params = fresh_params(job.spec, stage.seed, job.placement)
    flops = 3 * job.spec.flops_per_token(stage.batch.length)
    return run_loop(job, open_data(job), params, loss, flops, clock=clock)


def next_token_loss(spec: ModelSpec, compute: Compute, heads: LossHead) -> LossFn:
    """Cross-entropy of the counted labels; parts of the model may come in frozen."""
    model = VLM(spec, compute)

    def loss(params, frozen, batch):
        fixed = {key: tree for key, tree in frozen.items() if key != "teacher"}
        states = hidden(model, {**params, **fixed}, batch)
        total, metrics = heads.cross_entropy(states, head_matrix(params), batch["labels"], batch["loss_mask"])
        return total, {**metrics, "loss": metrics["ce"]}

    return loss
