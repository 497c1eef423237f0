"""Cut a finished stage's model to the next size: calibrate, score, surgery."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ministral_jax.distributed.processes import polled
from ministral_jax.losses.evaluation import as_teacher, make_evaluate
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, placed_params
from ministral_jax.pruning.statistics import batch_sums, calibrated
from ministral_jax.pruning.surgery import PruneOptions, Surgery, check_target
from ministral_jax.stages import rows
from ministral_jax.stages.base import Graph, Job, ModelRef, Params, Program, Result, load_stage
from ministral_jax.stages.figures import Figure
from ministral_jax.teachers.teacher import online
from ministral_jax.training.progress import ProgressLine


class Prune(rows.RowStage):
    """Calibrate, score and cut `from` to the sizes of `model`."""

    figures: ClassVar = (Figure("kl_to_source", "KL to the source", "nats per token", "lower"),)
    prunes: ClassVar = True

    do: Literal["prune"]
    source: str = Field(alias="from")
    model: ModelRef
    calibration: int = Field(default=16, ge=1)
    """Batches of calibration data."""
    options: PruneOptions = PruneOptions()
    evaluate: rows.EvaluateConfig = rows.EvaluateConfig()

    def check_sizes(self, spec: ModelSpec, graph: Graph, where: str) -> None:
        check_target(graph.specs[self.source], spec, where)
        self.check_length(spec, where)

    def programs(self, job: Job[Prune]) -> dict[str, Program]:
        source = job.graph.specs[self.source]
        params = placed_params(source, job.placement)
        teacher = online(source, params, self.compute, job.placement, self.batch.length)
        batch = rows.abstract_batch(job)
        surgery = Surgery(job.spec, list, self.options, self.seed, self.compute, job.placement)
        return {
            "calibrate": Program(batch_sums, (VLM(source, self.compute), True, params, calibrated(batch))),
            **{name: Program(*program) for name, program in surgery.programs(source).items()},
            **rows.evaluation_programs(job, job.spec, teacher),
        }

    def run(self, job: Job[Prune]) -> Result:
        spec, params = load_stage(job.source, placement=job.placement)
        data = rows.open_data(job)

        def kl_to_source(pruned: Params, pruned_spec: ModelSpec) -> float:
            teacher = as_teacher(spec, self.compute, job.placement)
            evaluate = make_evaluate(pruned_spec, self.compute, job.placement, teacher)
            return evaluate(pruned, params, rows.held_out_batches(job, data))[0]["kl"]

        surgery = Surgery(
            job.spec,
            lambda: polled(rows.train_batches(job, data, stop=self.calibration), "calibration batch"),
            self.options,
            self.seed,
            compute=self.compute,
            placement=job.placement,
            measure=kl_to_source,
            progress=ProgressLine(job.name, 0).say,
        )
        with job.placement.rules.active():
            pruned, pruned_spec, report = surgery.run(params, spec)
        files = job.save(pruned)
        metrics = {"kl_to_source": kl_to_source(pruned, pruned_spec)}
        details = {"prune": report.model_dump(mode="json"), "data": rows.data_details(data)}
        return Result(metrics, files=files, details=details, spec=pruned_spec)
