"""The causal text decoder of Mistral Small 3.1 and Ministral 3."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Int

from ministral_jax.distributed.axes import constrain
from ministral_jax.models import rope
from ministral_jax.models.block import (
    BlockSpec,
    Compute,
    Past,
    Segments,
    Tap,
    Tokens,
    residual,
    rms_norm,
    stacked,
    weight,
)
from ministral_jax.models.spec import ModelSpec

AXES = ("embed", "heads", "kv_heads", "head", "mlp")
ZIGZAG = 2  # chunks of a shard of T


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head; `embed_tokens`, `__call__` and `logits` are applied in that order."""

    spec: ModelSpec
    compute: Compute

    def setup(self) -> None:
        s = self.spec
        self.embed = weight(self, "embed", (s.vocab, s.width), ("vocab", "embed"), s.width**-0.5)
        block = BlockSpec(
            s.width, s.heads, s.kv_heads, s.head_width, s.mlp_width, s.norm_eps, True, AXES, s.layers, ZIGZAG
        )
        self.layers = stacked(block, self.compute, "layers")
        self.norm = weight(self, "norm", (s.width,), ("embed",), None)
        if not s.tied:
            self.head = weight(self, "head", (s.width, s.vocab), ("embed", "vocab"), s.width**-0.5)

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The tokens' rows of the embedding."""
        # Cut in V alone: from a table cut in D the compiler would make the rows of all devices on each of them.
        return residual(constrain(self.embed, ("vocab", None))[tokens], ZIGZAG)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None,
        segments: Segments,
        tap: Tap | None = None,
        past: Past | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Of embedded tokens the hidden states after the final norm, and what `tap` made of every layer's activations,
        stacked over layers as `past` is. `tap` is a pytree that can be called, like `jax.tree_util.Partial`."""
        s, wide = self.spec, jnp.promote_types(x.dtype, jnp.float32)
        if positions is None:
            positions = jnp.arange(x.shape[1])[None]
        angles = rope.rope_angles(positions, s.rope, s.head_width, wide)
        tokens = Tokens(angles, rope.position_scale(positions, s.rope, wide), segments)
        x, taps = self.layers(x, tokens, tap, past)
        return rms_norm(x, self.norm, s.norm_eps), taps

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 or wider."""
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        if self.spec.tied:
            return jnp.einsum("btd,vd->btv", hidden, self.embed, preferred_element_type=wide)
        return jnp.einsum("btd,dv->btv", hidden, self.head, preferred_element_type=wide)
