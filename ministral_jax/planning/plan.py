"""A plan: of every stage what it holds, how long it takes and what it costs on a machine, and what must change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ministral_jax.errors import UserError
from ministral_jax.explain import suggest
from ministral_jax.models.spec import PRESETS, ModelSpec
from ministral_jax.planning.findings.find import find
from ministral_jax.planning.findings.finding import Context, Finding
from ministral_jax.planning.findings.layout import kernel_fault
from ministral_jax.planning.findings.site import room
from ministral_jax.planning.machine import Machine
from ministral_jax.planning.memory.stage import StageMemory, stage_memory
from ministral_jax.planning.timing.assumptions import Assumptions
from ministral_jax.planning.timing.roofline import StageTime, stage_time
from ministral_jax.recipe.load import resolve_specs
from ministral_jax.recipe.types import Recipe
from ministral_jax.stages import Stage

HOUR = 3600
PUBLISHED = {
    "mistral-small-3.1": "mistral-small-3.1-24b",
    "mistral-small-3.2": "mistral-small-3.1-24b",
    "magistral-small": "mistral-small-3.1-24b",
    "mistral-medium-3.5": "mistral-medium-3.5-128b",
    "ministral-3-14b": "ministral-3-14b",
    "ministral-3-8b": "ministral-3-8b",
    "ministral-3-3b": "ministral-3-3b",
}
"""How names of published checkpoints begin, and their sizes."""


@dataclass(frozen=True)
class StagePlan:
    """One stage. mesh: sizes of its axes; None, as memory and time, where its mesh cannot be made."""

    name: str
    stage: Stage
    spec: ModelSpec
    mesh: Mapping[str, int] | None
    memory: StageMemory | None
    time: StageTime | None

    @property
    def seconds(self) -> float:
        return 0.0 if self.time is None else self.time.seconds


@dataclass(frozen=True)
class Plan:
    """Stages in the order in which they run, and what was found.

    price: of a chip for an hour, in any currency. presumed: stages whose checkpoints are not here, and the preset whose
    sizes were taken. assume: what times were predicted with.
    """

    context: Context
    stages: tuple[StagePlan, ...]
    findings: tuple[Finding, ...]
    presumed: Mapping[str, str]
    price: float | None = None
    assume: Assumptions = field(default_factory=Assumptions)

    @property
    def machine(self) -> Machine:
        return self.context.machine

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def disk(self) -> int:
        """Bytes on disk at the most: what all stages leave, and the states of the one that runs."""
        return room(self.context)

    @property
    def errors(self) -> int:
        return sum(finding.level == "error" for finding in self.findings)

    @property
    def is_possible(self) -> bool:
        return not self.errors

    @property
    def title(self) -> str:
        slices = f" x {self.machine.slices} slices" if self.machine.slices > 1 else ""
        return f"{self.context.recipe.name} on {self.machine.name}{slices}"

    def chip_hours(self, seconds: float) -> float:
        return seconds / HOUR * self.machine.chips

    def cost(self, seconds: float) -> float | None:
        return None if self.price is None else self.price * self.chip_hours(seconds)

    def mfu(self, stage: StagePlan) -> float | None:
        """Of the stage's steps; None where it has none."""
        found = stage.time.mfu(self.machine.chip.flops * self.machine.devices) if stage.time else 0.0
        return found or None

    def speed(self, stage: StagePlan) -> float | None:
        """Tokens that a chip trains on in a second; None where there are no steps."""
        time = stage.time
        return time.tokens / time.step_seconds / self.machine.chips if time and time.step_seconds else None

    def free(self, stage: StagePlan) -> float | None:
        """Share of a device's memory that is left at the fullest moment."""
        return None if stage.memory is None else 1 - stage.memory.peak.total / self.machine.chip.hbm


