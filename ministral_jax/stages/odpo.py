"""Online direct preference optimisation (Ministral 3, section 3.2): of two answers of the current policy, the one that
a judge prefers becomes more likely, by how sure the judge is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ministral_jax.alignment.examine import Examiner
from ministral_jax.alignment.rollout import Answers, Params, training_rows
from ministral_jax.alignment.scoring import resolve
from ministral_jax.alignment.tools import ToolBox
from ministral_jax.data.bins import place_whole
from ministral_jax.distributed.processes import announce
from ministral_jax.losses.evaluation import hidden
from ministral_jax.losses.head import LossHead
from ministral_jax.losses.preference import PreferenceOptions, decide, preference_loss
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Compute, head_matrix, placed_params
from ministral_jax.stages import online
from ministral_jax.stages.asking import TASK_FIGURES
from ministral_jax.stages.base import Job, Program, load_stage
from ministral_jax.stages.figures import ANSWERS, WIN_RATE, Curve
from ministral_jax.stages.judged import JudgedStage, open_judge, win_probability
from ministral_jax.stages.looped import FROZEN, update_program
from ministral_jax.stages.prompts import sampler_programs
from ministral_jax.stages.rows import Packing
from ministral_jax.training.state import LossFn, State, split_frozen
from ministral_jax.training.train import StepMetrics

Batch = dict[str, Any]


class ODPO(JudgedStage, online.OnlineStage):
    """Online DPO: of two answers to a prompt, make the one that the judge prefers more likely."""

    figures: ClassVar = (WIN_RATE, *ANSWERS, *TASK_FIGURES)
    curve: ClassVar = Curve("win_rate", None, "step")

    do: Literal["odpo"]
    tools: str | None = None
    """`package.module:function`, called with a tool's name and its arguments: what it returns is the tool's result."""
    tool_rounds: int = Field(default=2, ge=1)
    """How often an answer may call tools."""
    loss: PreferenceOptions = PreferenceOptions()

    def prepare(self, job: Job[Any], packing: Packing) -> None:
        if self.tools is not None:
            resolve(self.tools, f"{job.where}.tools")
        super().prepare(job, packing)

    def programs(self, job: Job[ODPO]) -> dict[str, Program]:
        placement, heads = job.placement, LossHead(job.placement)
        whole = placed_params(job.spec, placement)
        trainable, fixed = split_frozen(whole, FROZEN)
        loss = objective(job.spec, self.compute, self.loss, heads)
        step = update_program(job, loss, trainable, self.steps, self.microbatches)
        rows = 2 * self.prompts
        batch, split = (online.policy_batch(job, rows, ("old_logprobs",), m) for m in (1, self.microbatches))
        per_row = jax.ShapeDtypeStruct((rows,), jnp.float32, sharding=placement.batch_sharding("weights", 1))
        more = {"probability": per_row, "weights": per_row}
        reference = jax.jit(placement.rules.scoped(answer_logprobs(job.spec, self.compute, heads)))
        theirs = placed_params(job.spec, placement, jnp.dtype(self.compute.dtype))
        return {
            **sampler_programs(job, self.temperature, self.prompts, 2, self.max_prompt_length, self.answers_at_once),
            "reference": Program(reference, (theirs, batch | more)),
            "step": Program(step.function, (*step.arguments, fixed, split | more | {"reference": per_row})),
            **self.judge_programs(job),
        }

    def toolbox(self, job: Job[Any]) -> ToolBox | None:
        if self.tools is None:
            return None
        return ToolBox(resolve(self.tools, f"{job.where}.tools"), self.tool_rounds)

    def learner(self, *args: Any) -> online.OnlineLearner:
        return _Learner(*args)


class _Learner(online.OnlineLearner):
    """With the policy as it was before, the reference, and a judge if there is one."""

    stage: ODPO

    def __init__(self, *args: Any):
        super().__init__(*args)
        job, compute = self.job, self.stage.compute
        # In the dtype it computes in: the parameters would be cast to that at every use.
        self.reference = load_stage(job.source, jnp.dtype(compute.dtype), job.placement)[1]
        self.judge = open_judge(job, self.prompts.tokenizer)
        self.held_out = compared(self.examiner, lambda: self.reference)

    def learn(self, state: State, step: int, answers: Answers) -> tuple[State, StepMetrics]:
        probability, host = win_probability(self.stage, self.judge, answers, self.scores)
        self.clock.switch("step")
        batch, kept = pairs(answers, probability, self.job.spec, self.stage.compute.shortest_row)
        place = partial(place_whole, self.job.placement, batch, self.job.spec.vision)
        reference = self.programs["reference"].function(self.reference, placed := place())
        announce("update 1")
        if self.stage.microbatches > 1:  # pictures lie with the rows of their microbatch
            placed = place(self.stage.microbatches)
        placed["reference"] = reference
        state, metrics = self.programs["step"].function(state, self.fixed, placed)
        return state, {**host, **online.conduct_metrics(answers.samples), "pairs_kept": kept, **metrics}

    def evaluate(self, state: State) -> dict[str, float]:
        return self.held_out(self.params(state))


def token_logprobs(spec: ModelSpec, compute: Compute, heads: LossHead) -> Any:
    """`(params, batch) -> [N, T]`: log-probability of each token that counts, 0 elsewhere."""
    model = VLM(spec, compute)

    def read(params: Params, batch: Batch) -> jax.Array:
        states = hidden(model, params, batch)
        logprobs = heads.label_logprobs(states, head_matrix(params), batch["labels"], 1.0)["logprob"]
        return jnp.where(batch["loss_mask"] > 0, logprobs, 0)

    return read


def answer_logprobs(spec: ModelSpec, compute: Compute, heads: LossHead) -> Any:
    """`(params, batch) -> [N]`: log-probability of the tokens of each row's answer that the model drew."""
    read = token_logprobs(spec, compute, heads)
    return lambda params, batch: jnp.sum(read(params, batch), axis=1)


