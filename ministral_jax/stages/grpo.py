"""Group relative policy optimisation (Magistral, arXiv 2506.10910, section 2): answers to a prompt are compared with
each other; no critic, no reference, no KL."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from pydantic import Field, field_validator

from ministral_jax.alignment.rewards import RewardsConfig
from ministral_jax.alignment.rollout import Answers, training_rows
from ministral_jax.data.batch import Batch
from ministral_jax.distributed.processes import announce
from ministral_jax.losses.evaluation import hidden
from ministral_jax.losses.head import LossHead
from ministral_jax.losses.policy import PolicyOptions, advantages, policy_loss, token_weights
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Compute, head_matrix, placed_params
from ministral_jax.stages import online
from ministral_jax.stages.base import Job, Program
from ministral_jax.stages.figures import ANSWERS, Curve
from ministral_jax.stages.looped import FROZEN, update_program
from ministral_jax.stages.prompts import sampler_programs
from ministral_jax.training.state import LossFn, State, split_frozen
from ministral_jax.training.train import StepMetrics


class GRPO(online.OnlineStage):
    """Group relative policy optimisation, as in Magistral: no reference, no KL."""

    figures: ClassVar = ANSWERS
    curve: ClassVar = Curve("reward", "reward", "step")

    do: Literal["grpo"]
    num_generations: int = Field(default=8, ge=2)
    """Completions of each prompt, compared with each other."""
    steps_per_generation: int = Field(default=1, ge=1)
    """Updates into which the prompts of a step are split."""
    num_iterations: int = Field(default=1, ge=1)
    """How often a step goes over its completions."""
    mask_truncated_completions: bool = False
    """Whether the tokens of completions that reached the limit are left out of the loss."""
    rewards: RewardsConfig = Field()
    loss: PolicyOptions = PolicyOptions()

    @field_validator("steps_per_generation")
    @classmethod
    def _divides(cls, value: int, info: Any) -> int:
        if info.data.get("prompts", value) % value:
            raise ValueError(f"must divide prompts = {info.data['prompts']}")
        return value

    @property
    def answers_per_prompt(self) -> int:
        return self.num_generations

    @property
    def updates_per_step(self) -> int:
        return self.steps_per_generation

    @property
    def updates(self) -> int:
        return self.steps * self.steps_per_generation * self.num_iterations

    def programs(self, job: Job[GRPO]) -> dict[str, Program]:
        trainable, fixed = split_frozen(placed_params(job.spec, job.placement), FROZEN)
        loss = objective(job.spec, self.compute, self.loss, self.temperature, LossHead(job.placement))
        step = update_program(job, loss, trainable, self.updates, self.microbatches)
        rows = self.prompts * self.num_generations // self.steps_per_generation
        batch = online.policy_batch(job, rows, ("old_logprobs", "advantages", "weights"))
        return {
            **sampler_programs(job, self.temperature, self.prompts, self.num_generations, self.max_prompt_length),
            "step": Program(step.function, (*step.arguments, fixed, batch)),
        }

    def learner(self, *args: Any) -> online.OnlineLearner:
        return _Learner(*args)


class _Learner(online.OnlineLearner):
    stage: GRPO
    silent: int = 0
    """Steps in a row from which nothing was learnt."""

    def learn(self, state: State, answers: Answers) -> tuple[State, StepMetrics]:
        scores = self.scores(answers.samples)
        self.clock.switch("step")
        batches, signal = minibatches(self.stage, self.job.spec, answers, scores.total)
        self.silent = 0 if signal[0] else self.silent + 1
        if self.silent.bit_count() == 1:  # the 1st, 2nd, 4th, 8th, ..
            online.say(self.job, nothing_learnt(self.silent, self.stage.num_generations))
        metrics = []
        for number, batch in enumerate(batches * self.stage.num_iterations, 1):
            announce(f"update {number}")
            state, found = self.programs["step"].function(state, self.fixed, self.job.placement.place_whole(batch))
            metrics.append(found)
        host = {
            **online.reward_metrics(scores),
            **online.conduct_metrics(answers.samples),
            "groups_with_signal": signal,
        }
        return state, {**host, **online.added(metrics)}


def nothing_learnt(steps: int, answers: int) -> str:
    """Of `steps` steps in a row whose groups of `answers` answers have equal rewards, or fewer than two."""
    return (
        f"nothing is learnt from {steps} step{'s in a row' if steps > 1 else ''}: the {answers} answers to each prompt "
        "have equal rewards; see reward and groups_with_signal, and take other prompts, more num_generations or a "
        "higher temperature"
    )


def objective(spec: ModelSpec, compute: Compute, options: PolicyOptions, temperature: float, heads: LossHead) -> LossFn:
    """The clipped policy loss of the batches of `minibatches`; the distribution that is trained is the one that was
    drawn from, at its temperature."""
    model = VLM(spec, compute)

    def loss(params, frozen, batch):
        states = hidden(model, {**params, **frozen}, batch)
        read = heads.label_logprobs(states, head_matrix(params), batch["labels"], temperature)
        old, weights = batch["old_logprobs"], batch["weights"]
        total, metrics = policy_loss(read["logprob"], old, batch["advantages"], weights, options)
        counted = (weights > 0).astype(jnp.float32)
        return total, {**metrics, "entropy": ((counted * read["entropy"]).sum(), counted.sum())}

    return loss


def minibatches(
    stage: GRPO, spec: ModelSpec, answers: Answers, rewards: np.ndarray
) -> tuple[list[Batch], tuple[float, float]]:
    """The batches of a step's updates, each of whole groups, and how many groups had a signal, as (sum, count).

    Beside what `training_rows` gives: `advantages` and `weights` `[N, T]`, which are normalised over the batch.
    """
    each = stage.num_generations
    rows = training_rows(answers.episodes, spec, stage.compute.shortest_row)
    grouped = {name: array.reshape(-1, each, *array.shape[1:]) for name, array in rows.items()}
    counted = grouped["loss_mask"] * ~np.isnan(rewards.reshape(-1, each))[..., None]
    if stage.mask_truncated_completions:
        truncated = np.array([sample.stopped == "length" for sample in answers.samples])
        counted = counted * ~truncated.reshape(-1, each)[..., None]
    limit = answers.samples[0].limit
    parts, kept_groups = [], 0
    for part in np.split(np.arange(len(counted)), stage.steps_per_generation):
        found, kept = advantages(rewards.reshape(-1, each)[part], stage.loss.scale_rewards)
        weights = token_weights(counted[part], kept, stage.loss.loss_type, limit)
        kept_groups += int(kept.sum())
        more = {"advantages": np.broadcast_to(found[..., None], weights.shape), "weights": weights}
        batch = {name: array[part] for name, array in grouped.items()}
        batch |= {name: array.astype(np.float32) for name, array in more.items()}
        parts.append({name: array.reshape(-1, *array.shape[2:]) for name, array in batch.items()})
    return parts, (float(kept_groups), float(len(counted)))
