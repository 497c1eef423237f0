"""Scaled dot-product attention over packed documents: all scores at once, or tile by tile in memory linear in T.

Letters: K key-value heads, G = H/K query heads for each of them, t queries, s keys, h head width, n tiles.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
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
    T, K = q.shape[1], k.shape[2]
    segments = jnp.zeros((1, T), jnp.int32) if segments is None else segments
    q = q * q.shape[-1] ** -0.5
    if implementation == "auto":
        implementation = "blockwise" if block < T else "xla"
    if implementation == "xla":
        q = rearrange(q, "B t (K G) h -> B K G t h", K=K)
        k, v = (rearrange(x, "B s K h -> B K s h") for x in (k, v))
        p = jax.nn.softmax(_scores(q, k, _visible(segments, segments, 0, causal)))
        return keep(rearrange(jnp.einsum("BKGts,BKsh->BKGth", p.astype(v.dtype), v), "B K G t h -> B t (K G) h"))

    padding = [(0, 0), (0, -T % block)]
    q, k, v = (jnp.pad(x, [*padding, (0, 0), (0, 0)]) for x in (q, k, v))
    segments = jnp.pad(segments, padding, constant_values=-1)
    q = rearrange(q, "B (n t) (K G) h -> n B K G t h", t=block, K=K)
    k, v = (rearrange(x, "B (n s) K h -> n B K s h", s=block) for x in (k, v))
    out: Array = _tiles(q, k, v, rearrange(segments, "B (n t) -> n B t", t=block), causal)
    return rearrange(out, "n B K G t h -> B (n t) (K G) h")[:, :T]


def _visible(own: Array, other: Array, ahead: Array | int, causal: bool) -> Array:
    """Which keys of segments `other` [B, s] the queries of segments `own` [B, t] see: bool [B, t, s]. The first query
    is `ahead` tokens after the first key."""
    same = own[:, :, None] == other[:, None, :]
    if not causal:
        return same
    return same & (ahead + jnp.arange(own.shape[1])[:, None] >= jnp.arange(other.shape[1]))


def _scores(q: Array, k: Array, visible: Array) -> Array:
    """[B, K, G, t, s] in float32 or wider; finite where nothing is visible."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    s = jnp.einsum("BKGth,BKsh->BKGts", q, k, preferred_element_type=wide)
    return jnp.where(visible[:, None, None], s, jnp.finfo(wide).min)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tiles(q: Array, k: Array, v: Array, segments: Array, causal: bool) -> Array:
    """FlashAttention (arXiv 2205.14135, algorithms 1 and 4): softmax by a running maximum and sum over the tiles of a
    row, and a backward pass that computes the scores again from each row's log-sum-exp.

    `q` [n, B, K, G, t, h] scaled, `k` and `v` [n, B, K, t, h], `segments` [n, B, t] -> [n, B, K, G, t, h].
    """
    return _tiles_forward(q, k, v, segments, causal)[0]


def _tiles_forward(q, k, v, segments, causal):
    n, t = q.shape[0], q.shape[4]
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def row(args):
        i, q, own = args

        def tile(j, carry):
            out, top, total = carry
            s = _scores(q, k[j], _visible(own, segments[j], (i - j) * t, causal))
            new = jnp.maximum(top, jnp.max(s, axis=-1, keepdims=True))
            p, shrink = jnp.exp(s - new), jnp.exp(top - new)
            gain = jnp.einsum("BKGts,BKsh->BKGth", p.astype(v.dtype), v[j], preferred_element_type=wide)
            return out * shrink + gain, new, total * shrink + jnp.sum(p, axis=-1, keepdims=True)

        column = (*q.shape[:-1], 1)
        start = jnp.zeros(q.shape, wide), jnp.full(column, jnp.finfo(wide).min), jnp.zeros(column, wide)
        out, top, total = lax.fori_loop(0, i + 1 if causal else n, tile, start)
        return (out / total).astype(q.dtype), top + jnp.log(total)

    out, lse = map(keep, lax.map(row, (jnp.arange(n), q, segments)))
    return out, (q, k, v, segments, out, lse)


def _tiles_backward(causal, saved, d_out):
    q, k, v, segments, out, lse = saved
    n, t, wide = q.shape[0], q.shape[4], lse.dtype
    delta = jnp.sum(d_out.astype(wide) * out, axis=-1, keepdims=True)

    def row(sums, args):
        i, q, own, d_out, lse, delta = args

        # d_k and d_v stand transposed, [h, s]: with the tile on the right of the product XLA need not transpose it.
        def tile(j, carry):
            d_q, d_k, d_v = carry
            p = jnp.exp(_scores(q, k[j], _visible(own, segments[j], (i - j) * t, causal)) - lse)
            d_p = jnp.einsum("BKGth,BKsh->BKGts", d_out, v[j], preferred_element_type=wide)
            d_s = (p * (d_p - delta)).astype(q.dtype)
            d_q += jnp.einsum("BKGts,BKsh->BKGth", d_s, k[j], preferred_element_type=wide)
            d_k_j = jnp.einsum("BKGth,BKGts->BKhs", q, d_s, preferred_element_type=wide)
            d_v_j = jnp.einsum("BKGth,BKGts->BKhs", d_out, p.astype(q.dtype), preferred_element_type=wide)
            return d_q, d_k.at[j].add(d_k_j), d_v.at[j].add(d_v_j)

        start = jnp.zeros(q.shape, wide), *sums
        d_q, *sums = lax.fori_loop(0, i + 1 if causal else n, tile, start)
        return tuple(sums), d_q.astype(q.dtype)

    zeros = jnp.zeros(jnp.swapaxes(k, -1, -2).shape, wide)
    sums, d_q = lax.scan(row, (zeros, zeros), (jnp.arange(n), q, segments, d_out, lse, delta))
    d_k, d_v = (jnp.swapaxes(x, -1, -2).astype(k.dtype) for x in sums)
    return d_q, d_k, d_v, None


_tiles.defvjp(_tiles_forward, _tiles_backward)
