"""Whether the models of stages fit each other and memory: contexts, positions, and what lies on a device or a host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ministral_jax.errors import UserError
from ministral_jax.planning.findings.finding import Context, Finding, StageCheck, error, warning
from ministral_jax.planning.work import Draw
from ministral_jax.stages.base import Graph
from ministral_jax.stages.looped import Looped
from ministral_jax.stages.online import AnsweringStage

SPARE = 0.08
"""Of a device's memory, below which a plan is not to be trusted: fragments, and buffers of collectives."""
_SHOWN = 3
GB = 1e9

# ---- contexts --------------------------------------------------------------------------------------------------------


def sizes_fit(context: Context, name: str) -> Iterator[Finding]:
    """What the stage itself refuses when sizes are resolved: lengths, contexts, vocabularies."""
    stage, needed = context.stage(name), {name, *context.stage(name).inputs().values()}
    if not needed <= context.specs.keys():
        return
    try:
        stage.check_sizes(context.specs[name], Graph(context.recipe.stages, context.specs), f"stages.{name}")
    except UserError as fault:
        yield error(name, str(fault))


def beyond_the_teacher(context: Context, name: str) -> Iterator[Finding]:
    """How much of a row a teacher may say nothing of."""
    stage = context.stage(name)
    teacher, choice = getattr(stage, "teacher_stage", None), getattr(stage, "beyond_teacher", "refuse")
    if teacher is None or teacher not in context.specs or choice == "refuse":
        return
    length, known = stage.batch.length, context.specs[teacher].context
    if length > known:
        what = "is learnt from the text alone" if choice == "labels" else "is not learnt from"
        yield warning(
            name,
            f"stages.{name}.beyond_teacher = {choice}: of a document of {length} tokens (batch.length) the part beyond "
            f"the context of {known} of teacher {teacher!r}, {1 - known / length:.0%}, {what}; a teacher with a longer "
            "context, or shorter rows, avoid it",
        )


def question_fits(context: Context, name: str) -> Iterator[Finding]:
    """A judge reads the conversation and both answers."""
    stage = context.stage(name)
    judge = getattr(stage, "judge", None)
    if judge is None or judge not in context.specs or not isinstance(stage, AnsweringStage):
        return
    answer = max(stage.completion_lengths.values())
    asked, known = stage.max_prompt_length + 2 * answer, context.specs[judge].context
    if asked > known:
        yield warning(
            name,
            f"stages.{name}.max_completion_length = {answer} makes questions of up to {asked} tokens (the prompt and "
            f"two answers), of which judge {judge!r} reads {known}: the middle is cut out; shorten them",
        )


def answers_fit(context: Context, name: str) -> Iterator[Finding]:
    """Answers may be as long as they are said to be."""
    stage, spec = context.stage(name), context.specs.get(name)
    if spec is None:
        return
    evaluate = getattr(stage, "generate", None) or getattr(stage, "evaluate", None)
    examined = getattr(evaluate, "max_completion_length", None)
    given = {}
    if isinstance(stage, AnsweringStage):
        given["max_completion_length"] = max(stage.completion_lengths.values())
    if examined is not None:
        given["generate" if getattr(stage, "generate", None) else "evaluate"] = examined
    prompt = getattr(stage, "max_prompt_length", 0)
    for setting, answer in given.items():
        if prompt + answer > spec.context:
            dotted = setting if setting == "max_completion_length" else f"{setting}.max_completion_length"
            yield warning(
                name,
                f"stages.{name}.{dotted} = {answer} after a prompt of {prompt} tokens exceeds the model's context of "
                f"{spec.context}, where answers are cut short; lower it, or max_prompt_length",
            )


def positions_are_used(context: Context, name: str) -> Iterator[Finding]:
    """YaRN changes every position, so a stage that brings it should read rows that need it."""
    stage, spec = context.stage(name), context.specs.get(name)
    source = context.specs.get(stage.source or "")
    if (
        spec is None
        or not isinstance(stage, Looped)
        or spec.rope.yarn_factor == 1
        or spec.rope.original_context is None
    ):
        return
    brings = source is None or source.rope.yarn_factor != spec.rope.yarn_factor
    if brings and stage.batch.length <= spec.rope.original_context:
        yield warning(
            name,
            f"stages.{name}.batch.length = {stage.batch.length} is within model.rope.original_context = "
            f"{spec.rope.original_context}, so yarn_factor = {spec.rope.yarn_factor:g} changes all positions for none "
            "that needs it; take longer rows or yarn_factor 1",
        )


# ---- memory ----------------------------------------------------------------------------------------------------------


def fits_memory(context: Context, name: str) -> Iterator[Finding]:
    """What lies on a device at the most."""
    needed = context.memory.get(name)
    if needed is None or not needed.phases:
        return
    peak, has = needed.peak, context.machine.chip.hbm
    total = peak.total
    largest = sorted(peak.items, key=lambda item: -item.bytes)[:_SHOWN]
    items = ", ".join(f"{item.name} {item.bytes / GB:.1f}" for item in largest)
    chip = f"{has / GB:.1f} GB of a {context.machine.chip.name}"
    told = f"{total / GB:.1f} GB of the {chip} in phase {peak.phase!r} ({items})"
    mend = _mend_memory(context, name, peak.phase)
    if total > has:
        yield error(name, f"stages.{name} needs {told}; {mend}")
    elif total > (1 - SPARE) * has:
        yield warning(name, f"stages.{name} needs {told}, less than {SPARE:.0%} is spare; {mend}")


def _mend_memory(context: Context, name: str, phase: str) -> str:
    """Settings that lower the peak of a phase."""
    stage, where = context.stage(name), f"stages.{name}"
    work = context.work[name].phase(phase) if name in context.work else None
    if work is not None and any(isinstance(one, Draw) for one in work.work):
        part = ("generate." if getattr(stage, "generate", None) else "evaluate.") if phase == "examine" else ""
        return f"lower {where}.{part}max_completion_length or {where}.{part}prompts, or cut the model by mesh.tensor"
    more: list[str] = []
    batch = getattr(stage, "batch", None)
    if phase == "step":
        micro = "batch.microbatches" if hasattr(batch, "microbatches") else "microbatches"
        more += [f"raise {where}.{micro}"]
        more += [f"set {where}.compute.remat=full"] if stage.compute.remat != "full" else []
    elif batch is not None:
        more += [f"lower {where}.batch.sequences"]
    return ", ".join([*more, f"or cut more by {where}.mesh (fsdp, tensor)"])


def fits_host(context: Context, name: str) -> Iterator[Finding]:
    needed, has = context.memory.get(name), context.machine.chip.host_memory
    if needed is not None and needed.host > has:
        yield error(
            name,
            f"stages.{name} needs {needed.host / GB:.0f} GB of the {has / GB:.0f} GB of a host's memory; "
            f"{_mend_host(context.stage(name), f'stages.{name}')}",
        )


def _mend_host(stage: Any, where: str) -> str:
    batch = getattr(stage, "batch", None)
    return f"lower {where}.{'batch.sequences' if batch else 'prompts' if hasattr(stage, 'prompts') else 'mesh'}"


CHECKS: tuple[StageCheck, ...] = (
    sizes_fit,
    beyond_the_teacher,
    question_fits,
    answers_fit,
    positions_are_used,
    fits_memory,
    fits_host,
)
