"""Scaled dot-product attention over packed documents: all scores at once, or tile by tile in memory linear in T.

Letters: K key-value heads, G = H/K query heads for each of them, t queries, s keys, h head width, n and m tiles.

Queries and keys may be parts of a longer sequence: `starts` is then where in it the equal chunks begin that they hold.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

KEEP = "keep"


def keep(x: Array) -> Array:
    """Mark a result that is worth its memory until the backward pass, unlike the elementwise functions around it."""
    return checkpoint_name(x, KEEP)


def attend(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None = None,
    *,
    causal: bool = True,
    implementation: str = "auto",
    block: int = 128,
) -> Array:
    """softmax(q kᵀ / √h) v within a segment, softmax in float32 or wider.

    `q` [B, T, H, h], `k` and `v` [B, T, K, h] with K dividing H (query head n reads key head n // (H/K)), `segments`
    [B, T] int >= 0 or None for one segment per row. Token t sees the tokens of its own segment, with `causal` only
    those at index <= t. It always sees itself, so padding rows stay finite. Returns [B, T, H, h] in q's dtype.

    "xla" holds the T x T scores of every head, "blockwise" one `block` x `block` tile of them at a time and skips the
    tiles above the diagonal; "auto" is blockwise once T > block.
    """
    segments = jnp.zeros((1, q.shape[1]), jnp.int32) if segments is None else segments
    whole = Part(segments, np.zeros(1, np.int32))
    return attend_parts(q, k, v, whole, whole, causal=causal, implementation=implementation, block=block)


def attend_cached(q: Array, k: Array, v: Array, past: tuple[Array, Array], segments: tuple[Array, Array]) -> Array:
    """`attend` for the few tokens that follow others, whose keys and values are `past`, each [B, K, S, h].

    `q` [B, t, H, h], `k` and `v` [B, t, K, h]; `segments` of the past [B, S] and of the tokens [B, t]. A token sees
    its segment's past and, of the tokens, what stands before it. Returns [B, t, H, h].
    """
    before, own = segments
    S, index, K = before.shape[1], jnp.arange(q.shape[1]), k.shape[2]
    q = rearrange(q * q.shape[-1] ** -0.5, "B t (K G) h -> B K G t h", K=K)
    k, v = (rearrange(x, "B t K h -> B K t h") for x in (k, v))
    scores = [
        _scores(q, past[0], own[:, :, None] == before[:, None, :]),
        _scores(q, k, _visible(own, own, index, index, True)),
    ]
    p = jax.nn.softmax(jnp.concatenate(scores, axis=-1)).astype(v.dtype)
    mix = partial(jnp.einsum, "BKGts,BKsh->BKGth", preferred_element_type=scores[0].dtype)
    out = mix(p[..., :S], past[1]) + mix(p[..., S:], v)
    return rearrange(out.astype(v.dtype), "B K G t h -> B t (K G) h")


class Part(NamedTuple):
    """What tokens [B, T] are: their segments [B, T], and where the equal chunks [c] that they form begin."""

    segments: Array
    starts: Array | np.ndarray

    @property
    def index(self) -> Array:
        """[T], of every token in the whole sequence."""
        return rearrange(_every(self.starts, self.segments.shape[1] // len(self.starts), 1), "c t -> (c t)")


def attend_parts(
    q: Array, k: Array, v: Array, own: Part, other: Part, *, causal: bool, implementation: str, block: int
) -> Array:
    """`attend` for queries `own` and keys `other` of one sequence, the keys in ascending order."""
    K, keys = k.shape[2], k.shape[1]
    q = q * q.shape[-1] ** -0.5
    if implementation == "auto":
        implementation = "blockwise" if block < keys else "xla"
    if implementation == "xla":
        q = rearrange(q, "B t (K G) h -> B K G t h", K=K)
        k, v = (rearrange(x, "B s K h -> B K s h") for x in (k, v))
        p = jax.nn.softmax(_scores(q, k, _visible(own.segments, other.segments, own.index, other.index, causal)))
        return keep(rearrange(jnp.einsum("BKGts,BKsh->BKGth", p.astype(v.dtype), v), "B K G t h -> B t (K G) h"))
    out: Array = _tiles(*into_tiles(q, k, v, own, other, block), causal)
    return from_tiles(out, q.shape[1], len(own.starts))


class Tiles(NamedTuple):
    """Tiles of a `Part`: segments [n, B, t], -1 where a tile goes past its chunk, and where each begins [n]."""

    segments: Array
    starts: Array


def into_tiles(
    q: Array, k: Array, v: Array, own: Part, other: Part, block: int
) -> tuple[Array, Array, Array, Tiles, Tiles]:
    """q [n, B, K, G, t, h], k and v [m, B, K, t, h] and what they are; each chunk is padded to whole tiles."""

    def cut(x: Array, part: Part, pad: int) -> Array:
        x = rearrange(x, "B (c t) ... -> B c t ...", c=len(part.starts))
        x = jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % block)] + [(0, 0)] * (x.ndim - 3), constant_values=pad)
        return rearrange(x, "B c (n t) ... -> (c n) B t ...", t=block)

    def tiles(part: Part) -> Tiles:
        segments = cut(part.segments, part, -1)
        return Tiles(segments, _every(part.starts, len(segments) // len(part.starts), block).reshape(-1))

    q = rearrange(cut(q, own, 0), "n B t (K G) h -> n B K G t h", K=k.shape[2])
    k, v = (rearrange(cut(x, other, 0), "n B s K h -> n B K s h") for x in (k, v))
    return q, k, v, tiles(own), tiles(other)


def from_tiles(out: Array, tokens: int, chunks: int) -> Array:
    """[n, B, K, G, t, h] -> [B, T, H, h] without the padding."""
    out = rearrange(out, "(c n) B K G t h -> B c (n t) (K G) h", c=chunks)[:, :, : tokens // chunks]
    return rearrange(out, "B c t H h -> B (c t) H h")


def _every(starts: Array | np.ndarray, count: int, step: int) -> Array:
    """[c] -> [c, count]: `count` indices from each start on, `step` apart."""
    return jnp.asarray(starts)[:, None] + jnp.arange(count, dtype=jnp.int32) * step


def _visible(own: Array, other: Array, index: Array, other_index: Array, causal: bool) -> Array:
    """Which keys of segments `other` [B, s] the queries of segments `own` [B, t] see: bool [B, t, s]."""
    same = own[:, :, None] == other[:, None, :]
    if not causal:
        return same
    return same & (index[:, None] >= other_index)


def _scores(q: Array, k: Array, visible: Array) -> Array:
    """[B, K, G, t, s] in float32 or wider; finite where nothing is visible."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    s = jnp.einsum("BKGth,BKsh->BKGts", q, k, preferred_element_type=wide)
    return jnp.where(visible[:, None, None], s, jnp.finfo(wide).min)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _tiles(q: Array, k: Array, v: Array, own: Tiles, other: Tiles, causal: bool) -> Array:
    """FlashAttention (arXiv 2205.14135, algorithms 1 and 4): softmax by a running maximum and sum over the tiles of a
    row, and a backward pass that computes the scores again from each row's log-sum-exp.

    `q` [n, B, K, G, t, h] scaled, `k` and `v` [m, B, K, t, h] -> [n, B, K, G, t, h].
    """
    return _tiles_forward(q, k, v, own, other, causal)[0]


def _tiles_forward(q, k, v, own, other, causal):
    def row(args):
        q, own = args
        return finish(row_forward(empty(q), q, own, k, v, other, causal), q.dtype)

    out, lse = map(keep, lax.map(row, (q, own)))
    return out, (q, k, v, own, other, out, lse)


def _tiles_backward(causal, saved, d_out):
    q, k, v, own, other, out, lse = saved

    def row(sums, args):
        return row_backward(sums, args, k, v, other, causal)

    sums, d_q = lax.scan(row, transposed_zeros(k), (q, own, d_out, lse, delta(d_out, out, lse)))
    return d_q.astype(q.dtype), *(jnp.swapaxes(x, -1, -2).astype(k.dtype) for x in sums), None, None


_tiles.defvjp(_tiles_forward, _tiles_backward)


# ---- one row of tiles -----------------------------------------------------------------------------------------------

Running = tuple[Array, Array, Array]


def empty(q: Array) -> Running:
    """Output, maximum and sum over no key; made from the data they vary over the same `shard_map` axes."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    column = q[..., :1]
    return (
        jnp.zeros_like(q, wide),
        jnp.full_like(column, jnp.finfo(wide).min, wide),
        jnp.zeros_like(column, wide),
    )


def finish(running: Running, dtype) -> tuple[Array, Array]:
    """The output and the log-sum-exp of its scores."""
    out, top, total = running
    return (out / total).astype(dtype), top + jnp.log(total)


def row_forward(running: Running, q: Array, own: Tiles, k: Array, v: Array, other: Tiles, causal: bool) -> Running:
    """What one tile of queries, q [B, K, G, t, h], adds up from keys and values [m, B, K, t, h]."""

    def tile(j, carry):
        out, top, total = carry
        s = _scores(q, k[j], _between(own, other, j, causal))
        new = jnp.maximum(top, jnp.max(s, axis=-1, keepdims=True))
        p, shrink = jnp.exp(s - new), jnp.exp(top - new)
        gain = jnp.einsum("BKGts,BKsh->BKGth", p.astype(v.dtype), v[j], preferred_element_type=out.dtype)
        return out * shrink + gain, new, total * shrink + jnp.sum(p, axis=-1, keepdims=True)

    return lax.fori_loop(0, _reach(own, other, causal), tile, running)


def row_backward(sums, args, k: Array, v: Array, other: Tiles, causal: bool) -> tuple[tuple[Array, Array], Array]:
    """The sums of d_k and d_v with those of one tile of queries added, and its d_q."""
    q, own, d_out, lse, delta = args
    wide = lse.dtype

    # d_k and d_v stand transposed, [h, s]: with the tile on the right of the product XLA need not transpose it.
    def tile(j, carry):
        d_q, d_k, d_v = carry
        p = jnp.exp(_scores(q, k[j], _between(own, other, j, causal)) - lse)
        d_p = jnp.einsum("BKGth,BKsh->BKGts", d_out, v[j], preferred_element_type=wide)
        d_s = (p * (d_p - delta)).astype(q.dtype)
        d_q += jnp.einsum("BKGts,BKsh->BKGth", d_s, k[j], preferred_element_type=wide)
        d_k_j = jnp.einsum("BKGth,BKGts->BKhs", q, d_s, preferred_element_type=wide)
        d_v_j = jnp.einsum("BKGth,BKGts->BKhs", d_out, p.astype(q.dtype), preferred_element_type=wide)
        return d_q, d_k.at[j].add(d_k_j), d_v.at[j].add(d_v_j)

    d_q, *sums = lax.fori_loop(0, _reach(own, other, causal), tile, (jnp.zeros_like(q, wide), *sums))
    return tuple(sums), d_q


def delta(d_out: Array, out: Array, lse: Array) -> Array:
    return jnp.sum(d_out.astype(lse.dtype) * out, axis=-1, keepdims=True)


def transposed_zeros(k: Array) -> tuple[Array, Array]:
    zeros = jnp.zeros_like(jnp.swapaxes(k, -1, -2), jnp.promote_types(k.dtype, jnp.float32))
    return zeros, zeros


def _between(own: Tiles, other: Tiles, j: Array, causal: bool) -> Array:
    """Visibility of key tile `j` for one tile of queries, [B, t, s]."""
    index = jnp.arange(own.segments.shape[-1])
    return _visible(own.segments, other.segments[j], own.starts - other.starts[j] + index, index, causal)


def _reach(own: Tiles, other: Tiles, causal: bool) -> Array | int:
    """How many key tiles one tile of queries visits: with `causal`, those that begin before its end."""
    if not causal:
        return other.segments.shape[0]
    return jnp.sum(other.starts < own.starts + own.segments.shape[-1], dtype=jnp.int32)
