"""Whether what lies on a device and on a host fits, and the settings that make it fit: each was tried."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ministral_jax.distributed.placement import AXES, MeshConfig
from ministral_jax.errors import UserError
from ministral_jax.models.block import Compute
from ministral_jax.planning.findings.finding import Context, Finding, StageCheck, error, warning
from ministral_jax.planning.findings.layout import rows_fault
from ministral_jax.planning.memory.stage import PhaseMemory, stage_memory
from ministral_jax.planning.work import Draw, stage_work
from ministral_jax.recipe.launch import FRACTION

SPARE = 0.08
"""Of a device's memory, below which a plan is not to be trusted: fragments, and buffers of collectives."""
GB = 1e9
_SHOWN = 3
_HALVINGS = 8
_SHORTEST = 64
"""Tokens, below which no length is proposed."""


def fits_memory(context: Context, name: str) -> Iterator[Finding]:
    """What lies on a device at the most: every phase that does not fit, or the fullest where it is near."""
    needed = context.memory.get(name)
    if needed is None or not needed.phases or (job := context.jobs.get(name)) is None:
        return
    has = context.machine.chip.hbm
    over = {phase.phase: phase for phase in needed.phases if phase.total > has}
    for phase in over.values():
        told = _told(phase, f"{has / GB:.1f} GB of a {context.machine.chip.name}")
        yield error(name, f"stages.{name} needs {told}; {_mend(context, name, phase, job.mesh.shape)}")
    peak = needed.peak
    if not over and peak.total > (1 - SPARE) * has:
        told = _told(peak, f"{has / GB:.1f} GB of a {context.machine.chip.name}")
        mend = _mend(context, name, peak, job.mesh.shape)
        yield warning(name, f"stages.{name} needs {told}, less than {SPARE:.0%} is spare; {mend}")


def _told(phase: PhaseMemory, chip: str) -> str:
    largest = sorted(phase.items, key=lambda item: -item.bytes)[:_SHOWN]
    items = ", ".join(f"{item.name} {item.bytes / GB:.1f}" for item in largest)
    return f"{phase.total / GB:.1f} GB of the {chip} in phase {phase.phase!r} ({items})"


# ---- what mends it ---------------------------------------------------------------------------------------------------

Changes = dict[str, Any]
"""Dotted settings below a stage, and their values."""


def _mend(context: Context, name: str, phase: PhaseMemory, mesh: Any) -> str:
    """The first settings with which the phase fits; else those that together do, or how far they go."""
    limit, stage = (1 - SPARE) * context.machine.chip.hbm, context.stage(name)
    groups = [list(group) for group in _settings(context, name, phase, mesh)]
    for changes in (changes for group in groups for changes in group):
        size = _size(context, name, _changed(stage, changes), phase.phase)
        if size <= limit:
            return f"set {_words(name, changes)}, with which it needs {size / GB:.1f} GB"
    taken, least = Changes(), float(phase.total)
    for group in groups:
        sizes = [_size(context, name, _changed(stage, taken | changes), phase.phase) for changes in group]
        size = min(sizes, default=math.inf)
        if size < 0.99 * least:
            taken, least = taken | group[sizes.index(size)], size
        if least <= limit:
            return f"set {_words(name, taken)}, with which it needs {least / GB:.1f} GB"
    far = f"{_words(name, taken)} lower it to {least / GB:.1f} GB, and " if taken else ""
    return f"{far}no setting of one stage makes it fit: take more chips, or shorter rows"


def _settings(context: Context, name: str, phase: PhaseMemory, mesh: Any) -> Iterator[Iterable[Changes]]:
    """What may lower a phase, in the order in which it is to be tried: by what is largest there."""
    stage, work = context.stage(name), context.work[name].phase(phase.phase) if name in context.work else None
    largest = max(phase.items, key=lambda item: item.bytes).name
    meshes = list(_meshes(mesh))
    if work is not None and any(isinstance(one, Draw) for one in work.work):
        draws = [one for one in work.work if isinstance(one, Draw)]
        yield _together(stage, phase.phase, draws, math.prod(mesh.values()))
        yield from _of_draws(stage, phase.phase, meshes)
        return
    micro = "microbatches" if hasattr(stage, "microbatches") else "batch.microbatches"
    step = phase.phase == "step"
    microbatches = [{micro: value} for value in _doubles(stage, micro)] if step else []
    remat = [{"compute.remat": "full"}] if step and stage.compute.remat != "full" else []
    rows = [] if step else list(_halves(stage, "batch.sequences", 1))
    if largest == "loss head":
        yield _halves(stage, "loss.chunk", _SHORTEST)
    if largest in ("loss head", "activations", "cache", "batch"):
        yield from (remat, microbatches, rows, meshes)
    else:
        yield from (meshes, remat, microbatches)


def _together(stage: Any, phase: str, draws: list[Draw], devices: int) -> Iterator[Changes]:
    """Fewer answers at once, which changes none of them, down to one on a device."""
    part = ("generate." if getattr(stage, "generate", None) else "evaluate.") if phase == "examine" else ""
    count = max(draw.at_once or draw.prompts * draw.each for draw in draws) // 2
    while count >= devices:
        yield {f"{part}answers_at_once": count}
        count //= 2


