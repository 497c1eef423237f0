"""What the stages that learn from their own answers share: prompts, sampling, judging, and where the time goes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ministral_jax.alignment.examine import Examiner, conduct, score_together
from ministral_jax.alignment.rewards import RewardsConfig
from ministral_jax.alignment.rollout import Episode, Params, Sampler, seeds
from ministral_jax.alignment.sample import Sample
from ministral_jax.alignment.scoring import Scorer, Scores, resolve
from ministral_jax.config import OnlineStage, RewardStage, SFTStage
from ministral_jax.data.conversation import Document
from ministral_jax.data.pipeline import check_vocab
from ministral_jax.data.prompts import Progress, PromptData, PromptRow, open_prompts
from ministral_jax.distributed.placement import Placement
from ministral_jax.errors import UserError
from ministral_jax.models.spec import ModelSpec
from ministral_jax.stages.job import Job, Result
from ministral_jax.stages.looped import run_steps
from ministral_jax.training.goodput import Clock
from ministral_jax.training.loop import Schedule

_SAID = 3
"""Problems of rewards told of a step."""

HostMetrics = dict[str, tuple[float, float]]


class Prompts(NamedTuple):
    """A step's prompts. Steps count from 0 here."""

    step: int
    rows: list[PromptRow]


class Answers(NamedTuple):
    """Answers to the prompts of a step, prompt after prompt, and what they are judged by."""

    rows: list[PromptRow]
    episodes: list[Episode]
    samples: list[Sample]


def open_stage_prompts(job: Job) -> PromptData:
    """The prompts of a stage; SFT is examined by those of its own sources, and a reward model asked about its pairs."""
    return prompts_of(job.stage, job.spec, job.data_root, f"stages.{job.name}")


def prompts_of(stage: Any, spec: ModelSpec, root: Path, where: str, progress: Progress | None = None) -> PromptData:
    """See `open_stage_prompts`."""
    if isinstance(stage, OnlineStage):
        bound = f"{where}.max_prompt_length"
        return open_prompts(stage.data, spec.vision, root, stage.max_prompt_length, bound, progress)
    bound, answered = "the model's context less one", isinstance(stage, RewardStage)
    return open_prompts(stage.data, spec.vision, root, spec.context - 1, bound, progress, answered)


def check_prompts(
    stage: OnlineStage | SFTStage, spec: ModelSpec, root: Path, where: str, progress: Progress | None = None
) -> None:
    """Every fault of the prompts, of rewards that could not judge them and of tools, before anything is computed.

    Raises:
        UserError: naming the row.
    """
    if (tools := getattr(stage, "tools", None)) is not None:
        resolve(tools, f"{where}.tools")
    prompts = prompts_of(stage, spec, root, where, progress)
    check_vocab(prompts.tokenizer, spec)
    examined = stage.generate if isinstance(stage, SFTStage) else stage.evaluate
    if examined is not None:
        _check_rewards(examined.rewards, prompts.evaluation(examined.prompts))
    if rewards := getattr(stage, "rewards", None):
        _check_rewards(rewards, [document for documents in prompts.train.values() for document in documents])


def _check_rewards(rewards: RewardsConfig, rows: Sequence[PromptRow | Document]) -> None:
    with Scorer(rewards, 1) as scorer:
        for row in rows:
            scorer.check(row.columns, row.where)


def check_rows(stage: OnlineStage, placement: Placement, where: str) -> None:
    """A step's answers must split evenly over the mesh and the microbatches.

    Raises:
        UserError: they do not.
    """
    each, parts = getattr(stage, "num_generations", 2), getattr(stage, "steps_per_generation", 1)
    rows = stage.prompts * each // parts
    devices = int(np.prod([placement.mesh.shape[axis] for axis in placement.rules.batch]))
    if rows % (devices * stage.microbatches) or stage.prompts // parts % stage.microbatches:
        raise UserError(
            f"{where}.prompts = {stage.prompts} with {each} answers each makes updates of {rows} rows, which must be a "
            f"multiple of {devices * stage.microbatches} ({devices} devices * {stage.microbatches} microbatches), and "
            "the prompts of an update a multiple of the microbatches"
        )