def make_plan(
    recipe: Recipe,
    names: Sequence[str],
    machine: Machine,
    sizes: Mapping[str, str] | None = None,
    *,
    assume: Assumptions = Assumptions(),  # noqa: B008
    price: float | None = None,
    here: Path | None = None,
) -> Plan:
    """Plan the stages `names` (in an order in which they can run) of a recipe.

    Args:
        sizes: presets of imports whose checkpoints are not here, by stage; others are known by their published names.
        here: the run's directory, where the plan is of the machine it is made on.

    Raises:
        UserError: an import whose sizes nobody knows, or sizes that do not fit together.
    """
    presumed = presumed_sizes(recipe, names, sizes or {})
    made = {name: PRESETS[preset] for name, preset in presumed.items()}
    specs = resolve_specs(recipe, names, made)
    context = Context(recipe, specs, tuple(names), machine, here=here)
    stages = tuple(_stage_plan(context, name, assume) for name in names)
    memory = {stage.name: stage.memory for stage in stages if stage.memory is not None}
    times = {stage.name: stage.time for stage in stages if stage.time is not None}
    context = replace(context, memory=memory, times=times)
    return Plan(context, stages, tuple(find(context)), presumed, price, assume)


def _stage_plan(context: Context, name: str, assume: Assumptions) -> StagePlan:
    stage, work, machine = context.stage(name), context.work[name], context.machine
    if (job := context.jobs.get(name)) is None:
        return StagePlan(name, stage, context.specs[name], None, None, None)
    if kernel_fault(job, work, machine) is not None:
        return StagePlan(name, stage, context.specs[name], dict(job.mesh.shape), None, None)
    memory = stage_memory(work, job.mesh, machine.hosts, job.teacher_mesh)
    time = stage_time(work, job.mesh, machine, assume, job.teacher_mesh)
    return StagePlan(name, stage, context.specs[name], dict(job.mesh.shape), memory, time)


def presumed_sizes(recipe: Recipe, names: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Presets of the stages whose checkpoints are not here: as given, or as the checkpoint's name says."""
    for name, preset in given.items():
        if name not in recipe.stages:
            raise UserError(f"--sizes {name}={preset}: no stage {name!r}{suggest(name, recipe.stages)}")
        if preset not in PRESETS:
            raise UserError(f"--sizes {name}={preset}: no preset {preset!r}{suggest(preset, PRESETS)}")
    found: dict[str, str] = {}
    for name in (name for name in names if recipe.stages[name].is_gone):
        preset = given.get(name) or published(recipe.stages[name])
        if preset is None:
            path = str(getattr(recipe.stages[name], "path", ""))
            raise UserError(
                f"stages.{name}.path = {path!r} is not here, and its name does not tell its sizes; say them with "
                f"--sizes {name}=PRESET ({', '.join(PRESETS)})"
            )
        found[name] = preset
    return found


def published(stage: Stage) -> str | None:
    """The preset that the name of a checkpoint tells."""
    name = Path(str(getattr(stage, "path", ""))).name.lower()
    return next((preset for begins, preset in PUBLISHED.items() if name.startswith(begins)), None)


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything a plan says, JSON-ready: seconds, bytes of one device, shares."""
    machine = plan.machine
    return {
        "recipe": plan.context.recipe.name,
        "machine": {"name": machine.name, "slices": machine.slices, "chips": machine.chips, **asdict(machine.chip)},
        "possible": plan.is_possible,
        "presumed_sizes": dict(plan.presumed),
        "seconds": plan.seconds,
        "chip_hours": plan.chip_hours(plan.seconds),
        "cost": plan.cost(plan.seconds),
        "disk": plan.disk,
        "findings": [asdict(finding) for finding in plan.findings],
        "stages": {stage.name: _stage_json(plan, stage) for stage in plan.stages},
    }


def _stage_json(plan: Plan, stage: StagePlan) -> dict[str, Any]:
    memory, time = stage.memory, stage.time
    found: dict[str, Any] = {"do": stage.stage.do, "parameters": stage.spec.parameters, "mesh": stage.mesh}
    if memory is not None:
        phases = {phase.phase: {item.name: item.bytes for item in phase.items} for phase in memory.phases}
        found["memory"] = {"phases": phases, "peak": memory.peak.total, "free": plan.free(stage)}
        found["memory"] |= {"host": memory.host, "written": memory.written}
    if time is not None:
        found |= {"seconds": time.seconds, "step_seconds": time.step_seconds, "mfu": plan.mfu(stage)}
        found |= {"tokens_per_second_per_chip": plan.speed(stage), "chip_hours": plan.chip_hours(time.seconds)}
        found |= {"cost": plan.cost(time.seconds), "phases": {phase.phase: asdict(phase) for phase in time.phases}}
    return found
