"""Sizes of the family: what a checkpoint's arrays must look like, and nothing about how they are computed.

Dimension letters used throughout the project: B batch, T tokens, D model width, F feed-forward width, H query heads,
K key-value heads, h head width, L layers, V vocabulary, P image patches.
"""

from __future__ import annotations

import math
from typing import Any, Self

from pydantic import Field, model_validator

from ministral_jax.settings import Frozen


class RopeSpec(Frozen):
    """Rotary positions and what long context adds to them.

    `yarn_factor == 1` is plain RoPE; `temperature_beta == 0` turns the position temperature off. Both are said relative
    to `original_context`, which is therefore required as soon as either is on. The temperature is 1 below it; YaRN
    changes frequencies, and so what is computed at every position.
    """

    theta: float = Field(default=1e6, gt=1)
    yarn_factor: float = Field(default=1.0, ge=1)
    original_context: int | None = Field(default=None, ge=1)
    beta_fast: float = Field(default=32.0, ge=1e-6, le=1e6)
    beta_slow: float = Field(default=1.0, ge=1e-6, le=1e6)
    """Rotations within the original context, see `yarn_frequencies`."""
    attention_factor: float = Field(default=1.0, gt=0)
    """What YaRN multiplies cos and sin by."""
    temperature_beta: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _original_context_is_known(self) -> Self:
        if (self.yarn_factor > 1 or self.temperature_beta > 0) and self.original_context is None:
            raise ValueError("rope.original_context is required when rope.yarn_factor > 1 or rope.temperature_beta > 0")
        if self.yarn_factor == 1 and self.attention_factor != 1:
            raise ValueError("rope.attention_factor is YaRN's; without rope.yarn_factor > 1 it must be 1")
        return self


class VisionSpec(Frozen):
    """Pixtral vision tower. `patch_size * merge` pixels of an image side become one token of the decoder."""

    layers: int = Field(default=24, ge=1)
    width: int = Field(default=1024, ge=1)
    mlp_width: int = Field(default=4096, ge=1)
    heads: int = Field(default=16, ge=1)
    head_width: int = Field(default=64, ge=4, multiple_of=4)
    patch_size: int = Field(default=14, ge=1)
    max_image_size: int = Field(default=1540, ge=1)
    merge: int = Field(default=2, ge=1)
    rope_theta: float = Field(default=1e4, gt=1)
    norm_eps: float = Field(default=1e-5, gt=0)

    @property
    def stride(self) -> int:
        """Pixels of an image side that become one decoder token."""
        return self.patch_size * self.merge

    @property
    def patch_width(self) -> int:
        """Values in one flattened RGB patch, ordered (channel, row, column)."""
        return 3 * self.patch_size**2

    @model_validator(mode="after")
    def _inner_width_matches(self) -> Self:
        if self.heads * self.head_width != self.width:
            raise ValueError(
                f"vision heads * head_width = {self.heads * self.head_width} must equal width = {self.width}"
            )
        return self


