"""A pairwise reward model: trained as in SFT to say which of two answers is better, then calibrated."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ministral_jax.alignment.calibration import expected_calibration_error, fit_temperature
from ministral_jax.alignment.judge import Judge, both_orders
from ministral_jax.alignment.rollout import Params
from ministral_jax.config import RewardStage
from ministral_jax.data.conversation import spell
from ministral_jax.data.pairwise import CHOICES
from ministral_jax.data.prompts import Progress, PromptRow
from ministral_jax.errors import UserError
from ministral_jax.losses.head import LossHead
from ministral_jax.models.spec import ModelSpec
from ministral_jax.stages.distill import FROZEN
from ministral_jax.stages.job import Job, Result, load_stage
from ministral_jax.stages.looped import open_data, run_loop
from ministral_jax.stages.online import open_stage_prompts, prompts_of
from ministral_jax.stages.train import next_token_loss
from ministral_jax.training.goodput import Clock


def run(job: Job) -> Result:
    stage, clock, data = job.stage, Clock(), open_data(job)
    loss = next_token_loss(job.spec, stage.compute, LossHead(job.placement))
    judge = Judge(job.spec, stage.compute, job.placement, data.tokenizer)
    pairs = held_out_pairs(open_stage_prompts(job).rows("held_out"), stage.pairs, f"stages.{job.name}")
    assert job.source is not None
    params = load_stage(job.source, placement=job.placement)[1]
    flops = 3 * job.spec.flops_per_token(stage.batch.length)
    return run_loop(job, data, params, loss, flops, FROZEN, None, clock, lambda params: examine(judge, params, pairs))


def check_pairs(stage: RewardStage, spec: ModelSpec, root: Path, where: str, progress: Progress | None = None) -> None:
    """Every row must be one of a pair, and enough of them held out.

    Raises:
        UserError: naming the row.
    """
    prompts = prompts_of(stage, spec, root, where, progress)
    for documents in prompts.train.values():
        for document in documents:
            _check_pair(spell(document.messages[-1]), document.where)
    held_out_pairs(prompts.rows("held_out"), stage.pairs, where)


def _check_pair(answer: str, where: str) -> None:
    if answer not in CHOICES:
        raise UserError(f"{where}: is no pair; a reward stage needs rows with 'chosen' and 'rejected'")


def held_out_pairs(rows: list[PromptRow], count: int, where: str) -> list[tuple[PromptRow, PromptRow]]:
    """The first held-out pairs, each as the two questions that are made of it.

    Raises:
        UserError: there are fewer than four, or a row is not one of a pair.
    """
    pairs = list(zip(rows[0::2], rows[1::2], strict=False))[:count]
    for row in (row for pair in pairs for row in pair):
        _check_pair(row.reference, row.where)
    if len(pairs) < 4:
        raise UserError(f"{where}.data holds out {len(pairs)} pairs, of which the judge is calibrated; raise held_out")
    return pairs


def examine(judge: Judge, params: Params, pairs: list[tuple[PromptRow, PromptRow]]) -> dict[str, float]:
    """Every other pair fits `judge_temperature`; the rest are asked for `judge_accuracy` (of both orders together) and
    the calibration error of their probability before and after, `judge_ece_before` and `judge_ece`."""
    logits = [judge.logits(params, [judge.tokens(pair[n].messages) for pair in pairs]) for n in (0, 1)]
    first_better = np.array([pair[0].reference == "A" for pair in pairs], np.float64)
    fit, rest = slice(0, None, 2), slice(1, None, 2)
    both = np.concatenate([logits[0][fit], -logits[1][fit]])
    temperature = fit_temperature(both, np.tile(first_better[fit], 2))
    before, after = (both_orders(logits[0][rest], logits[1][rest], t) for t in (1.0, temperature))
    return {
        "judge_temperature": temperature,
        "judge_accuracy": float(np.mean((after > 0.5) == (first_better[rest] > 0.5))),
        "judge_ece_before": expected_calibration_error(before, first_better[rest]),
        "judge_ece": expected_calibration_error(after, first_better[rest]),
    }
