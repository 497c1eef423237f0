"""Whether stages fit the devices of a machine: meshes in its network, and what the axes of a mesh cut."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ministral_jax.alignment.judge import ROWS
from ministral_jax.data.batch import bucket
from ministral_jax.distributed.axes import dividing_axes
from ministral_jax.distributed.placement import AXES, MeshConfig
from ministral_jax.distributed.torus import SIDES, Side, torus_sides
from ministral_jax.errors import UserError
from ministral_jax.models.attention import KERNELS
from ministral_jax.planning.findings.finding import Context, Finding, StageCheck, error, warning
from ministral_jax.planning.machine import Machine
from ministral_jax.planning.timing.links import wraps
from ministral_jax.planning.timing.roofline import stage_time
from ministral_jax.planning.work import Draw, Held, Read, StageWork
from ministral_jax.sampling.engine import by_rows
from ministral_jax.stages.base import Job
from ministral_jax.stages.online import AnsweringStage
from ministral_jax.stages.rows import RowStage

# ---- the mesh and the network ----------------------------------------------------------------------------------------


def mesh_fits(context: Context, name: str) -> Iterator[Finding]:
    """The sizes multiply to the devices, and `slice` is the number of slices."""
    stage, machine = context.stage(name), context.machine
    try:
        machine.meshes(stage, f"stages.{name}")
    except UserError as fault:
        apart = getattr(stage, "teacher_mesh", None)  # which may be what does not fit
        mend = "" if apart is not None else _mend_mesh(machine, stage.mesh)
        yield error(name, f"{fault}{mend}")
        return
    if machine.chip.platform == "tpu" and stage.mesh.slice > machine.slices == 1:
        yield warning(
            name,
            f"stages.{name}.mesh.slice = {stage.mesh.slice} on one slice makes copies of the parameters, as `data` "
            f"does; plan with --slices {stage.mesh.slice}, or set it to 1",
        )


def _mend_mesh(machine: Machine, mesh: MeshConfig) -> str:
    """The slices that the mesh is for, else the nearest sizes that multiply to the devices."""
    if machine.chip.platform == "tpu" and machine.slices == 1 < mesh.slice:
        each = replace(machine, slices=mesh.slice)
        with suppress(UserError):
            each.mesh(mesh)
            return f"; with --slices {mesh.slice} it fits"
    slices = machine.slices if machine.chip.platform == "tpu" else 1
    left, sizes = machine.devices // slices, {"slice": slices}
    for axis in ("tensor", "context", "fsdp"):  # what lies nearest is kept as it is, if it can be
        given = getattr(mesh, axis)
        sizes[axis] = left if given == -1 else math.gcd(given, left)
        left //= sizes[axis]
    return f"; {_full(MeshConfig(**sizes, data=left))} fits"


def _full(config: MeshConfig) -> str:
    """All axes, since a recipe or its stage may have set those that are 1."""
    return "{" + ", ".join(f"{axis}: {getattr(config, axis)}" for axis in AXES) + "}"


def whole_sides(context: Context, name: str) -> Iterator[Finding]:
    """Mesh axes that talk much have whole sides of the torus, and rings along them."""
    if (job := _working(context, name)) is None or (sides := _sides(context, job)) is None:
        return
    shared = [
        f"{axis} {job.mesh.shape[axis]} has {side.extent} of the {side.whole} places of side {side.name}"
        for axis in ("fsdp", "tensor", "context")
        for side in sides[axis]
        if side.is_split
    ]
    if shared:
        better = _unsplit(context, job)
        mend = f"{_full(better)} has whole ones" if better else "no sizes with whole ones are better"
        lengths = [side.whole for axis in ("fsdp", "tensor", "context") for side in sides[axis] if side.is_split]
        rings = any(wraps(context.machine, length) for length in lengths)
        yield warning(
            name,
            f"stages.{name}.mesh on {context.machine.name} splits a side of the torus: {', '.join(shared)}"
            f"{', without a ring there, at half the speed' if rings else ''}; {mend}",
        )


def within_two_sides(context: Context, name: str) -> Iterator[Finding]:
    """Parameters are not gathered over all three sides of the torus: docs/scaling.md, where XLA makes all-reduces of
    such gathers."""
    if (job := _working(context, name)) is None or (sides := _sides(context, job)) is None:
        return
    axes = [axis for axis in job.stage.sharding.embed if job.mesh.shape[axis] > 1]
    spanned = {side.name for axis in axes for side in sides[axis]} & set(SIDES[:3])
    if len(spanned) == 3:
        group = " * ".join(f"{axis} {job.mesh.shape[axis]}" for axis in axes)
        yield warning(
            name,
            f"stages.{name}.mesh on {context.machine.name} gathers parameters over {group} devices along all three "
            "sides of the torus, for which XLA writes all-reduces of twice the bytes; leave a side to `data` or "
            "`tensor`" + (f", or `context` out of stages.{name}.sharding.embed" if "context" in axes else ""),
        )


def tensor_in_a_node(context: Context, name: str) -> Iterator[Finding]:
    """Tensor parallelism stays within NVLink."""
    if context.machine.chip.platform != "gpu" or (job := _working(context, name)) is None:
        return
    line = job.mesh.devices[tuple(slice(None) if axis == "tensor" else 0 for axis in AXES)]
    nodes = len({device.process_index for device in line.flat})
    if nodes > 1:
        yield warning(
            name,
            f"stages.{name}.mesh.tensor = {len(line)} reaches over {nodes} nodes, so activations cross the network "
            f"twice a layer; tensor * context should divide the {context.machine.chip.per_host} GPUs of a node",
        )


def _working(context: Context, name: str) -> Job[Any] | None:
    """The job of a stage that reads rows or draws answers."""
    work = context.work.get(name)
    busy = work is not None and any(isinstance(one, Read | Draw) for phase in work.phases for one in phase.work)
    return context.jobs.get(name) if busy else None


def _sides(context: Context, job: Job[Any]) -> dict[str, tuple[Side, ...]] | None:
    """None where there is no torus, or a ring is wound through sides of a small one."""
    if context.machine.chip.platform != "tpu":
        return None
    sides = torus_sides(job.mesh)
    plain = all(math.prod(side.extent for side in sides[axis]) == job.mesh.shape[axis] for axis in AXES[1:])
    return sides if plain else None


def _unsplit(context: Context, job: Job[Any]) -> MeshConfig | None:
    """The mesh most like a stage's in which each side of the torus belongs to one axis."""
    stage, old = job.stage, job.mesh.shape
    axes = [axis for axis in AXES[1:] if axis in ("data", "fsdp") or old[axis] > 1]
    found: dict[MeshConfig, float] = {}
    sides = [side for side in _torus(context.machine) if side > 1]
    for owners in itertools.product(axes, repeat=len(sides)):
        sizes = dict.fromkeys(AXES, 1) | {"slice": context.machine.slices}
        for side, axis in zip(sides, owners, strict=True):
            sizes[axis] *= side
        distance = sum(abs(math.log2(sizes[axis] / old[axis])) for axis in ("fsdp", "tensor", "context"))
        found[MeshConfig(**sizes)] = distance
    for config in sorted(found, key=lambda config: found[config]):
        other = context.job(stage.model_copy(update={"mesh": config}), job.name)
        if other is not None and rows_fault(other) is None and not _is_worse(context, job, other):
            return config
    return None


