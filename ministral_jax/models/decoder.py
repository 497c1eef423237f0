"""The causal text decoder of Mistral Small 3.1 and Ministral 3."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
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
    gathered,
    narrowed,
    rms_norm,
    scattered,
    stacked,
    stored,
    weight,
)
from ministral_jax.models.spec import ModelSpec

AXES = ("embed", "heads", "kv_heads", "head", "mlp")
ZIGZAG = 2  # chunks of a shard of T


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def token_rows(table: Float[Array, "V D"], tokens: Int[Array, "B T"], compute: Compute) -> Float[Array, "B T D"]:
    """Rows of an embedding in the dtype that is computed in.

    Their gradients are added up in float32 or wider: a frequent token's are thousands in a batch, and bfloat16 loses
    whatever is below 1/256 of the sum so far.
    """
    return _looked_up(narrowed(table, compute), tokens)


def _looked_up(table: Array, tokens: Array) -> Array:
    # Cut in V alone: from a table cut in D the compiler would make the rows of all devices on each of them.
    return constrain(table, ("vocab", None))[tokens]


def _rows_forward(table: Array, tokens: Array, compute: Compute) -> tuple[Array, tuple[Array, Array]]:
    return token_rows(table, tokens, compute), (table, tokens)  # of the table only its shape and dtype are used


def _rows_backward(compute: Compute, saved: tuple[Array, Array], d_rows: Array) -> tuple[Array, None]:
    table, tokens = saved
    wide = jnp.promote_types(d_rows.dtype, jnp.float32)
    scatter = jax.linear_transpose(lambda x: _looked_up(x, tokens), jax.ShapeDtypeStruct(table.shape, wide))
    return scatter(d_rows.astype(wide))[0].astype(table.dtype), None


token_rows.defvjp(_rows_forward, _rows_backward)


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head; `embed_tokens`, `__call__` and `logits` are applied in that order."""

    spec: ModelSpec
    compute: Compute

    def setup(self) -> None:
        s = self.spec
        self.embed = stored(self, "embed", (s.vocab, s.width), ("vocab", "embed"), s.width**-0.5)
        block = BlockSpec(
            s.width, s.heads, s.kv_heads, s.head_width, s.mlp_width, s.norm_eps, True, AXES, s.layers, ZIGZAG
        )
        self.layers = stacked(block, self.compute, "layers")
        self.norm = weight(self, "norm", (s.width,), ("embed",), None)
        if not s.tied:
            self.head = weight(self, "head", (s.width, s.vocab), ("embed", "vocab"), s.width**-0.5)

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The tokens' rows of the embedding."""
        return scattered(token_rows(self.embed, tokens, self.compute), ZIGZAG)

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
        return gathered(rms_norm(x, self.norm, s.norm_eps), ZIGZAG), taps

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 or wider."""
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        if self.spec.tied:
            embed = narrowed(self.embed, self.compute)
            return jnp.einsum("btd,vd->btv", hidden, embed, preferred_element_type=wide)
        return jnp.einsum("btd,dv->btv", hidden, self.head, preferred_element_type=wide)
