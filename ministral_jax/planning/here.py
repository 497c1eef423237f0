"""The machine that this process runs on, for `plan --on here`: listed chips, or a CPU whose two peaks are measured."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp

from ministral_jax.distributed.chips import Chip, chip_of
from ministral_jax.planning.machine import Machine

ROUNDS = 5
WIDTH, STREAM = 512, 2**22


def here() -> Machine:
    """Of all devices of all processes; one slice. On a CPU it measures, about a second."""
    devices = jax.devices()
    chip = chip_of(devices[0].device_kind)
    if chip is None:
        return Machine(measured_chip(), (1, len(devices)))
    if chip.platform == "gpu":
        nodes = len({device.process_index for device in devices})
        return Machine(replace(chip, per_host=len(devices) // nodes), (nodes, len(devices) // nodes))
    coords = [device.coords for device in devices]
    sides = tuple(max(at[side] for at in coords) + 1 for side in range(chip.sides))
    return Machine(chip, sides, max(1, len(devices) // (math.prod(sides) * chip.cores)))


def measured_chip() -> Chip:
    """A device of this host's processor: what its devices reach together, shared among them."""
    flops, bandwidth = measured_peaks()
    count = jax.local_device_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    each, link = bandwidth / count, bandwidth / 2 / count
    return Chip("here", ("cpu",), flops / count, memory // count, each, 0, link, link, count, memory)


def measured_peaks() -> tuple[float, float]:
    """FLOP/s of a float32 product of 512 x 512 matrices and bytes/s of a sum of two arrays of 16 MiB, the best of
    five each."""
    square, long, other = jnp.ones((WIDTH, WIDTH)), jnp.ones(STREAM), jnp.zeros(STREAM)
    product, total = jax.jit(lambda x: x @ x), jax.jit(lambda x, y: x + 2 * y)
    return 2 * WIDTH**3 / _best(lambda: product(square)), 3 * 4 * STREAM / _best(lambda: total(long, other))


def _best(run: Callable[[], jax.Array]) -> float:
    """Seconds of the fastest of some runs after a first."""
    spent: list[float] = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        run().block_until_ready()
        spent.append(time.perf_counter() - start)
    return min(spent[1:])
