"""What attention remembers of the tokens before: a plain dict of arrays.

`k` (rotated by its position) and `v` [L, B, K, S, h], and `segments` [B, S] int32, 0 where a slot is empty. Rows lie
over the batch's mesh axes, key-value heads over theirs. The slot of a token says nothing of its position, so that rows
of prompts of several lengths go on in the same slot.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array, lax
from jaxtyping import Float, Int

from ministral_jax.distributed.axes import constrain, partition_of

Cache = dict[str, Array]


LayerKeys = Float[Array, "L B K T h"]


def keys_and_values(activations: dict[str, Array]) -> tuple[Float[Array, "B K T h"], Float[Array, "B K T h"]]:
    """A tap: each layer's keys and values."""
    k, v = (rearrange(activations[name], "B T K h -> B K T h") for name in ("key", "value"))
    return k, v


def new_cache(k: LayerKeys, v: LayerKeys, segments: Int[Array, "B T"]) -> Cache:
    """One that holds these tokens and has no empty slot."""
    return _placed({"k": k, "v": v, "segments": segments})


def append(cache: Cache, k: LayerKeys, v: LayerKeys, segments: Int[Array, "B T"], slot: Int[Array, ""]) -> Cache:
    """With these tokens in the slots from `slot` on, which must be there."""
    zero = jnp.zeros_like(slot)
    at = (zero, zero, zero, slot, zero)
    return _placed(
        {
            "k": lax.dynamic_update_slice(cache["k"], k, at),
            "v": lax.dynamic_update_slice(cache["v"], v, at),
            "segments": lax.dynamic_update_slice(cache["segments"], segments, (zero, slot)),
        }
    )


def fork(rows: dict[str, Array], parents: Int[Array, " rows"]) -> dict[str, Array]:
    """Row i of the result, of arrays as a cache has them, is row `parents[i]` of those on the same devices: nothing is
    sent. On one device these are all."""

    def taken(rows: dict[str, Array], parents: Array) -> dict[str, Array]:
        return {name: jnp.take(x, parents, axis=logical_axes(x.ndim).index("batch")) for name, x in rows.items()}

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return taken(rows, parents)
    specs: Any = {name: partition_of(x.shape, logical_axes(x.ndim)) for name, x in rows.items()}
    mapped = jax.shard_map(taken, in_specs=(specs, partition_of(parents.shape, ("batch",))), out_specs=specs)
    return mapped(rows, parents)


def grow(cache: Cache, slots: int) -> Cache:
    """A cache, or some of its arrays, with that many more empty slots at the end."""
    wide = lambda ndim: ((0, 0), (0, 0), (0, 0), (0, slots), (0, 0)) if ndim == 5 else ((0, 0), (0, slots))
    return _placed({name: jnp.pad(x, wide(x.ndim)) for name, x in cache.items()})


def logical_axes(ndim: int) -> tuple[str | None, ...]:
    """Of a cache's arrays, by their number of dimensions."""
    return ("layers", "batch", "kv_heads", None, None) if ndim == 5 else ("batch", None)


def _placed(cache: Cache) -> Cache:
    return {name: constrain(x, logical_axes(x.ndim)) for name, x in cache.items()}
