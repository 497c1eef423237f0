"""Group relative policy optimisation (Magistral, arXiv 2506.10910, section 2): answers to a prompt are compared with
each other; no critic, no reference, no KL."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from ministral_jax.alignment.rollout import Arrays, Sampler, training_rows
from ministral_jax.distributed.processes import announce
from ministral_jax.losses.evaluation import hidden
from ministral_jax.losses.head import LossHead
from ministral_jax.losses.policy import PolicyOptions, advantages, policy_loss, token_weights
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Compute, head_matrix
from ministral_jax.stages.distill import FROZEN
from ministral_jax.stages.job import Job, Result, load_stage
from ministral_jax.stages.looped import make_update
from ministral_jax.stages.online import (
    Answers,
    Online,
    Prompts,
    added,
    conduct_metrics,
    open_stage_prompts,
    reward_metrics,
)
from ministral_jax.training.goodput import Clock
from ministral_jax.training.state import LossFn, split_frozen


def run(job: Job) -> Result:
    stage, clock, prompts = job.stage, Clock(), open_stage_prompts(job)
    sampler = Sampler(job.spec, stage.compute, job.placement, prompts.tokenizer, stage.temperature)
    assert job.source is not None
    trainable, fixed = split_frozen(load_stage(job.source, placement=job.placement)[1], FROZEN)
    loss = objective(job.spec, stage.compute, stage.loss, stage.temperature, LossHead(job.placement))
    updates = stage.steps * stage.steps_per_generation * stage.num_iterations
    update = make_update(job, loss, trainable, updates, stage.microbatches)
    with Online(job, prompts, sampler, clock) as online:

        def step(state: Any, asked: Prompts) -> tuple[Any, Any]:
            answers = online.answers({**state["params"], **fixed}, asked, stage.num_generations)
            scores = online.scores(answers.samples)
            clock.switch("step")
            batches, signal = minibatches(stage, job.spec, answers, scores.total)
            metrics = []
            for number, batch in enumerate(batches * stage.num_iterations, 1):
                announce(f"update {number}")
                state, found = update(state, fixed, job.placement.place_whole(batch))
                metrics.append(found)
            host = {**reward_metrics(scores), **conduct_metrics(answers.samples), "groups_with_signal": signal}
            return state, {**host, **added(metrics)}

        def evaluate(state: Any) -> dict[str, float]:
            return online.examiner.figures({**state["params"], **fixed})

        return online.run(trainable, updates, step, evaluate, fixed)


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
    stage: Any, spec: ModelSpec, answers: Answers, rewards: np.ndarray
) -> tuple[list[Arrays], tuple[float, float]]:
    """The batches of a step's updates, each of whole groups, and how many groups had a signal, as (sum, count).

    Beside what `training_rows` gives: `advantages` and `weights` `[N, T]`, which are normalised over the batch.
    """
    each = stage.num_generations
    rows = training_rows(answers.episodes, spec)
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
