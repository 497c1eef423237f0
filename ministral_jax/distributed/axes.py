"""Where activations lie: the mesh that is set and the logical rules that are active while a model is traced."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from jax import Array
from jax.sharding import PartitionSpec

Axes = tuple[str, ...]
Names = tuple[str | None, ...]
"""The logical axis of every dimension."""


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


def sharded_axes(shape: tuple[int, ...], names: Names, multiple_of: int = 1) -> tuple[Axes, ...]:
    """Mesh axes of every dimension, () for whole: those the rules name while they divide it (tokens into multiples of
    `multiple_of`) and no earlier dimension has taken them. All () without a mesh or rules."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    rules = dict(nn.get_logical_axis_rules())
    found: list[Axes] = []
    for size, name in zip(shape, names, strict=True):
        entry = (rules.get(name) if name else None) or ()
        free = [axis for axis in ((entry,) if isinstance(entry, str) else entry) if not any(axis in f for f in found)]
        found.append(dividing_axes(size, free, sizes, multiple_of if name in ("length", "residual") else 1))
    return tuple(found)


def partition_of(shape: tuple[int, ...], names: Names, multiple_of: int = 1) -> PartitionSpec:
    """`sharded_axes` as JAX wants them."""
    return PartitionSpec(*(axes or None for axes in sharded_axes(shape, names, multiple_of)))


def constrain(x: Array, names: Names, multiple_of: int = 1) -> Array:
    """`x`, kept on the mesh as the rules say; the identity without rules, and without a mesh of several devices."""
    spec = _spec(x, names, multiple_of)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def relaid(x: Array, names: Names, cotangent: Names, multiple_of: int = 1) -> Array:
    """`constrain` whose cotangent is laid by other names: to gather what is scattered on the way back, or the reverse.
    The transpose of `constrain` would first sum all of a cotangent everywhere."""
    spec, back = (_spec(x, way, multiple_of) for way in (names, cotangent))
    return x if spec is None or back is None else _relaid(x, spec, back)


def _spec(x: Array, names: Names, multiple_of: int) -> PartitionSpec | None:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not nn.get_logical_axis_rules():
        return None
    return partition_of(x.shape, names, multiple_of)


# The rules are not active any more when a backward pass is traced: where the cotangent lies is known before.
@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _relaid(x: Array, spec: PartitionSpec, back: PartitionSpec) -> Array:
    return jax.lax.with_sharding_constraint(x, spec)


def _relaid_forward(x: Array, spec: PartitionSpec, back: PartitionSpec) -> tuple[Array, None]:
    return jax.lax.with_sharding_constraint(x, spec), None


def _relaid_backward(spec: PartitionSpec, back: PartitionSpec, _: None, d_x: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(d_x, back),)


_relaid.defvjp(_relaid_forward, _relaid_backward)


@contextmanager
def rows_of(name: str) -> Generator[None, None, None]:
    """Within it `batch` means what the active rules say of the axis `name`, and no other axis is cut."""
    rules = dict(nn.get_logical_axis_rules())
    with nn.logical_axis_rules([("batch", rules.get(name))] if rules else []):
        yield
