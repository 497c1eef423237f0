"""What the stages that learn from their own answers share: prompts, sampling, judging, and where the time goes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal, Self

import jax
import numpy as np
from pydantic import Field, field_validator

from ministral_jax import console
from ministral_jax.alignment.answer import Sample
from ministral_jax.alignment.examine import Examiner, GenerateConfig, conduct, score_together
from ministral_jax.alignment.rewards import RewardsConfig
from ministral_jax.alignment.rollout import Answers, Params, seeds
from ministral_jax.alignment.scoring import Scorer, Scores
from ministral_jax.alignment.tools import ToolBox
from ministral_jax.data.batch import bucket
from ministral_jax.data.bins import batch_shapes
from ministral_jax.data.config import DataConfig
from ministral_jax.data.prompts import PromptData, PromptRow
from ministral_jax.data.tokenizer import load_tokenizer
from ministral_jax.errors import UserError
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import Compute
from ministral_jax.stages.asking import InLoop, check_loop_tasks, check_shown, loop_tasks, told_tasks
from ministral_jax.stages.base import Graph, Job, Result, Stage, load_stage
from ministral_jax.stages.checks import check_compute
from ministral_jax.stages.figures import told
from ministral_jax.stages.looped import FROZEN
from ministral_jax.stages.prompts import check_prompts, open_sampler, open_stage_prompts
from ministral_jax.stages.rows import Packing, data_contents
from ministral_jax.training.goodput import Clock
from ministral_jax.training.log import check_tracker
from ministral_jax.training.state import State, split_frozen
from ministral_jax.training.train import Schedule, StepMetrics, Steps, train

_SHOWN_PROBLEMS = 3
"""Problems of rewards told of a step."""

HostMetrics = dict[str, tuple[float, float]]


class OnlineEvaluateConfig(InLoop, GenerateConfig):
    """When held-out prompts are answered: as the evaluations of the other loops."""

    every: int = Field(default=50, ge=1)
    early: bool = True


class AnsweringStage(Stage):
    """A stage whose model answers prompts.

    A prompt is a conversation of the sources up to the assistant's last turn.
    """

    source: str = Field(alias="from")
    seed: int = Field(default=0, ge=0)
    data: DataConfig
    compute: Compute = Compute()
    prompts: int = Field(default=16, ge=1)
    """New ones in every step."""
    answers_at_once: int | None = Field(default=None, ge=1)
    """Answers that are drawn together, one such batch after the other, for want of memory; None: all of a step. What
    they say does not depend on it."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    rewards: RewardsConfig | None = None
    max_prompt_length: int = Field(default=512, ge=1)
    """Tokens; a longer prompt is an error that names its row."""
    max_completion_length: int | dict[int, int] = 256
    """Tokens; or by the step from which it holds, the first of them 0: `{0: 16384, 400: 24576}`."""
    on_error: Literal["drop", "stop"] = "drop"
    """What becomes of a run when a reward raises, times out or is not a number; `drop` leaves the completion out."""
    workers: int = Field(default=2, ge=1)
    """Processes that score completions, on each host."""
    reward_seconds: float = Field(default=10, gt=0)
    """For one completion."""

    @field_validator("max_completion_length")
    @classmethod
    def _from_the_first_step(cls, value: int | dict[int, int]) -> int | dict[int, int]:
        lengths = {0: value} if isinstance(value, int) else value
        if 0 not in lengths or min(lengths) < 0 or min(lengths.values()) < 1:
            raise ValueError("must be at least 1, and say what holds from step 0 on")
        return value

    @property
    def completion_lengths(self) -> dict[int, int]:
        """Tokens that completions may have, by the step from which it holds."""
        lengths = self.max_completion_length
        return {0: lengths} if isinstance(lengths, int) else lengths

    @property
    def answers_per_prompt(self) -> int:
        return 2

    @property
    def longest_row(self) -> int:
        """Tokens of the longest prompt with the longest answer."""
        return self.max_prompt_length + max(self.completion_lengths.values())

    def contents(self, root: Path) -> dict[str, str | None]:
        return data_contents(self.data, root)

    def check_sizes(self, spec: ModelSpec, graph: Graph, where: str) -> None:
        super().check_sizes(spec, graph, where)
        if self.max_prompt_length >= spec.context:
            raise UserError(
                f"{where}.max_prompt_length = {self.max_prompt_length} leaves no room in the model's context of "
                f"{spec.context}"
            )

    def limit(self, step: int) -> int:
        """Tokens that completions may have in a step, from 0 on."""
        lengths = self.completion_lengths
        return lengths[max(first for first in lengths if first <= step)]

    def toolbox(self, job: Job[Any]) -> ToolBox | None:
        """What answers may call."""
        return None


