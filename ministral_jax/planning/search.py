"""Meshes, microbatches and remat for a stage that fit a machine, fastest first. What is learnt stays as it is: rows,
lengths and steps are the recipe's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args, get_type_hints

from ministral_jax.distributed.placement import MeshConfig
from ministral_jax.errors import UserError
from ministral_jax.models.block import Compute
from ministral_jax.planning.findings import layout
from ministral_jax.planning.findings.finding import Context, Finding
from ministral_jax.planning.findings.memory import SPARE
from ministral_jax.planning.machine import Machine
from ministral_jax.planning.memory.stage import StageMemory, stage_memory
from ministral_jax.planning.plan import StagePlan
from ministral_jax.planning.timing.assumptions import Assumptions
from ministral_jax.planning.timing.roofline import stage_time
from ministral_jax.planning.work import StageWork, stage_work
from ministral_jax.stages import Job

CLEARLY = 0.1
"""Share of a stage's time below which two predictions are taken for the same."""
REMAT = tuple(name for name in get_args(get_type_hints(Compute)["remat"]) if name != "offload")
"""Of what goes to the host and back the time is not known."""
MICROBATCHES = tuple(2**n for n in range(10))


@dataclass(frozen=True)
class Choice:
    """A way to run a stage, and what it is predicted to need."""

    plan: StagePlan
    settings: Mapping[str, Any]
    """What differs from the recipe, by dotted key below the stage."""
    warnings: tuple[str, ...] = ()
    """What the layout of this one brings that the recipe's does not have."""

    @property
    def overrides(self) -> list[str]:
        """Words for the command line."""
        return [f"stages.{self.plan.name}.{key}={value}" for key, value in self.settings.items()]

    def to_json(self) -> dict[str, Any]:
        """Seconds, and bytes of one device."""
        memory, time = self.plan.memory, self.plan.time
        found: dict[str, Any] = {"overrides": self.overrides, "mesh": self.plan.mesh, "seconds": self.plan.seconds}
        found["step_seconds"] = None if time is None else time.step_seconds
        return found | {"peak": None if memory is None else memory.peak.total, "warnings": self.warnings}


def search(context: Context, name: str, assume: Assumptions) -> list[Choice]:
    """For every mesh and every remat the fewest microbatches with which the stage fits with `SPARE` to spare, by the
    predicted time of the whole stage; of two as fast, the one that needs less memory. More microbatches gather weights
    more often and are never faster. Of those less than `CLEARLY` slower than the fastest, the ones whose layout brings
    no warning come first.

    Raises:
        UserError: nothing fits.
    """
    stage, spec, machine = context.stage(name), context.specs[name], context.machine
    found: list[Choice] = []
    for mesh, remat in product(_meshes(stage.mesh, machine), REMAT):
        for settings, changed in _variants(stage, mesh, remat):
            if (fitting := _fitting(context, name, changed)) is not None:
                work, job, memory = fitting
                time = stage_time(work, job.mesh, machine, assume, job.teacher_mesh)
                plan = StagePlan(name, changed, spec, dict(job.mesh.shape), memory, time)
                found.append(Choice(plan, settings))
                break
    if not found:
        raise UserError(
            f"stages.{name}: no mesh, microbatches and remat fit {machine.name} with {SPARE:.0%} of memory to spare; "
            "take more chips, or shorter or fewer rows"
        )
    found.sort(key=_rank)
    near = [choice for choice in found if choice.plan.seconds <= (1 + CLEARLY) * found[0].plan.seconds]
    known = {finding.text for finding in _warnings(context, name, stage)}
    warned = [replace(choice, warnings=_brings(context, choice, known)) for choice in near]
    return [*sorted(warned, key=lambda choice: bool(choice.warnings)), *found[len(near) :]]


def _brings(context: Context, choice: Choice, known: Set[str]) -> tuple[str, ...]:
    found = _warnings(context, choice.plan.name, choice.plan.stage)
    return tuple(finding.text for finding in found if finding.text not in known)


def _warnings(context: Context, name: str, stage: Any) -> list[Finding]:
    """What is found of the layout of `stage` in the place of `name`."""
    recipe = context.recipe.model_copy(update={"stages": {**context.recipe.stages, name: stage}})
    changed = replace(context, recipe=recipe, names=(name,))
    return [finding for check in layout.CHECKS for finding in check(changed, name)]


def _fitting(context: Context, name: str, stage: Any) -> tuple[StageWork, Job[Any], StageMemory] | None:
    """What `stage`, in the place of `name`, does, where, and what it needs, if it fits."""
    machine = context.machine
    try:
        if (job := context.job(stage, name)) is None:
            return None
        stage.check_mesh(job)
    except UserError:
        return None
    work = stage_work(stage, job.spec, context.graph)
    if layout.kernel_fault(job, work, machine) is not None:
        return None
    memory = stage_memory(work, job.mesh, machine.hosts, job.teacher_mesh)
    fits = memory.peak.total <= (1 - SPARE) * machine.chip.hbm and memory.host <= machine.chip.host_memory
    return (work, job, memory) if fits else None


def _rank(choice: Choice) -> tuple[float, int]:
    memory = choice.plan.memory
    return round(choice.plan.seconds, 3), memory.peak.total if memory else 0


def _variants(stage: Any, mesh: MeshConfig, remat: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """With every number of microbatches, ascending: what is changed, and the stage with it."""
    online = not hasattr(stage, "batch")
    key, now = ("microbatches", stage.microbatches) if online else ("batch.microbatches", stage.batch.microbatches)
    rows = stage.prompts if online else stage.batch.sequences
    changes: dict[str, Any] = {f"mesh.{a}": n for a, n in vars(mesh).items() if n != getattr(stage.mesh, a)}
    if remat != stage.compute.remat:
        changes["compute.remat"] = remat
    for count in (count for count in MICROBATCHES if rows % count == 0):
        update: dict[str, Any] = {"mesh": mesh, "compute": replace(stage.compute, remat=remat)}
        if online:
            update["microbatches"] = count
        else:
            update["batch"] = stage.batch.model_copy(update={"microbatches": count})
        yield changes | ({key: count} if count != now else {}), stage.model_copy(update=update)


def _meshes(given: MeshConfig, machine: Machine) -> Iterator[MeshConfig]:
    """Every way to cut the devices of a slice into `data`, `fsdp`, `tensor` and `context`; all GPUs are one slice
    unless the recipe says otherwise."""
    slices = machine.slices if machine.chip.platform == "tpu" else given.slice
    each = machine.devices // slices
    for tensor, context, fsdp in product(_divisors(each), repeat=3):
        if each % (tensor * context * fsdp) == 0:
            data = each // (tensor * context * fsdp)
            yield MeshConfig(slice=slices, data=data, fsdp=fsdp, tensor=tensor, context=context)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
