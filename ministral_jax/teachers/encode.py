"""What is kept of a teacher (`codecs.py`), computed from its final hidden states on the mesh.

As in the loss head (`losses/head.py`), tokens lie over the batch and length axes and V over the others that cut it; the
head is gathered over the axes that cut D once, then the sequence goes through it chunk by chunk, so that no
`[tokens, V]` array outlives one. Arithmetic is float32, or float64 for float64 states.

With V cut, each device finds its own most probable ids and all of them choose among these; for draws, the devices
exchange the masses of blocks of ids, which are smaller than the vocabulary by the size of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from ministral_jax.distributed.placement import Placement, partition
from ministral_jax.losses.chunked import cut_tokens, join_tokens
from ministral_jax.losses.divergences import Axis, logsumexp, maximum, reduce_over
from ministral_jax.losses.head import mesh_axes, whole_head
from ministral_jax.teachers import codecs
from ministral_jax.teachers.codecs import Codec, DenseCodec, HiddenCodec, SampledCodec, TopKCodec

Encoder = Callable[[Array, Array, Array, Array | None], dict[str, Array]]
Keep = Callable[[Array, Array | None, Axis], dict[str, Array]]
Largest = tuple[Float[Array, "B c k"], Int[Array, "B c k"]]


def encoder(codec: Codec, placement: Placement, forced: tuple[int, ...], chunk: int) -> Encoder:
    """A function of a batch, to be traced under `jit`, that gives the arrays for `codecs.pack`.

    Args:
        placement: where tokens and the teacher's head lie.
        forced: ids that are always kept (`topk`), ascending; `codecs.check` has passed them.
        chunk: tokens, over the rows of one device, whose logits are in memory at once.

    Returns:
        `(states [B, T, D'], head [D', V], mask [B, T], uniforms [B, T, S] or None) -> arrays`. Products run in the
        dtype of the states. Arrays are `[B, T, ..]` and lie as the tokens do, or (`curve`) `[B, ..]`; where the mask is
        zero they are zero, even if the states are NaN. `counted` uint8 `[B, T]` is 1 where the mask is not. Else:
            topk: `ids` int32 `[B, T, S]`, the S most probable outside `forced` (of equal ones the lower), ascending;
                `logprobs [B, T, S + f]`, theirs and those of the forced ids; `tail [B, T]`, the log of the mass of all
                other ids, -inf if there are none; `tail_entropy [B, T]` in nats, of those ids' distribution;
                `curve [B, n]`, for each of `curve_sizes` the tail mass that so many entries would leave, summed over
                counted tokens.
            sampled: `draws` int32 `[B, T, S]`, the ids at which the cumulative distribution passes the uniforms,
                ascending as these are; `entropy [B, T]` of the teacher in nats.
            hidden: `states`, and for float8 `scale [B, T]`.
            dense: `logits` float32 `[B, T, V]`.
    """
    mesh, rules = placement.mesh, placement.rules

    def encode(states: Array, head: Array, mask: Array, uniforms: Array | None) -> dict[str, Array]:
        counted = mask != 0
        if isinstance(codec, HiddenCodec):
            return _hidden(codec, states, counted)
        keep, head = _keep(codec, head.shape[1], forced), head.astype(states.dtype)
        if mesh.size == 1:
            return _in_chunks(keep, states, head, counted, uniforms, chunk, None)
        tokens = partition(mask.shape, ("batch", "length"), rules, mesh)
        cut = partition(head.shape, ("embed", "vocab"), rules, mesh)
        over, length = mesh_axes(*tokens), mesh_axes(tokens[1])
        vocab = tuple(axis for axis in mesh_axes(cut[1]) if axis not in over)
        own = P(tuple(axis for axis in mesh_axes(cut[0]) if axis in over), vocab)

        def local(states, head, counted, uniforms):
            arrays = _in_chunks(keep, states, whole_head(head, own), counted, uniforms, chunk, vocab or None)
            return {name: jax.lax.psum(x, length) if name == "curve" and length else x for name, x in arrays.items()}

        rows: Any = P(*tokens, None)
        specs = dict.fromkeys(("ids", "logprobs", "draws"), rows) | {"curve": P(tokens[0]), "logits": P(*tokens, vocab)}
        # Results do not differ over the axes of V, but an all_gather does not tell the type checker so.
        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(rows, own, tokens, rows if uniforms is not None else None),
            out_specs={name: specs.get(name, tokens) for name in _RESULTS[codec.kind]},
            check_vma=False,
        )
        return mapped(states, head, counted, uniforms)

    return encode


_RESULTS = {
    "topk": ("counted", "ids", "logprobs", "tail", "tail_entropy", "curve"),
    "sampled": ("counted", "draws", "entropy"),
    "dense": ("counted", "logits"),
}


def _hidden(codec: HiddenCodec, states: Array, counted: Array) -> dict[str, Array]:
    kept = {"counted": counted.astype(jnp.uint8), "states": jnp.where(counted[..., None], states, 0)}
    if codec.dtype != "float8":
        return kept | {"states": kept["states"].astype(codec.dtype)}
    codes, scale = codecs.encode_float8(kept["states"])
    return kept | {"states": codes, "scale": jnp.where(counted, scale, 0)}


def _keep(codec: TopKCodec | SampledCodec | DenseCodec, vocab: int, forced: tuple[int, ...]) -> Keep:
    """`(logits [B, c, v], uniforms [B, c, S], axis that cuts V) -> arrays [B, c, ..]`."""
    match codec:
        case TopKCodec(entries=entries):
            is_forced = np.zeros(vocab, bool)
            is_forced[list(forced)] = True
            sizes = codecs.curve_sizes(codec, vocab)
            return lambda logits, _, axis: _top_k(logits, entries, sizes, forced, is_forced, axis)
        case SampledCodec():
            block = 2 ** round(math.log2(vocab) / 2)

            def sample(logits, uniforms, axis):
                lse = logsumexp(logits, axis)
                return {"draws": _draw(logits, uniforms, block, axis), "entropy": _entropy(logits, lse, axis)}

            return sample
        case DenseCodec():
            return lambda logits, *_: {"logits": logits.astype(jnp.float32)}


def _in_chunks(keep: Keep, states, head, counted, uniforms, chunk: int, axis: Axis) -> dict[str, Array]:
    dtype = jnp.promote_types(states.dtype, jnp.float32)

    def step(_, arrays):
        states, counted, uniforms = arrays
        only = lambda x: jnp.where(counted.reshape(counted.shape + (1,) * (x.ndim - 2)), x, 0)
        logits = jnp.einsum("bcd,dv->bcv", only(states), head, preferred_element_type=dtype)
        return None, {name: only(x) for name, x in keep(logits, uniforms, axis).items()}

    with jax.named_scope("encode"):
        _, arrays = jax.lax.scan(step, None, cut_tokens((states, counted, uniforms), chunk))
    arrays = {name: join_tokens(x, counted.shape[1]) for name, x in arrays.items()}
    if "curve" in arrays:
        arrays["curve"] = arrays["curve"].sum(axis=1)
    return arrays | {"counted": counted.astype(jnp.uint8)}


# ---- the most probable ids and the rest -----------------------------------------------------------------------------


def _top_k(
    logits: Array, entries: int, sizes: tuple[int, ...], forced: tuple[int, ...], is_forced: np.ndarray, axis: Axis
) -> dict[str, Array]:
    own = logits.shape[-1]
    first = 0 if axis is None else jax.lax.axis_index(axis) * own
    ids = first + jnp.arange(own, dtype=jnp.int32)
    always = jax.lax.dynamic_slice_in_dim(jnp.asarray(is_forced), first, own)
    free = jnp.where(always, -jnp.inf, logits)
    size = min(max(entries, sizes[-1]), len(is_forced) - len(forced))
    values, best = _largest(free, ids, size, axis)
    lse = logsumexp(logits, axis)
    log_probs = values - lse[..., None]

    # The rest is what comes after the last of these. It is summed by itself, as 1 - sum would have no digits left.
    after = (free < values[..., -1:]) | ((free == values[..., -1:]) & (ids > best[..., -1:]))
    rest = jnp.where(after & ~always, logits, -jnp.inf)
    rest_lse = logsumexp(rest, axis)
    rest_entropy = _entropy(rest, rest_lse, axis)
    groups = jnp.concatenate([log_probs, (rest_lse - lse)[..., None]], axis=-1)
    tail = jax.nn.logsumexp(groups[..., entries:], axis=-1)
    share = jnp.exp(groups[..., -1] - jnp.where(tail > -jnp.inf, tail, 0))
    # H(tail) = H(its ids, the rest as one of them) + P(rest | tail) H(rest)
    tail_entropy = _entropy(groups[..., entries:], tail, None) + share * rest_entropy
    left = [jnp.exp(jax.nn.logsumexp(groups[..., min(s, size) :], axis=-1)) for s in sizes]

    kept, kept_log_probs = jax.lax.sort((best[..., :entries], log_probs[..., :entries]), num_keys=1)
    forced_log_probs = _at(jnp.asarray(forced, jnp.int32) - first, logits, axis) - lse[..., None]
    return {
        "ids": kept,
        "logprobs": jnp.concatenate([kept_log_probs, forced_log_probs], axis=-1),
        "tail": tail,
        "tail_entropy": tail_entropy,
        "curve": jnp.stack(left, axis=-1),
    }


def _largest(values: Float[Array, "B c v"], ids: Int[Array, " v"], size: int, axis: Axis) -> Largest:
    """The `size` largest values over all devices, descending, and their ids; of equal ones the lower id."""
    found, index = _largest_here(values, min(size, values.shape[-1]))
    best = ids[0] + index
    if axis is not None:
        # Devices come in the order of their ids, and top_k takes the first of equal ones.
        found, best = (jax.lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True) for x in (found, best))
        found, index = jax.lax.top_k(found, size)
        best = jnp.take_along_axis(best, index, axis=-1)
    return found, best


def _largest_here(values: Float[Array, "B c v"], size: int) -> Largest:
    """`jax.lax.top_k`, without its sort of all values: the k largest lie in the k blocks whose maxima are the largest.

    Of equal values the lower index still comes first: every block that precedes a value's own, by its maximum and then
    by its place, has a value that precedes it.
    """
    block = 2 ** max(0, round(math.log2(values.shape[-1] / size) / 2))
    blocks = _blocks(values, block, -jnp.inf)
    which = jnp.sort(jax.lax.top_k(blocks.max(axis=-1), size)[1], axis=-1)
    within = jnp.take_along_axis(blocks, which[..., None], axis=2)
    found, index = jax.lax.top_k(rearrange(within, "b c n k -> b c (n k)"), size)
    return found, jnp.take_along_axis(which, index // block, axis=-1) * block + index % block


def _blocks(values: Float[Array, "B c v"], block: int, fill: float) -> Float[Array, "B c n k"]:
    """Blocks of k = `block`, the last one padded by `fill`."""
    padded = jnp.pad(values, [(0, 0), (0, 0), (0, -values.shape[-1] % block)], constant_values=fill)
    return rearrange(padded, "b c (n k) -> b c n k", k=block)


def _at(index: Int[Array, " f"], logits: Float[Array, "B c v"], axis: Axis) -> Float[Array, "B c f"]:
    """Logits at indices that count from the first column of this device."""
    here = (index >= 0) & (index < logits.shape[-1])
    return reduce_over(jax.lax.psum, jnp.where(here, logits[..., jnp.where(here, index, 0)], 0), axis)


def _entropy(logits: Float[Array, "B c v"], lse: Float[Array, "B c"], axis: Axis) -> Float[Array, "B c"]:
    """-Σ p log p, with p = exp(logits - lse); of nothing it is 0. Dividing by Σ p takes out the rounding of `lse`."""
    lse = jnp.where(lse > -jnp.inf, lse, 0)[..., None]
    p = jnp.exp(logits - lse)
    total = reduce_over(jax.lax.psum, jnp.sum(jnp.where(p > 0, p * (lse - logits), 0), axis=-1), axis)
    mass = reduce_over(jax.lax.psum, jnp.sum(p, axis=-1), axis)
    return total / jnp.where(mass > 0, mass, 1)


# ---- draws ----------------------------------------------------------------------------------------------------------


def _draw(
    logits: Float[Array, "B c v"], uniforms: Float[Array, "B c S"], block: int, axis: Axis
) -> Int[Array, "B c S"]:
    """Ids at which the cumulative distribution over V passes the uniforms.

    In two levels, blocks of ids and ids of a block, so that float32 sums are short. Weights are taken relative to the
    largest logit, which is the same however V is cut, and so are the sums over a block where it divides the device's V.
    """
    own = logits.shape[-1]
    weights = _blocks(jnp.exp(logits - maximum(logits, axis)[..., None]), block, 0)
    masses, count = weights.sum(axis=-1), weights.shape[2]
    if axis is not None:
        masses = jax.lax.all_gather(masses, axis, axis=2, tiled=True)
    which, within = inverse_cdf(masses[:, :, None], uniforms)
    here = which // count == (0 if axis is None else jax.lax.axis_index(axis))
    of_block = jnp.take_along_axis(weights, (which % count)[..., None], axis=2)
    inside, _ = inverse_cdf(of_block, within)
    ids = (which // count) * own + (which % count) * block + inside
    return ids if axis is None else jax.lax.psum(jnp.where(here, ids, 0), axis)


def inverse_cdf(
    weights: Float[Array, "*B #S n"], u: Float[Array, "*B S"]
) -> tuple[Int[Array, "*B S"], Float[Array, "*B S"]]:
    """Where u in [0, 1) falls among the cumulative weights as shares of their sum: the index, always of a positive
    weight, and the place in [0, 1] between its ends."""
    ends = jnp.cumsum(weights, axis=-1)
    ends = jnp.concatenate([jnp.zeros_like(ends[..., :1]), ends], axis=-1)
    u = u * ends[..., -1]
    # Rounded sums need not ascend strictly: the first positive weight that ends beyond u, or the last positive one.
    position, positive = jnp.arange(weights.shape[-1], dtype=jnp.int32), weights > 0
    last = jnp.max(jnp.where(positive, position, 0), axis=-1, keepdims=True)
    found = positive & (ends[..., 1:] > u[..., None])
    index = jnp.min(jnp.where(found, position, last), axis=-1)
    ends = jnp.broadcast_to(ends, (*u.shape, ends.shape[-1]))
    start = jnp.take_along_axis(ends, index[..., None], axis=-1)[..., 0]
    stop = jnp.take_along_axis(ends, index[..., None] + 1, axis=-1)[..., 0]
    return index, jnp.clip((u - start) / jnp.where(stop > start, stop - start, 1), 0, 1)
