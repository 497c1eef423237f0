"""Group relative policy optimisation (Magistral, arXiv 2506.10910, section 2): answers to a prompt are compared with
each other; no critic, no reference, no KL."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import jax.numpy as jnp
import numpy as np
from pydantic import Field, field_validator, model_validator

from ministral_jax.alignment.difficulty import DifficultyConfig, pass_rates
from ministral_jax.alignment.rewards import CHECKABLE, RewardsConfig
from ministral_jax.alignment.rollout import Answers, Params, joined, seeds, training_rows
from ministral_jax.alignment.scoring import Scores, together
from ministral_jax.data.batch import Batch
from ministral_jax.data.bins import place_whole
from ministral_jax.data.prompts import PromptRow
from ministral_jax.distributed.processes import announce
from ministral_jax.errors import UserError
from ministral_jax.files import digest_of
from ministral_jax.losses.evaluation import hidden
from ministral_jax.losses.head import LossHead
from ministral_jax.losses.policy import PolicyOptions, advantages, policy_loss, token_weights, with_signal
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Compute, head_matrix, placed_params
from ministral_jax.stages import online
from ministral_jax.stages.asking import TASK_FIGURES
from ministral_jax.stages.base import Job, Program
from ministral_jax.stages.figures import ANSWERS, Curve
from ministral_jax.stages.looped import FROZEN, update_program
from ministral_jax.stages.manifest import digest
from ministral_jax.stages.prompts import sampler_programs
from ministral_jax.training.state import LossFn, State, split_frozen
from ministral_jax.training.train import StepMetrics


class GRPO(online.OnlineStage):
    """Group relative policy optimisation, as in Magistral: no reference, no KL."""

    figures: ClassVar = (*ANSWERS, *TASK_FIGURES)
    curve: ClassVar = Curve("reward", "reward", "step")

    do: Literal["grpo"]
    num_generations: int = Field(default=8, ge=2)
    """Completions of each prompt, compared with each other."""
    steps_per_generation: int = Field(default=1, ge=1)
    """Updates into which the prompts of a step are split."""
    num_iterations: int = Field(default=1, ge=1)
    """How often a step goes over its completions."""
    max_num_gen_batches: int = Field(default=2, ge=1)
    """Groups whose rewards are all equal are replaced by those of further prompts, `prompts` of them at most in each
    generation after a step's first; so many generations there are at most (verl's `filter_groups`). 1: none is."""
    difficulty: DifficultyConfig | None = None
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

    @model_validator(mode="after")
    def _difficulty_is_measured(self) -> Self:
        if self.difficulty is not None and not any(reward.kind in CHECKABLE for reward in self.rewards.values()):
            raise ValueError(f"difficulty needs a reward that says right or wrong: {', '.join(CHECKABLE)}")
        return self

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
        batch = online.policy_batch(job, rows, ("old_logprobs", "advantages", "weights"), self.microbatches)
        return {
            **sampler_programs(
                job, self.temperature, self.prompts, self.num_generations, self.max_prompt_length, self.answers_at_once
            ),
            "step": Program(step.function, (*step.arguments, fixed, batch)),
        }

    def learner(self, *args: Any) -> online.OnlineLearner:
        return _Learner(*args)


_FURTHER = 1 << 16
"""Added to the seed of a stage, and to the salt of random numbers, where prompts are further ones."""


class _Learner(online.OnlineLearner):
    stage: GRPO
    silent: int = 0
    """Steps in a row from which nothing was learnt."""

    def begin(self, params: Params) -> None:
        """Leaves out the prompts that are too hard or too easy for the model, where the stage says so."""
        if (given := self.stage.difficulty) is None:
            return
        stage, job, places = self.stage, self.job, self.prompts.places
        online.say(job, f"measuring how difficult {len(places):,} prompts are")

        def rate(first: int, rows: list[PromptRow]) -> np.ndarray:
            self.clock.switch("generate")
            numbers, limit = seeds(stage.seed, first, len(rows), _FURTHER), stage.completion_lengths[0]
            answers = self.sampler.answers(params, rows, numbers, given.completions, limit)
            self.clock.switch("score")
            passed = self.scorer.passed(self.scores(answers.samples))
            assert passed is not None, "the settings were checked"
            return passed.reshape(len(rows), -1).mean(axis=1)

        settings = stage.model_dump(mode="json", include={"seed", "temperature", "rewards", "max_completion_length"})
        identity = [settings, given.completions, digest(job.source), stage.contents(job.data_root)]
        rates = pass_rates(self.prompts, rate, job.directory / "difficulty.json", digest_of(identity), stage.prompts)
        low, high = given.min_pass_rate, given.max_pass_rate
        kept = [place for place, found in zip(places, rates, strict=True) if low <= found <= high]
        words = f"{len(kept):,} of {len(places):,} prompts have a pass rate from {low:g} to {high:g}"
        if not kept:
            raise UserError(f"{job.where}.difficulty: {words}; widen the band or take other prompts")
        online.say(job, f"{words}, the others are left out")
        self.prompts = self.prompts.only(kept)

    def learn(self, state: State, step: int, answers: Answers) -> tuple[State, StepMetrics]:
        answers, scores, chosen = self._filled(self.params(state), step, answers)
        self.clock.switch("step")
        rewards = self._grouped(scores.total)
        drawn, signal = len(rewards), int(with_signal(rewards).sum())
        self.silent = 0 if signal else self.silent + 1
        if self.silent.bit_count() == 1:  # the 1st, 2nd, 4th, 8th, ..
            online.say(self.job, nothing_learnt(self.silent, self.stage.num_generations))
        batches = minibatches(self.stage, self.job.spec, of_groups(answers, chosen, drawn), rewards[chosen])
        metrics = []
        for number, batch in enumerate(batches * self.stage.num_iterations, 1):
            announce(f"update {number}")
            placed = place_whole(self.job.placement, batch, self.job.spec.vision, self.stage.microbatches)
            state, found = self.programs["step"].function(state, self.fixed, placed)
            metrics.append(found)
        host = {
            **online.reward_metrics(scores),
            **online.conduct_metrics(answers.samples),
            "groups_with_signal": (float(signal), float(drawn)),
            "groups_replaced": (float((chosen >= self.stage.prompts).sum()), 1.0),
            "prompts_drawn": (float(drawn), 1.0),
        }
        return state, {**host, **online.added(metrics)}

    def _grouped(self, rewards: np.ndarray) -> np.ndarray:
        return rewards.reshape(-1, self.stage.num_generations)

    def _filled(self, params: Params, step: int, answers: Answers) -> tuple[Answers, Scores, np.ndarray]:
        """The answers of a step with those to further prompts, what all of them are worth, and which groups are learnt
        from `[P]`: in the place of one without a signal stands one of the further ones that has it.

        Further prompts come in an order of their own, of which every step has as many as it may need: which they are
        depends on the seed, the step and the rewards alone.
        """
        stage, chosen = self.stage, np.arange(self.stage.prompts)
        all_answers, all_scores, drawn = [answers], [self.scores(answers.samples)], stage.prompts
        missing = np.flatnonzero(~with_signal(self._grouped(all_scores[0].total)))
        for generation in range(1, stage.max_num_gen_batches):
            if not len(missing):
                break
            # a power of two, so that few numbers of rows are compiled
            count = min(1 << (len(missing) - 1).bit_length(), stage.prompts)
            first = (step * (stage.max_num_gen_batches - 1) + generation - 1) * stage.prompts
            prompts = self.prompts.drawn(stage.seed + _FURTHER, first, count)
            all_answers.append(self.answers(params, step, prompts, _FURTHER + generation))
            all_scores.append(self.scores(all_answers[-1].samples, few=True))
            found = drawn + np.flatnonzero(with_signal(self._grouped(all_scores[-1].total)))
            chosen[missing[: len(found)]] = found[: len(missing)]
            missing, drawn = missing[len(found) :], drawn + count
        return joined(all_answers), together(all_scores), chosen


def of_groups(answers: Answers, chosen: np.ndarray, count: int) -> Answers:
    """Of `count` groups of answers, one after the other, the chosen ones."""
    places = np.arange(len(answers.samples)).reshape(count, -1)[chosen].ravel()
    rows, episodes, samples = answers
    return Answers([rows[n] for n in places], [episodes[n] for n in places], [samples[n] for n in places])


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
        read = heads.label_logprobs(states, head_matrix(params), batch["labels"], temperature, options.chunk)
        old, weights = batch["old_logprobs"], batch["weights"]
        total, metrics = policy_loss(read["logprob"], old, batch["advantages"], weights, options)
        counted = (weights > 0).astype(jnp.float32)
        return total, {**metrics, "entropy": ((counted * read["entropy"]).sum(), counted.sum())}

    return loss


def minibatches(stage: GRPO, spec: ModelSpec, answers: Answers, rewards: np.ndarray) -> list[Batch]:
    """The batches of a step's updates, each of whole groups, from rewards `[P, G]`.

    Beside what `training_rows` gives: `advantages` and `weights` `[N, T]`, which are normalised over the batch.
    """
    each = stage.num_generations
    rows = training_rows(answers.episodes, spec, stage.compute.shortest_row)
    grouped = {name: array.reshape(-1, each, *array.shape[1:]) for name, array in rows.items()}
    counted = grouped["loss_mask"] * ~np.isnan(rewards)[..., None]
    if stage.mask_truncated_completions:
        truncated = np.array([sample.stopped == "length" for sample in answers.samples])
        counted = counted * ~truncated.reshape(-1, each)[..., None]
    limit = answers.samples[0].limit
    parts = []
    for part in np.split(np.arange(len(counted)), stage.steps_per_generation):
        found, kept = advantages(rewards[part], stage.loss.scale_rewards)
        weights = token_weights(counted[part], kept, stage.loss.loss_type, limit)
        more = {"advantages": np.broadcast_to(found[..., None], weights.shape), "weights": weights}
        batch = {name: array[part] for name, array in grouped.items()}
        batch |= {name: array.astype(np.float32) for name, array in more.items()}
        parts.append({name: array.reshape(-1, *array.shape[2:]) for name, array in batch.items()})
    return parts
