"""The machine a plan is for: chips in a torus or in nodes, one or several slices, and the mesh of a stage on it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import jax
from jax.sharding import Mesh

from ministral_jax.distributed.chips import CHIPS, Chip
from ministral_jax.distributed.placement import MeshConfig, make_mesh
from ministral_jax.errors import UserError
from ministral_jax.explain import suggest

EXAMPLES = "v5p:4x4x8, v6e:16x16, h100:32 (nodes of 8) or here"


@dataclass(frozen=True)
class Device:
    """What JAX's mesh construction asks of a device, of one that is not there."""

    id: int
    platform: str
    device_kind: str
    process_index: int
    slice_index: int
    coords: tuple[int, ...]
    core_on_chip: int = 0


@dataclass(frozen=True)
class Machine:
    """`slices` times chips in a torus of `shape`, or (nodes, GPUs of each)."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As `plan --on` takes it, and as libtpu names a topology."""
        if self.chip.platform == "cpu":
            return self.chip.name
        if self.chip.platform == "gpu":
            return f"{self.chip.name}:{math.prod(self.shape)}"
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.chip.cores

    @property
    def hosts(self) -> int:
        return max(1, self.devices // self.chip.per_host)

    @cached_property
    def described(self) -> list[Any]:
        """Its devices, in the order in which JAX lists them: x runs fastest, cores of a chip are neighbours."""
        if self.chip.platform == "cpu":
            return jax.devices()
        found: list[Device] = []
        gpu, each = self.chip.platform == "gpu", math.prod(self.shape) * self.chip.cores
        for number in range(self.devices):
            of_slice, within = divmod(number, each)
            place, core = divmod(within, self.chip.cores)
            if gpu:  # XLA takes every node for a slice
                host = number // self.chip.per_host
                found.append(Device(number, "gpu", self.chip.kinds[0], host, host, (place, 0, 0)))
                continue
            coords = []
            for side in self.shape:
                place, at = divmod(place, side)
                coords.append(at)
            coords += [0] * (3 - len(coords))
            host = self._host(number, of_slice, coords)
            found.append(Device(number, "tpu", self.chip.kinds[0], host, of_slice, tuple(coords), core))
        return found

    def _host(self, number: int, of_slice: int, place: Sequence[int]) -> int:
        """Of a TPU's device: a host has 2 x 2 chips in x and y where these sides allow it, and the next one is in x,
        then in y, as libtpu numbers its processes."""
        (x, y, z), (wide, high, *deep) = place, self.shape
        if wide % 2 or high % 2:
            return number // self.chip.per_host
        return x // 2 + wide // 2 * (y // 2 + high // 2 * (z + of_slice * math.prod(deep)))

    def mesh(self, config: MeshConfig, where: str = "mesh") -> Mesh:
        """The mesh of a stage; `where` is its setting. Raises `UserError`: the sizes do not fit the devices."""
        return _mesh(self, config, where)

    def meshes(self, stage: Any, where: str) -> tuple[Mesh, Mesh | None]:
        """The mesh of a stage, and its teacher's own one. Raises `UserError`, as `Stage.meshes` does."""
        if getattr(stage, "teacher_mesh", None) is None:
            return self.mesh(stage.mesh, f"{where}.mesh"), None
        return stage.meshes(self.described, where)


def _make(machine: Machine, config: MeshConfig, where: str) -> Mesh:
    return make_mesh(config, list(machine.described), where)


_mesh: Any = lru_cache(maxsize=256)(_make)  # Any: a type checker takes frozen models for unhashable


FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
"""Shapes of two sides that can be booked, as Google Cloud's pages say."""
SMALL = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4))
"""Shapes of three sides that are less than a cube of 4 chips a side, whichever side is which."""


def _check_torus(text: str, sides: tuple[int, ...]) -> None:
    if len(sides) == 2:
        if sides not in FLAT:
            known = ", ".join("x".join(map(str, shape)) for shape in FLAT)
            raise UserError(f"--on {text}: no such machine can be booked; its shape must be one of {known}")
    elif tuple(sorted(sides)) not in SMALL and any(side % 4 for side in sides):
        raise UserError(
            f"--on {text}: no such machine can be booked; its shape must be 2x2x1, 2x2x2, 2x2x4, 2x4x4 or have sides "
            "that are multiples of 4"
        )


def parse_machine(text: str, slices: int = 1) -> Machine:
    """A machine from `CHIP:SIDExSIDE..` or, of GPUs, `CHIP:COUNT`.

    Raises:
        UserError: an unknown chip, a torus that cannot be booked, or GPUs that do not fill nodes.
    """
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise UserError(f"--on {text}: no chip {name!r}{suggest(name, CHIPS)}; e.g. {EXAMPLES}")
    chip = CHIPS[name]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(f"--on {text}: after {name}: comes the shape of the machine; e.g. {EXAMPLES}")
    sides = tuple(map(int, shape.split("x")))
    if slices < 1:
        raise UserError(f"--slices {slices} must be at least 1")
    if chip.platform == "tpu":
        if len(sides) != chip.sides:
            raise UserError(f"--on {text}: a {name} has a torus of {chip.sides} sides, {shape} has {len(sides)}")
        _check_torus(text, sides)
        return Machine(chip, sides, slices)
    count = math.prod(sides)
    if slices > 1:
        raise UserError(f"--slices {slices}: GPUs have no slices; give their number, e.g. {name}:{count * slices}")
    if count > chip.per_host and count % chip.per_host:
        raise UserError(f"--on {text}: {count} GPUs do not fill nodes of {chip.per_host}")
    return Machine(chip, (max(1, count // chip.per_host), min(count, chip.per_host)))
