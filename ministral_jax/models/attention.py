"""Scaled dot-product attention over packed documents: all scores at once, tile by tile in memory linear in T, or by a
kernel of the platform (`models.kernels`).

Letters: K key-value heads, G = H/K query heads for each of them, t queries, s keys, h head width, n and m tiles.

Queries and keys may be parts of a longer sequence: `starts` is then where in it the equal chunks begin that they hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from ministral_jax.distributed.axes import platform
from ministral_jax.errors import UserError
from ministral_jax.models.kernels import KEEP, PADDING, Asked, cudnn, mosaic, splash, triton

CPU_BLOCK = 64  # the fastest of 64, 128, 256 and 512 in `benchmarks/attention_cpu.py`'s cases: tiles stay in a cache
BEYOND = -1  # the segment of what fills a chunk's last tile
Queries = Float[Array, "B T H h"]
KeyValues = Float[Array, "B T K h"]
Implementation = Literal["auto", "xla", "blockwise", "splash", "cudnn", "mosaic", "triton"]
KERNELS: dict[Implementation, tuple[str, ModuleType]] = {
    "splash": ("tpu", splash),
    "cudnn": ("gpu", cudnn),
    "mosaic": ("gpu", mosaic),
    "triton": ("gpu", triton),
}
"""The platform of each kernel, and its module; "auto" takes the first of a platform that serves the shapes."""


@dataclass(frozen=True)
class AttentionSpec:
    """What sees what, and how it is computed.

    `implementation`: "xla" holds the T x T scores of every head, "blockwise" one `block` x `block` tile of them at a
    time, from the first tile that holds a document of the queries on, to the diagonal or the last one that does;
    "splash" is the kernel of TPUs, "cudnn", "mosaic" and "triton" are those of GPUs; "auto" is the first kernel of the
    platform that serves, else blockwise once T > block, on CPUs by tiles of at most `CPU_BLOCK`. On a mesh
    (`attend_on_mesh`): `context` says how the tokens of a row meet where it is cut, `heads` is the logical axis of the
    query heads, and the length is cut into multiples of `multiple_of`.
    """

    causal: bool = True
    implementation: Implementation = "auto"
    block: int = 128
    context: Literal["all_gather", "ring"] = "all_gather"
    heads: str = "heads"
    multiple_of: int = 2


def keep(x: Array) -> Array:
    """Mark a result of attention, which `Compute.remat` may keep until the backward pass."""
    return checkpoint_name(x, KEEP)


def attend(
    q: Queries,
    k: KeyValues,
    v: KeyValues,
    segments: Int[Array, "B T"] | None = None,
    spec: AttentionSpec = AttentionSpec(),
) -> Queries:
    """softmax(q kᵀ / √h) v within a segment, softmax in float32 or wider; in q's dtype.

    K divides H: query head n reads key head n // (H/K). `segments` are >= 0, or None for one segment per row. Token t
    sees the tokens of its own segment, with `spec.causal` only those at index <= t. Padding, segment 0, sees itself
    alone: it stays finite and costs no more than its length.
    """
    segments = jnp.ones((1, q.shape[1]), jnp.int32) if segments is None else segments
    whole = Part(segments, np.zeros(1, np.int32))
    return attend_parts(q, k, v, whole, whole, spec)


def attend_cached(
    q: Float[Array, "B t H h"],
    k: Float[Array, "B t K h"],
    v: Float[Array, "B t K h"],
    past: tuple[Float[Array, "B K S h"], Float[Array, "B K S h"]],
    segments: tuple[Int[Array, "B S"], Int[Array, "B t"]],
) -> Float[Array, "B t H h"]:
    """`attend` for the few tokens that follow others, whose keys and values are `past`.

    `segments` are those of the past and of the tokens. A token sees its segment's past and, of the tokens, what stands
    before it.
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
    """What tokens are: their segments, and where in the whole sequence the equal chunks that they form begin."""

    segments: Int[Array, "B T"]
    starts: Int[Array, " c"] | Int[np.ndarray, " c"]

    @property
    def indices(self) -> Int[Array, " T"]:
        """Of every token in the whole sequence."""
        return rearrange(_every(self.starts, self.segments.shape[1] // len(self.starts), 1), "c t -> (c t)")

    @property
    def apart(self) -> Int[Array, "B T"]:
        """The segments, still ascending, where each token of padding has one of its own."""
        return jnp.where(self.segments > 0, self.segments, PADDING + self.indices)


def attend_parts(q: Queries, k: KeyValues, v: KeyValues, queries: Part, keys: Part, spec: AttentionSpec) -> Queries:
    """`attend` for tokens of one sequence and others whose keys are given in ascending order."""
    K, chunk = k.shape[2], q.shape[1] // len(queries.starts)
    q = q * q.shape[-1] ** -0.5
    chosen = chosen_implementation(spec, platform(), Asked(chunk, k.shape[1], q.shape[-1], q.dtype.name))
    if chosen in KERNELS:
        own, every = (jnp.broadcast_to(part.apart, x.shape[:2]) for part, x in ((queries, q), (keys, k)))
        return KERNELS[chosen][1].attend(q, k, v, (own, every), queries.indices.reshape(-1, chunk), spec.causal)
    if chosen == "xla":
        q = rearrange(q, "B t (K G) h -> B K G t h", K=K)
        k, v = (rearrange(x, "B s K h -> B K s h") for x in (k, v))
        visible = _visible(queries.apart, keys.apart, queries.indices, keys.indices, spec.causal)
        p = jax.nn.softmax(_scores(q, k, visible))
        return keep(rearrange(jnp.einsum("BKGts,BKsh->BKGth", p.astype(v.dtype), v), "B K G t h -> B t (K G) h"))
    out: Array = _tiles(*into_tiles(q, k, v, queries, keys, chosen_block(spec, platform())), spec.causal)
    return from_tiles(out, q.shape[1], len(queries.starts))


def chosen_implementation(spec: AttentionSpec, platform: str, asked: Asked) -> Implementation:
    """What "auto" is on devices of a platform.

    Raises:
        UserError: a kernel is asked for that does not serve this.
    """
    around = spec.context == "ring" and asked.chunk < asked.keys
    if spec.implementation in KERNELS:
        its, kernel = KERNELS[spec.implementation]
        wanted = f"{its} devices" if its != platform else kernel.unserved(asked)
        wanted = "compute.context: all_gather" if around and not wanted else wanted
        if wanted:
            unit = "tokens" if spec.causal else "patches"
            raise UserError(
                f"compute.attention = {spec.implementation} needs {wanted}; here are {platform} devices, chunks of "
                f"{asked.chunk} {unit} and compute.context: {spec.context}, which compute.attention: auto serves"
            )
    if spec.implementation != "auto":
        return spec.implementation
    for name in () if around else KERNELS:
        its, kernel = KERNELS[name]
        if its == platform and not kernel.unserved(asked):
            return name
    return "blockwise" if spec.block < asked.keys else "xla"


def check_attention(spec: AttentionSpec, platform: str, asked: Asked, where: str) -> None:
    """Raise `UserError` when the setting `where`.compute.attention names a kernel that does not serve this."""
    try:
        chosen_implementation(spec, platform, asked)
    except UserError as fault:
        raise UserError(f"{where}.{fault}") from None


def chosen_block(spec: AttentionSpec, platform: str) -> int:
    """Tokens of a tile: of "auto" on CPUs at most `CPU_BLOCK`."""
    return min(spec.block, CPU_BLOCK) if spec.implementation == "auto" and platform == "cpu" else spec.block


class Tiles(NamedTuple):
    """Tiles of a `Part`: the segments `apart`, where each tile begins, and its first and last segment."""

    segments: Int[Array, "n B t"]
    starts: Int[Array, " n"]
    first: Int[Array, "n B"]
    last: Int[Array, "n B"]


QueryTiles = Float[Array, "n B K G t h"]
KeyTiles = Float[Array, "m B K t h"]
QueryTile = Float[Array, "B K G t h"]
Column = Float[Array, "B K G t 1"]


def into_tiles(
    q: Queries, k: KeyValues, v: KeyValues, queries: Part, keys: Part, block: int
) -> tuple[QueryTiles, KeyTiles, KeyTiles, Tiles, Tiles]:
    """Arrays by tiles and what these are; each chunk is padded to whole tiles."""

    def cut(x: Array, part: Part, pad: int) -> Array:
        x = rearrange(x, "B (c t) ... -> B c t ...", c=len(part.starts))
        x = jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % block)] + [(0, 0)] * (x.ndim - 3), constant_values=pad)
        return rearrange(x, "B c (n t) ... -> (c n) B t ...", t=block)

    def tiles(part: Part) -> Tiles:
        segments = cut(part.apart, part, BEYOND)
        starts = _every(part.starts, len(segments) // len(part.starts), block).reshape(-1)
        real = segments != BEYOND
        first = jnp.min(segments, axis=-1, where=real, initial=jnp.iinfo(segments.dtype).max)
        return Tiles(segments, starts, first, jnp.max(segments, axis=-1, where=real, initial=BEYOND))

    q = rearrange(cut(q, queries, 0), "n B t (K G) h -> n B K G t h", K=k.shape[2])
    k, v = (rearrange(cut(x, keys, 0), "n B s K h -> n B K s h") for x in (k, v))
    return q, k, v, tiles(queries), tiles(keys)


def from_tiles(out: QueryTiles, tokens: int, chunks: int) -> Queries:
    """Without the padding."""
    out = rearrange(out, "(c n) B K G t h -> B c (n t) (K G) h", c=chunks)[:, :, : tokens // chunks]
    return rearrange(out, "B c t H h -> B (c t) H h")


def _every(starts: Array | np.ndarray, count: int, step: int) -> Int[Array, "c count"]:
    """`count` indices from each start on, `step` apart."""
    return jnp.asarray(starts)[:, None] + jnp.arange(count, dtype=jnp.int32) * step


def _visible(
    queries: Int[Array, "B t"],
    keys: Int[Array, "B s"],
    index: Int[Array, " t"],
    key_index: Int[Array, " s"],
    causal: bool,
) -> Bool[Array, "B t s"]:
    """Which keys the queries see, from the segments of both and their places in the sequence."""
    same = queries[:, :, None] == keys[:, None, :]
    if not causal:
        return same
    return same & (index[:, None] >= key_index)


def _scores(q: QueryTile, k: Float[Array, "B K s h"], visible: Bool[Array, "B t s"]) -> Float[Array, "B K G t s"]:
    """In float32 or wider; finite where nothing is visible."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    s = jnp.einsum("BKGth,BKsh->BKGts", q, k, preferred_element_type=wide)
    return jnp.where(visible[:, None, None], s, jnp.finfo(wide).min)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _tiles(q: QueryTiles, k: KeyTiles, v: KeyTiles, queries: Tiles, keys: Tiles, causal: bool) -> QueryTiles:
    """FlashAttention (arXiv 2205.14135, algorithms 1 and 4) of scaled queries: softmax by a running maximum and sum
    over the tiles of a row, and a backward pass that computes the scores again from each row's log-sum-exp."""
    return _tiles_forward(q, k, v, queries, keys, causal)[0]


def _tiles_forward(
    q: QueryTiles, k: KeyTiles, v: KeyTiles, queries: Tiles, keys: Tiles, causal: bool
) -> tuple[QueryTiles, tuple[Any, ...]]:
    def row(tile: tuple[QueryTile, Tiles]) -> tuple[QueryTile, Column]:
        return softmax_result(attend_row(empty_softmax(tile[0]), *tile, (k, v, keys), causal), q.dtype)

    out, lse = map(keep, lax.map(row, (q, queries)))
    return out, (q, k, v, queries, keys, out, lse)


def _tiles_backward(causal: bool, saved: tuple[Any, ...], d_out: QueryTiles) -> tuple[Any, ...]:
    q, k, v, queries, keys, out, lse = saved

    def row(sums: KeyGradients, tile: RowCotangents) -> tuple[KeyGradients, QueryTile]:
        return attend_row_backward(sums, tile, (k, v, keys), causal)

    sums, d_q = lax.scan(row, transposed_zeros(k), (q, queries, d_out, lse, delta(d_out, out, lse)))
    return d_q.astype(q.dtype), *(jnp.swapaxes(x, -1, -2).astype(k.dtype) for x in sums), None, None


_tiles.defvjp(_tiles_forward, _tiles_backward)


# ---- one row of tiles -----------------------------------------------------------------------------------------------

OnlineSoftmax = tuple[QueryTile, Column, Column]
"""Output, maximum and sum over the keys until now."""
Keys = tuple[KeyTiles, KeyTiles, Tiles]
"""Keys, values and what they are."""
KeyGradients = tuple[Float[Array, "m B K h t"], Float[Array, "m B K h t"]]
"""Of keys and values, transposed: with the tile on the right of the product XLA need not transpose it."""
RowCotangents = tuple[QueryTile, Tiles, QueryTile, Column, Column]
"""Of one tile of queries: they, what they are, the output's cotangent, log-sum-exp and `delta`."""


def empty_softmax(q: QueryTile) -> OnlineSoftmax:
    """Over no key; made from the data they vary over the same `shard_map` axes."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    column = q[..., :1]
    return (
        jnp.zeros_like(q, wide),
        jnp.full_like(column, jnp.finfo(wide).min, wide),
        jnp.zeros_like(column, wide),
    )


def softmax_result(softmax: OnlineSoftmax, dtype: DTypeLike) -> tuple[QueryTile, Column]:
    """The output and the log-sum-exp of its scores."""
    out, top, total = softmax
    return (out / total).astype(dtype), top + jnp.log(total)


def attend_row(softmax: OnlineSoftmax, q: QueryTile, queries: Tiles, keys: Keys, causal: bool) -> OnlineSoftmax:
    """What one tile of queries adds up from keys and values."""
    k, v, tiles = keys

    def tile(j: Array, carry: OnlineSoftmax) -> OnlineSoftmax:
        out, top, total = carry
        s = _scores(q, k[j], _tile_visible(queries, tiles, j, causal))
        new = jnp.maximum(top, jnp.max(s, axis=-1, keepdims=True))
        p, shrink = jnp.exp(s - new), jnp.exp(top - new)
        gain = jnp.einsum("BKGts,BKsh->BKGth", p.astype(v.dtype), v[j], preferred_element_type=out.dtype)
        return out * shrink + gain, new, total * shrink + jnp.sum(p, axis=-1, keepdims=True)

    return lax.fori_loop(*_visited(queries, tiles, causal), tile, softmax)


def attend_row_backward(
    sums: KeyGradients, row: RowCotangents, keys: Keys, causal: bool
) -> tuple[KeyGradients, QueryTile]:
    """The sums of d_k and d_v with those of one tile of queries added, and its d_q."""
    (q, queries, d_out, lse, delta), (k, v, tiles) = row, keys
    wide = lse.dtype

    def tile(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        d_q, d_k, d_v = carry
        p = jnp.exp(_scores(q, k[j], _tile_visible(queries, tiles, j, causal)) - lse)
        d_p = jnp.einsum("BKGth,BKsh->BKGts", d_out, v[j], preferred_element_type=wide)
        d_s = (p * (d_p - delta)).astype(q.dtype)
        d_q += jnp.einsum("BKGts,BKsh->BKGth", d_s, k[j], preferred_element_type=wide)
        d_k_j = jnp.einsum("BKGth,BKGts->BKhs", q, d_s, preferred_element_type=wide)
        d_v_j = jnp.einsum("BKGth,BKGts->BKhs", d_out, p.astype(q.dtype), preferred_element_type=wide)
        return d_q, d_k.at[j].add(d_k_j), d_v.at[j].add(d_v_j)

    d_q, d_k, d_v = lax.fori_loop(*_visited(queries, tiles, causal), tile, (jnp.zeros_like(q, wide), *sums))
    return (d_k, d_v), d_q


def delta(d_out: QueryTiles, out: QueryTiles, lse: Float[Array, "n B K G t 1"]) -> Float[Array, "n B K G t 1"]:
    """rowsum(dO ∘ O), which the backward pass subtracts from dP (FlashAttention, algorithm 4)."""
    return jnp.sum(d_out.astype(lse.dtype) * out, axis=-1, keepdims=True)


def transposed_zeros(k: KeyTiles) -> KeyGradients:
    zeros = jnp.zeros_like(jnp.swapaxes(k, -1, -2), jnp.promote_types(k.dtype, jnp.float32))
    return zeros, zeros


def _tile_visible(queries: Tiles, keys: Tiles, j: Array, causal: bool) -> Bool[Array, "B t s"]:
    """Of key tile `j` for one tile of queries."""
    index = jnp.arange(queries.segments.shape[-1])
    return _visible(queries.segments, keys.segments[j], queries.starts - keys.starts[j] + index, index, causal)


def _visited(queries: Tiles, keys: Tiles, causal: bool) -> tuple[Array, Array]:
    """From which key tile to before which one tile of queries visits them: those that share a range of segments with it
    in any row and, with `causal`, begin before its end."""
    visited = jnp.any((keys.first <= queries.last) & (queries.first <= keys.last), axis=-1)
    if causal:
        visited &= keys.starts < queries.starts + queries.segments.shape[-1]
    index = jnp.arange(len(visited), dtype=jnp.int32)
    begin = jnp.min(index, where=visited, initial=len(visited))
    return begin, jnp.max(index + 1, where=visited, initial=0)
