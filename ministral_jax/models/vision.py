"""The Pixtral vision tower and the projector that turns its patches into decoder tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Int, Shaped

from ministral_jax.distributed.axes import constrain, rows_of
from ministral_jax.models.block import BlockSpec, Compute, Tokens, linear, residual, rms_norm, stacked, weight
from ministral_jax.models.rope import axial_angles
from ministral_jax.models.spec import ModelSpec, VisionSpec

AXES = ("vision_embed", "vision_heads", "vision_heads", "vision_head", "vision_mlp")


# CLIP's pixel statistics, RGB.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def normalise(patches: Shaped[Array, "... 3*p*p"]) -> Float[Array, "... 3*p*p"]:
    """Pixels, uint8, as float32: / 255, then CLIP's mean and standard deviation per channel. Floats are taken for
    normalised."""
    if patches.dtype != jnp.uint8:
        return patches
    mean, std = (np.repeat(values, patches.shape[-1] // 3) for values in (MEAN, STD))
    return (patches.astype(jnp.float32) / 255 - mean) / std


class VisionTower(nn.Module):
    """Features of the flattened patches of pictures in bins; there is no final norm."""

    spec: VisionSpec
    compute: Compute

    @nn.compact
    def __call__(
        self,
        patches: Shaped[Array, "S G P 3*p*p"],
        image: Int[Array, "S G P"],
        row: Int[Array, "S G P"],
        column: Int[Array, "S G P"],
    ) -> Float[Array, "S G P Dv"]:
        """`image` numbers the pictures of a bin, ascending, and is 0 at padding behind them; `row` and `column` place a
        patch in its picture. Bins are independent: they lie over all axes of a mesh, and every device has the weights.
        """
        s, groups = self.spec, len(patches)
        patches, image, row, column = (rearrange(x, "S G ... -> (S G) ...") for x in (patches, image, row, column))
        with rows_of("pictures"):
            patches = constrain(patches, ("batch", None, None))
            kernel = weight(
                self, "patch_embed", (s.patch_width, s.width), ("patch", "vision_embed"), s.patch_width**-0.5
            )
            gain = weight(self, "norm", (s.width,), ("vision_embed",), None)
            x = rms_norm(linear(normalise(patches).astype(kernel.dtype), kernel), gain, s.norm_eps)

            angles = axial_angles(row, column, s.rope_theta, s.head_width, jnp.promote_types(x.dtype, jnp.float32))
            block = BlockSpec(
                s.width, s.heads, s.heads, s.head_width, s.mlp_width, s.norm_eps, False, AXES, s.layers, s.merge**2
            )
            layers = stacked(block, self.compute, "vision_layers", name="layers")
            x = layers(residual(x, 1), Tokens(angles, None, image), None, None)[0]
        return rearrange(x, "(S G) P D -> S G P D", S=groups)


class Projector(nn.Module):
    """Decoder embeddings of features in merge-block order, one for each m x m patches."""

    spec: ModelSpec
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "... P Dv"]) -> Float[Array, "... P/m**2 D"]:
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
        x = rearrange(x, "... (n block) c -> ... n (c block)", block=block)
        x = linear(linear(x, merge), linear_1)
        return linear(jax.nn.gelu(x, approximate=False), linear_2)
