"""What each verb computes, as `records`."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache, singledispatch
from typing import Any

from ministral_jax.alignment.examine import GenerateConfig
from ministral_jax.alignment.judge import ROWS, question_length
from ministral_jax.data.batch import bucket
from ministral_jax.losses.targets import DEFAULT_CHUNK
from ministral_jax.models.block import Compute
from ministral_jax.models.spec import ModelSpec
from ministral_jax.planning.memory.shards import ITEMSIZE
from ministral_jax.planning.records import Cut, Draw, Head, Held, Move, Phase, Read, StageWork, Work
from ministral_jax.stages.base import Graph, Stage, TokenIds
from ministral_jax.stages.distill import Distill
from ministral_jax.stages.dpo import DPO
from ministral_jax.stages.evaluate import Evaluate
from ministral_jax.stages.export import CALIBRATION, Export, loaded_dtype
from ministral_jax.stages.grpo import GRPO
from ministral_jax.stages.import_ import Import
from ministral_jax.stages.looped import FROZEN, Looped
from ministral_jax.stages.odpo import ODPO
from ministral_jax.stages.pairs import Pairs
from ministral_jax.stages.prune import Prune
from ministral_jax.stages.record import Record
from ministral_jax.stages.reward import Reward
from ministral_jax.stages.sft import SFT
from ministral_jax.stages.train import Train
from ministral_jax.teachers import codecs
from ministral_jax.training.train import Schedule


def stage_work(stage: Stage, spec: ModelSpec, graph: Graph) -> StageWork:
    """What `stage` computes to make a model of `spec`; of a verb of a user's own, nothing is known."""
    checkpoint = getattr(stage, "checkpoint", None)
    return replace(_work(stage, spec, graph), keep=0 if checkpoint is None else checkpoint.keep)


@singledispatch
def _work(stage: Stage, spec: ModelSpec, graph: Graph) -> StageWork:
    return StageWork((), ())


# ---- loops over packed rows ------------------------------------------------------------------------------------------


@_work.register
def _(stage: Train, spec: ModelSpec, graph: Graph) -> StageWork:
    return _loop(stage, spec, graph, frozen=())


@_work.register
def _(stage: Distill, spec: ModelSpec, graph: Graph) -> StageWork:
    return _loop(stage, spec, graph)


@_work.register
def _(stage: SFT, spec: ModelSpec, graph: Graph) -> StageWork:
    found = _loop(stage, spec, graph)
    return _with(found, _examined(stage, found.held[0], stage.generate))


@_work.register
def _(stage: Reward, spec: ModelSpec, graph: Graph) -> StageWork:
    found = _loop(stage, spec, graph)
    questions = _judging(found.held[0], stage.compute, 2 * stage.pairs, stage.batch.length)
    return _with(found, (Phase("judge", (questions,), _evaluations(stage), beside=True),))


