"""Arrays handed from the devices of one mesh to those of another: the same ones, or others that every process has.

JAX moves an array between meshes of the same devices, whatever their shapes, in any number of processes. Between
devices that are not the same it does so inside a process alone, so each process hands its own part on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ministral_jax.errors import UserError


def shared_out(devices: Sequence[Any], count: int, where: str) -> tuple[list[Any], list[Any]]:
    """The devices in two parts of which the second has `count`: the last ones of every process, equally many.

    Raises:
        UserError: naming `where`: none are left for the first part, or the processes cannot have equally many.
    """
    processes: dict[int, list[Any]] = {}
    for device in devices:
        processes.setdefault(device.process_index, []).append(device)
    if count >= len(devices):
        raise UserError(f"{where} = {count} leaves none of {len(devices)} devices to the student")
    if count % len(processes):
        raise UserError(
            f"{where} = {count} must be a multiple of {len(processes)}: every process has equally many, since it hands "
            "what the teacher says on to the student's devices of its own"
        )
    each = count // len(processes)
    first = [device for local in processes.values() for device in local[:-each]]
    return first, [device for local in processes.values() for device in local[-each:]]


def handed(array: Array, sharding: NamedSharding) -> Array:
    """`array` where `sharding` says, over other devices or the same. Nothing waits for it.

    Where the devices differ, every process has some of both, see `shared_out`.
    """
    if array.sharding.device_set == sharding.device_set:
        return _put(array, sharding)
    source: Any = array.sharding
    staged = _put(array, _staging(array.shape, source.mesh, sharding))
    whole = [slice(0, size) for size in array.shape]
    held: dict[tuple[int, int], list[Array]] = {}
    for shard in staged.addressable_shards:
        held.setdefault(_span(shard.index[0], array.shape[0]), []).append(shard.data)
    parts: list[Array] = []
    for number, (device, index) in enumerate(sharding.addressable_devices_indices_map(array.shape).items()):
        start, stop = _span((index or whole)[0], array.shape[0])
        (first, _), copies = next(item for item in held.items() if item[0][0] <= start and stop <= item[0][1])
        part, within = copies[number % len(copies)], (slice(start - first, stop - first), *(index or whole)[1:])
        if any(_span(cut, size) != (0, size) for cut, size in zip(within, part.shape, strict=True)):
            with jax.set_mesh(_alone(part)):
                part = part[within]
        parts.append(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


def _put(array: Array, sharding: NamedSharding) -> Array:
    """On the same devices. In several processes that is a program, which must not find another mesh set."""
    mesh: Any = sharding.mesh
    with jax.set_mesh(mesh):
        return jax.device_put(array, sharding)


def _alone(part: Array) -> Mesh:
    (device,) = part.devices()
    return Mesh(np.array([device]), ("alone",), axis_types=(AxisType.Auto,))


def _span(cut: slice, size: int) -> tuple[int, int]:
    start, stop, _ = cut.indices(size)
    return start, stop


def _stage(shape: tuple[int, ...], mesh: Mesh, sharding: NamedSharding) -> NamedSharding:
    """Rows, the first dimension, cut over the devices of `mesh` as finely as can be while every process holds those
    that its devices of `sharding` are to get."""
    rows, wanted, own = shape[0], dict[int, set[int]](), dict[int, list[Any]]()
    for device in mesh.devices.flat:
        own.setdefault(device.process_index, []).append(device)
    for device, index in sharding.devices_indices_map(shape).items():
        start, _ = _span(index[0], rows) if index else (0, rows)
        wanted.setdefault(device.process_index, set()).add(start)
    blocks = len(set[int]().union(*wanted.values()))
    common = math.gcd(blocks, mesh.size)
    for count in (n for n in range(common, 0, -1) if common % n == 0):
        holders: list[list[Any]] = [[] for _ in range(count)]
        for process, starts in wanted.items():
            parts = sorted({start * count // rows for start in starts})
            each, rest = divmod(len(own[process]), len(parts))
            for number, part in enumerate(parts):
                holders[part] += own[process][number * each : (number + 1) * each] if not rest else []
        if all(len(holder) == mesh.size // count for holder in holders):
            grid = np.array(holders)
            auto = (AxisType.Auto,) * 2
            return NamedSharding(Mesh(grid, ("rows", "copies"), axis_types=auto), PartitionSpec("rows"))
    raise AssertionError("one part, which every device has, always fits")


_staging: Any = lru_cache(maxsize=64)(_stage)  # Any: a type checker takes shardings for unhashable
