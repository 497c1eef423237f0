"""Attention on a mesh: batch and heads are independent; the tokens of a row meet by an all-gather or around a ring.

With the length cut over n shards, a causal model's tokens lie in zig-zag order: of 2n chunks, shard i holds i and
2n-1-i, so that all shards visit the same number of tiles. Other models' tokens lie in their own order.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from ministral_jax.distributed.axes import Axes, platform, sharded_axes
from ministral_jax.models import attention
from ministral_jax.models.attention import (
    KERNELS,
    AttentionSpec,
    KeyGradients,
    Keys,
    KeyTiles,
    KeyValues,
    OnlineSoftmax,
    Part,
    Queries,
    QueryTile,
    QueryTiles,
    RowCotangents,
    Tiles,
    attend,
    attend_parts,
    chosen_block,
    chosen_implementation,
    keep,
)
from ministral_jax.models.kernels import Asked


def attend_on_mesh(
    q: Queries,
    k: KeyValues,
    v: KeyValues,
    segments: Int[Array, "B T"] | None = None,
    spec: AttentionSpec = AttentionSpec(),  # noqa: B008
) -> Queries:
    """`attention.attend` for arrays that lie as the active rules say for `batch`, `length` and `spec.heads`.

    A dimension that its mesh axes do not divide (the length: into multiples of `spec.multiple_of`) is whole everywhere.
    Where T is cut, causal rows are in zig-zag order. Key-value heads that the axes of the heads do not divide are
    whole, and each device picks those of its query heads.
    """
    batch, length, cut = sharded_axes(q.shape[:3], ("batch", "length", spec.heads), spec.multiple_of)
    mesh = jax.sharding.get_abstract_mesh()
    sizes = mesh.shape
    shards = math.prod(sizes[axis] for axis in length)
    asked = Asked.of_row(q.shape[1], shards, spec.causal, q.shape[-1], q.dtype.name)
    block = chosen_block(spec, platform())
    chosen = replace(spec, implementation=chosen_implementation(spec, platform(), asked), block=block)
    kernel = chosen.implementation in KERNELS
    # XLA's partitioner stops at a kernel, also where nothing is cut.
    if not (batch or length or cut or (kernel and mesh.size > 1)):
        return attend(q, k, v, segments, spec)
    segments = jnp.ones(q.shape[:2], jnp.int32) if segments is None else segments
    segments = jnp.broadcast_to(segments, q.shape[:2])
    with_keys = k.shape[2] % math.prod(sizes[axis] for axis in cut) == 0
    group, every = q.shape[2] // k.shape[2], (*batch, *length, *cut)

    def local(q: Array, k: Array, v: Array, segments: Array) -> Array:
        q, k, v, segments = (_varying(x, every) for x in (q, k, v, segments))
        if not with_keys:
            k, v = (_own_heads(x, q.shape[2], group, cut) for x in (k, v))
        if not length:
            return attend(q, k, v, segments, chosen)
        own = Part(segments, _starts(lax.axis_index(length), lax.axis_size(length), q.shape[1], spec.causal))
        tiled = replace(chosen, block=min(block, asked.chunk))
        if spec.context == "ring":
            return _ring_attend(q, k, v, own, length, tiled)
        k, v, all_segments = (_gather(x, length, spec.causal) for x in (k, v, segments))
        whole = Part(all_segments, np.zeros(1, np.int32))
        if kernel and spec.causal:
            return _attend_by_chunk(q, k, v, own, whole, tiled)
        return attend_parts(q, k, v, own, whole, tiled)

    by_head = P(batch, length, cut, None)
    by_key = by_head if with_keys else P(batch, length, None, None)
    specs = by_head, by_key, by_key, P(batch, length)
    # Kernels do not say over which axes their results vary.
    return jax.shard_map(local, in_specs=specs, out_specs=by_head, check_vma=not kernel)(q, k, v, segments)


def _attend_by_chunk(q: Queries, k: KeyValues, v: KeyValues, own: Part, every: Part, spec: AttentionSpec) -> Queries:
    """`attend_parts`, each of the two chunks of a shard by a kernel of its own: the first one always lies in the first
    half of the row, and a kernel's grid goes through all the keys that it is given."""
    t, half, found = q.shape[1] // 2, k.shape[1] // 2, list[Array]()
    for c, keys in enumerate((half, 2 * half)):
        here = slice(c * t, (c + 1) * t)
        queries = Part(own.segments[:, here], own.starts[c : c + 1])
        seen = Part(every.segments[:, :keys], every.starts)
        found.append(attend_parts(q[:, here], k[:, :keys], v[:, :keys], queries, seen, spec))
    return jnp.concatenate(found, axis=1)


