"""How a mesh is laid into the torus that the devices of a TPU slice form, and on which of its sides its axes lie."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

SIDES = ("x", "y", "z", "core")
"""Of a torus, whose innermost is that of a chip's cores where each is a device."""


class Side(NamedTuple):
    """A part of the torus along which a mesh axis runs."""

    name: str
    """One of `SIDES`."""
    extent: int
    """Places on this side that the devices of one line of the mesh axis have."""
    whole: int
    """Places that the side has."""

    @property
    def is_split(self) -> bool:
        """Whether other mesh axes share the side, so that this one has no ring of its own along it."""
        return self.extent < self.whole


def arrange(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices of one TPU slice, or some of them, as an array of `shape`, whose last axes talk most.

    Where JAX's own search finds no whole sides of the torus for each axis, because it never goes back on a choice, all
    ways are tried; a side is split between axes only where there is none. Some chips of every host form a torus too,
    with others between its places, unless they are too many for that: then they come as they are listed.
    """
    try:
        if devices[0].platform != "tpu" or _is_block(devices):
            return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:
        pass
    torus = _torus(devices)
    if torus.size != len(devices):
        return np.array(devices, object).reshape(shape)
    parts = _whole(torus.shape, shape) or _split(torus.shape, shape)
    places = [(axis, side) for side in range(torus.ndim) for axis in range(len(shape))]
    # Of the axes that share a side, the last has its neighbours next to each other.
    pieces = torus.reshape([parts[side][axis] for axis, side in places])
    return pieces.transpose(sorted(range(len(places)), key=places.__getitem__)).reshape(shape)


def torus_sides(mesh: Mesh) -> dict[str, tuple[Side, ...]]:
    """By mesh axis, the sides of the torus along which its neighbours differ; empty for one of size 1, and for devices
    that are in no torus. Of several slices, each a torus of its own, the axis between them has none.

    In the smallest slices (up to 16 chips), where JAX winds one ring through several sides, an axis is said to run
    along each that it visits.
    """
    devices = mesh.devices
    if devices.flat[0].platform != "tpu":
        return dict.fromkeys(mesh.axis_names, ())
    coords = np.array([_coords(device) for device in devices.flat]).reshape(*devices.shape, len(SIDES))
    whole = coords.reshape(-1, len(SIDES)).max(0) - coords.reshape(-1, len(SIDES)).min(0) + 1
    found: dict[str, tuple[Side, ...]] = {}
    for number, axis in enumerate(mesh.axis_names):
        steps = np.diff(np.sort(coords, axis=number), axis=number) != 0
        extents = 1 + steps.sum(number).reshape(-1, len(SIDES)).max(0)
        sides = zip(SIDES, extents, whole, strict=True)
        found[axis] = tuple(Side(name, int(part), int(all_)) for name, part, all_ in sides if part > 1)
    return found


def _coords(device: Any) -> tuple[int, ...]:
    """Its place, one number for each of `SIDES`."""
    return (*device.coords, *(0,) * (3 - len(device.coords)), device.core_on_chip)


def _is_block(devices: Sequence[Any]) -> bool:
    """Whether nothing is missing between the devices."""
    coords = np.array([_coords(device) for device in devices])
    return math.prod(int(side) for side in coords.max(0) - coords.min(0) + 1) == len(devices)


def _torus(devices: Sequence[Any]) -> np.ndarray:
    """The devices by their places among those that any of them has, of the sides longer than one."""
    coords = np.array([_coords(device) for device in devices])
    places = np.stack([np.unique(side, return_inverse=True)[1].reshape(-1) for side in coords.T], axis=1)
    shape = places.max(0) + 1
    torus = np.empty(shape, object)
    for device, place in zip(devices, places, strict=True):
        torus[tuple(place)] = device
    return torus.reshape([size for size in shape if size > 1])


Parts = list[list[int]]
"""By side and axis, how much of the side the axis has; a side's parts multiply to it, an axis's to its size."""


def _whole(sides: Sequence[int], shape: Sequence[int]) -> Parts | None:
    """Every side given to one axis, if that can be; as JAX, most sides to the last axes."""
    fitting: list[tuple[int, ...]] = []
    for owners in itertools.product([axis for axis, size in enumerate(shape) if size > 1], repeat=len(sides)):
        sizes = [1] * len(shape)
        for side, axis in zip(sides, owners, strict=True):
            sizes[axis] *= side
        fitting += [owners] if sizes == list(shape) else []
    if not fitting:
        return None
    best = max(fitting, key=lambda owners: [owners.count(axis) for axis in reversed(range(len(shape)))])
    return [
        [side if owner == axis else 1 for axis in range(len(shape))] for side, owner in zip(sides, best, strict=True)
    ]


def _split(sides: Sequence[int], shape: Sequence[int]) -> Parts:
    """From the last axis on, as much as can be of whole sides, then what is missing of the largest that are left.

    It always ends well: of every prime factor there are together as many in the sides as in the axes. JAX's own search
    fails on sides such as 28, of which it overlooks factors.
    """
    left, parts = list(sides), [[1] * len(shape) for _ in sides]
    for axis in reversed(range(len(shape))):
        untouched = [side for side in range(len(sides)) if left[side] == sides[side]]
        subsets = itertools.chain(*(itertools.combinations(untouched, count) for count in range(len(sides) + 1)))
        sizes = {subset: math.prod(sides[side] for side in subset) for subset in subsets}
        whole = max((s for s in sizes if shape[axis] % sizes[s] == 0), key=lambda s: (sizes[s], len(s)))
        missing = shape[axis]
        for side in (*whole, *sorted(range(len(sides)), key=lambda side: -left[side])):
            part = math.gcd(left[side], missing)
            missing, left[side], parts[side][axis] = missing // part, left[side] // part, parts[side][axis] * part
    return parts
