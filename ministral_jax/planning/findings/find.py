"""What would stop or slow a recipe on a machine, found by arithmetic before the machine is booked: no device, no data,
nothing is compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ministral_jax.errors import UserError
from ministral_jax.models.spec import ModelSpec
from ministral_jax.planning.findings import clock, layout, models, site
from ministral_jax.planning.findings.finding import Context, Finding, error, merged
from ministral_jax.planning.machine import Machine
from ministral_jax.planning.memory.stage import stage_memory
from ministral_jax.recipe.types import Recipe
from ministral_jax.stages.base import Graph

OF_STAGES = (*layout.CHECKS, *models.CHECKS, *clock.CHECKS)


def find(context: Context) -> list[Finding]:
    """Everything that the checks find, errors first, then in the order of the stages; what is the same in several
    stages once."""
    found = [finding for check in site.CHECKS for finding in check(context)]
    return sorted(merged([*found, *_of_stages(context)]), key=lambda finding: not is_error(finding))


def impossible(recipe: Recipe, names: Sequence[str], machine: Machine) -> list[Finding]:
    """The errors of stages that need no predicted times, nor any file: sizes of an import that is not here are not
    known, nor what depends on them."""
    specs, faults = _known_specs(recipe, names)
    context = Context(recipe, specs, tuple(names), machine)
    fitting = {name: work for name, work in context.work.items() if name in context.jobs}
    memory = {name: stage_memory(work, context.jobs[name].mesh, machine.hosts) for name, work in fitting.items()}
    return [finding for finding in merged([*faults, *_of_stages(replace(context, memory=memory))]) if is_error(finding)]


def _of_stages(context: Context) -> Iterator[Finding]:
    for name in context.names:
        for check in OF_STAGES:
            yield from check(context, name)


def is_error(finding: Finding) -> bool:
    return finding.level == "error"


def _known_specs(recipe: Recipe, names: Sequence[str]) -> tuple[dict[str, ModelSpec], list[Finding]]:
    """Sizes, as far as they are known, and why a stage has none though those of all that it needs are."""
    specs: dict[str, ModelSpec] = {}
    faults: list[Finding] = []
    for name in names:
        stage = recipe.stages[name]
        if stage.is_gone or not set(stage.inputs().values()) <= specs.keys():
            continue
        try:
            specs[name] = stage.resolve(Graph(recipe.stages, specs), f"stages.{name}")
        except UserError as fault:
            faults.append(error(name, str(fault)))
    return specs, faults
