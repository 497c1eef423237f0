"""What is kept of a teacher, computed on the mesh from its final hidden states."""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from ministral_jax.distillation.codecs import Codec
from ministral_jax.parallel import Placement, Rules

Encoder = Callable[[Array, Array, Array, Array | None], dict[str, Array]]


def encoder(codec: Codec, placement: Placement, teacher_rules: Rules, forced: tuple[int, ...], chunk: int) -> Encoder:
    """A function `(states [B, T, D'], head [D', V], mask [B, T], uniforms [B, T, S] or None) -> arrays for `pack`."""
    raise NotImplementedError
