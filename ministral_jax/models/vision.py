"""The Pixtral vision tower and the projector that turns its patches into decoder tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Int

from ministral_jax.models.block import BlockSpec, Compute, Tokens, linear, rms_norm, stacked, weight
from ministral_jax.models.rope import axial_angles
from ministral_jax.models.spec import ModelSpec, VisionSpec

AXES = ("vision_embed", "vision_heads", "vision_heads", "vision_head", "vision_mlp")


class VisionTower(nn.Module):
    """Features of the flattened patches of packed images; there is no final norm."""

    spec: VisionSpec
    compute: Compute

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "B P 3*p*p"],
        image: Int[Array, "B P"],
        row: Int[Array, "B P"],
        column: Int[Array, "B P"],
    ) -> Float[Array, "B P Dv"]:
        """`image` numbers the images of a row (0 is padding), `row` and `column` place a patch in its image."""
        s = self.spec
        kernel = weight(self, "patch_embed", (s.patch_width, s.width), ("patch", "vision_embed"), s.patch_width**-0.5)
        gain = weight(self, "norm", (s.width,), ("vision_embed",), None)
        x = rms_norm(linear(patches.astype(kernel.dtype), kernel), gain, s.norm_eps)

        angles = axial_angles(row, column, s.rope_theta, s.head_width, jnp.promote_types(x.dtype, jnp.float32))
        block = BlockSpec(
            s.width, s.heads, s.heads, s.head_width, s.mlp_width, s.norm_eps, False, AXES, s.layers, s.merge**2
        )
        layers = stacked(block, self.compute, "vision_layers", name="layers")
        return layers(x, Tokens(angles, None, image), None, None)[0]


class Projector(nn.Module):
    """Decoder embeddings of features in merge-block order, one for each m x m patches."""

    spec: ModelSpec
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B P Dv"]) -> Float[Array, "B P/m**2 D"]:
        width, v = self.spec.width, self.spec.vision
        assert v is not None
        block = v.merge**2
        merged = block * v.width
        gain = weight(self, "norm", (v.width,), ("vision_embed",), None)
        merge = weight(self, "merge", (merged, v.width), ("merged_patches", "vision_embed"), merged**-0.5)
        linear_1 = weight(self, "linear_1", (v.width, width), ("vision_embed", "projector"), v.width**-0.5)
        linear_2 = weight(self, "linear_2", (width, width), ("projector", "embed"), width**-0.5)

        x = rms_norm(x, gain, self.spec.norm_eps)
        # Channel-major, feature = c·m² + dy·m + dx, as torch's unfold orders it.
        x = rearrange(x, "B (n block) c -> B n (c block)", block=block)
        x = linear(linear(x, merge), linear_1)
        return linear(jax.nn.gelu(x, approximate=False), linear_2)
