"""What the kernels of GPUs have in common: which GPU it is, and where the documents of a row begin and end."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int

from ministral_jax.models.kernels import Asked

HOPPER = 9.0
"""Compute capability of H100 and H200; B200 has 10.0, A100 8.0."""
TILE = 128
"""Rows are multiples of it, so that no kernel needs to pad them."""


def is_here() -> bool:
    """Whether this process has a GPU; else GPUs are those that are planned for."""
    return jax.devices()[0].platform == "gpu"


def capability() -> float:
    """Of the GPU that is here, or of Hopper where none is: what is planned for is not older."""
    if not is_here():
        return HOPPER
    device: Any = jax.devices()[0]
    text = str(getattr(device, "compute_capability", ""))
    return float(text) if text.replace(".", "", 1).isdecimal() else 0.0  # AMD's has letters, and its kernels are others


def unserved_numbers(asked: Asked) -> str:
    """What is wrong with a number format or a head width, "" where nothing is."""
    if asked.dtype not in ("bfloat16", "float16"):
        return "compute.dtype: bfloat16"
    if asked.head_width % 8 or asked.head_width > 256:
        return "heads of a width of up to 256, a multiple of 8"
    return "" if asked.chunk % TILE == 0 else f"rows, or the chunks of one that is cut, of a multiple of {TILE} tokens"


def unserved_rows(asked: Asked) -> str:
    """`unserved_numbers` of a kernel that takes whole rows alone."""
    return "rows that no mesh cuts (mesh.context 1)" if asked.chunk < asked.keys else unserved_numbers(asked)


def document_begins(segments: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """At which tokens a segment does."""
    return jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], 1)


def first_keys(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """For every token where its document begins. Documents lie in one piece each."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    return lax.cummax(jnp.where(document_begins(segments), index, 0), axis=1)


def end_keys(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """For every token where the next document begins."""
    return segments.shape[1] - jnp.flip(first_keys(jnp.flip(segments, 1)), 1)
