"""What the stages share that hold two answers against each other: a judge or rewards, and how sure the verdict is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import jax.numpy as jnp
import numpy as np
from pydantic import Field, model_validator

from ministral_jax.alignment.answer import Sample
from ministral_jax.alignment.judge import Judge
from ministral_jax.alignment.rollout import Answers, Params
from ministral_jax.alignment.scoring import Scores
from ministral_jax.data.tokenizer import Tokenizer
from ministral_jax.distributed.processes import poll_slow
from ministral_jax.errors import UserError
from ministral_jax.lazy import Lazy
from ministral_jax.models.spec import ModelSpec
from ministral_jax.stages import online
from ministral_jax.stages.base import Graph, Job, Program, load_stage
from ministral_jax.stages.manifest import finished
from ministral_jax.stages.reward import Reward, judge_program
from ministral_jax.stages.teaching import check_vocabulary

if TYPE_CHECKING:
    from scipy import special
else:
    special = Lazy("scipy.special")

OpenJudge = tuple[Judge, Params]


class JudgedStage(online.AnsweringStage):
    """Of two answers to a prompt, a judge or rewards prefer one."""

    temperature: float = Field(default=0.7, gt=0, allow_inf_nan=False)
    judge: str | None = None
    """A reward stage; or none, and `rewards` decide."""
    reward_temperature: float = Field(default=1.0, gt=0)
    """The first answer wins with probability sigmoid of the rewards' difference over this."""

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        if (self.judge is None) == (self.rewards is None):
            raise ValueError("needs either a `judge`, the name of a reward stage, or `rewards`")
        return self

    def inputs(self) -> dict[str, str]:
        needed = super().inputs()
        if self.judge is not None and self.judge != self.source:
            needed["judge"] = self.judge
        return needed

    def check_sizes(self, spec: ModelSpec, graph: Graph, where: str) -> None:
        super().check_sizes(spec, graph, where)
        if self.judge is not None:
            if not isinstance(graph.stages[self.judge], Reward):
                raise UserError(f"{where}.judge = {self.judge!r} must be a reward stage")
            check_vocabulary(spec, self.judge, "judge", graph, where)

    @property
    def longest_question(self) -> int:
        """Tokens of the longest prompt and two of the longest answers; the words of the question are not counted."""
        return self.max_prompt_length + 2 * max(self.completion_lengths.values())

    def judge_programs(self, job: Job[Any]) -> dict[str, Program]:
        if self.judge is None:
            return {}
        return {"judge": judge_program(job, job.graph.specs[self.judge], self.longest_question)}


def open_judge(job: Job[Any], tokenizer: Tokenizer) -> OpenJudge | None:
    """The stage's judge and its parameters, in the dtype it computes in; None where rewards decide."""
    if job.stage.judge is None:
        return None
    directory, compute = job.run_dir / job.stage.judge, job.stage.compute
    spec, params = load_stage(directory, jnp.dtype(compute.dtype), job.placement)
    temperature = finished(directory).metrics["judge_temperature"]
    return Judge(spec, compute, job.placement, tokenizer, temperature, on_step=poll_slow), params


def win_probability(
    stage: JudgedStage, judge: OpenJudge | None, answers: Answers, scores: Callable[[list[Sample]], Scores]
) -> tuple[np.ndarray, online.HostMetrics]:
    """`[P]`: that the first of two neighbours among the answers is better than the second, NaN where nobody can tell;
    and figures. Reasoning is not judged."""
    samples = answers.samples
    if judge is None:
        given = scores(samples)
        found = special.expit((given.total[0::2] - given.total[1::2]) / stage.reward_temperature)
        host = online.reward_metrics(given)
    else:
        model, params = judge
        a, b = ([sample.answer for sample in samples[place::2]] for place in (0, 1))
        found = model.win_probability(params, [row.messages for row in answers.rows[0::2]], a, b)
        host = {}
    sure = np.abs(found - 0.5) + 0.5
    return found, {**host, "judge_confidence": (float(np.nansum(sure)), float((~np.isnan(sure)).sum()))}
