"""Attention on TPUs by JAX's splash kernels: no scores in memory, and no work for blocks that no document crosses.

There are three kernels: forward, and two backward ones (d_q; d_k and d_v) that compute the scores again from each row's
log-sum-exp. The library's fused backward kernel writes a d_q for every block of keys, so it is not used.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from ministral_jax.models.kernels import KEEP, Asked

LANES = 128
"""Of a TPU's vector register: blocks are multiples of it."""
LARGEST, LARGEST_COMPUTED = 1024, 512
"""Tokens of a block, and keys multiplied at once within one; twice as many do not fit the 16 MiB of vector memory that
a kernel has by default."""


LARGEST_TABLE = 2**16
"""Pairs of blocks whose table fits the scalar memory: the most that have been compiled."""


def unserved(asked: Asked) -> str:
    """What it lacks, "" where it serves. Every head width does."""
    if asked.chunk % LANES:
        return f"rows, or the chunks of one that is cut, of a multiple of {LANES} tokens"
    block = block_of(asked.chunk)
    if (asked.chunk // block) * (asked.keys // block) > LARGEST_TABLE:
        return f"at most {LARGEST_TABLE} pairs of blocks of {block} tokens, by a row's length and mesh.context"
    return ""


def block_of(chunk: int) -> int:
    """Tokens of a block: as many as divide the chunk, `LARGEST` at most."""
    return next(block for block in range(LARGEST, 0, -LANES) if chunk % block == 0)


def attend(
    q: Float[Array, "B t H h"],
    k: Float[Array, "B s K h"],
    v: Float[Array, "B s K h"],
    segments: tuple[Int[Array, "B t"], Int[Array, "B s"]],
    index: Int[Array, "c t/c"],
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "B t H h"]:
    """softmax(q kᵀ) v of each query over the keys of its segment, with `causal` only those not after it.

    A query's own key must be among the keys. The more the segments ascend, the fewer blocks are visited. `index` of the
    queries by the chunks in which they lie, ascending in each; key s is the token s. `interpret`: on a CPU, slowly.
    """
    # Only where it is used, since it takes a third of a second to load.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    block = block_of(index.shape[1])
    flat: Any = index.reshape(-1)
    computed = next(size for size in range(LARGEST_COMPUTED, 0, -LANES) if block % size == 0)
    blocks = library.BlockSizes(block, block, computed, block, block, computed, block, block)

    def row(q: Array, k: Array, v: Array, own: Array, every: Array) -> Array:
        crossed = visited(own, every, flat if causal else None, block)[None]
        by_query, by_key = (
            MaskInfo(_fetched(crossed, axis), None, crossed.astype(jnp.int8), None, flat if causal else None)
            for axis in (2, 1)
        )
        kernel: Any = library.SplashAttentionKernel(
            by_query,
            by_query,
            by_key,
            block_sizes=blocks,
            is_mqa=True,
            save_residuals=False,
            mask_value=library.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=KEEP,
            mask_function=_not_after if causal else None,
            interpret=interpret,
        )
        # The library leaves its backward kernels to one of the two cores of a v4 or v5p; a mapped axis is shared.
        return jax.vmap(kernel, (0, 0, 0, None))(q, k, v, library.SegmentIds(own, every))

    q = rearrange(q, "B t (K G) h -> B K G t h", K=k.shape[2])
    k, v = (rearrange(x, "B s K h -> B K s h") for x in (k, v))
    # Rows have tables of their own, so that mapping makes a loop of them; one row needs none.
    alone = len(q) == 1
    out = row(*(x[0] for x in (q, k, v, *segments)))[None] if alone else jax.vmap(row)(q, k, v, *segments)
    return rearrange(out, "B K G t h -> B t (K G) h")


def _not_after(query: Array, key: Array) -> Array:
    """A function of the module, since the kernels are compiled once for each mask function."""
    return query >= key


def visited(
    own: Int[Array, " t"], every: Int[Array, " s"], index: Int[Array, " t"] | None, block: int
) -> Bool[Array, "n m"]:
    """Which blocks of keys each block of queries meets: those that share a range of segments with it and, with the
    queries' index, do not begin after its end."""
    own, every = (x.reshape(-1, block) for x in (own, every))
    met = (own.min(1)[:, None] <= every.max(1)) & (own.max(1)[:, None] >= every.min(1))
    if index is None:
        return met
    return met & (index.reshape(-1, block)[:, -1:] >= jnp.arange(len(every)) * block)


def _fetched(crossed: Bool[Array, "1 n m"], axis: int) -> Int[Array, "1 n m"]:
    """The block along `axis` to have at each step: its own where it works, else the next that does, else the last."""
    blocks = lax.broadcasted_iota(jnp.int32, crossed.shape, axis)
    last = jnp.max(jnp.where(crossed, blocks, 0), axis, keepdims=True)
    following = lax.cummin(jnp.where(crossed, blocks, crossed.shape[axis]), axis, reverse=True)
    return jnp.minimum(following, last).astype(jnp.int16)
