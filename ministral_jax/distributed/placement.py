"""Placement: the mesh of a stage, which logical axis lies on which of its axes, and arrays made that way.

Models name their axes (`embed`, `heads`, ..); here those names meet devices. JAX's multi-controller runtime is the
engine: every process runs the same program over one global mesh. Nothing here gathers a model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int
from pydantic import Field, model_validator

from ministral_jax.distributed.axes import dividing_axes
from ministral_jax.distributed.torus import arrange
from ministral_jax.errors import UserError
from ministral_jax.settings import Frozen

AXES = ("slice", "data", "fsdp", "tensor", "context")
Tree = Any
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class MeshConfig(Frozen):
    """Devices along each mesh axis; one of them may be -1, "the rest".

    `slice`: TPU slices, or groups of GPU nodes, joined by a slow network that only gradients cross; 1 leaves GPU nodes
    to the other axes, of which the last lie within a node. `data`: copies of the parameters.
    `fsdp`: parameters and moments are cut, gathered layer by layer; on a TPU torus keep it within two of the three
    dimensions (see docs/scaling.md). `tensor`: heads, feed-forward and vocabulary are
    cut, activations are reduced twice a layer: keep it inside a fast network. `context`: the tokens of a row are cut.
    """

    slice: int = Field(default=1, ge=1)
    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1

    @model_validator(mode="after")
    def _one_rest(self) -> MeshConfig:
        sizes = [getattr(self, axis) for axis in AXES]
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError("sizes must be positive, one of them may be -1")
        return self

    def shape(self, devices: int, where: str = "mesh") -> tuple[int, ...]:
        """Sizes in the order of `AXES`; `where` is the setting's dotted name, for errors.

        Raises:
            UserError: they do not multiply to the number of devices.
        """
        sizes = [getattr(self, axis) for axis in AXES]
        known = int(np.prod([size for size in sizes if size != -1]))
        if devices % known or (-1 not in sizes and known != devices):
            text = ", ".join(f"{axis}: {size}" for axis, size in zip(AXES, sizes, strict=True) if size != 1)
            fits = f"a multiple of {known}" if -1 in sizes else f"{known}"
            raise UserError(f"{where} {{{text}}} does not fit {devices} devices, but {fits}")
        return tuple(devices // known if size == -1 else size for size in sizes)


class Rules(Frozen):
    """Logical axis -> mesh axes, one line each; a parameter's or activation's other axes are whole everywhere.

    FSDP cuts the width D of every matrix and gathers it again when its layer runs; devices that share a row's tokens
    take part in that, since each would hold the same copy. Tensor parallelism cuts what a matrix product reads or
    writes next to it (heads, feed-forward, vocabulary). Between such products the tokens of the residual stream are cut
    by it too, within their shard of `length` (sequence parallelism, arXiv 2205.05198). The vision tower is gathered by
    all devices, each of which has pictures of its own (`pictures`). Where an axis does not divide the dimension (8
    key-value heads over 16 devices), that axis is left out. The same rules serve every backend; what differs there is
    how large the mesh's axes should be.
    """

    batch: tuple[str, ...] = ("slice", "data", "fsdp")
    length: tuple[str, ...] = ("context",)
    residual: tuple[str, ...] = ("context", "tensor")
    embed: tuple[str, ...] = ("fsdp", "context")
    vocab: tuple[str, ...] = ("tensor",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    layers: tuple[str, ...] = ()
    vision_embed: tuple[str, ...] = ("fsdp", "context", "tensor")
    vision_heads: tuple[str, ...] = ()
    vision_mlp: tuple[str, ...] = ()
    projector: tuple[str, ...] = ("tensor",)
    merged_patches: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _known(self) -> Rules:
        for name in type(self).model_fields:
            for axis in getattr(self, name):
                if axis not in AXES:
                    raise ValueError(f"{name} names mesh axis {axis!r}; there are {', '.join(AXES)}")
        if self.length not in ((), ("context",)):
            raise ValueError("length can lie on mesh axis 'context' alone, whose shards take its tokens in turns")
        return self

    @property
    def bins(self) -> tuple[str, ...]:
        """Of the bins of pictures that a shard of the rows has: all axes of the mesh but those of the rows."""
        return tuple(axis for axis in AXES if axis not in self.batch)

    @property
    def pictures(self) -> tuple[str, ...]:
        """Of all bins of pictures."""
        return (*self.batch, *self.bins)

    @contextmanager
    def active(self) -> Generator[None, None, None]:
        """Within it, the logical axes of a model that is traced mean these (`axes.constrain`)."""
        names = (*type(self).model_fields, "bins", "pictures")
        with nn.logical_axis_rules([(name, getattr(self, name) or None) for name in names]):
            yield

    def scoped(self, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """`function`, always traced under these rules."""

        def under_rules(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with self.active():
                return function(*args, **kwargs)

        return under_rules


def make_mesh(config: MeshConfig, devices: list[Any] | None = None, where: str = "mesh") -> Mesh:
    """A mesh with all of `AXES`, neighbours placed by the network where the backend knows it; the later an axis, the
    nearer its devices.

    TPU slices, which a slower network joins, lie along `slice` alone, see `torus.arrange` for the inside of one. XLA
    takes every GPU node for a slice: they are slices here only where `mesh.slice` says so, else one mesh in which the
    GPUs of a node are neighbours.

    Args:
        devices: all that there are, when None; described ones will do.
        where: the setting's dotted name, for errors.

    Raises:
        UserError: the sizes do not fit the devices, or `slice` does not fit the slices that there are.
    """
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices), where)
    slices: dict[int, list[Any]] = {}
    for device in sorted(devices, key=_slice_index):
        slices.setdefault(_slice_index(device), []).append(device)
    count, gpu = len(slices), devices[0].platform == "gpu"
    if gpu and count % shape[0] and count > 1:
        raise UserError(
            f"{where}.slice = {shape[0]} but there are {count} nodes, which it must divide (1: no node is a slice)"
        )
    if not gpu and count not in (1, shape[0]):
        raise UserError(f"{where}.slice = {shape[0]} but the devices form {count} slices; they must be equal")
    if gpu:
        grid = np.array(sorted(devices, key=lambda device: (_slice_index(device), device.id))).reshape(shape)
    elif count > 1:
        grid = np.concatenate([arrange((1, *shape[1:]), slices[index]) for index in sorted(slices)])
    else:
        grid = arrange(shape, devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slice_index(device: Any) -> int:
    return getattr(device, "slice_index", 0) or 0


def partition(shape: tuple[int, ...], axes: tuple[str | None, ...], rules: Rules, mesh: Mesh) -> PartitionSpec:
    """Mesh axes of each dimension: those of the rules while they divide it and no earlier dimension has taken them."""
    taken: set[str] = set()
    entries: list[str | tuple[str, ...] | None] = []
    for size, name in zip(shape, axes, strict=True):
        free = [axis for axis in getattr(rules, name or "", ()) if axis not in taken]
        chosen = dividing_axes(size, free, mesh.shape)
        taken.update(chosen)
        entries.append(chosen if len(chosen) > 1 else chosen[0] if chosen else None)
    return PartitionSpec(*entries)


class Bins(NamedTuple):
    """In which the pictures of a batch lie: `each` for the rows of a microbatch in one of `shards` parts of all."""

    shards: int = 1
    each: int = 1
    microbatches: int = 1


@dataclass(frozen=True)
class Placement:
    """A mesh and rules: where the parameters, the optimiser's state and the rows of a batch lie."""

    mesh: Mesh
    rules: Rules

    @cached_property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def sharding(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> NamedSharding:
        """Where an array with these logical axes lies."""
        return NamedSharding(self.mesh, partition(shape, axes, self.rules, self.mesh))

    # ---- batches ----

    @cached_property
    def _context(self) -> int:
        """Parts into which the tokens of a row are cut."""
        return self.mesh.shape["context"] if self.rules.length else 1

    def batch_sharding(self, name: str, ndim: int) -> NamedSharding:
        """Rows over `rules.batch`; the tokens of a row over `rules.length`."""
        length = self.rules.length if name not in _NOT_PER_TOKEN else ()
        entries = [self.rules.batch, length or None, *[None] * (ndim - 2)]
        return NamedSharding(self.mesh, PartitionSpec(*entries[:ndim]))

    def array_sharding(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
        """`batch_sharding`; bins of pictures lie over all other axes too, as far as these divide their number."""
        if name not in _PICTURES:
            return self.batch_sharding(name, len(shape))
        others = dividing_axes(shape[1], self.rules.bins, self.mesh.shape)
        return NamedSharding(self.mesh, PartitionSpec(self.rules.batch, others or None))

    @cached_property
    def row_shards(self) -> int:
        """Parts into which the rows of a batch are cut."""
        return int(np.prod([self.mesh.shape[axis] for axis in self.rules.batch]))

    def bins(self, microbatches: int = 1) -> Bins:
        """One for each device and microbatch."""
        return Bins(self.row_shards, self.mesh.size // self.row_shards, microbatches)

    def even(self, rows: int) -> int:
        """The next number of rows that the devices share evenly."""
        return -(-rows // self.row_shards) * self.row_shards

    def check_batch(
        self, sequences: int, length: int, where: str, microbatches: int = 1, setting: str = "mesh"
    ) -> None:
        """Raise `UserError` when a global batch does not split evenly; `setting` says which mesh it is."""
        rows = self.row_shards
        if sequences % (rows * microbatches):
            parts = " * ".join(f"{a} {self.mesh.shape[a]}" for a in self.rules.batch if self.mesh.shape[a] > 1)
            micro = f" * microbatches {microbatches}" if microbatches > 1 else ""
            raise UserError(
                f"{where}.batch.sequences = {sequences} must be a multiple of {rows * microbatches}, "
                f"over which the {setting} splits it ({parts or 'one device'}{micro})"
            )
        if self._context > 1 and length % (2 * self._context):
            raise UserError(
                f"{where}.batch.length = {length} must be a multiple of {2 * self._context}, twice {setting}.context"
            )

    def rows(self, count: int) -> Int[np.ndarray, " rows"]:
        """Which rows of a global batch of `count` the devices of this process hold, ascending."""
        held = np.zeros(count, bool)
        index: Any = self.batch_sharding("tokens", 2).addressable_devices_indices_map((count, 2 * self._context))
        for rows, _ in index.values():
            held[rows] = True
        return np.flatnonzero(held)

    def row_owners(self, count: int) -> list[tuple[Int[np.ndarray, " rows"], int]]:
        """The blocks of rows into which a global batch of `count` falls over processes, and the first process that
        holds each."""
        held: dict[int, np.ndarray] = {}
        index: Any = self.batch_sharding("tokens", 2).devices_indices_map((count, 2 * self._context))
        for device, (rows, _) in index.items():
            held.setdefault(device.process_index, np.zeros(count, bool))[rows] = True
        owners: dict[bytes, tuple[np.ndarray, int]] = {}
        for process in sorted(held):
            owners.setdefault(held[process].tobytes(), (np.flatnonzero(held[process]), process))
        return sorted(owners.values(), key=lambda owner: int(owner[0][0]))

    def local_rows(self, array: jax.Array) -> np.ndarray:
        """This process's `rows` of an array whose rows alone are cut, as a batch's are, on this host."""
        parts = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
        return np.concatenate([np.asarray(parts[start].data) for start in sorted(parts)])

    def order(self, length: int) -> Int[np.ndarray, " T"]:
        """In which the tokens of a row lie on the mesh."""
        return zigzag(length, self._context)

    def place(self, batch: Mapping[str, np.ndarray], count: int) -> dict[str, jax.Array]:
        """A global batch of `count` rows from this process's `rows(count)` of it, and the pictures of these."""
        held, order = len(self.rows(count)), self.order(batch["tokens"].shape[1])

        def put(name: str, local: np.ndarray) -> jax.Array:
            if self._context > 1 and name not in _NOT_PER_TOKEN and local.ndim > 1:
                local = local[:, order]
            total = len(local) * count // held  # groups of pictures are in other numbers than rows
            where = np.full(total, -1)
            where[self.rows(total)] = np.arange(len(local))
            shape = (total, *local.shape[1:])
            sharding = self.array_sharding(name, shape)

            def part(index: Any) -> np.ndarray:
                return local[(where[index[0]], *index[1:])]

            return jax.make_array_from_callback(shape, sharding, part)

        return {name: put(name, array) for name, array in batch.items()}

    def described(self, shapes: Mapping[str, tuple[tuple[int, ...], Any]]) -> dict[str, jax.ShapeDtypeStruct]:
        """A global batch of which shapes and dtypes alone are known, as `place` would put it on the devices."""
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=self.array_sharding(name, shape))
            for name, (shape, dtype) in shapes.items()
        }

    def place_whole(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """`place` of a global batch that every process has whole."""
        count = len(batch["tokens"])
        return self.place({name: array[self.rows(count)] for name, array in batch.items()}, count)


_PICTURES = ("patches", "patch_image", "patch_row", "patch_col")
_NOT_PER_TOKEN = (*_PICTURES, "margin", "reference")


def zigzag(length: int, shards: int) -> Int[np.ndarray, " T"]:
    """Order of tokens in which equal contiguous shards do equal causal work: of 2n chunks, shard i has i and
    2n-1-i. The identity for one shard."""
    if shards == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * shards, -1)
    return np.concatenate([np.concatenate([chunks[i], chunks[2 * shards - 1 - i]]) for i in range(shards)])


def with_shardings(abstract: Tree, shardings: Tree) -> Tree:
    """Abstract arrays that say where they lie."""
    return jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), abstract, shardings)


def like_params(state: Tree, params: Tree, shardings: Tree, default: NamedSharding) -> Tree:
    """Shardings of an optimiser's state: a leaf that stands for a parameter (same path at its end, same shape) lies
    where that does. Under `jit` alone, moments would be whole on every device."""
    names = lambda path: tuple(str(key) for key in path)
    leaves = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True)
    table = {names(path): (leaf.shape, sharding) for (path, leaf), sharding in leaves}

    def find(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            shape, sharding = table.get(names(path[start:]), (None, default))
            if shape == leaf.shape:
                return sharding
        return default

    return jax.tree_util.tree_map_with_path(find, state)
