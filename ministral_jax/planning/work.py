"""What a stage computes, as a few records that the memory model and the roofline both read.

A stage holds models and goes through phases: some work is done so many times, and while it is done its temporaries lie
beside the models. Numbers of rows are global ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any, Literal

from ministral_jax.alignment.examine import GenerateConfig
from ministral_jax.alignment.judge import ROWS
from ministral_jax.data.batch import bucket
from ministral_jax.distributed.placement import Rules
from ministral_jax.losses.targets import DEFAULT_CHUNK
from ministral_jax.models.block import Compute
from ministral_jax.models.spec import ModelSpec
from ministral_jax.stages.base import Graph, Stage
from ministral_jax.stages.distill import Distill
from ministral_jax.stages.dpo import DPO
from ministral_jax.stages.evaluate import Evaluate
from ministral_jax.stages.export import Export
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
from ministral_jax.training.train import Schedule

Head = Literal["kl", "ce", "logprobs", "choice", "none"]
"""What is made of a read's final states: KL and cross-entropy against a teacher's, cross-entropy, log-probabilities of
the labels, logits at one position, nothing."""


@dataclass(frozen=True)
class Held:
    """A model that lies in memory while a stage runs.

    role: what the stage calls it, e.g. `student`.
    dtype: of its parameters.
    learns: with a gradient and AdamW's two moments, in float32; but for `frozen`, top-level keys of the parameters.
    """

    role: str
    spec: ModelSpec
    dtype: str
    rules: Rules
    learns: bool = False
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Read:
    """A model reads packed rows: forward, and where it `learns` (in this work) backward and an update too.

    patches: of a row's images, 0 without any. chunk: tokens of a device whose logits are there at once.
    taps: whether every layer's activations are observed, as calibration does.
    """

    model: Held
    rows: int
    length: int
    compute: Compute
    microbatches: int = 1
    patches: int = 0
    head: Head = "none"
    chunk: int = DEFAULT_CHUNK
    learns: bool = False
    taps: bool = False


@dataclass(frozen=True)
class Draw:
    """A model answers `prompts` prompts of `prompt` tokens `each` so often, with up to `completion` tokens."""

    model: Held
    prompts: int
    each: int
    prompt: int
    completion: int
    compute: Compute
    patches: int = 0


@dataclass(frozen=True)
class Cut:
    """A model is cut to the sizes of another one; both are there."""

    source: Held
    target: Held


@dataclass(frozen=True)
class Move:
    """A model is read from or written to disk."""

    model: Held
    whole: bool = False
    """On one host, as an export is."""
    dtype: str | None = None
    """On disk; None is as it is kept."""


Work = Read | Draw | Cut | Move


@dataclass(frozen=True)
class Phase:
    """Work that is done one after the other, `times` in the stage."""

    name: str
    work: tuple[Work, ...]
    times: float = 1


@dataclass(frozen=True)
class StageWork:
    """All that a stage does: the models it holds throughout, its phases, and how many states it keeps to go on from."""

    held: tuple[Held, ...]
    phases: tuple[Phase, ...]
    keep: int = 0

    def phase(self, name: str) -> Phase | None:
        return next((phase for phase in self.phases if phase.name == name), None)

    @property
    def main(self) -> Phase | None:
        """The phase in which most of the stage's time is meant to be spent: its steps, if it has some."""
        return self.phase("step") or (self.phases[0] if self.phases else None)


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
    return _loop(stage, spec, None, "ce", frozen=())


@_work.register
def _(stage: Distill, spec: ModelSpec, graph: Graph) -> StageWork:
    return _loop(stage, spec, _teacher(stage, graph), "kl")


@_work.register
def _(stage: SFT, spec: ModelSpec, graph: Graph) -> StageWork:
    teacher = None if stage.teacher is None else _teacher(stage, graph)
    found = _loop(stage, spec, teacher, "ce" if stage.teacher is None else "kl")
    return _with(found, _examined(stage, found.held[0], stage.generate))


@_work.register
def _(stage: Reward, spec: ModelSpec, graph: Graph) -> StageWork:
    found = _loop(stage, spec, None, "ce")
    judged = Phase(
        "judge", (_judging(found.held[0], stage.compute, 2 * stage.pairs, stage.batch.length),), _evaluations(stage)
    )
    return _with(found, (judged,))


