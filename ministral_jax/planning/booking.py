"""The machine that a scheduler is asked for by the `launch:` block of a recipe."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from ministral_jax.distributed.chips import CHIPS, Chip
from ministral_jax.planning.machine import Machine
from ministral_jax.recipe.launch import GkeLaunch, Launch, SlurmLaunch, TpuVmLaunch

CORES = {"v4": 2, "v5p": 2}
"""Of a chip, of the generations whose accelerator types count cores."""
CUBE = 64
"""Chips of the cubes that three-dimensional tori are made of."""


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
        return Booking(found, _nodes(CHIPS[job.gpu] if job.gpu else None, job.nodes, job.gpus_per_node))
    return None


def _nodes(chip: Chip | None, nodes: int, each: int) -> Machine:
    """GPUs of a kind that is not known are none whose memory would not do."""
    plenty = replace(CHIPS["h100"], name="gpu", hbm=sys.maxsize, host_memory=sys.maxsize)
    return Machine(replace(chip or plenty, per_host=each), (nodes, each))


def _torus(sides: int, chips: int) -> tuple[int, ...]:
    """The most even one, as Cloud TPU makes it unless it is told otherwise: 4x4x8 of 128 chips, 2x2x1 of 4, 8x12x16 of
    1,536. Sides of 4 or more chips are whole cubes in three dimensions."""
    if sides == 3 and chips < CUBE:
        small = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
        return small.get(chips, (1, 1, chips))
    each = 4 if sides == 3 else 1
    shape, left = [each] * sides, chips // each**sides
    factors: list[int] = []
    while left > 1:
        factors.append(next(n for n in range(2, left + 1) if left % n == 0))
        left //= factors[-1]
    for factor in reversed(factors):
        shape[shape.index(min(shape))] *= factor
    return tuple(sorted(shape))
