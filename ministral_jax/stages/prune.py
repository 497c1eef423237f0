"""Cut a finished stage's model to the next size: calibrate, score, surgery."""

from __future__ import annotations

import sys

import jax

from ministral_jax.config import PruneStage
from ministral_jax.data.pipeline import batches
from ministral_jax.evaluation import make_evaluate
from ministral_jax.pruning.prune import prune
from ministral_jax.stages.job import Job, Result, load_stage
from ministral_jax.stages.looped import data_details, held_out_batches, open_data


def run(job: Job) -> Result:
    stage: PruneStage = job.stage
    assert job.source is not None
    spec, params = load_stage(job.source)
    data = open_data(job)
    evaluation = held_out_batches(job, data)

    def calibration():
        return batches(data, "train", stage.batch.sequences, stage.seed, stop_step=stage.calibration)

    def kl_to_source(pruned, pruned_spec) -> float:
        evaluate = make_evaluate(pruned_spec, stage.compute, spec)
        return evaluate(pruned, params, evaluation)[0]["kl"]

    key = jax.random.key(stage.seed)
    pruned, pruned_spec, report = prune(
        params,
        spec,
        job.spec,
        calibration,
        stage.options,
        key,
        lambda text: print(f"{job.name:>18}  {text}", file=sys.stderr, flush=True),
        compute=stage.compute,
        measure=kl_to_source,
    )
    job.save(pruned)
    metrics = {"kl_to_source": kl_to_source(pruned, pruned_spec)}
    details = {"prune": report, "data": data_details(data)}
    return Result(metrics, details=details, spec=pruned_spec)
