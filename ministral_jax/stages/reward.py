"""A pairwise reward model: trained as in SFT to say which of two answers is better, then calibrated."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ministral_jax.alignment.calibration import calibration_floor, expected_calibration_error, fit_temperature
from ministral_jax.alignment.judge import ROWS, Judge, both_orders, judge_reader, question_length
from ministral_jax.alignment.rollout import Params
from ministral_jax.data.batch import shapes
from ministral_jax.data.conversation import spell
from ministral_jax.data.pairwise import CHOICES
from ministral_jax.data.prompts import PromptRow
from ministral_jax.distributed.processes import poll_slow
from ministral_jax.errors import UserError
from ministral_jax.losses.head import LossHead
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import placed_params
from ministral_jax.stages.asking import TASK_FIGURES
from ministral_jax.stages.base import Job, Program, Result, load_stage
from ministral_jax.stages.figures import HELD_OUT, Curve, Figure
from ministral_jax.stages.looped import FROZEN, Looped, Objective, loop_programs, run_loop
from ministral_jax.stages.prompts import open_stage_prompts
from ministral_jax.stages.rows import Packing, open_data
from ministral_jax.stages.train import next_token_loss
from ministral_jax.training.goodput import Clock


class Reward(Looped):
    """A pairwise judge: learn to say which of two answers is better, then calibrate how sure it is."""

    figures: ClassVar = (
        Figure("judge_accuracy", "pairs judged right", "share", "higher", "judge_pairs"),
        Figure("judge_ece_before", "calibration error of the judge, raw", "share", "lower"),
        Figure("judge_ece", "calibration error of the judge", "share", "lower"),
        Figure("judge_ece_floor", "calibration error of a perfect judge of as many pairs", "share"),
        *HELD_OUT,
        *TASK_FIGURES,
    )
    curve: ClassVar = Curve("judge_accuracy", None, "step")

    do: Literal["reward"]
    source: str = Field(alias="from")
    pairs: int = Field(default=256, ge=4)
    """Held-out pairs: every other one fits the temperature, the rest measure it."""

    def prepare(self, job: Job[Any], packing: Packing) -> None:
        """Every row must be one of a pair, and enough of them held out."""
        prompts = open_stage_prompts(job, packing.progress, answered=True)
        for documents in prompts.train.values():
            for document in documents:
                _check_pair(spell(document.messages[-1]), document.where)
        held_out_pairs(prompts.held_out_rows(), self.pairs, job.where)
        super().prepare(job, packing)

    def objective(self, job: Job[Reward]) -> Objective:
        return Objective(next_token_loss(job.spec, self.compute, LossHead(job.placement)), FROZEN)

    def programs(self, job: Job[Reward]) -> dict[str, Program]:
        return loop_programs(job, self.objective(job)) | {"judge": judge_program(job, job.spec, self.batch.length)}

    def run(self, job: Job[Reward]) -> Result:
        clock, data = Clock(), open_data(job)
        job = job.with_tokens(data.tokenizer)
        judge = Judge(job.spec, self.compute, job.placement, data.tokenizer, on_step=poll_slow)
        pairs = held_out_pairs(open_stage_prompts(job, answered=True).held_out_rows(), self.pairs, job.where)
        params = load_stage(job.source, placement=job.placement)[1]
        return run_loop(job, data, self.objective(job), params, clock, lambda params: examine(judge, params, pairs))


def judge_program(job: Job[Any], spec: ModelSpec, longest: int) -> Program:
    """Reading a batch of questions of up to `longest` tokens by a judge of `spec`."""
    placement, compute = job.placement, job.stage.compute
    read = judge_reader(spec, compute, placement, job.tokens.choices)
    batch = shapes(placement.even(ROWS), question_length(longest, spec, compute))
    batch = placement.described({name: batch[name] for name in batch if name != "labels"})
    return Program(read, (placed_params(spec, placement, jnp.dtype(compute.dtype)), batch))


def _check_pair(answer: str, where: str) -> None:
    if answer not in CHOICES:
        raise UserError(f"{where}: is no pair; a reward stage needs rows with 'chosen' and 'rejected'")


def held_out_pairs(rows: list[PromptRow], count: int, where: str) -> list[tuple[PromptRow, PromptRow]]:
    """The first held-out pairs, each as the two questions that are made of it. Raises `UserError`: there are fewer
    than four, or a row is not one of a pair."""
    pairs = list(zip(rows[0::2], rows[1::2], strict=False))[:count]
    for row in (row for pair in pairs for row in pair):
        _check_pair(row.reference, row.where)
    if len(pairs) < 4:
        raise UserError(f"{where}.data holds out {len(pairs)} pairs, of which the judge is calibrated; raise held_out")
    return pairs


def examine(judge: Judge, params: Params, pairs: list[tuple[PromptRow, PromptRow]]) -> dict[str, float]:
    """Every other pair fits `judge_temperature`; the rest, `judge_pairs`, measure `judge_accuracy` and the calibration
    error before and after, `judge_ece_before` and `judge_ece`, beside what a perfect judge of as many pairs would show,
    `judge_ece_floor`. All of the mean over both orders, by which answers are judged."""
    logits = [judge.logits(params, [judge.tokens(pair[n].messages) for pair in pairs]) for n in (0, 1)]
    first_better = np.array([pair[0].reference == "A" for pair in pairs], np.float64)
    fit, rest = slice(0, None, 2), slice(1, None, 2)
    temperature = fit_temperature(np.stack([logits[0][fit], -logits[1][fit]]), first_better[fit])
    before, after = (both_orders(logits[0][rest], logits[1][rest], t) for t in (1.0, temperature))
    return {
        "judge_temperature": temperature,
        "judge_pairs": float(len(before)),
        "judge_accuracy": float(np.mean((after > 0.5) == (first_better[rest] > 0.5))),
        "judge_ece_before": expected_calibration_error(before, first_better[rest]),
        "judge_ece": expected_calibration_error(after, first_better[rest]),
        "judge_ece_floor": calibration_floor(after),
    }
