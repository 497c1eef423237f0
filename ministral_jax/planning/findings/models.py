"""Whether the models of stages fit each other: contexts and positions."""

from __future__ import annotations

from collections.abc import Iterator

from ministral_jax.errors import UserError
from ministral_jax.planning.findings.finding import Context, Finding, StageCheck, error, warning
from ministral_jax.stages.base import Graph
from ministral_jax.stages.looped import Looped
from ministral_jax.stages.online import AnsweringStage


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


CHECKS: tuple[StageCheck, ...] = (
    sizes_fit,
    beyond_the_teacher,
    question_fits,
    answers_fit,
    positions_are_used,
)