def _is_worse(context: Context, job: Job[Any], other: Job[Any]) -> bool:
    """Whether another mesh for a stage brings findings that it does not have now."""
    checks = (within_two_sides, answers_divide, padded_questions, idle_samplers, parameters_divide)

    def told(one: Job[Any]) -> int:
        recipe = context.recipe
        there = recipe.model_copy(update={"stages": {**recipe.stages, job.name: one.stage}})
        moved = replace(context, recipe=there)
        return sum(1 for check in checks for _ in check(moved, job.name))

    return told(other) > told(job)


def _torus(machine: Machine) -> tuple[int, ...]:
    return (*machine.shape, machine.chip.cores)


# ---- kernels ---------------------------------------------------------------------------------------------------------


def kernels_serve(context: Context, name: str) -> Iterator[Finding]:
    """A kernel that a stage names is one of its devices, for its rows."""
    job, work = context.jobs.get(name), context.work.get(name)
    if job is not None and work is not None and (fault := kernel_fault(job, work, context.machine)) is not None:
        yield error(name, fault)


def kernel_fault(job: Job[Any], work: StageWork, machine: Machine) -> str | None:
    """Why no time can be predicted, where a kernel is named that does not serve."""
    if getattr(getattr(job.stage, "compute", None), "attention", None) not in KERNELS:
        return None
    try:
        stage_time(work, job.mesh, machine, apart=job.teacher_mesh)
    except UserError as fault:
        return f"{job.where}.{fault}"
    return None


