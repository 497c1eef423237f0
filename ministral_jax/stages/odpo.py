"""Online direct preference optimisation (Ministral 3, section 3.2): of two answers of the current policy, the one that
a judge prefers becomes more likely, by how sure the judge is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from ministral_jax.alignment.judge import Judge
from ministral_jax.alignment.rollout import Params, Sampler, training_rows
from ministral_jax.alignment.scoring import resolve
from ministral_jax.alignment.tools import ToolBox
from ministral_jax.losses.evaluation import hidden
from ministral_jax.losses.head import LossHead
from ministral_jax.losses.preference import PreferenceOptions, decide, preference_loss
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Compute, head_matrix
from ministral_jax.stages.distill import FROZEN
from ministral_jax.stages.job import Job, Result, load_stage
from ministral_jax.stages.looped import make_update
from ministral_jax.stages.manifest import finished
from ministral_jax.stages.online import (
    Answers,
    HostMetrics,
    Online,
    Prompts,
    conduct_metrics,
    open_stage_prompts,
    reward_metrics,
)
from ministral_jax.training.goodput import Clock
from ministral_jax.training.state import LossFn, split_frozen

Batch = dict[str, Any]


def run(job: Job) -> Result:
    stage, clock, prompts = job.stage, Clock(), open_stage_prompts(job)
    tools = None
    if stage.tools is not None:
        tools = ToolBox(resolve(stage.tools, f"stages.{job.name}.tools"), stage.tool_rounds)
    sampler = Sampler(job.spec, stage.compute, job.placement, prompts.tokenizer, stage.temperature, tools)
    judge = None if stage.judge is None else _open_judge(job, sampler)
    assert job.source is not None
    trainable, fixed = split_frozen(load_stage(job.source, placement=job.placement)[1], FROZEN)
    # In the dtype it computes in: the parameters would be cast to that at every use.
    reference = load_stage(job.source, jnp.dtype(stage.compute.dtype), job.placement)[1]
    heads = LossHead(job.placement)
    update = make_update(
        job, objective(job.spec, stage.compute, stage.loss, heads), trainable, stage.steps, stage.microbatches
    )
    rules = job.placement.rules
    of_reference = jax.jit(rules.scoped(answer_logprobs(job.spec, stage.compute, heads)))
    with Online(job, prompts, sampler, clock) as online:

        def step(state: Any, asked: Prompts) -> tuple[Any, Any]:
            answers = online.answers({**state["params"], **fixed}, asked, 2)
            probability, host = _judged(online, judge, answers)
            clock.switch("step")
            batch, kept = pairs(answers, probability, job.spec)
            placed = job.placement.place_whole(batch)
            placed["reference"] = of_reference(reference, placed)
            state, metrics = update(state, fixed, placed)
            return state, {**host, **conduct_metrics(answers.samples), "pairs_kept": kept, **metrics}

        examined: dict[str, np.ndarray] = {}

        def evaluate(state: Any) -> dict[str, float]:
            if not examined:  # before the answers of the policy: those are what is left to be looked at
                examined["initial"] = online.examiner.examine(reference)[1]
            figures, rewards = online.examiner.examine({**state["params"], **fixed})
            return figures | {"win_rate": win_rate(rewards, examined["initial"])}

        return online.run(trainable, stage.steps, step, evaluate, fixed)


def answer_logprobs(spec: ModelSpec, compute: Compute, heads: LossHead) -> Any:
    """`(params, batch) -> [N]`: log-probability of the tokens of each row's answer that the model drew."""
    model = VLM(spec, compute)

    def read(params: Params, batch: Batch) -> jax.Array:
        states = hidden(model, params, batch)
        logprobs = heads.label_logprobs(states, head_matrix(params), batch["labels"], 1.0)["logprob"]
        return jnp.sum(jnp.where(batch["loss_mask"] > 0, logprobs, 0), axis=1)

    return read


def objective(spec: ModelSpec, compute: Compute, options: PreferenceOptions, heads: LossHead) -> LossFn:
    """The preference loss of the batches of `pairs`, with the `reference`'s log-probabilities `[2P]` in them."""
    read = answer_logprobs(spec, compute, heads)

    def loss(params, frozen, batch):
        policy_a, policy_b = jnp.split(read({**params, **frozen}, batch), 2)
        reference_a, reference_b = jnp.split(batch["reference"], 2)
        probability, weights = (jnp.split(batch[name], 2)[0] for name in ("probability", "weights"))
        return preference_loss(policy_a, policy_b, reference_a, reference_b, probability, weights, options)

    return loss


def pairs(answers: Answers, probability: np.ndarray, spec: ModelSpec) -> tuple[Batch, tuple[float, float]]:
    """A batch of 2P rows, first the P answers a and then the answers b in the same order, and how many pairs count.

    So a pair stays within a microbatch, which takes every m-th row. Beside what `training_rows` gives, `probability`
    and `weights` `[2P]`, the same for both of a pair. What loops is the loser whatever the judge says.
    """
    loops = np.array([sample.looping for sample in answers.samples])
    decided, kept = decide(probability, loops[0::2], loops[1::2])
    batch: Batch = training_rows([*answers.episodes[0::2], *answers.episodes[1::2]], spec)
    batch["probability"] = np.tile(np.nan_to_num(decided), 2).astype(np.float32)
    batch["weights"] = np.tile(kept & ~np.isnan(decided), 2).astype(np.float32)
    return batch, (float(batch["weights"].sum() / 2), float(len(kept)))


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of answers with a higher reward than the other's to the same prompt, ties as half."""
    return float(np.mean((ours > theirs) + (ours == theirs) / 2))


def _open_judge(job: Job, sampler: Sampler) -> tuple[Judge, Params]:
    directory = job.run_dir / job.stage.judge
    temperature = finished(directory).metrics["judge_temperature"]
    spec, params = load_stage(directory, jnp.dtype(job.stage.compute.dtype), job.placement)
    return Judge(spec, job.stage.compute, job.placement, sampler.tokenizer, temperature), params


def _judged(online: Online, judge: tuple[Judge, Params] | None, answers: Answers) -> tuple[np.ndarray, HostMetrics]:
    """`[P]`: that answer a is better than b, and figures. Reasoning is not judged."""
    samples = answers.samples
    if judge is None:
        scores = online.scores(samples)
        found = expit((scores.total[0::2] - scores.total[1::2]) / online.stage.reward_temperature)
        host = reward_metrics(scores)
    else:
        model, params = judge
        a, b = ([sample.answer for sample in samples[place::2]] for place in (0, 1))
        found = model.win_probability(params, [row.messages for row in answers.rows[0::2]], a, b)
        host = {}
    sure = np.abs(found - 0.5) + 0.5
    return found, {**host, "judge_confidence": (float(np.nansum(sure)), float((~np.isnan(sure)).sum()))}