class ModelSpec(Frozen):
    """A decoder-only vision-language model. `heads * head_width` need not equal `width` (it does not in 14B and 3B)."""

    layers: int = Field(ge=1)
    width: int = Field(ge=1)
    mlp_width: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_width: int = Field(ge=2, multiple_of=2)
    vocab: int = Field(ge=2)
    context: int = Field(ge=1)
    tied: bool = False
    norm_eps: float = Field(default=1e-5, gt=0)
    rope: RopeSpec = RopeSpec()
    vision: VisionSpec | None = VisionSpec()
    image_token: int = 10

    @model_validator(mode="after")
    def _heads_group_evenly(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads} must be a multiple of kv_heads = {self.kv_heads}")
        return self

    @property
    def components(self) -> dict[str, int]:
        """Parameters by component."""
        v, table = self.vision, self.vocab * self.width
        sizes = {
            "embedding": table,
            "attention": self.layers * self.width * self.head_width * 2 * (self.heads + self.kv_heads),
            "feed-forward": self.layers * 3 * self.width * self.mlp_width,
            "norms": (2 * self.layers + 1) * self.width,
            "head": 0 if self.tied else table,
        }
        if v is None:
            return sizes
        layer = 4 * v.width**2 + 3 * v.width * v.mlp_width + 2 * v.width
        tower = v.patch_width * v.width + v.width + v.layers * layer
        projector = v.width + v.merge**2 * v.width**2 + v.width * self.width + self.width**2
        return {**sizes, "vision tower": tower, "projector": projector}

    @property
    def vision_parameters(self) -> int:
        """Parameters of the vision tower and the projector."""
        return sum(self.components.get(name, 0) for name in ("vision tower", "projector"))

    @property
    def decoder_parameters(self) -> int:
        """Parameters of embedding, layers, final norm and head (one matrix when tied)."""
        return self.parameters - self.vision_parameters

    @property
    def parameters(self) -> int:
        return sum(self.components.values())

    def flops_per_token(self, length: int) -> int:
        """Forward FLOPs of the decoder for one token: 2 per weight used, and attention over `length` / 2 keys."""
        attention = self.width * self.head_width * 2 * (self.heads + self.kv_heads)
        weights = self.layers * (attention + 3 * self.width * self.mlp_width) + self.vocab * self.width
        scores = self.layers * 2 * self.heads * self.head_width * length
        return 2 * weights + scores


_YARN: dict[str, Any] = dict(yarn_factor=16.0, original_context=16_384, temperature_beta=0.1)
_REAL: dict[str, Any] = dict(heads=32, kv_heads=8, head_width=128, vocab=131_072)
_TINY_VISION = VisionSpec(layers=2, width=32, mlp_width=96, heads=2, head_width=16, patch_size=2, max_image_size=32)
_TINY: dict[str, Any] = dict(heads=4, kv_heads=2, head_width=16, vocab=2_048, vision=_TINY_VISION)

PRESETS: dict[str, ModelSpec] = {
    "mistral-small-3.1-24b": ModelSpec(
        layers=40, width=5120, mlp_width=32_768, context=131_072, rope=RopeSpec(theta=1e9), **_REAL
    ),
    # Its config.json was not seen. That its RoPE has the base of its class, 10^6, follows from where its YaRN begins to
    # slow frequencies: at pair 23 (GaijinEntertainment/daScript#3479, of a GGUF). An imported model has its own.
    "mistral-medium-3.5-128b": ModelSpec(
        **dict(_REAL, layers=88, width=12_288, mlp_width=28_672, heads=96, context=262_144),
        rope=RopeSpec(yarn_factor=64.0, original_context=4096, beta_fast=4.0, attention_factor=0.1 * math.log(64) + 1),
        vision=VisionSpec(layers=48, width=1664, mlp_width=8192, heads=16, head_width=104),
    ),
    "ministral-3-14b": ModelSpec(
        layers=40, width=5120, mlp_width=16_384, context=262_144, rope=RopeSpec(theta=1e9, **_YARN), **_REAL
    ),
    "ministral-3-8b": ModelSpec(
        layers=34, width=4096, mlp_width=14_336, context=262_144, rope=RopeSpec(theta=1e6, **_YARN), **_REAL
    ),
    "ministral-3-3b": ModelSpec(
        layers=26, width=3072, mlp_width=9216, context=262_144, rope=RopeSpec(theta=1e6, **_YARN), tied=True, **_REAL
    ),
    "tiny-24b": ModelSpec(layers=8, width=80, mlp_width=512, context=128, rope=RopeSpec(theta=1e6), **_TINY),
    "tiny-14b": ModelSpec(layers=8, width=80, mlp_width=256, context=128, rope=RopeSpec(theta=1e6), **_TINY),
    "tiny-8b": ModelSpec(layers=7, width=64, mlp_width=224, context=128, rope=RopeSpec(theta=1e4), **_TINY),
    "tiny-3b": ModelSpec(layers=5, width=48, mlp_width=144, context=128, rope=RopeSpec(theta=1e4), tied=True, **_TINY),
}
