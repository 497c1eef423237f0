"""Where activations lie: the mesh that is set and the logical rules that are active while a model is traced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import linen as nn
from jax import Array
from jax.sharding import PartitionSpec

Axes = tuple[str, ...]


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of the devices of the mesh that is set, which need not be there, else of the default
    device."""
    config: Any = jax.config
    device = jax.sharding.get_abstract_mesh().abstract_device or config.jax_default_device or jax.devices()[0]
    return device if isinstance(device, str) else device.platform


def dividing_axes(size: int, axes: Iterable[str], mesh: Mapping[str, int], multiple_of: int = 1) -> Axes:
    """Those of the axes, in order, that cut a dimension into equal multiples of `multiple_of`; `mesh` has sizes."""
    chosen: list[str] = []
    count = multiple_of
    for axis in axes:
        if mesh.get(axis, 1) > 1 and size % (count * mesh[axis]) == 0:
            chosen.append(axis)
            count *= mesh[axis]
    return tuple(chosen)


def sharded_axes(shape: tuple[int, ...], names: tuple[str | None, ...], multiple_of: int = 1) -> tuple[Axes, ...]:
    """Mesh axes of every dimension, () for whole: those the rules name while they divide it (`length` into multiples of
    `multiple_of`). All () without a mesh or rules."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    rules = dict(nn.get_logical_axis_rules())

    def cut(size: int, name: str | None) -> Axes:
        entry = (rules.get(name) if name else None) or ()
        axes = (entry,) if isinstance(entry, str) else entry
        return dividing_axes(size, axes, sizes, multiple_of if name == "length" else 1)

    return tuple(cut(size, name) for size, name in zip(shape, names, strict=True))


def constrain(x: Array, names: tuple[str | None, ...], multiple_of: int = 1) -> Array:
    """`x`, kept on the mesh as the rules say; the identity without rules, and without a mesh of several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not nn.get_logical_axis_rules():
        return x
    axes = sharded_axes(x.shape, names, multiple_of)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(a or None for a in axes)))
