"""Held-out figures of a finished stage's model, measured as a training stage measures its own."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ministral_jax.losses.evaluation import make_evaluate
from ministral_jax.stages import rows
from ministral_jax.stages.base import Job, ModelRef, Program, Result, load_stage
from ministral_jax.stages.figures import HELD_OUT
from ministral_jax.stages.image_answers import write_samples


class Evaluate(rows.RowStage):
    """Evaluate `from` once on held-out rows; with `model` as if it had that context and those positions."""

    figures: ClassVar = HELD_OUT
    makes_model: ClassVar = False

    do: Literal["evaluate"]
    source: str = Field(alias="from")
    model: ModelRef | None = None
    evaluate: rows.EvaluateConfig = rows.EvaluateConfig()

    def programs(self, job: Job[Evaluate]) -> dict[str, Program]:
        return rows.evaluation_programs(job, job.spec)

    def run(self, job: Job[Evaluate]) -> Result:
        params = load_stage(job.source, placement=job.placement)[1]
        data = rows.open_data(job)
        evaluator = make_evaluate(job.spec, self.compute, job.placement)
        found, predictions = evaluator(params, None, rows.held_out_batches(job, data))
        write_samples(job.directory / "samples.json", data, self.batch.sequences, self.evaluate.rows, predictions)
        return Result(found.figures, details={"data": rows.data_details(data), "held_out": found.details()})


def evaluation_name(stage: str) -> str:
    """Of the stage that evaluates an imported one."""
    return f"{stage}-evaluated"