@_work.register
def _(stage: DPO, spec: ModelSpec, graph: Graph) -> StageWork:
    policy = _learner("policy", spec, stage)
    read = _rows(stage, policy, "logprobs")
    step = replace(read, learns=True, microbatches=stage.batch.microbatches)
    rounds = _evaluations(stage) * -(-stage.evaluate.rows // stage.batch.sequences)
    phases = (
        Phase("reference", (read,), stage.steps),
        Phase("step", (step,), stage.steps),
        Phase("evaluate", (read,), rounds, beside=True),
    )
    return _with(StageWork((policy,), phases), _examined(stage, policy, stage.generate))


def _loop(stage: Looped, spec: ModelSpec, graph: Graph, frozen: tuple[str, ...] = FROZEN) -> StageWork:
    student, count = _learner("student", spec, stage, frozen), stage.batch.microbatches
    name = getattr(stage, "teacher_stage", None)
    recorder = graph.stages[name] if name is not None else None
    teacher = _teacher(stage, graph) if name is not None else None
    head: Head = "ce" if teacher is None else "kl"
    step = replace(_rows(stage, student, head), learns=True, microbatches=count)
    seen = _rows(stage, student, head, chunk=DEFAULT_CHUNK)
    taught, shown = (step,), (seen,)
    if teacher is not None and isinstance(recorder, Record):
        kept = recorder.kept(TokenIds().control)
        taught, shown = (
            (_told(stage, step, teacher, *kept["train"]),),
            (_told(stage, seen, teacher, *kept["held_out"]),),
        )
    elif teacher is not None:
        step, seen = replace(step, taught=teacher), replace(seen, taught=teacher)
        if getattr(stage, "teacher_mesh", None) is not None:
            return _taught_apart(stage, student, teacher, step, seen)
        one_tower = spec.vision is not None and teacher.spec.vision == spec.vision and set(FROZEN) <= set(frozen)
        if one_tower:  # as `stages.teaching.sharing_tower` will find, but where a stage between has trained it
            teacher = replace(teacher, only=("decoder", "projector"))
        read = replace(_rows(stage, teacher, "none", count), tower=not one_tower)
        taught, shown = (read, step), (_rows(stage, teacher, "none"), seen)
    return StageWork((student, *(() if teacher is None else (teacher,))), _loop_phases(stage, taught, shown))


def _loop_phases(stage: Looped, taught: tuple[Read, ...], shown: tuple[Read, ...]) -> tuple[Phase, ...]:
    rounds = _evaluations(stage) * -(-stage.evaluate.rows // stage.batch.sequences)
    return Phase("step", taught, stage.steps), Phase("evaluate", shown, rounds, beside=True)


def _taught_apart(stage: Any, student: Held, teacher: Held, step: Read, seen: Read) -> StageWork:
    """With a teacher on a mesh of its own, of which the student's has the output matrix and what it hands over."""
    head = _head_of(teacher, "teacher's head")
    handed = stage.batch.length * teacher.spec.width * ITEMSIZE[stage.compute.dtype]
    step, seen = replace(step, taught=head, handed=handed), replace(seen, taught=head, handed=handed)
    read = _rows(stage, teacher, "none", stage.batch.microbatches)
    phases = _loop_phases(stage, (step,), (seen,))
    return StageWork((student, head), phases, apart=Phase("teacher", (read,), stage.steps))


# ---- loops over answers ----------------------------------------------------------------------------------------------


@_work.register
def _(stage: GRPO, spec: ModelSpec, graph: Graph) -> StageWork:
    policy = _learner("policy", spec, stage)
    parts = stage.steps_per_generation
    step = _update(stage, policy, stage.prompts * stage.num_generations // parts)
    draw = _draw(stage, policy, stage.prompts, stage.num_generations, max(stage.completion_lengths.values()))
    phases = (
        Phase("sample", (draw,), stage.steps),
        Phase("step", (step,), stage.steps * parts * stage.num_iterations),
    )
    return _with(StageWork((policy,), phases), _examined(stage, policy, stage.evaluate))


@_work.register
def _(stage: ODPO, spec: ModelSpec, graph: Graph) -> StageWork:
    policy = _learner("policy", spec, stage)
    reference = Held("reference", spec, stage.compute.dtype, stage.sharding)
    step = _update(stage, policy, 2 * stage.prompts)
    theirs = replace(step, model=reference, learns=False, microbatches=1)
    draw = _draw(stage, policy, stage.prompts, 2, max(stage.completion_lengths.values()))
    judge, judging = _judge(stage, graph)
    phases = (
        Phase("sample", (draw,), stage.steps),
        *judging,
        Phase("step", (theirs, step), stage.steps),
    )
    return _with(StageWork((policy, reference, *judge), phases), _examined(stage, policy, stage.evaluate))


@_work.register
def _(stage: Pairs, spec: ModelSpec, graph: Graph) -> StageWork:
    model = Held("policy", spec, stage.compute.dtype, stage.sharding)
    draw = _draw(stage, model, stage.prompts, stage.num_generations, max(stage.completion_lengths.values()))
    judge, judging = _judge(stage, graph)
    return StageWork((model, *judge), (Phase("sample", (draw,), stage.rounds), *judging))


# ---- the rest --------------------------------------------------------------------------------------------------------


@_work.register
def _(stage: Prune, spec: ModelSpec, graph: Graph) -> StageWork:
    dtype = stage.stored_dtype(graph.stages)
    source = Held("source", graph.specs[stage.source], dtype, stage.sharding)
    pruned = Held("pruned", spec, dtype, stage.sharding)
    cuts = sum(getattr(source.spec, size) != getattr(spec, size) for size in ("layers", "width", "mlp_width"))
    passes = max(1, cuts) if stage.options.recollect else 1
    read, rounds = _rows(stage, source, "none"), -(-stage.evaluate.rows // stage.batch.sequences)
    kept, head = (replace(read, rows=rounds * read.rows),), _head_of(source, "source's head")
    phases = (
        Phase("source", (read,), rounds, kept=kept),
        Phase("calibrate", (replace(read, taps=True),), passes * stage.calibration, kept=kept),
        Phase("surgery", (Cut(source, pruned),), 1, kept=kept),
        Phase(
            "evaluate",
            (replace(_rows(stage, pruned, "kl"), taught=head),),
            (cuts + 1) * rounds,
            held=(pruned, head),
            kept=kept,
        ),
    )
    return StageWork((source,), phases)


@_work.register
def _(stage: Record, spec: ModelSpec, graph: Graph) -> StageWork:
    teacher = Held("teacher", graph.specs[stage.source], stage.compute.dtype, stage.sharding)
    codec, forced = stage.kept(TokenIds().control)["train"]
    read = replace(_rows(stage, teacher, "logprobs"), targets=_row_bytes(stage, teacher.spec, codec, forced))
    return StageWork((teacher,), (Phase("record", (read,), _batches_to_record(stage)),))


@_work.register
def _(stage: Evaluate, spec: ModelSpec, graph: Graph) -> StageWork:
    model = Held("model", spec, "float32", stage.sharding)
    rounds = -(-stage.evaluate.rows // stage.batch.sequences)
    return StageWork((model,), (Phase("evaluate", (_rows(stage, model, "ce"),), rounds),))


@_work.register
def _(stage: Export, spec: ModelSpec, graph: Graph) -> StageWork:
    model = Held("model", spec, loaded_dtype(stage.dtype), stage.sharding)
    phases = (Phase("export", (Move(model, whole=True, dtype=model.dtype),)),)
    if stage.format == "fp8" and (rows := stage.calibrated_on(graph)) is not None:
        read = replace(_rows(rows, model, "none"), compute=Compute(dtype=model.dtype), at_once=rows.batch.sequences)
        phases = (*phases, Phase("calibrate", (read,), CALIBRATION, held=(model,)))  # `StageWork.main` is the first one
    return StageWork((), phases)


@_work.register
def _(stage: Import, spec: ModelSpec, graph: Graph) -> StageWork:
    model = Held("model", spec, stage.dtype, stage.sharding)
    return StageWork((model,), (Phase("import", (Move(model),)),))


def _batches_to_record(stage: Record) -> float:
    """0 where all rows of the data are recorded, whose number is not known here."""
    return -(-(stage.rows or 0) // stage.batch.sequences)


def _with(found: StageWork, more: tuple[Phase, ...]) -> StageWork:
    return StageWork(found.held, (*found.phases, *more))


def _head_of(model: Held, role: str) -> Held:
    """A model's output matrix alone."""
    return replace(model, role=role, only=("decoder/embed" if model.spec.tied else "decoder/head",))


def _learner(role: str, spec: ModelSpec, stage: Any, frozen: tuple[str, ...] = FROZEN) -> Held:
    fixed, moments = frozen if spec.vision is not None else (), stage.optimizer.moments
    return Held(role, spec, "float32", stage.sharding, True, fixed, moments=moments)


def _teacher(stage: Any, graph: Graph) -> Held:
    """A model beside the student; or, where its distribution was recorded, its output matrix."""
    name = stage.teacher_stage
    spec, rules = graph.specs[name], stage.teacher_sharding or stage.sharding
    if not isinstance(recorder := graph.stages[name], Record):
        return Held("teacher", spec, stage.compute.dtype, rules)
    untied = graph.specs[recorder.source].model_copy(update={"tied": False})
    return Held("teacher", untied, recorder.compute.dtype, rules, only=("decoder/head",))


def _told(stage: Any, read: Read, teacher: Held, codec: codecs.Codec, forced: tuple[int, ...]) -> Read:
    """With what was recorded of a teacher, whose logits are made anew where hidden states were."""
    taught = teacher if isinstance(codec, codecs.HiddenCodec) else None
    return replace(read, taught=taught, targets=_row_bytes(stage, teacher.spec, codec, forced))


def _row_bytes(stage: Any, teacher: ModelSpec, codec: codecs.Codec, forced: tuple[int, ...]) -> int:
    """Of what is recorded of a row, as it is stored and, but for counts of few bytes, as a batch has it."""
    arrays = codecs.layout(codec, stage.batch.length, teacher.width, teacher.vocab, forced)
    return sum(math.prod(array.shape) * array.itemsize for array in arrays.values())


def _rows(stage: Any, model: Held, head: Head, microbatches: int = 1, chunk: int = 0) -> Read:
    batch = stage.batch
    patches = stage.data.patches if model.spec.vision is not None else 0
    chunk = chunk or getattr(getattr(stage, "loss", None), "chunk", DEFAULT_CHUNK)
    return Read(model, batch.sequences, batch.length, stage.compute, microbatches, patches, head, chunk)


def _evaluations(stage: Any) -> int:
    """How often a loop evaluates."""
    return _times(stage.evaluate.every, stage.steps, stage.evaluate.early)


@cache
def _times(every: int, steps: int, early: bool) -> int:
    """Steps, of all from 0 on, at which a loop evaluates."""
    schedule = Schedule(every, steps, evaluate_early=early)
    return sum(schedule.evaluates_at(step, steps) for step in range(steps + 1))


def _update(stage: Any, policy: Held, rows: int) -> Read:
    """Of the longest answers that a step can draw."""
    length = bucket(max(stage.longest_row, stage.compute.shortest_row))
    patches = bucket(stage.data.patches) if stage.data.patches and policy.spec.vision is not None else 0
    chunk = getattr(stage.loss, "chunk", DEFAULT_CHUNK)
    return Read(
        policy, rows, length, stage.compute, stage.microbatches, patches, "logprobs", chunk, learns=True, streamed=False
    )


def _draw(stage: Any, model: Held, prompts: int, each: int, completion: int) -> Draw:
    prompt = bucket(max(min(stage.max_prompt_length, model.spec.context - 1), stage.compute.shortest_row))
    patches = bucket(stage.data.patches) if stage.data.patches and model.spec.vision is not None else 0
    longest = min(completion, model.spec.context - prompt)
    return Draw(model, prompts, each, prompt, longest, stage.compute, patches, stage.answers_at_once or 0)


def _judge(stage: Any, graph: Graph) -> tuple[tuple[Held, ...], tuple[Phase, ...]]:
    """The judge of a stage that has one, and a step's questions to it, each asked in both orders."""
    if stage.judge is None:
        return (), ()
    judge = Held("judge", graph.specs[stage.judge], stage.compute.dtype, stage.sharding)
    questions = 2 * stage.prompts * stage.answers_per_prompt // 2
    rounds = getattr(stage, "steps", None) or stage.rounds
    reads = _judging(judge, stage.compute, questions, stage.longest_question)
    return (judge,), (Phase("judge", (reads,), rounds),)


def _judging(model: Held, compute: Compute, questions: int, longest: int) -> Read:
    length = question_length(longest, model.spec, compute)
    return Read(model, questions, length, compute, head="choice", streamed=False, at_once=ROWS)


def _examined(stage: Any, model: Held, given: GenerateConfig | None) -> tuple[Phase, ...]:
    """Held-out prompts answered at every evaluation: greedily, then by draws. Where no setting bounds them, they are as
    long as the rows of the stage, whose sources they are of."""
    if given is None:
        return ()
    every = getattr(given, "every", None) or stage.evaluate.every
    early = getattr(given, "early", None) if hasattr(given, "early") else stage.evaluate.early
    times = _times(every, stage.steps, bool(early))
    longest = stage.batch.length if isinstance(stage, Looped) else stage.max_prompt_length
    prompt = bucket(max(min(longest, model.spec.context - 1), stage.compute.shortest_row))
    patches = bucket(stage.data.patches) if stage.data.patches and model.spec.vision is not None else 0
    draws: list[Work] = []
    for each in (1, given.completions):
        if each:
            longest, at_once = given.max_completion_length, given.answers_at_once or 0
            draws.append(Draw(model, given.prompts, each, prompt, longest, stage.compute, patches, at_once))
    return (Phase("examine", tuple(draws), times, beside=True),)
