"""Attention on GPUs by cuDNN's fused kernels, through JAX: the documents of whole rows are sequences of their own, so
nothing is computed across them, forward and backward."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int

from ministral_jax.models.kernels import PADDING, Asked, triton
from ministral_jax.models.kernels.gpu import HOPPER, TILE, capability, document_begins, unserved_rows

MOST = 2 * TILE
"""Tokens of a row for each document that it may hold."""
FEWEST = 16


def documents(tokens: int) -> int:
    """How many documents a row may hold; one with more is attended to by `triton`. The kernels begin with so many
    sequences of a whole row each, and their statistics are [B, documents, H, T] in float32."""
    return max(FEWEST, tokens // MOST)


def unserved(asked: Asked) -> str:
    """What is wrong with what is asked for, "" where nothing is."""
    if capability() < HOPPER:
        return "a GPU of Hopper or later, for documents in one row"
    return unserved_rows(asked)


def attend(
    q: Array,
    k: Array,
    v: Array,
    segments: tuple[Int[Array, "B t"], Int[Array, "B s"]],
    index: Int[Array, "1 t"],
    causal: bool,
) -> Array:
    """See `models.kernels`. Documents lie in one piece each, padding behind them."""
    padding, most = segments[0] >= PADDING, documents(q.shape[1])
    first = ~padding & document_begins(segments[0])
    starts, lengths = packed(first, jnp.sum(~padding, axis=1), most)

    def fused(q: Array, k: Array, v: Array) -> Array:
        from jax._src.cudnn import fused_attention_stablehlo as library  # the public function takes no sequences

        mask: Any = library.MaskType.PADDING_CAUSAL if causal else library.MaskType.PADDING
        more = dict(q_seqlen=lengths, kv_seqlen=lengths, q_offsets=starts, kv_offsets=starts, mask_type=mask, scale=1.0)
        # Of padding, which is in no sequence, results and gradients are whatever stood in memory.
        clear = (jnp.where(padding[..., None, None], 0, x) for x in (q, k, v))
        kernel: Any = library.dot_product_attention
        out = kernel(*clear, **more)
        return jnp.where(padding[..., None, None], jnp.repeat(v, q.shape[2] // k.shape[2], axis=2), out)

    def other(q: Array, k: Array, v: Array) -> Array:
        return triton.attend(q, k, v, segments, index, causal)

    return lax.cond(jnp.max(jnp.sum(first, axis=1)) <= most, fused, other, q, k, v)


def packed(
    begins: Bool[Array, "B T"], tokens: Int[Array, " B"], most: int
) -> tuple[Int[Array, "B most+1"], Int[Array, "B most"]]:
    """Where each row's documents begin and their lengths; -1 where there are no more, also in the last column.

    `begins`: at which of a row's `tokens` a document does. The library strings the rows' documents together by what is
    not -1, begins and lengths each by themselves, so where a row ends must not stand among its begins.
    """

    def row(begins: Array, tokens: Array) -> tuple[Array, Array]:
        (starts,) = jnp.nonzero(begins, size=most + 1, fill_value=tokens)
        lengths = jnp.diff(starts)
        found = jnp.append(lengths > 0, False)
        return jnp.where(found, starts, -1).astype(jnp.int32), jnp.where(found[:-1], lengths, -1).astype(jnp.int32)

    return jax.vmap(row)(begins, tokens)
