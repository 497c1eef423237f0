"""What would stop or slow a recipe on a machine, found by arithmetic before the machine is booked: no device, no data,
nothing is compiled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ministral_jax.distributed.chips import CHIPS
from ministral_jax.errors import UserError
from ministral_jax.models.spec import ModelSpec
from ministral_jax.planning.findings import clock, layout, memory, models, site
from ministral_jax.planning.findings.finding import Context, Finding, error, merged
from ministral_jax.planning.machine import Machine
from ministral_jax.planning.memory.stage import stage_memory
from ministral_jax.planning.timing.roofline import stage_time
from ministral_jax.recipe.load import order
from ministral_jax.recipe.types import Recipe
from ministral_jax.stages.base import Graph

OF_ROWS = (*layout.CHECKS, *models.CHECKS)
"""What can be said of a stage whose rows its devices do not share."""
OF_STAGES = (*OF_ROWS, *memory.CHECKS, *clock.CHECKS)


def find(context: Context) -> list[Finding]:
    """Everything that the checks find, errors first, then in the order of the stages; what is the same in several
    stages once."""
    found = [finding for check in (*site.CHECKS, *clock.OF_RECIPE) for finding in check(context)]
    return sorted(merged([*found, *_of_stages(context)]), key=lambda finding: not is_error(finding))


def impossible(
    recipe: Recipe, names: Sequence[str], machine: Machine, made: Mapping[str, ModelSpec] | None = None
) -> list[Finding]:
    """The errors of stages, for which no file is needed: where sizes of an import are neither here nor `made`, they and
    what depends on them are not known. Memory and times are predicted of a chip that is."""
    needs = order(recipe, names) if names else []
    specs, faults = _known_specs(recipe, needs, made or {})
    context = Context(recipe, specs, tuple(names), machine)
    fitting = {
        name: work
        for name, work in context.work.items()
        if (job := context.jobs.get(name)) and layout.kernel_fault(job, work, machine) is None
    }
    if machine.chip.name in CHIPS:
        meshes = {name: (job.mesh, job.teacher_mesh) for name in fitting if (job := context.jobs[name])}
        needed = {
            name: stage_memory(work, meshes[name][0], machine.hosts, meshes[name][1]) for name, work in fitting.items()
        }
        times = {
            name: stage_time(work, meshes[name][0], machine, apart=meshes[name][1]) for name, work in fitting.items()
        }
        context = replace(context, memory=needed, times=times)
    wanted = (fault for fault in faults if fault.stage in names)
    found = merged([*wanted, *_of_stages(context), *clock.restarts_suffice(context)])
    return [finding for finding in found if is_error(finding)]


def _of_stages(context: Context) -> Iterator[Finding]:
    for name in context.names:
        refused = name in context.jobs and layout.rows_fault(context.jobs[name]) is not None
        for check in OF_ROWS if refused else OF_STAGES:
            yield from check(context, name)


def is_error(finding: Finding) -> bool:
    return finding.level == "error"


def _known_specs(
    recipe: Recipe, names: Sequence[str], made: Mapping[str, ModelSpec]
) -> tuple[dict[str, ModelSpec], list[Finding]]:
    """Sizes, as far as they are known, and why a stage has none though those of all that it needs are."""
    specs: dict[str, ModelSpec] = {}
    faults: list[Finding] = []
    for name in names:
        stage = recipe.stages[name]
        if name in made and stage.is_gone:
            specs[name] = made[name]
        if name in specs or stage.is_gone or not set(stage.inputs().values()) <= specs.keys():
            continue
        try:
            specs[name] = stage.resolve(Graph(recipe.stages, specs), f"stages.{name}")
        except UserError as fault:
            faults.append(error(name, str(fault)))
    return specs, faults
