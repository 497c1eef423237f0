"""Scaled dot-product attention over packed documents, one signature for every implementation."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array


def attend(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None = None,
    *,
    causal: bool = True,
    implementation: str = "auto",
    block: int = 512,
) -> Array:
    """softmax(q kᵀ / √h) v within a segment, softmax in float32 or wider.

    `q` [B, T, H, h], `k` and `v` [B, T, K, h] with K dividing H (query head n reads key head n // (H/K)), `segments`
    [B, T] int or None for one segment per row. Token t sees the tokens of its own segment, with `causal` only those at
    index <= t. It always sees itself, so padding rows stay finite. Returns [B, T, H, h] in q's dtype.

    "xla" holds all H x T x T scores; "blockwise" holds `block` x T of them and recomputes them in the backward pass, so
    its memory is linear in T; "auto" takes blockwise once T > block.
    """
    T, K = q.shape[1], k.shape[2]
    q = rearrange(q * q.shape[-1] ** -0.5, "B T (K G) h -> B T K G h", K=K)
    if implementation == "xla" or (implementation == "auto" and T <= block):
        mask = visible(jnp.arange(T), jnp.arange(T), segments, segments, causal)
        out = weighted_values(q, k, v, mask)
    else:
        out = blockwise(q, k, v, segments, causal, min(block, T))
    return rearrange(out, "B T K G h -> B T (K G) h")


def visible(q_index: Array, k_index: Array, q_segments: Array | None, k_segments: Array | None, causal: bool):
    """Which keys a query may see: bool, broadcastable to [B, Tq, Tk]; None when all of them."""
    masks = []
    if causal:
        masks.append(q_index[:, None] >= k_index[None, :])
    if k_segments is not None:
        masks.append(q_segments[:, :, None] == k_segments[:, None, :])
    return None if not masks else masks[0] if len(masks) == 1 else masks[0] & masks[1]


def weighted_values(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """`q` [B, Tq, K, G, h] against `k`, `v` [B, Tk, K, h] under `mask` [B or 1, Tq, Tk]."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=wide)
    if mask is not None:
        mask = mask if mask.ndim == 3 else mask[None]
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(wide).min)
    return jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores).astype(v.dtype), v)


def blockwise(q: Array, k: Array, v: Array, segments: Array | None, causal: bool, block: int) -> Array:
    """`weighted_values` of one query block after another; T is padded up to whole blocks."""
    B, T = q.shape[:2]
    count = -(-T // block)
    padding = [(0, 0), (0, count * block - T)]
    index = jnp.arange(T)
    blocks = [
        rearrange(jnp.pad(q, padding + [(0, 0)] * 3), "B (n c) K G h -> n B c K G h", n=count),
        jnp.arange(count * block).reshape(count, block),
    ]
    if segments is not None:
        blocks.append(rearrange(jnp.pad(segments, padding), "B (n c) -> n B c", n=count))

    @partial(jax.checkpoint, prevent_cse=False)
    def one(block):
        q_block, q_index, *q_segments = block
        mask = visible(q_index, index, q_segments[0] if q_segments else None, segments, causal)
        return weighted_values(q_block, k, v, mask)

    out = jax.lax.map(one, tuple(blocks))
    return rearrange(out, "n B c K G h -> B (n c) K G h")[:, :T]
