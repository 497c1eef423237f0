"""Attention on GPUs by tokamax's Mosaic kernels (extra `gpu`, Python 3.12): every query has a range of keys.

Forward, tiles outside of a row of tiles' ranges are passed over. On Hopper the backward kernels pass over what is after
a query, where the row is whole, and only mask the rest: documents much shorter than rows are for `cudnn`.
"""

from __future__ import annotations

import importlib.util
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from ministral_jax.models.kernels import KEEP, Asked
from ministral_jax.models.kernels.gpu import HOPPER, capability, end_keys, first_keys, is_here, unserved_numbers

_NEXT = 11.0
"""From this compute capability on there are no kernels yet."""


def unserved(asked: Asked) -> str:
    """What is wrong with what is asked for, "" where nothing is."""
    if is_here() and importlib.util.find_spec("tokamax") is None:  # what is planned for has what it needs
        return "tokamax (Python 3.12 and the extra `gpu`)"
    if not HOPPER <= capability() < _NEXT:
        return "a GPU of Hopper or Blackwell, as its backward kernels do"
    return unserved_numbers(asked)


def attend(
    q: Float[Array, "B t H h"],
    k: Float[Array, "B s K h"],
    v: Float[Array, "B s K h"],
    segments: tuple[Int[Array, "B t"], Int[Array, "B s"]],
    index: Int[Array, "c t/c"],
    causal: bool,
) -> Float[Array, "B t H h"]:
    """See `models.kernels`. Documents lie in one piece each."""
    every, flat = segments[1], index.reshape(-1)
    first = jnp.take(first_keys(every), flat, axis=1)[:, None]
    if causal and index.shape == (1, k.shape[1]):
        return _ranges(q, k, v, first, None, True)
    end = jnp.broadcast_to(flat + 1, first.shape) if causal else jnp.take(end_keys(every), flat, axis=1)[:, None]
    return _ranges(q, k, v, first, end, False)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _ranges(
    q: Array, k: Array, v: Array, first: Int[Array, "B 1 t"], end: Int[Array, "B 1 t"] | None, causal: bool
) -> Array:
    """Attention to the keys from `first` up to `end`, with `causal` up to the query. The library's own rule keeps
    nothing by name, so a backward pass that recomputes would run the forward kernel again."""
    return _forward(q, k, v, first, end, causal)[0]


def _forward(
    q: Array, k: Array, v: Array, first: Array, end: Array | None, causal: bool
) -> tuple[Array, tuple[Any, ...]]:
    arguments, how = _bound(q, k, v, first, end, causal)
    out, statistics = _kernel()(*arguments, **how, return_residuals=True)
    out, statistics = jax.tree.map(lambda x: checkpoint_name(x, KEEP), (out, statistics))
    return out, (q, k, v, first, end, out, statistics)


def _backward(causal: bool, saved: tuple[Any, ...], d_out: Array) -> tuple[Array | None, ...]:
    q, k, v, first, end, out, statistics = saved
    arguments, how = _bound(q, k, v, first, end, causal)
    found = _kernel().vjp(statistics, out, d_out, *arguments, **how)
    return found["q"], found["k"], found["v"], None, None


_ranges.defvjp(_forward, _backward)


def _bound(
    q: Array, k: Array, v: Array, first: Array, end: Array | None, causal: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments that forward and backward kernels are called with."""
    from tokamax._src.ops.attention.base import Mask  # pyright: ignore[reportMissingImports]

    bound = _kernel().bind(q, k, v, logits_scale=1.0, mask=Mask(k_start=first, k_end=end, is_causal=causal))
    how = dict(bound.kwargs)
    del how["return_residuals"]
    return bound.args, how


@cache
def _kernel() -> Any:
    # The public function takes no first keys.
    from tokamax._src.ops.attention import pallas_mosaic_gpu  # pyright: ignore[reportMissingImports]

    return pallas_mosaic_gpu.PallasMosaicGpuFlashAttention()