class Online:
    """A stage at work. `step` is `(state, Prompts) -> (state, metrics)`."""

    def __init__(self, job: Job, prompts: PromptData, sampler: Sampler, clock: Clock):
        self.job, self.stage, self.prompts, self.sampler, self.clock = job, job.stage, prompts, sampler, clock
        self.examiner = Examiner(
            sampler, prompts, self.stage.evaluate, job.directory, self.stage.workers, self.stage.reward_seconds
        )
        self.scorer = Scorer(
            self.stage.rewards or {}, self.stage.workers, self.stage.reward_seconds, self.stage.on_error
        )

    def __enter__(self) -> Online:
        return self

    def __exit__(self, *_: object) -> None:
        self.examiner.__exit__()
        self.scorer.close()

    def answers(self, params: Params, prompts: Prompts, each: int) -> Answers:
        """`each` answers to every prompt of a step."""
        jax.block_until_ready(params)  # the last update, whose time is not that of sampling
        self.clock.switch("generate")
        limit = self.stage.completion_length(prompts.step)
        numbers = seeds(self.stage.seed, prompts.step, len(prompts.rows))
        episodes = self.sampler.roll_out(params, prompts.rows, numbers, each, limit)
        rows = [row for row in prompts.rows for _ in range(each)]
        samples = [self.sampler.sample(row, episode, limit) for row, episode in zip(rows, episodes, strict=True)]
        self.clock.switch("score")
        return Answers(rows, episodes, samples)

    def scores(self, samples: list[Sample]) -> Scores:
        """Rewards of answers; what went wrong with some is told."""
        scores = score_together(self.scorer, samples)
        for problem in scores.problems[:_SAID]:
            print(f"{self.job.name:>18}  left out: {problem}", file=sys.stderr, flush=True)
        return scores

    def run(
        self,
        trainable: Params,
        updates: int,
        step: Callable[[Any, Prompts], tuple[Any, Any]],
        evaluate: Callable[[Any], dict[str, float]],
        fixed: Params,
    ) -> Result:
        """The loop, then the result is saved. `updates` are those of all steps; `fixed` parameters are saved as they
        are."""
        stage, job = self.stage, self.job
        schedule = Schedule(stage.steps, stage.evaluate.every, stage.checkpoint.every, 0, 0.0)
        outcome, store = run_steps(job, trainable, updates, step, self._prompts, evaluate, schedule, self.clock)
        files = job.save({**outcome.state["params"], **fixed})
        store.delete()
        details = {"data": {"tokenizer_digest": self.prompts.tokenizer.digest}}
        return Result(outcome.metrics, 0, stage.steps, outcome.seconds, files, details)

    def _prompts(self, first: int) -> Iterator[Prompts]:
        step = first
        while True:
            yield Prompts(step, self.prompts.batch(self.stage.seed, step, self.stage.prompts))
            step += 1


def reward_metrics(scores: Scores) -> HostMetrics:
    """Means over the answers that were judged, as (sum, count): `reward` and `reward_<part>`; `reward_errors` over all
    of them."""
    judged = ~np.isnan(scores.total)
    parts = {"reward": scores.total, **{f"reward_{name}": values for name, values in scores.parts.items()}}
    found = {name: (float(np.nansum(values)), float((~np.isnan(values)).sum())) for name, values in parts.items()}
    return found | {"reward_errors": (float((~judged).sum()), float(len(judged)))}


def conduct_metrics(samples: list[Sample]) -> HostMetrics:
    """`conduct` as (sum, count), and `tokens_drawn` in the step."""
    found = {name: (value * len(samples), float(len(samples))) for name, value in conduct(samples).items()}
    return found | {"tokens_drawn": (float(sum(len(sample.tokens) for sample in samples)), 1.0)}


def added(metrics: list[Any]) -> Any:
    """Metrics of several updates as those of one step."""
    return {name: (sum(m[name][0] for m in metrics), sum(m[name][1] for m in metrics)) for name in metrics[0]}