def fp8_products(context: Context, name: str) -> Iterator[Finding]:
    """What is said of them is that of wider ones."""
    stage = context.stage(name)
    for key, owner in (("compute.matmul", getattr(stage, "compute", None)), ("quantize", stage)):
        if getattr(owner, key.split(".")[-1], None) == "fp8":
            yield warning(name, f"stages.{name}.{key} = fp8 is predicted as bfloat16; measure a few steps")


# ---- batches ---------------------------------------------------------------------------------------------------------


def rows_divide(context: Context, name: str) -> Iterator[Finding]:
    """What the stage itself refuses when it begins."""
    job = context.jobs.get(name)
    if job is not None and (fault := rows_fault(job)) is not None:
        yield error(name, f"{fault}{_mend_rows(job)}")


def rows_fault(job: Job[Any]) -> str | None:
    try:
        job.stage.check_mesh(job)
    except UserError as fault:
        return str(fault)
    return None


def _mend_rows(job: Job[Any]) -> str:
    """Settings that are near and do divide, where there are some."""
    stage, rows = job.stage, isinstance(job.stage, RowStage)
    micro = stage.batch.microbatches if rows else getattr(stage, "microbatches", 1)
    for fewer in range(micro - 1, 0, -1):
        update = {"batch": stage.batch.model_copy(update={"microbatches": fewer})} if rows else {"microbatches": fewer}
        if rows_fault(replace(job, stage=stage.model_copy(update=update))) is None:
            return f"; set {job.where}.{'batch.' * rows}microbatches to {fewer}"
    need = job.placement.row_shards * micro
    if rows and need < 2 * stage.batch.sequences and stage.batch.sequences % need:
        return f"; set {job.where}.batch.sequences to {need * max(1, round(stage.batch.sequences / need))}"
    return "; a mesh with more `tensor` or `context` splits into fewer"


def answers_divide(context: Context, name: str) -> Iterator[Finding]:
    """Rows of one document come in a few lengths, all of which `context` must cut in two times as many chunks."""
    stage, job = context.stage(name), context.jobs.get(name)
    if job is None or not isinstance(stage, AnsweringStage) or not stage.sharding.length:
        return
    parts, shortest = 2 * job.mesh.shape["context"], stage.compute.shortest_row
    lengths = [bucket(shortest), bucket(bucket(shortest) + 1)]
    if parts > 2 and any(length % parts for length in lengths):
        yield warning(
            name,
            f"stages.{name}.compute.shortest_row = {shortest} lets rows of {lengths[0]} and {lengths[1]} tokens be "
            f"made, which mesh.context = {parts // 2} does not cut into {parts} equal parts: a step without a "
            f"longer row fails; set it to {2 * parts}",
        )


