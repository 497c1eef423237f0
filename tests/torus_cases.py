"""Devices of machines that are not here, as JAX describes them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5p", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
TOPOLOGIES = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x12", "4x4x28", "4x8x8", "8x8x8", "8x8x12"),
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "tpu7x": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
}


@dataclass(frozen=True)
class Device:
    id: int
    platform: str
    device_kind: str
    process_index: int
    slice_index: int
    coords: tuple[int, ...] | None = None
    core_on_chip: int = 0


def tpu(kind: str, topology: str, slices: int = 1) -> list[Device]:
    """In the order of `jax.devices()`: x runs fastest, cores of a chip follow each other; four chips on a host."""
    sides = [*map(int, topology.split("x")), 1, 1][:3]
    cores = 2 if kind == "tpu7x" else 1
    places = itertools.product(range(slices), *map(range, reversed(sides)), range(cores))
    return [
        Device(number, "tpu", KINDS[kind], number // (4 * cores), slice_, (x, y, z), core)
        for number, (slice_, z, y, x, core) in enumerate(places)
    ]


def gpus(nodes: int, each: int = 8) -> list[Device]:
    """One process for each GPU; XLA gives every node a `slice_index` of its own."""
    return [Device(n, "gpu", "NVIDIA H100 80GB HBM3", n, n // each) for n in range(nodes * each)]


def devices_of(kind: str, topology: str) -> int:
    return math.prod(map(int, topology.split("x"))) * (2 if kind == "tpu7x" else 1)
