"""What the stages that answer prompts share: the prompts, their faults, and the sampler's programs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ministral_jax.alignment.examine import Examiner, GenerateConfig
from ministral_jax.alignment.rollout import Sampler
from ministral_jax.alignment.scoring import Scorer
from ministral_jax.alignment.tools import ToolBox
from ministral_jax.data.batch import bucket
from ministral_jax.data.bins import batch_shapes
from ministral_jax.data.documents import Progress
from ministral_jax.data.prompts import PromptData, PromptRow, RowCheck, open_prompts
from ministral_jax.data.tokenizer import check_vocab
from ministral_jax.distributed.processes import poll_slow
from ministral_jax.errors import UserError
from ministral_jax.models.cache import logical_axes
from ministral_jax.models.vlm import placed_params
from ministral_jax.sampling.decoding import Choice, Rows, programs
from ministral_jax.sampling.engine import SLOTS, SamplingOptions, by_rows, rows_at_once
from ministral_jax.stages.base import Job, Program


def open_stage_prompts(job: Job[Any], progress: Progress | None = None, answered: bool = False) -> PromptData:
    """The prompts of a stage, of its own sources, each short enough to be answered and such that its rewards can judge
    it. They are looked at once: what was found is kept beside the data.

    Args:
        answered: rows are asked for with the answer that the data gives, and not judged.

    Raises:
        UserError: rows that cannot be used, or a reward that cannot be given on this machine.
    """
    check = _row_check(job, answered)
    return open_prompts(job.stage.data, job.spec.vision, job.data_root, answered, check, progress)


def _row_check(job: Job[Any], answered: bool) -> RowCheck:
    stage, longest = job.stage, getattr(job.stage, "max_prompt_length", None)
    bound = f"{job.where}.max_prompt_length" if longest is not None else "the model's context less one"
    longest = job.spec.context - 1 if longest is None else longest
    asked = getattr(stage, "generate", None) or getattr(stage, "evaluate", None)
    judged = () if answered else (getattr(stage, "rewards", None), getattr(asked, "rewards", None))
    train, held_out = ([Scorer(rewards or {}, 1) for rewards in judged] + 2 * [Scorer({}, 1)])[:2]

    def row(prompt: PromptRow, is_held_out: bool) -> None:
        if (tokens := len(prompt.rendered.tokens)) > longest:
            raise UserError(f"{prompt.where}: the prompt has {tokens} tokens, {bound} is {longest}")
        (held_out if is_held_out else train).check(prompt.columns, prompt.where)

    settings = [
        {name: reward.model_dump(mode="json") for name, reward in (rewards or {}).items()} for rewards in judged
    ]
    return RowCheck([longest, settings], row)


def check_prompts(job: Job[Any], progress: Progress | None = None) -> None:
    """Every fault of the prompts before anything is computed. Raises `UserError`: see `open_stage_prompts`; or none is
    held out."""
    prompts = open_stage_prompts(job, progress)
    check_vocab(prompts.tokenizer, job.spec)
    prompts.evaluation(1)


def open_sampler(
    job: Job[Any], prompts: PromptData, temperature: float, tools: ToolBox | None = None, at_once: int | None = None
) -> Sampler:
    """The stage's model as it answers prompts; the job may stop at every piece of work."""
    place = job.spec, job.stage.compute, job.placement
    return Sampler(*place, prompts.tokenizer, temperature, tools, at_once=at_once, on_step=poll_slow)


def open_examiner(job: Job[Any], given: GenerateConfig) -> Examiner:
    """Answers held-out prompts of the stage's own sources, as `generate` says; to be entered before it is used."""
    prompts = open_stage_prompts(job)
    return Examiner(open_sampler(job, prompts, given.temperature), prompts, given, job.directory)


def sampler_programs(
    job: Job[Any], temperature: float, prompts: int, each: int, length: int, at_once: int | None = None
) -> dict[str, Program]:
    """What sampling compiles to answer `prompts` prompts of at most `length` tokens `each` so often: reading them,
    branching into the answers, and a chunk of tokens. Shorter prompts are padded to fewer tokens."""
    spec, compute, place = job.spec, job.stage.compute, by_rows(job.placement)
    choice = Choice(temperature=temperature, vocab=job.tokens.vocab)
    run = programs(spec, compute, place, choice, (job.tokens.eos,), SamplingOptions().chunk)
    count, total = rows_at_once(prompts, each, at_once, place)
    params, patches = placed_params(spec, place), job.stage.data.patches
    batch = batch_shapes(count, bucket(max(length, compute.shortest_row)), (), patches, place.bins(), spec.vision)
    batch = place.described({name: batch[name] for name in batch.keys() - {"positions", "labels"}})
    one = jax.ShapeDtypeStruct
    lengths, per_row, scalar = (one(shape, jnp.int32) for shape in ((count,), (total,), ()))
    rows = Rows(per_row, per_row, one((total,), jnp.bool_), one((total,), jnp.uint32), per_row)

    def placed(states: Any) -> Any:
        lie = lambda x: one(x.shape, x.dtype, sharding=place.sharding(x.shape, logical_axes(x.ndim)))
        return jax.tree.map(lie, states)

    with jax.set_mesh(place.mesh):
        hidden, cache = placed(jax.eval_shape(run.start, params, batch, lengths))
        branched = placed(jax.eval_shape(lambda *args: run.fork(*args, SLOTS), hidden, cache, per_row))
    return {
        "sample/start": Program(run.start, (params, batch, lengths)),
        "sample/fork": Program(run.fork, (hidden, cache, per_row, SLOTS)),
        "sample/chunk": Program(run.chunk, (params, *branched, rows, scalar, scalar, scalar)),
    }


def generate_programs(job: Job[Any], given: GenerateConfig | None) -> dict[str, Program]:
    """What sampling compiles to answer held-out prompts: greedily, and by draws where there are any."""
    if given is None:
        return {}
    length = job.spec.context - 1
    found = sampler_programs(job, 0.0, given.prompts, 1, length, given.answers_at_once)
    if given.completions:
        drawn = sampler_programs(
            job, given.temperature, given.prompts, given.completions, length, given.answers_at_once
        )
        found |= {f"drawn/{name}": program for name, program in drawn.items()}
    return found
