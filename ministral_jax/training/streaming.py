"""Parameters on their way between devices and disk, little of them at once."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jax

from ministral_jax.lazy import Lazy

if TYPE_CHECKING:
    from orbax.checkpoint import v1 as ocp
else:
    ocp = Lazy("orbax.checkpoint.experimental.v1")

IN_FLIGHT = 2**30
"""Bytes that a host may have on their way at once, where no one leaf needs more."""
CHUNK = 2**28
"""Bytes of a chunk of a file at most: what is compressed at once, and what a smaller part of a leaf has to read."""


@contextmanager
def streaming(placed: Any, stored: Any = None) -> Generator[Any, None, None]:
    """Within it, Orbax encodes or decodes at most `IN_FLIGHT` bytes at once, or the largest leaf's on this host where
    that is more. What a save has fetched from accelerators, this host's share of the tree, is there besides.

    Args:
        placed: a tree of arrays that are saved, or of shapes with shardings that are read.
        stored: what Orbax says of the tree in the file, where it is read.
    """
    context = ocp.Context()
    if stored is None:
        needed = [_local(leaf) for leaf in jax.tree.leaves(placed)]
        context.memory.write_concurrent_bytes = max(IN_FLIGHT, *needed) + 1  # Orbax refuses what is not less
        context.array.saving.storage_options.chunk_byte_size = CHUNK
    else:
        needed = jax.tree.leaves(jax.tree.map(_read, placed, stored))
        context.memory.read_concurrent_bytes = max(IN_FLIGHT, *needed) + 1
    with context:
        yield context


def _local(leaf: Any) -> int:
    """Bytes of a leaf that this host's devices hold, a part that several hold counted for each."""
    return sum(shard.data.nbytes for shard in leaf.addressable_shards) if isinstance(leaf, jax.Array) else leaf.nbytes


def _read(leaf: Any, stored: Any) -> int:
    """Bytes of the chunks that one device's part of a leaf may lie in."""
    chunk = getattr(stored.storage_metadata, "chunk_shape", None) or leaf.shape
    part = leaf.sharding.shard_shape(leaf.shape)
    touched = [min(-(-n // c) + 1, -(-whole // c)) * c for n, c, whole in zip(part, chunk, leaf.shape, strict=True)]
    return math.prod(touched) * stored.dtype.itemsize