def _varying(x: Array, axes: Axes) -> Array:
    missing = tuple(a for a in axes if a not in jax.typeof(x).manual_axis_type.varying)
    return lax.pcast(x, missing, to="varying") if missing else x


def _own_heads(x: KeyValues, queries: int, group: int, cut: Axes) -> Float[Array, "B T k h"]:
    """Of key-value heads those that this device's `queries` heads read, `group` of all read each."""
    same = math.gcd(queries, group)
    first = lax.axis_index(cut) * queries
    return jnp.take(x, (first + jnp.arange(0, queries, same)) // group, axis=2)


def _starts(shard: Array, shards: int, tokens: int, causal: bool) -> Int[Array, " c"]:
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


RingCarry = tuple[QueryTiles, Keys, KeyGradients]


def _ring_attend(q: Array, k: Array, v: Array, own: Part, length: Axes, spec: AttentionSpec) -> Array:
    scaled = q * q.shape[-1] ** -0.5
    *tiles, _ = attention.into_tiles(scaled, k, v, own, own, spec.block)
    out: Any = _ring(*tiles, length, spec.causal)
    return attention.from_tiles(out, q.shape[1], len(own.starts))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _ring(q: QueryTiles, k: KeyTiles, v: KeyTiles, own: Tiles, length: Axes, causal: bool) -> QueryTiles:
    """`attention._tiles` where every shard has the keys of its own tokens; all of them come by once."""
    return _ring_forward(q, k, v, own, length, causal)[0]


def _pass_on(x: Any, length: Axes) -> Any:
    n = lax.axis_size(length)
    return jax.tree.map(lambda leaf: lax.ppermute(leaf, length, [(i, (i + 1) % n) for i in range(n)]), x)


def _ring_forward(
    q: QueryTiles, k: KeyTiles, v: KeyTiles, own: Tiles, length: Axes, causal: bool
) -> tuple[QueryTiles, tuple[Any, ...]]:
    def hop(carry: tuple[OnlineSoftmax, Keys], _: None) -> tuple[tuple[OnlineSoftmax, Keys], None]:
        softmax, keys = carry
        coming = _pass_on(keys, length)  # independent of what follows: it may travel meanwhile

        def row(tile: tuple[OnlineSoftmax, QueryTile, Tiles]) -> OnlineSoftmax:
            return attention.attend_row(*tile, keys, causal)

        return (lax.map(row, (softmax, q, own)), coming), None

    start = attention.empty_softmax(q), (k, v, own)
    (softmax, _), _ = lax.scan(hop, start, length=lax.axis_size(length))
    out, lse = map(keep, attention.softmax_result(softmax, q.dtype))
    return out, (q, k, v, own, out, lse)


def _ring_backward(length: Axes, causal: bool, saved: tuple[Any, ...], d_out: QueryTiles) -> tuple[Any, ...]:
    q, k, v, own, out, lse = saved
    delta = attention.delta(d_out, out, lse)

    def hop(carry: RingCarry, _: None) -> tuple[RingCarry, None]:
        d_q, keys, sums = carry
        coming = _pass_on(keys, length)

        def row(sums: KeyGradients, tile: RowCotangents) -> tuple[KeyGradients, QueryTile]:
            return attention.attend_row_backward(sums, tile, keys, causal)

        sums, gain = lax.scan(row, sums, (q, own, d_out, lse, delta))
        return (d_q + gain, coming, _pass_on(sums, length)), None

    start = jnp.zeros_like(q, lse.dtype), (k, v, own), attention.transposed_zeros(k)
    (d_q, _, sums), _ = lax.scan(hop, start, length=lax.axis_size(length))
    return d_q.astype(q.dtype), *(jnp.swapaxes(x, -1, -2).astype(k.dtype) for x in sums), None


_ring.defvjp(_ring_forward, _ring_backward)
