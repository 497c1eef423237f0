"""Rotary positions: plain, YaRN and 2-D axial, and the position temperature of long contexts.

All rotations use the Hugging Face "half" layout: the pair of feature i is i + h/2.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ministral_jax.models.spec import RopeSpec

Angles = tuple[Float[Array, "B T h/2"], Float[Array, "B T h/2"]]
"""cos and sin of the angle by which each pair of features is rotated; those of YaRN times its attention factor."""


def frequencies(width: int, theta: float) -> Float[np.ndarray, " width/2"]:
    """theta^(-2i/width) for i < width/2, radians per position, float64 (RoFormer, arXiv 2104.09864, section 3.2.2)."""
    return theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)


def yarn_frequencies(width: int, rope: RopeSpec) -> Float[np.ndarray, " width/2"]:
    """Frequencies of the decoder, float64; plain RoPE when `rope.yarn_factor == 1`.

    YaRN (arXiv 2309.00071, section 3.2, "NTK-by-parts"): dimensions that rotate more than `beta_fast` times within
    the original context keep their frequency, those that rotate less than `beta_slow` times are slowed by the factor,
    with a linear ramp between. The ramp's ends are rounded outwards as `transformers` does.
    """
    plain = frequencies(width, rope.theta)
    if rope.yarn_factor == 1:
        return plain
    length = _original(rope)

    def dimension(rotations: float) -> float:
        return width * math.log(length / (2 * math.pi * rotations)) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)
    return plain * (ramp / rope.yarn_factor + 1 - ramp)


def _original(rope: RopeSpec) -> int:
    assert rope.original_context is not None, "RopeSpec requires it"
    return rope.original_context


def position_scale(positions: Int[Array, "B T"], rope: RopeSpec, dtype: DTypeLike) -> Float[Array, "B T"] | None:
    """s(p) = 1 + beta ln(1 + floor(p / L0)): what queries are multiplied by; None where it is always 1."""
    if rope.temperature_beta == 0:
        return None
    return 1 + rope.temperature_beta * jnp.log1p((positions // _original(rope)).astype(dtype))


def rope_angles(positions: Int[Array, "B T"], rope: RopeSpec, width: int, dtype: DTypeLike) -> Angles:
    """Of the decoder. YaRN's constant temperature (section 3.4), where it is not replaced by `position_scale`, lies in
    the attention factor, which multiplies queries and keys."""
    angles = positions[..., None].astype(dtype) * jnp.asarray(yarn_frequencies(width, rope), dtype)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def axial_angles(
    rows: Int[Array, "B P"], columns: Int[Array, "B P"], theta: float, width: int, dtype: DTypeLike
) -> Angles:
    """Of patches: even frequencies by row, odd ones by column
    (Pixtral, arXiv 2410.07073, section 2.2)."""
    base = jnp.asarray(frequencies(width, theta), dtype)
    by_row, by_column = rows[..., None] * base[0::2], columns[..., None] * base[1::2]
    angles = jnp.concatenate([by_row, by_column], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Float[Array, "B T H h"], angles: Angles) -> Float[Array, "B T H h"]:
    """Rotate the pairs (i, i + h/2) of `x`; in its dtype."""
    cos, sin = (part[:, :, None] for part in angles)
    a, b = jnp.split(x.astype(jnp.promote_types(x.dtype, cos.dtype)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
