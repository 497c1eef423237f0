"""Cut a finished stage's model to the next size: calibrate, score, surgery."""

from __future__ import annotations

from ministral_jax.config import PruneStage
from ministral_jax.distributed.processes import polled
from ministral_jax.losses.evaluation import as_teacher, make_evaluate
from ministral_jax.pruning.surgery import Surgery
from ministral_jax.stages.job import Job, Result, load_stage
from ministral_jax.stages.looped import data_details, held_out_batches, open_data, train_batches
from ministral_jax.training.metrics import ProgressLine


def run(job: Job) -> Result:
    stage: PruneStage = job.stage
    assert job.source is not None
    spec, params = load_stage(job.source, placement=job.placement)
    data = open_data(job)

    def kl_to_source(pruned, pruned_spec) -> float:
        evaluate = make_evaluate(
            pruned_spec, stage.compute, job.placement, as_teacher(spec, stage.compute, job.placement)
        )
        return evaluate(pruned, params, polled(held_out_batches(job, data), "evaluating batch"))[0]["kl"]

    surgery = Surgery(
        job.spec,
        lambda: polled(train_batches(job, data, stop=stage.calibration), "calibration batch"),
        stage.options,
        stage.seed,
        compute=stage.compute,
        placement=job.placement,
        measure=kl_to_source,
        progress=ProgressLine(job.name, 0).say,
    )
    with job.placement.rules.active():
        pruned, pruned_spec, report = surgery.run(params, spec)
    files = job.save(pruned)
    metrics = {"kl_to_source": kl_to_source(pruned, pruned_spec)}
    details = {"prune": report.model_dump(mode="json"), "data": data_details(data)}
    return Result(metrics, files=files, details=details, spec=pruned_spec)
