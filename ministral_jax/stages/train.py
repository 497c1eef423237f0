"""Next-token training from random initialisation: where a parent comes from when there is none to import."""

from __future__ import annotations

from ministral_jax.distillation.kl import cross_entropy
from ministral_jax.evaluation import hidden, labels
from ministral_jax.models.vlm import VLM, head_matrix
from ministral_jax.stages.job import Job, Result, fresh_params
from ministral_jax.stages.looped import run_loop


def run(job: Job) -> Result:
    stage = job.stage
    model = VLM(job.spec, stage.compute)

    def loss(params, frozen, batch):
        states = hidden(model, params, batch)
        total, metrics = cross_entropy(states, head_matrix(params), labels(batch), batch["loss_mask"])
        return total, {**metrics, "loss": metrics["ce"]}

    params = fresh_params(job.spec, stage.seed)
    return run_loop(job, params, loss, 3 * job.spec.flops_per_token(stage.batch.length))
