"""Cut a finished stage's model to the next size: calibrate, score, surgery."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import jax.numpy as jnp
from pydantic import Field

from ministral_jax.distributed.processes import polled
from ministral_jax.losses.evaluation import forward, make_evaluate
from ministral_jax.losses.held_out import HeldOut
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, head_of, placed_params
from ministral_jax.pruning.statistics import batch_sums, calibrated
from ministral_jax.pruning.surgery import PruneOptions, Surgery, check_target
from ministral_jax.stages import rows
from ministral_jax.stages.base import Graph, Job, ModelRef, Params, Program, Result, Stage, load_stage
from ministral_jax.stages.figures import Figure
from ministral_jax.teachers.apart import STATES
from ministral_jax.teachers.teacher import from_states
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

    @property
    def rows_read(self) -> int:
        return self.calibration * self.batch.sequences

    def stored_dtype(self, stages: Mapping[str, Stage]) -> str:
        """That of its source where no wider one is computed in: else parameters would be rounded before their time."""
        dtype = stages[self.source].stored_dtype(stages)
        return dtype if dtype == self.compute.dtype else "float32"

    def check_sizes(self, spec: ModelSpec, graph: Graph, where: str) -> None:
        check_target(graph.specs[self.source], spec, where)
        self.check_length(spec, where)

    def programs(self, job: Job[Prune]) -> dict[str, Program]:
        source, dtype = job.graph.specs[self.source], jnp.dtype(self.stored_dtype(job.graph.stages))
        params = placed_params(source, job.placement, dtype)
        batch, weighted = rows.abstract_batch(job), self.options.width_weight == "token"
        surgery = Surgery(job.spec, list, self.options, self.seed, self.compute, job.placement)
        calibrate = batch_sums, (VLM(source, self.compute.unrounded), True, weighted, params, calibrated(batch))
        ours = {"calibrate": calibrate, **surgery.programs(source, dtype)}
        teacher = from_states(source, head_of(params), rows.abstract_states(job, source))
        return {
            **{name: Program(*program)._replace(rules=job.placement.rules) for name, program in ours.items()},
            **rows.evaluation_programs(job, job.spec, teacher, dtype),
        }

    def run(self, job: Job[Prune]) -> Result:
        dtype, placement = jnp.dtype(self.stored_dtype(job.graph.stages)), job.placement
        spec, *source = load_stage(job.source, dtype, placement)
        data, say = rows.open_data(job), ProgressLine(job.name, 0).say
        # What the source says of held-out rows is kept, and its head: its other parameters go as they are cut.
        read, head = forward(spec, self.compute, placement), head_of(source[0])
        with placement.rules.active():
            said = [read(source[0], batch) for batch in rows.held_out_batches(job, data)]
        say("held-out rows: read by the source")

        def measure(pruned: Params, pruned_spec: ModelSpec) -> HeldOut:
            told = lambda head, batch: (batch[STATES], head)
            evaluate = make_evaluate(pruned_spec, self.compute, placement, told, teacher_context=spec.context)
            batches = zip(rows.held_out_batches(job, data), said, strict=True)
            return evaluate(pruned, head, (batch | {STATES: states} for batch, states in batches))[0]

        surgery = Surgery(
            job.spec,
            lambda: polled(rows.train_batches(job, data, stop=self.calibration), "calibration batch"),
            self.options,
            self.seed,
            compute=self.compute.unrounded,
            placement=placement,
            measure=lambda pruned, pruned_spec: measure(pruned, pruned_spec).figures["kl"],
            progress=say,
        )
        with placement.rules.active():
            pruned, pruned_spec, report = surgery.run(source.pop(), spec)
        files = job.save(pruned)
        found = measure(pruned, pruned_spec)
        held_out = found.details()
        held_out["intervals"] = {f"{name}_to_source": ends for name, ends in found.intervals.items() if name == "kl"}
        details = {"prune": report.model_dump(mode="json"), "data": rows.data_details(data), "held_out": held_out}
        return Result({"kl_to_source": found.figures["kl"]}, files=files, details=details, spec=pruned_spec)
