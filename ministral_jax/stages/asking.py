"""Tasks that a model is asked while it is trained: settings, what is wrong with them, and the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator

from ministral_jax.console import say
from ministral_jax.data.tokenizer import Tokenizer
from ministral_jax.distributed.collectives import is_first
from ministral_jax.distributed.processes import poll_slow
from ministral_jax.errors import UserError
from ministral_jax.evaluation.examinee import DEFAULT_BATCH, Examinee
from ministral_jax.evaluation.tasks import TASKS, QuestionsConfig, answered, questions_of
from ministral_jax.explain import near
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM
from ministral_jax.settings import Frozen
from ministral_jax.stages.base import Job, Params
from ministral_jax.stages.figures import Figure, share_of
from ministral_jax.training.scores import Tasks
from ministral_jax.training.state import State

TASK_FIGURES = tuple(Figure(f"task_{name}", name, "share", "higher", f"count_{name}") for name in TASKS)
"""Scores at tasks that are made here."""


class LoopTasks(QuestionsConfig):
    """Tasks that are asked while the model is trained."""

    names: tuple[str, ...] = Field(min_length=1)
    """Of those that are made here (docs/evaluate.md)."""
    limit: int = Field(default=100, ge=1)
    """Questions of each task, always the same."""
    batch: int = Field(default=DEFAULT_BATCH, ge=1)
    """Requests that are worked on together; scores do not depend on it."""

    @field_validator("names")
    @classmethod
    def _made_here(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in TASKS:
                raise ValueError(
                    f"{name!r} is none of {', '.join(TASKS)}{near(name, [*TASKS])}; a stage `do: evaluate` asks tasks "
                    "of lm-evaluation-harness"
                )
        return tuple(dict.fromkeys(names))


class InLoop(Frozen):
    """What a model is asked while it is trained, and when that ends its training."""

    tasks: LoopTasks | None = None
    """Asked at multiples of `every` and at the last step."""
    patience: int | None = Field(default=2, ge=1)
    """The stage stops when a task's score has fallen for so many evaluations in a row although the loss fell; see
    docs/evaluate.md. null: it goes on."""


def check_shown(names: Sequence[str], spec: ModelSpec, where: str) -> None:
    """Raise `UserError` where a task of the setting `where` shows images to a model without vision."""
    for name in names:
        if spec.vision is None and TASKS[name].shows:
            raise UserError(f"{where}.names: {name} shows images and the model has no vision")


def check_fit(job: Job[Any], names: Sequence[str], asking: QuestionsConfig, tokenizer: Tokenizer, where: str) -> None:
    """Raise `UserError` where a task of the setting `where` has no question that the model can read."""
    for name in names:
        try:
            questions_of(name, job.spec, tokenizer, job.stage.data.held_out, asking)
        except UserError as error:
            raise UserError(f"{where}.names: {error}") from None


def check_loop_tasks(job: Job[Any], tokenizer: Callable[[], Tokenizer]) -> None:
    """`check_fit` of what the stage's loop asks."""
    if (tasks := job.stage.evaluate.tasks) is not None:
        check_fit(job, tasks.names, tasks, tokenizer(), f"{job.where}.evaluate.tasks")


def loop_tasks(job: Job[Any], tokenizer: Tokenizer, params: Callable[[State], Params]) -> Tasks | None:
    """What the stage's loop asks the model whose parameters are `params` of a state."""
    stage = job.stage
    if (tasks := stage.evaluate.tasks) is None:
        return None
    # not rounded as an FP8 export is: that takes one scale for a batch, on which scores would then depend
    model, told = VLM(job.spec, stage.compute.evaluated), set[str]()

    def ask(state: State) -> dict[str, list[bool]]:
        held_out = stage.data.held_out
        examinee = Examinee(model, params(state), job.placement, tokenizer, held_out, tasks.batch, poll_slow)
        found = {name: answered(name, examinee, tasks) for name in tasks.names}
        for name, (right, score) in found.items():
            if (cut := score.get("truncated")) and name not in told and is_first():
                told.add(name)
                say(
                    f"{job.name:>18}  {cut} of {len(right)} questions of {name} lose their beginning: answers may have "
                    f"{job.where}.evaluate.tasks.max_tokens = {tasks.max_tokens} of the context's {job.spec.context}"
                )
        return {name: right for name, (right, _) in found.items()}

    return Tasks(ask, stage.evaluate.patience, f"{job.where}.evaluate")


def told_tasks(figures: Mapping[str, float]) -> list[str]:
    """A line of the scores among a stage's figures, if there are any."""
    shares = {figure.label: share_of(figures, figure) for figure in TASK_FIGURES}
    said = [f"{name} {share}" for name, share in shares.items() if share is not None]
    return [f"tasks: {', '.join(said)}"] if said else []
