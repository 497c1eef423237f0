"""Offline direct preference optimisation (arXiv 2305.18290): of pairs of answers that are there already, the chosen one
becomes more likely than the other, as the policy that the stage begins with has them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ministral_jax.alignment.examine import GenerateConfig
from ministral_jax.data.config import SourceConfig
from ministral_jax.data.pipeline import Join
from ministral_jax.data.prepare import PackedData
from ministral_jax.data.rows import pairs_per_row
from ministral_jax.data.tokenizer import check_vocab, load_tokenizer
from ministral_jax.distributed.collectives import first_then_all
from ministral_jax.distributed.processes import poll_alone
from ministral_jax.errors import UserError
from ministral_jax.losses.head import LossHead
from ministral_jax.losses.preference import PreferenceOptions, preference_loss
from ministral_jax.losses.targets import Metrics
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import Compute, placed_params
from ministral_jax.stages import rows
from ministral_jax.stages.asking import TASK_FIGURES, check_loop_tasks, loop_tasks
from ministral_jax.stages.base import Graph, Job, Params, Program, Result, load_stage
from ministral_jax.stages.checks import check_compute
from ministral_jax.stages.figures import ANSWERS, WIN_RATE, Curve, Figure
from ministral_jax.stages.looped import FROZEN, Examine, Looped, Objective, RowLearner, update_program
from ministral_jax.stages.odpo import compared, token_logprobs
from ministral_jax.stages.online import added
from ministral_jax.stages.pairs import Pairs, pairs_of
from ministral_jax.stages.prompts import check_prompts, generate_programs, open_examiner
from ministral_jax.stages.reference import reference_logprobs
from ministral_jax.stages.rows import Packing
from ministral_jax.stages.teaching import check_vocabulary
from ministral_jax.training.goodput import Clock
from ministral_jax.training.log import check_tracker, mean
from ministral_jax.training.state import LossFn, State, split_frozen
from ministral_jax.training.train import train

Batch = dict[str, Any]


class OfflineOptions(PreferenceOptions):
    """`PreferenceOptions`, `loss_type` and `beta` among them, with the defaults of DPO as it was published; so
    `rescale_beta` is off."""

    loss_type: Literal["sigmoid", "ipo", "odpo", "offset"] = "sigmoid"
    rescale_beta: bool = False


class DPO(Looped):
    """Offline DPO: of two answers that are given, make the chosen one more likely. The vision tower is frozen.

    A packed row holds whole pairs, both answers with their prompt.
    """

    figures: ClassVar = (
        WIN_RATE,
        *ANSWERS,
        Figure("rewards/accuracies", "pairs in the right order", "share", "higher"),
        Figure("rewards/margins", "margin of the chosen answer", "nats", "higher"),
        *TASK_FIGURES,
    )
    curve: ClassVar = Curve("rewards/accuracies", "rewards/accuracies")
    reads_pairs: ClassVar = True

    do: Literal["dpo"]
    source: str = Field(alias="from")
    pairs: str | None = None
    """A stage that has made the pairs; the sources are then those of the prompts of `generate` alone. None: the rows of
    the sources are pairs."""
    reward_temperature: float = Field(default=1.0, gt=0)
    """The chosen answer is better with probability sigmoid of the difference of their scores over this; where a row
    says the probability, of its log-odds over this."""
    loss: OfflineOptions = OfflineOptions()
    generate: GenerateConfig | None = None

    def inputs(self) -> dict[str, str]:
        return super().inputs() | ({} if self.pairs is None else {"pairs": self.pairs})

    def check_sizes(self, spec: ModelSpec, graph: Graph, where: str) -> None:
        super().check_sizes(spec, graph, where)
        if self.pairs is None:
            return
        if not isinstance(maker := graph.stages[self.pairs], Pairs):
            raise UserError(f"{where}.pairs = {self.pairs!r} must be a pairs stage")
        check_vocabulary(spec, self.pairs, "pairs", graph, where)
        if self.generate is not None and self.data.held_out > maker.data.held_out:
            raise UserError(
                f"{where}.data.held_out = {self.data.held_out:g} is above that of {self.pairs!r}, "
                f"{maker.data.held_out:g}: `generate` would ask prompts of which the policy learns; lower it"
            )
        if self.batch.length < (longest := 2 * maker.longest_row):
            raise UserError(
                f"{where}.batch.length = {self.batch.length} does not hold two of the longest answers of "
                f"{self.pairs!r} with their prompt, {longest} tokens"
            )

    def prepare(self, job: Job[Any], packing: Packing) -> None:
        if self.generate is not None:
            check_prompts(job, packing.progress)
        if self.pairs is None:
            super().prepare(job, packing)
            _check(job, packing.rows(job))
        else:  # they are not there yet
            if not self.data.held_out:
                raise UserError(f"{job.where}.data.held_out = 0 holds no pair out; raise it")
            check_tracker(self.track, job.where)
            check_compute(job, self.batch.length)
            check_vocab(tokenizer := load_tokenizer(self.data.tokenizer, job.data_root), job.spec)
            check_loop_tasks(job, lambda: tokenizer)

    def programs(self, job: Job[DPO]) -> dict[str, Program]:
        placement, heads = job.placement, LossHead(job.placement)
        whole = placed_params(job.spec, placement)
        trainable, fixed = split_frozen(whole, FROZEN)
        size, microbatches = pairs_per_row(self.batch.length), self.batch.microbatches
        margin = placement.described({"margin": ((self.batch.sequences, size), np.float32)})
        batch, split = (rows.abstract_batch(job, m) | margin for m in (1, microbatches))
        read = jax.jit(
            placement.rules.scoped(pair_logprobs(job.spec, self.compute, heads)), out_shardings=placement.replicated
        )
        both = placement.described({"reference": ((self.batch.sequences, 2 * size), np.float32)})
        step = update_program(job, objective(job, heads), trainable, self.steps, microbatches)
        policy = jax.ShapeDtypeStruct(both["reference"].shape, jnp.float32, sharding=placement.replicated)
        figures = jax.jit(lambda policy, batch: pair_loss(self, policy, batch)[1], out_shardings=placement.replicated)
        return generate_programs(job, self.generate) | {
            "read": Program(read, (whole, batch)),
            "step": Program(step.function, (*step.arguments, {**fixed, "teacher": None}, split | both)),
            "figures": Program(figures, (policy, batch | both)),
        }

    def run(self, job: Job[DPO]) -> Result:
        clock, opened = Clock(), list[PackedData]()
        first_then_all(lambda: opened.append(_open(job)))
        (data,) = opened
        job = job.with_tokens(data.tokenizer)
        programs, params = self.programs(job), load_stage(job.source, placement=job.placement)[1]
        reference = reference_logprobs(job, data, programs["read"].function, params)
        trainable, fixed = split_frozen(params, FROZEN)
        del params
        with ExitStack() as stack:
            examine = None
            if self.generate is not None:
                examiner = stack.enter_context(open_examiner(job, self.generate))
                examine = compared(examiner, lambda: load_stage(job.source, placement=job.placement)[1])
            learner = _Learner(job, data, fixed, examine, programs, reference)
            tasks = loop_tasks(job, data.tokenizer, learner.params)
            outcome = train(learner, trainable, self, job.directory, clock, tasks)
        files = job.save(learner.params(outcome.state))
        outcome.store.delete()
        tokens, details = self.steps * self.batch.tokens, {"data": rows.data_details(data)}
        return Result(outcome.metrics, tokens, self.steps, outcome.seconds, files, details)


class _Learner(RowLearner):
    """With what the policy gave the answers before it was trained."""

    def __init__(
        self,
        job: Job[DPO],
        data: PackedData,
        fixed: Params,
        examine: Examine | None,
        programs: dict[str, Program],
        reference: Join,
    ):
        super().__init__(job, data, Objective(objective(job, LossHead(job.placement)), FROZEN), fixed, examine)
        self.reference, self.read, self.figures = reference, programs["read"].function, programs["figures"].function

    def batches(self, first: int) -> rows.Batches:
        return rows.train_batches(
            self.job, self.data, first, join=self.reference, microbatches=self.job.stage.batch.microbatches
        )

    def evaluate(self, state: State) -> dict[str, float]:
        params, found = self.params(state), list[Metrics]()
        for batch in rows.held_out_batches(self.job, self.data, self.reference):
            alone = {name: array for name, array in batch.items() if name != "reference"}  # the program it was read by
            found.append(jax.device_get(self.figures(self.read(params, alone), batch)))
        return (self.examine(params) if self.examine else {}) | mean(added(found))


def _open(job: Job[DPO]) -> PackedData:
    """The packed pairs, of the stage that has made them where there is one."""
    stage = job.stage
    if stage.pairs is not None:
        path = str(pairs_of(job.run_dir / stage.pairs).absolute())
        source = SourceConfig(kind="jsonl", path=path)
        data = stage.data.model_copy(update={"sources": {stage.pairs: source}})
        job = replace(job, stage=stage.model_copy(update={"data": data}))
    poll_alone("packing data")
    data = rows.open_data(job, lambda what, _: poll_alone(f"packing data: {what}"))
    _check(job, data)
    return data


def _check(job: Job[DPO], data: PackedData) -> None:
    """Raise `UserError` where nothing is held out, or the loss needs to know how much better an answer is."""
    if not data.counts["held_out"]["rows"]:
        raise UserError(f"{job.where}.data.held_out = {job.stage.data.held_out} holds no pair out; raise it")
    if job.stage.loss.uses_probability and (place := data.counts.get("unjudged")):
        raise UserError(
            f"{place}: has neither 'probability' nor 'score_chosen' and 'score_rejected', which {job.where}.loss."
            f"loss_type = {job.stage.loss.loss_type} needs; sigmoid and ipo do without"
        )


def pair_logprobs(spec: ModelSpec, compute: Compute, heads: LossHead) -> Callable[[Params, Batch], jax.Array]:
    """`(params, batch) -> [B, S]`: of a batch of packed pairs, the log-probability of each answer, that of segment
    s + 1 at s; 0 where there is none."""
    read = token_logprobs(spec, compute, heads)

    def answers(params: Params, batch: Batch) -> jax.Array:
        count = 2 * batch["margin"].shape[1]
        add = lambda x, segments: jax.ops.segment_sum(x, segments, count + 1)[1:]
        return jax.vmap(add)(read(params, batch), batch["segments"])

    return answers


def pair_loss(stage: DPO, policy: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
    """`preference_loss` of packed pairs from `policy` and `reference` `[B, S]`, whose even answers are the chosen."""
    answers = lambda x: (x[:, 0::2].reshape(-1), x[:, 1::2].reshape(-1))
    pair = jnp.arange(batch["margin"].shape[1])
    weights = (batch["segments"].max(axis=1)[:, None] > 2 * pair).astype(jnp.float32).reshape(-1)
    margin = batch["margin"].reshape(-1) / stage.reward_temperature
    p = jax.nn.sigmoid(margin) if stage.loss.uses_probability else jnp.ones_like(margin)
    return preference_loss(answers(policy), answers(batch["reference"]), p, weights, stage.loss)


def objective(job: Job[DPO], heads: LossHead) -> LossFn:
    """`pair_loss` of what the policy gives the answers."""
    read = pair_logprobs(job.spec, job.stage.compute, heads)

    def loss(params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
        fixed = {key: tree for key, tree in frozen.items() if key != "teacher"}
        return pair_loss(job.stage, read({**params, **fixed}, batch), batch)

    return loss
