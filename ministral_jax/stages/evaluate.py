"""Held-out figures of a finished stage's model, measured as a training stage measures its own."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar, Literal

from pydantic import Field

from ministral_jax.data.tokenizer import Tokenizer
from ministral_jax.distributed.processes import poll_slow
from ministral_jax.evaluation.examinee import DEFAULT_BATCH, Examinee
from ministral_jax.evaluation.results import Kept, check_installed, evaluate
from ministral_jax.evaluation.suites import Setting, asked_for
from ministral_jax.evaluation.tasks import TASKS, Asking
from ministral_jax.files import digest_of
from ministral_jax.losses.evaluation import make_evaluate
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM
from ministral_jax.stages import rows
from ministral_jax.stages.asking import TASK_FIGURES, check_fit, check_shown
from ministral_jax.stages.base import Graph, Job, ModelRef, Program, Result, load_stage
from ministral_jax.stages.figures import HELD_OUT
from ministral_jax.stages.image_answers import write_samples
from ministral_jax.stages.manifest import digest


class TasksConfig(Asking):
    """Tasks that the model is asked, beside its held-out figures."""

    names: tuple[str, ...] = Field(min_length=1)
    """`digits`, `needle` and others that are made here, tasks of lm-evaluation-harness, `TASK@SHOTS` with so many
    examples, or `paper`, the benchmarks of the paper."""
    batch: int = Field(default=DEFAULT_BATCH, ge=1)
    """Requests that are worked on together; scores do not depend on it."""


class Evaluate(rows.RowStage):
    """Evaluate `from` once on held-out rows; with `model` as if it had that context and those positions."""

    figures: ClassVar = (*HELD_OUT, *TASK_FIGURES)
    makes_model: ClassVar = False
    incidental: ClassVar = rows.RowStage.incidental | {"tasks.batch"}

    do: Literal["evaluate"]
    source: str = Field(alias="from")
    model: ModelRef | None = None
    evaluate: rows.EvaluateConfig = rows.EvaluateConfig()
    tasks: TasksConfig | None = None

    def check_sizes(self, spec: ModelSpec, graph: Graph, where: str) -> None:
        super().check_sizes(spec, graph, where)
        if self.tasks is not None:
            asked, _ = asked_for(self.tasks.names, Setting.of(f"{where}.tasks"))
            check_shown([task.task for task in asked if task.task in TASKS], spec, f"{where}.tasks")

    def prepare(self, job: Job[Evaluate], packing: rows.Packing) -> None:
        if self.tasks is not None:
            setting = Setting.of(f"{job.where}.tasks")
            asked, _ = asked_for(self.tasks.names, setting)
            check_installed(asked, setting)
            if others := [task for task in asked if task.task not in TASKS]:
                from ministral_jax.evaluation.harness import known_tasks

                known_tasks(others, self.tasks.include, setting)
        super().prepare(job, packing)
        if self.tasks is not None:
            made_here = [task.task for task in asked_for(self.tasks.names)[0] if task.task in TASKS]
            check_fit(job, made_here, self.tasks, packing.rows(job).tokenizer, f"{job.where}.tasks")

    def programs(self, job: Job[Evaluate]) -> dict[str, Program]:
        return rows.evaluation_programs(job, job.spec)

    def run(self, job: Job[Evaluate]) -> Result:
        params = load_stage(job.source, placement=job.placement)[1]
        data = rows.open_data(job)
        evaluator = make_evaluate(job.spec, self.compute, job.placement)
        found, predictions = evaluator(params, None, rows.held_out_batches(job, data))
        write_samples(job.directory / "samples.json", data, self.batch.sequences, self.evaluate.rows, predictions)
        details = {"data": rows.data_details(data), "held_out": found.details()}
        if self.tasks is None:
            return Result(found.figures, details=details)
        model = VLM(job.spec, self.compute)
        examinee = Examinee(
            model, params, job.placement, data.tokenizer, self.data.held_out, self.tasks.batch, poll_slow
        )
        setting = Setting.of(f"{job.where}.tasks")
        asked, _ = asked_for(self.tasks.names, setting)
        kept = Kept(job.directory / "tasks", self._identity(job, data.tokenizer))
        scores = evaluate(asked, examinee, self.tasks, kept, setting)
        shares = {name: score for name, score in scores.items() if "accuracy" in score}
        figures = {f"task_{name}": score["accuracy"] for name, score in shares.items()}
        counts = {f"count_{name}": float(score["count"]) for name, score in shares.items()}
        return Result(found.figures | figures | counts, details=details | {"tasks": scores})

    def _identity(self, job: Job[Evaluate], tokenizer: Tokenizer) -> dict[str, Any]:
        """All that scores depend on: of a stage that was cut off, other settings may stand now than began it."""
        assert self.tasks is not None
        of = {"checkpoint": digest(job.source), "tokenizer": tokenizer.digest, "held_out": self.data.held_out}
        of |= {"model": digest_of(job.spec.model_dump(mode="json")), "compute": digest_of(asdict(self.compute))}
        return of | self.tasks.model_dump(mode="json", include=set(Asking.model_fields))


def evaluation_name(stage: str) -> str:
    """Of the stage that evaluates an imported one."""
    return f"{stage}-evaluated"