def objective(spec: ModelSpec, compute: Compute, options: PreferenceOptions, heads: LossHead) -> LossFn:
    """The preference loss of the batches of `pairs`, with the `reference`'s log-probabilities `[2P]` in them."""
    read = answer_logprobs(spec, compute, heads)

    def loss(params, frozen, batch):
        policy_a, policy_b = jnp.split(read({**params, **frozen}, batch), 2)
        reference_a, reference_b = jnp.split(batch["reference"], 2)
        probability, weights = (jnp.split(batch[name], 2)[0] for name in ("probability", "weights"))
        return preference_loss((policy_a, policy_b), (reference_a, reference_b), probability, weights, options)

    return loss


def pairs(
    answers: Answers, probability: np.ndarray, spec: ModelSpec, shortest: int
) -> tuple[Batch, tuple[float, float]]:
    """A batch of 2P rows, first the P answers a and then the answers b in the same order, and how many pairs count.

    So a pair stays within a microbatch, which takes every m-th row. Beside what `training_rows` gives, `probability`
    and `weights` `[2P]`, the same for both of a pair. What loops is the loser whatever the judge says.
    """
    loops = np.array([sample.looping for sample in answers.samples])
    decided, kept = decide(probability, loops[0::2], loops[1::2])
    batch: Batch = training_rows([*answers.episodes[0::2], *answers.episodes[1::2]], spec, shortest)
    batch["probability"] = np.tile(np.nan_to_num(decided), 2).astype(np.float32)
    batch["weights"] = np.tile(kept & ~np.isnan(decided), 2).astype(np.float32)
    return batch, (float(batch["weights"].sum() / 2), float(len(kept)))


def compared(examiner: Examiner, initial: Callable[[], Params]) -> Callable[[Params], dict[str, float]]:
    """Figures of a policy's answers to held-out prompts, and its `win_rate` over the initial policy, which is asked
    once."""
    first: list[np.ndarray] = []

    def figures(params: Params) -> dict[str, float]:
        if not first:  # before the answers of the policy: those are what is left to be looked at
            first.append(examiner.examine(initial())[1])
        found, rewards = examiner.examine(params)
        return found | {WIN_RATE.name: win_rate(rewards, first[0])}

    return figures


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of answers with a higher reward than the other's to the same prompt, ties as half."""
    return float(np.mean((ours > theirs) + (ours == theirs) / 2))