def padded_evaluation(context: Context, name: str) -> Iterator[Finding]:
    """Held-out rows fill whole batches."""
    stage = context.stage(name)
    if not isinstance(stage, RowStage) or (given := getattr(stage, "evaluate", None)) is None:
        return
    rows, batch = given.rows, stage.batch.sequences
    computed = -(-rows // batch) * batch
    if computed >= 2 * rows:
        yield warning(
            name,
            f"stages.{name}.evaluate.rows = {rows} is padded to {computed}, batches of {batch} rows; {computed} rows "
            "cost the same",
        )


def padded_questions(context: Context, name: str) -> Iterator[Finding]:
    """A judge reads batches of a fixed number of questions."""
    stage, job = context.stage(name), context.jobs.get(name)
    asked = stage.prompts if getattr(stage, "judge", None) else getattr(stage, "pairs", 0)
    if job is None or not isinstance(asked, int) or not asked:
        return
    questions, batch = 2 * asked, job.placement.even(ROWS)
    setting = "prompts" if getattr(stage, "judge", None) else "pairs"
    if -(-questions // batch) * batch >= 2 * questions:
        yield warning(
            name,
            f"stages.{name}.{setting} = {asked} asks the judge {questions} questions, padded to a batch of {batch}; "
            "a mesh with more `tensor` or `context` has smaller ones",
        )


def idle_samplers(context: Context, name: str) -> Iterator[Finding]:
    """Answers are drawn row by row, at least one on each device that shares rows."""
    job, work = context.jobs.get(name), context.work.get(name)
    if job is None or work is None:
        return
    shards = by_rows(job.placement).row_shards
    for phase in work.phases:
        draws = [one for one in phase.work if isinstance(one, Draw)]
        rows = max((draw.at_once or draw.prompts * draw.each for draw in draws), default=shards)
        if 2 * rows <= shards:
            setting = _drawn(context.stage(name), phase.name)
            yield warning(
                name,
                f"stages.{name}: {rows} answers are drawn at once ({setting}) by {shards} groups of devices, of which "
                "most compute padding; take more, or a mesh with more `tensor`",
            )


def _drawn(stage: Any, phase: str) -> str:
    """The settings that say how many answers a phase draws."""
    if phase == "examine":
        return "generate.prompts" if getattr(stage, "generate", None) else "evaluate.prompts"
    return "prompts, num_generations" if hasattr(stage, "num_generations") else "prompts"


# ---- what the axes cut -----------------------------------------------------------------------------------------------


def parameters_divide(context: Context, name: str) -> Iterator[Finding]:
    """Every axis cuts what its rule names; where it does not divide a dimension, that is whole on its devices."""
    job, work = context.jobs.get(name), context.work.get(name)
    if job is None or work is None:
        return
    told: set[str] = set()
    for held in work.held:
        for logical, size in _dimensions(held).items():
            axes = [axis for axis in getattr(held.rules, logical) if job.mesh.shape[axis] > 1]
            whole = [axis for axis in axes if axis not in dividing_axes(size, axes, job.mesh.shape)]
            if whole and logical not in told:
                told.add(logical)
                group = " and ".join(f"mesh.{axis} = {job.mesh.shape[axis]}" for axis in whole)
                yield warning(
                    name,
                    f"stages.{name}: {group} does not divide the {logical} of its {held.role} ({size}), which is "
                    "whole on these devices: more memory and arithmetic; take one that does",
                )


def _dimensions(held: Held) -> dict[str, int]:
    spec = held.spec
    found = {"heads": spec.heads, "kv_heads": spec.kv_heads, "mlp": spec.mlp_width, "vocab": spec.vocab}
    found["embed"] = spec.width
    if spec.vision is not None:
        found |= {"vision_embed": spec.vision.width, "vision_heads": spec.vision.heads}
        found |= {"vision_mlp": spec.vision.mlp_width}
    return found


def enough_tokens(context: Context, name: str) -> Iterator[Finding]:
    """A matrix product of fewer tokens than FLOPs per byte waits for its weights (roofline model)."""
    job, work, chip = context.jobs.get(name), context.work.get(name), context.machine.chip
    if job is None or work is None or (phase := work.main) is None:
        return
    need = chip.flops / chip.hbm_bandwidth
    for read in (one for one in phase.work if isinstance(one, Read)):
        parts = job.placement.row_shards * (job.mesh.shape["context"] if job.stage.sharding.length else 1)
        tokens = read.rows * read.length / parts / read.microbatches
        if tokens < need:
            micro = f" and microbatches = {read.microbatches}" if read.microbatches > 1 else ""
            setting = "batch.sequences" if isinstance(job.stage, RowStage) else "prompts"
            yield warning(
                name,
                f"stages.{name}.{setting}: {read.rows} rows of {read.length} tokens{micro} leave {tokens:,.0f} tokens "
                f"to a device, fewer than the {need:,.0f} that keep {chip.name} computing; take more rows, fewer "
                "microbatches, or more `tensor`",
            )
            return


CHECKS: tuple[StageCheck, ...] = (
    mesh_fits,
    whole_sides,
    within_two_sides,
    tensor_in_a_node,
    kernels_serve,
    fp8_products,
    rows_divide,
    answers_divide,
    padded_evaluation,
    padded_questions,
    idle_samplers,
    parameters_divide,
    enough_tokens,
)
