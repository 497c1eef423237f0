"""Attention on a mesh: batch and heads are independent; the tokens of a row meet by an all-gather or around a ring.

With the length cut over n shards, a causal model's tokens lie in zig-zag order: of 2n chunks, shard i holds i and
2n-1-i, so that all shards visit the same number of tiles. Other models' tokens lie in their own order.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from ministral_jax.distributed.axes import Axes, sharded_axes
from ministral_jax.models import attention
from ministral_jax.models.attention import Part, Tiles, attend, attend_parts, keep


def attend_on_mesh(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None = None,
    *,
    causal: bool = True,
    implementation: str = "auto",
    block: int = 128,
    context: str = "all_gather",
    heads: str = "heads",
    multiple_of: int = 2,
) -> Array:
    """`attention.attend` for arrays that lie as the active rules say for `batch`, `length` and the axis `heads`.

    A dimension that its mesh axes do not divide (the length: into multiples of `multiple_of`) is whole everywhere.
    Where T is cut, causal rows are in zig-zag order. Key-value heads that the axes of the heads do not divide are
    whole, and each device picks those of its query heads.
    """
    batch, length, cut = sharded_axes(q.shape[:3], ("batch", "length", heads), multiple_of)
    whole = partial(attend, causal=causal, implementation=implementation, block=block)
    if not (batch or length or cut):
        return whole(q, k, v, segments)
    segments = jnp.zeros(q.shape[:2], jnp.int32) if segments is None else segments
    segments = jnp.broadcast_to(segments, q.shape[:2])
    chosen = ("blockwise" if block < q.shape[1] else "xla") if implementation == "auto" else implementation
    sizes = jax.sharding.get_abstract_mesh().shape
    with_keys = k.shape[2] % math.prod(sizes[axis] for axis in cut) == 0
    group, every = q.shape[2] // k.shape[2], (*batch, *length, *cut)

    def local(q: Array, k: Array, v: Array, segments: Array) -> Array:
        q, k, v, segments = (_varying(x, every) for x in (q, k, v, segments))
        if not with_keys:
            k, v = (_own_heads(x, q.shape[2], group, cut) for x in (k, v))
        if not length:
            return whole(q, k, v, segments)
        own = Part(segments, _starts(lax.axis_index(length), lax.axis_size(length), q.shape[1], causal))
        if context == "ring":
            return _ring_attend(q, k, v, own, length, causal, block)
        k, v, all_segments = (_gather(x, length, causal) for x in (k, v, segments))
        other = Part(all_segments, np.zeros(1, np.int32))
        tile = min(block, q.shape[1] // len(own.starts))
        return attend_parts(q, k, v, own, other, causal=causal, implementation=chosen, block=tile)

    by_head = P(batch, length, cut, None)
    by_key = by_head if with_keys else P(batch, length, None, None)
    mapped = jax.shard_map(local, in_specs=(by_head, by_key, by_key, P(batch, length)), out_specs=by_head)
    return mapped(q, k, v, segments)


def _varying(x: Array, axes: Axes) -> Array:
    missing = tuple(a for a in axes if a not in jax.typeof(x).manual_axis_type.varying)
    return lax.pcast(x, missing, to="varying") if missing else x


def _own_heads(x: Array, queries: int, group: int, cut: Axes) -> Array:
    """Of key-value heads [B, T, K, h] those that this device's `queries` heads read, `group` of all read each."""
    same = math.gcd(queries, group)
    first = lax.axis_index(cut) * queries
    return jnp.take(x, (first + jnp.arange(0, queries, same)) // group, axis=2)


def _starts(shard: Array, shards: int, tokens: int, causal: bool) -> Array:
    """Where in the row the chunks of a shard of `tokens` begin."""
    if not causal:
        return shard[None] * tokens
    return jnp.stack([shard, 2 * shards - 1 - shard]) * (tokens // 2)


def _gather(x: Array, length: Axes, causal: bool) -> Array:
    """[B, T/n, ..] -> [B, T, ..] in the row's own order."""
    if not causal:
        return lax.all_gather(x, length, axis=1, tiled=True)
    early, late = jnp.split(lax.all_gather(x, length, axis=1), 2, axis=2)
    return rearrange(jnp.concatenate([early, late[:, ::-1]], axis=1), "B c t ... -> B (c t) ...")


# ---- ring -----------------------------------------------------------------------------------------------------------


def _ring_attend(q: Array, k: Array, v: Array, own: Part, length: Axes, causal: bool, block: int) -> Array:
    block = min(block, q.shape[1] // len(own.starts))
    scaled = q * q.shape[-1] ** -0.5
    tiles = attention.into_tiles(scaled, k, v, own, own, block)
    out: Any = _ring(tiles[0], tiles[1], tiles[2], tiles[3], length, causal)
    return attention.from_tiles(out, q.shape[1], len(own.starts))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _ring(q: Array, k: Array, v: Array, own: Tiles, length: Axes, causal: bool) -> Array:
    """`attention._tiles` where every shard has the keys of its own tokens; all of them come by once."""
    return _ring_forward(q, k, v, own, length, causal)[0]


def _pass_on(x: Any, length: Axes) -> Any:
    n = lax.axis_size(length)
    return jax.tree.map(lambda leaf: lax.ppermute(leaf, length, [(i, (i + 1) % n) for i in range(n)]), x)


def _ring_forward(q, k, v, own, length, causal):
    def hop(carry, _):
        running, keys = carry
        k, v, other = keys
        coming = _pass_on(keys, length)  # independent of what follows: it may travel meanwhile
        row = lambda a: attention.row_forward(a[0], a[1], a[2], k, v, other, causal)
        return (lax.map(row, (running, q, own)), coming), None

    start = attention.empty(q), (k, v, own)
    (running, _), _ = lax.scan(hop, start, length=lax.axis_size(length))
    out, lse = map(keep, attention.finish(running, q.dtype))
    return out, (q, k, v, own, out, lse)


def _ring_backward(length, causal, saved, d_out):
    q, k, v, own, out, lse = saved
    delta = attention.delta(d_out, out, lse)

    def hop(carry, _):
        d_q, keys, sums = carry
        k, v, other = keys
        coming = _pass_on(keys, length)
        row = lambda sums, args: attention.row_backward(sums, args, k, v, other, causal)
        sums, gain = lax.scan(row, sums, (q, own, d_out, lse, delta))
        return (d_q + gain, coming, _pass_on(sums, length)), None

    start = jnp.zeros_like(q, lse.dtype), (k, v, own), attention.transposed_zeros(k)
    (d_q, _, sums), _ = lax.scan(hop, start, length=lax.axis_size(length))
    return d_q.astype(q.dtype), *(jnp.swapaxes(x, -1, -2).astype(k.dtype) for x in sums), None


_ring.defvjp(_ring_forward, _ring_backward)