@_work.register
def _(stage: DPO, spec: ModelSpec, graph: Graph) -> StageWork:
    policy = _learner("policy", spec, stage)
    read = _rows(stage, policy, "logprobs")
    step = Read(**{**vars(read), "learns": True, "microbatches": stage.batch.microbatches})
    rounds = _evaluations(stage) * -(-stage.evaluate.rows // stage.batch.sequences)
    phases = (
        Phase("reference", (read,), stage.steps),
        Phase("step", (step,), stage.steps),
        Phase("evaluate", (read,), rounds),
    )
    return _with(StageWork((policy,), phases), _examined(stage, policy, stage.generate))


def _loop(
    stage: Looped, spec: ModelSpec, teacher: Held | None, head: Head, frozen: tuple[str, ...] = FROZEN
) -> StageWork:
    student = _learner("student", spec, stage, frozen)
    step = Read(**{**vars(_rows(stage, student, head)), "learns": True, "microbatches": stage.batch.microbatches})
    taught = () if teacher is None else (_rows(stage, teacher, "none", stage.batch.microbatches),)
    seen = () if teacher is None else (_rows(stage, teacher, "none"),)
    rounds = _evaluations(stage) * -(-stage.evaluate.rows // stage.batch.sequences)
    phases = (
        Phase("step", (*taught, step), stage.steps),
        Phase("evaluate", (*seen, _rows(stage, student, "kl" if seen else "ce", chunk=DEFAULT_CHUNK)), rounds),
    )
    return StageWork((student, *(() if teacher is None else (teacher,))), phases)


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
    theirs = Read(**{**vars(step), "model": reference, "learns": False, "microbatches": 1})
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
    source = Held("source", graph.specs[stage.source], "float32", stage.sharding)
    pruned = Held("pruned", spec, "float32", stage.sharding)
    cuts = sum(getattr(source.spec, size) != getattr(spec, size) for size in ("layers", "width", "mlp_width"))
    passes = max(1, cuts) if stage.options.recollect else 1
    calibrate = Read(**{**vars(_rows(stage, source, "none")), "taps": True})
    seen = (_rows(stage, source, "none"), _rows(stage, pruned, "kl"))
    rounds = (cuts + 1) * -(-stage.evaluate.rows // stage.batch.sequences)
    phases = (
        Phase("calibrate", (calibrate,), passes * stage.calibration),
        Phase("surgery", (Cut(source, pruned),), 1),
        Phase("evaluate", seen, rounds),
    )
    return StageWork((source,), phases)


@_work.register
def _(stage: Record, spec: ModelSpec, graph: Graph) -> StageWork:
    teacher = Held("teacher", graph.specs[stage.source], stage.compute.dtype, stage.sharding)
    return StageWork((teacher,), (Phase("record", (_rows(stage, teacher, "logprobs"),), _batches_to_record(stage)),))


@_work.register
def _(stage: Evaluate, spec: ModelSpec, graph: Graph) -> StageWork:
    model = Held("model", spec, "float32", stage.sharding)
    rounds = -(-stage.evaluate.rows // stage.batch.sequences)
    return StageWork((model,), (Phase("evaluate", (_rows(stage, model, "ce"),), rounds),))


@_work.register
def _(stage: Export, spec: ModelSpec, graph: Graph) -> StageWork:
    model = Held("model", spec, "float32", stage.sharding)
    return StageWork((), (Phase("export", (Move(model, whole=True, dtype=stage.dtype),)),))


@_work.register
def _(stage: Import, spec: ModelSpec, graph: Graph) -> StageWork:
    model = Held("model", spec, stage.dtype, stage.sharding)
    return StageWork((model,), (Phase("import", (Move(model),)),))


def _batches_to_record(stage: Record) -> float:
    """0 where all rows of the data are recorded, whose number is not known here."""
    return -(-(stage.rows or 0) // stage.batch.sequences)


def _with(found: StageWork, more: tuple[Phase, ...]) -> StageWork:
    return StageWork(found.held, (*found.phases, *more))


def _learner(role: str, spec: ModelSpec, stage: Any, frozen: tuple[str, ...] = FROZEN) -> Held:
    return Held(role, spec, "float32", stage.sharding, True, frozen if spec.vision is not None else ())


def _teacher(stage: Any, graph: Graph) -> Held | None:
    """A model beside the student; None where its distribution was recorded."""
    name = stage.teacher_stage
    if isinstance(graph.stages[name], Record):
        return None
    rules = stage.teacher_sharding or stage.sharding
    return Held("teacher", graph.specs[name], stage.compute.dtype, rules)


def _rows(stage: Any, model: Held, head: Head, microbatches: int = 1, chunk: int = 0) -> Read:
    batch = stage.batch
    patches = stage.data.patches if model.spec.vision is not None else 0
    chunk = chunk or getattr(getattr(stage, "loss", None), "chunk", DEFAULT_CHUNK)
    return Read(model, batch.sequences, batch.length, stage.compute, microbatches, patches, head, chunk)


def _evaluations(stage: Any) -> int:
    """How often a loop evaluates."""
    schedule = Schedule(stage.evaluate.every, stage.steps, evaluate_early=stage.evaluate.early)
    return sum(schedule.evaluates_at(step, stage.steps) for step in range(stage.steps + 1))


def _update(stage: Any, policy: Held, rows: int) -> Read:
    """Of the longest answers that a step can draw."""
    length = bucket(max(stage.longest_row, stage.compute.shortest_row))
    patches = bucket(stage.data.patches) if stage.data.patches and policy.spec.vision is not None else 0
    chunk = getattr(stage.loss, "chunk", DEFAULT_CHUNK)
    return Read(policy, rows, length, stage.compute, stage.microbatches, patches, "logprobs", chunk, learns=True)


def _draw(stage: Any, model: Held, prompts: int, each: int, completion: int) -> Draw:
    prompt = bucket(max(min(stage.max_prompt_length, model.spec.context - 1), stage.compute.shortest_row))
    patches = bucket(stage.data.patches) if stage.data.patches and model.spec.vision is not None else 0
    return Draw(model, prompts, each, prompt, min(completion, model.spec.context - prompt), stage.compute, patches)


def _judge(stage: Any, graph: Graph) -> tuple[tuple[Held, ...], tuple[Phase, ...]]:
    """The judge of a stage that has one, and a step's questions to it, each asked in both orders: two of the longest
    answers to the longest prompt."""
    if stage.judge is None:
        return (), ()
    judge = Held("judge", graph.specs[stage.judge], stage.compute.dtype, stage.sharding)
    questions = 2 * stage.prompts * stage.answers_per_prompt // 2
    rounds = getattr(stage, "steps", None) or stage.rounds
    longest = stage.max_prompt_length + 2 * max(stage.completion_lengths.values())
    return (judge,), (Phase("judge", (_judging(judge, stage.compute, questions, longest),), rounds),)


def _judging(model: Held, compute: Compute, questions: int, longest: int) -> Read:
    """Questions, of which a batch of `ROWS` is read at once; the words they are put in are not counted."""
    length = bucket(max(min(longest, model.spec.context), compute.shortest_row))
    batches = -(-questions // ROWS)
    return Read(model, ROWS * batches, length, compute, batches, head="choice")


def _examined(stage: Any, model: Held, given: GenerateConfig | None) -> tuple[Phase, ...]:
    """Held-out prompts answered at every evaluation: greedily, then by draws. Where no setting bounds them, they are as
    long as the rows of the stage, whose sources they are of."""
    if given is None:
        return ()
    every = getattr(given, "every", None) or stage.evaluate.every
    early = getattr(given, "early", None) if hasattr(given, "early") else stage.evaluate.early
    schedule = Schedule(every, stage.steps, evaluate_early=bool(early))
    times = sum(schedule.evaluates_at(step, stage.steps) for step in range(stage.steps + 1))
    longest = stage.batch.length if isinstance(stage, Looped) else stage.max_prompt_length
    prompt = bucket(max(min(longest, model.spec.context - 1), stage.compute.shortest_row))
    patches = bucket(stage.data.patches) if stage.data.patches and model.spec.vision is not None else 0
    draws: list[Work] = []
    for each in (1, given.completions):
        if each:
            draws.append(Draw(model, given.prompts, each, prompt, given.max_completion_length, stage.compute, patches))
    return (Phase("examine", tuple(draws), times),)
