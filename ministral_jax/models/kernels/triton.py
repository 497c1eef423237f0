"""Attention on GPUs by JAX's own Pallas kernels in Triton, where nothing better serves: whole rows, all tiles up to a
query's, every key-value head repeated for its queries."""

from __future__ import annotations

import warnings
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from ministral_jax.models.kernels import Asked
from ministral_jax.models.kernels.gpu import capability, unserved_rows

_AMPERE = 8.0


def unserved(asked: Asked) -> str:
    """What is wrong with what is asked for, "" where nothing is."""
    if capability() < _AMPERE:
        return "a GPU of Ampere or later"
    return unserved_rows(asked)


def attend(
    q: Array,
    k: Array,
    v: Array,
    segments: tuple[Int[Array, "B t"], Int[Array, "B s"]],
    index: Int[Array, "1 t"],
    causal: bool,
    interpret: bool = False,
) -> Array:
    """See `models.kernels`. `interpret`: on a CPU, slowly."""
    del index
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # in favour of tokamax, which not every Python has
        from jax.experimental.pallas.ops.gpu.attention import mha

    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    kernel: Any = mha
    return kernel(q, k, v, segments[0], sm_scale=1.0, causal=causal, interpret=interpret)