def _of_draws(stage: Any, phase: str, meshes: list[Changes]) -> Iterator[Iterable[Changes]]:
    """The fewest halvings first, whichever setting takes them; then of several at once."""
    part = ("generate." if getattr(stage, "generate", None) else "evaluate.") if phase == "examine" else ""
    settings = {"max_prompt_length": _SHORTEST, f"{part}max_completion_length": _SHORTEST, f"{part}prompts": 1}
    halves = [list(_halves(stage, key, least)) for key, least in settings.items()]
    yield (changes[n] for n in range(_HALVINGS) for changes in halves if n < len(changes))
    yield meshes
    prompt, answer, count = halves
    yield (one | other for one, other in zip(prompt, answer, strict=False))
    yield (one | other | few for one, other, few in zip(prompt, answer, count, strict=False))


def _halves(stage: Any, dotted: str, least: int) -> Iterator[Changes]:
    value = _value(stage, dotted)
    largest = max(value.values()) if isinstance(value, dict) else value or 0
    for n in range(1, _HALVINGS + 1):
        if largest >> n >= least:
            halved = {step: one >> n for step, one in value.items()} if isinstance(value, dict) else value >> n
            yield {dotted: halved}


def _doubles(stage: Any, dotted: str) -> Iterator[int]:
    if (value := _value(stage, dotted)) is not None:
        yield from (value << n for n in range(1, _HALVINGS + 1))


def _meshes(shape: Any) -> Iterator[Changes]:
    """Devices of one axis given to another, few first."""
    for n in range(1, _HALVINGS + 1):
        for cuts in ("fsdp", "context", "tensor"):
            for gives in ("data", "fsdp", "context", "tensor"):
                if gives != cuts and shape[gives] % 2**n == 0:
                    sizes = {axis: int(shape[axis]) for axis in AXES}
                    sizes[cuts] <<= n
                    sizes[gives] >>= n
                    yield {"mesh": MeshConfig(**sizes)}


def _value(node: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        node = getattr(node, key, None)
    return node


def _changed(stage: Any, changes: Changes) -> Any:
    for dotted, value in changes.items():
        stage = _with(stage, dotted, value)
    return stage


def _with(node: Any, dotted: str, value: Any) -> Any:
    key, _, rest = dotted.partition(".")
    value = _with(getattr(node, key), rest, value) if rest else value
    return replace(node, **{key: value}) if isinstance(node, Compute) else node.model_copy(update={key: value})


def _size(context: Context, name: str, stage: Any, phase: str) -> float:
    """Bytes of a phase of a stage in the place of `name`; infinite where the stage or its devices refuse it."""
    if name not in context.specs or (job := context.job(stage, name)) is None or rows_fault(job) is not None:
        return math.inf
    try:
        work = stage_work(stage, job.spec, context.graph)
    except UserError:
        return math.inf
    phases = stage_memory(work, job.mesh, context.machine.hosts, job.teacher_mesh).phases
    return next((one.total for one in phases if one.phase == phase), math.inf)


def _words(name: str, changes: Changes) -> str:
    return " and ".join(_word(name, dotted, value) for dotted, value in changes.items())


def _word(name: str, dotted: str, value: Any) -> str:
    """As the command line takes it; of a mesh all axes, since a recipe or its stage may have set others."""
    if isinstance(value, MeshConfig):
        value = "{" + ", ".join(f"{axis}: {getattr(value, axis)}" for axis in AXES) + "}"
    return f"stages.{name}.{dotted}={value}"


# ---- GPUs ------------------------------------------------------------------------------------------------------------

_TAKEN = 0.75


def within_its_share(context: Context, name: str) -> Iterator[Finding]:
    """JAX takes three quarters of a GPU's memory when it begins, and no more, unless the environment says otherwise
    (JAX's page on GPU memory allocation), as that of a launched job does."""
    needed, has, launch = context.memory.get(name), context.machine.chip.hbm, context.recipe.launch
    if needed is None or context.machine.chip.platform != "gpu":
        return
    asked = launch.gke is not None and launch.gke.gpu is not None and not launch.slurm.gpus_per_node
    gke = launch.gke if asked else None
    environment = (gke or launch.slurm).variables
    setting = f"launch.{'slurm' if gke is None else 'gke'}.environment.{FRACTION}"
    share, total = _share(environment), needed.peak.total
    if share < 1 - SPARE and share * has < total <= has:  # beyond it `fits_memory` speaks
        yield error(
            name,
            f"{setting} is {environment.get(FRACTION, f'not set, so that JAX takes {_TAKEN}')} of a GPU, "
            f"{share * has / GB:.1f} GB, of which stages.{name} needs {total / GB:.1f}; set it to {1 - SPARE:g}",
            setting,
            total,
        )


def _share(environment: Mapping[str, str]) -> float:
    if environment.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower() in ("false", "0"):
        return 1
    try:
        return float(environment.get(FRACTION, _TAKEN))
    except ValueError:
        return _TAKEN


# ---- hosts -----------------------------------------------------------------------------------------------------------


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


CHECKS: tuple[StageCheck, ...] = (fits_memory, within_its_share, fits_host)
