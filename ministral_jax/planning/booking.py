"""The machine that a scheduler is asked for by the `launch:` block of a recipe."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from ministral_jax.distributed.chips import CHIPS, Chip
from ministral_jax.planning.machine import Machine
from ministral_jax.recipe.launch import GkeLaunch, Launch, SlurmLaunch, TpuVmLaunch

CORES = {"v4": 2, "v5p": 2}
"""Of a chip, of the generations whose accelerator types count cores."""


@dataclass(frozen=True)
class Booking:
    """setting: what asks for it, with its value."""

    setting: str
    machine: Machine


def booking(job: Launch) -> Booking | None:
    """What a job asks for; None without accelerators."""
    if isinstance(job, TpuVmLaunch):
        kind, _, count = job.accelerator_type.partition("-")
        chip = CHIPS["v5e" if kind == "v5litepod" else kind]
        shape = _torus(chip.sides, int(count) // CORES.get(kind, 1))
        return Booking(f"launch.tpu_vm.accelerator_type = {job.accelerator_type}", Machine(chip, shape))
    if isinstance(job, GkeLaunch) and (tpu := job.tpu) is not None:
        shape = tuple(map(int, tpu.topology.split("x")))
        slices = f" with slices = {tpu.slices}" if tpu.slices > 1 else ""
        return Booking(f"launch.gke.tpu.topology = {tpu.topology}{slices}", Machine(CHIPS[tpu.type], shape, tpu.slices))
    if isinstance(job, GkeLaunch) and (gpu := job.gpu) is not None:
        found = f"launch.gke.gpu.nodes = {gpu.nodes} with per_node = {gpu.per_node}"
        known = (chip for name, chip in CHIPS.items() if name in gpu.type.lower())
        return Booking(found, _nodes(next(known, None), gpu.nodes, gpu.per_node))
    if isinstance(job, SlurmLaunch) and job.gpus_per_node:
        found = f"launch.slurm.nodes = {job.nodes} with gpus_per_node = {job.gpus_per_node}"
        return Booking(found, _nodes(None, job.nodes, job.gpus_per_node))
    return None


def _nodes(chip: Chip | None, nodes: int, each: int) -> Machine:
    """GPUs of a kind that is not known are none whose memory would not do."""
    plenty = replace(CHIPS["h100"], name="gpu", hbm=sys.maxsize, host_memory=sys.maxsize)
    return Machine(replace(chip or plenty, per_host=each), (nodes, each))


def _torus(sides: int, chips: int) -> tuple[int, ...]:
    """The most even one, as Cloud TPU makes it unless it is told otherwise: 4x4x8 of 128 chips."""
    shape = [1] * sides
    while chips > 1:
        factor = next(n for n in range(2, chips + 1) if chips % n == 0)
        shape[shape.index(min(shape))] *= factor
        chips //= factor
    return tuple(sorted(shape))