class OnlineStage(AnsweringStage, Steps):
    """A stage that learns from what its own model answers. A step samples, judges and then updates.

    A prompt is a conversation of the sources up to the assistant's last turn. The vision tower is frozen.
    """

    microbatches: int = Field(default=1, ge=1)
    """Over which the gradient of an update is accumulated."""
    evaluate: OnlineEvaluateConfig

    @property
    def updates_per_step(self) -> int:
        """Into which the prompts of a step are split."""
        return 1

    @property
    def updates(self) -> int:
        """Of all steps."""
        return self.steps

    def check_mesh(self, job: Job[Any]) -> None:
        """A step's answers must split evenly over the mesh and the microbatches."""
        each, parts = self.answers_per_prompt, self.updates_per_step
        rows = self.prompts * each // parts
        devices = job.placement.row_shards
        if rows % (devices * self.microbatches) or self.prompts // parts % self.microbatches:
            raise UserError(
                f"{job.where}.prompts = {self.prompts} with {each} answers each makes updates of {rows} rows, which "
                f"must be a multiple of {devices * self.microbatches} ({devices} devices * {self.microbatches} "
                "microbatches), and the prompts of an update a multiple of the microbatches"
            )

    def check_sizes(self, spec: ModelSpec, graph: Graph, where: str) -> None:
        super().check_sizes(spec, graph, where)
        if self.evaluate.tasks is not None:
            check_shown(self.evaluate.tasks.names, spec, f"{where}.evaluate.tasks")

    def prepare(self, job: Job[Any], packing: Packing) -> None:
        check_tracker(self.track, job.where)
        check_compute(job, bucket(max(self.longest_row, self.compute.shortest_row)))
        check_prompts(job, packing.progress)
        check_loop_tasks(job, lambda: load_tokenizer(self.data.tokenizer, job.data_root))

    def learner(self, *args: Any) -> OnlineLearner:
        """What the loop drives, of the arguments of `OnlineLearner`."""
        raise NotImplementedError

    def run(self, job: Job[Any]) -> Result:
        clock, prompts = Clock(), open_stage_prompts(job)
        job = job.with_tokens(prompts.tokenizer)
        trainable, fixed = split_frozen(load_stage(job.source, placement=job.placement)[1], FROZEN)
        with self.learner(job, prompts, fixed, clock) as learner:
            learner.begin({**trainable, **fixed})
            clock.switch("start")
            tasks = loop_tasks(job, prompts.tokenizer, learner.params)
            outcome = train(learner, trainable, self, job.directory, clock, tasks)
            files = job.save(learner.params(outcome.state))
        outcome.store.delete()
        details = {"data": {"tokenizer_digest": prompts.tokenizer.digest}}
        return Result(outcome.metrics, 0, self.steps, outcome.seconds, files, details)


Prompts = tuple[int, list[PromptRow]]
"""A step's; steps count from 0 here."""


class OnlineLearner:
    """Learns from its own answers; see `training.train.Learner`. A context manager: rewards run in other processes.

    A verb says how answers become an update (`learn`) and what is measured (`evaluate`).
    """

    def __init__(self, job: Job[Any], prompts: PromptData, fixed: Params, clock: Clock):
        stage: OnlineStage = job.stage
        self.job, self.stage, self.prompts, self.fixed, self.clock = job, stage, prompts, fixed, clock
        self.programs = stage.programs(job)
        self.sampler = open_sampler(job, prompts, stage.temperature, stage.toolbox(job), stage.answers_at_once)
        self.examiner = Examiner(
            self.sampler, prompts, stage.evaluate, job.directory, stage.workers, stage.reward_seconds
        )
        self.scorer = Scorer(stage.rewards or {}, stage.workers, stage.reward_seconds, stage.on_error)
        self.schedule = Schedule(stage.evaluate.every, stage.updates, evaluate_early=stage.evaluate.early)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.examiner.__exit__()
        self.scorer.__exit__()

    def begin(self, params: Params) -> None:
        """Before any step, of the model that the stage starts from."""

    def batches(self, first: int) -> Iterator[Prompts]:
        for step in count(first):
            yield step, self.prompts.batch(self.stage.seed, step, self.stage.prompts)

    def step(self, state: State, batch: Prompts) -> tuple[State, StepMetrics]:
        step, prompts = batch
        params = jax.block_until_ready(self.params(state))  # the last update, whose time is not that of sampling
        return self.learn(state, step, self.answers(params, step, prompts))

    def answers(self, params: Params, step: int, prompts: list[PromptRow], salt: int = 0) -> Answers:
        """To prompts of a step, with random numbers that `salt` makes other ones."""
        self.clock.switch("generate")
        numbers, each = seeds(self.stage.seed, step, len(prompts), salt), self.stage.answers_per_prompt
        answers = self.sampler.answers(params, prompts, numbers, each, self.stage.limit(step))
        self.clock.switch("score")
        return answers

    def learn(self, state: State, step: int, answers: Answers) -> tuple[State, StepMetrics]:
        """Judge the answers of a step, and update."""
        raise NotImplementedError

    def evaluate(self, state: State) -> dict[str, float]:
        return self.examiner.examine(self.params(state))[0]

    def told(self, figures: dict[str, float]) -> list[str]:
        return [*told_tasks(figures), *told(self.stage.figures, figures)]

    def params(self, state: State) -> Params:
        """All parameters of the policy."""
        return {**state["params"], **self.fixed}

    def scores(self, samples: list[Sample], few: bool = False) -> Scores:
        """See `scored`."""
        return scored(self.job, self.scorer, samples, few)


def scored(job: Job[Any], scorer: Scorer, samples: list[Sample], few: bool = False) -> Scores:
    """Rewards of answers; what went wrong with some is told. `few`: see `score_together`."""
    scores = score_together(scorer, samples, few)
    for problem in scores.problems[:_SHOWN_PROBLEMS]:
        say(job, f"left out: {problem}")
    return scores


def say(job: Job[Any], text: str) -> None:
    """A line of the log."""
    console.say(f"{job.name:>18}  {text}")


def policy_batch(job: Job[Any], rows: int, more: tuple[str, ...], microbatches: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The largest batch that `training_rows` makes of a step's answers, with `more` float32 arrays `[N, T]` beside it:
    shapes, dtypes and where they lie."""
    stage, floats = job.stage, ("loss_mask", *more)
    length, bins = bucket(max(stage.longest_row, stage.compute.shortest_row)), job.placement.bins(microbatches)
    return job.placement.described(batch_shapes(rows, length, floats, stage.data.patches, bins, job.spec.vision))


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
