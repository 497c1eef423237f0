"""The transformer block that the decoder and the vision tower share, and how a parameter is declared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from ministral_jax.distributed.axes import constrain, relaid
from ministral_jax.errors import UserError
from ministral_jax.models.attention import KEEP, AttentionSpec, Implementation, attend_cached
from ministral_jax.models.quantized import fp8_exported_linear, fp8_linear
from ministral_jax.models.rope import Angles, apply_rope
from ministral_jax.models.sharded_attention import attend_on_mesh

PRODUCT, INPUT = "product", "input"
"""Names of the results of linear layers, and of what a block is given, for what is kept until the backward pass."""


@dataclass(frozen=True)
class Compute:
    """How a model is evaluated; but for `matmul`, none of it changes what is computed.

    `dtype`: of matrix products and the residual stream (float64 parameters are never narrowed). `matmul`: "fp8" rounds
    what the decoder's linear layers multiply, see `fp8_linear`; embedding, attention and head stay as they are.
    `remat`: what the backward pass recomputes: elementwise functions and norms only ("none"), attention too ("dots"),
    everything but attention ("attention"), everything ("full"); "offload" recomputes what "attention" does, and what it
    keeps, a block's input among it, waits in the memory of the host. `unroll`: layers unrolled in each step of the
    layer scan, 0 for all. `attention`, `attention_block`: see `AttentionSpec`. `context`: how the tokens of a row meet
    where a mesh cuts it. `shortest_row`: tokens to which rows of one document (prompts, answers, questions to a judge)
    are padded at least; the higher, the fewer programs are compiled.
    """

    dtype: str = "float32"
    matmul: Literal["fp8"] | None = None
    remat: Literal["none", "dots", "attention", "offload", "full"] = "none"
    unroll: int = 1
    attention: Implementation = "auto"
    attention_block: int = 128
    context: Literal["all_gather", "ring"] = "all_gather"
    shortest_row: int = 32

    def product(self, x: Array, kernel: Array, scale: Array | None) -> Array:
        """The tokens times a layer's matrix; `scale` is for `Exported`."""
        return linear(x, kernel) if self.matmul is None else checkpoint_name(fp8_linear(x, kernel), PRODUCT)

    @property
    def unrounded(self) -> Compute:
        """Of what does not learn: the same, but all products in `dtype`."""
        return replace(self, matmul=None)

    @property
    def evaluated(self) -> Compute:
        """Of the model that comes out of the training."""
        return self.unrounded


@dataclass(frozen=True)
class Exported(Compute):
    """Of a model that multiplies what its FP8 export holds, see `fp8_exported_linear`: what goes into a matrix is
    rounded by the scale of its own largest number, or by that of the variables `SCALES`."""

    def product(self, x: Array, kernel: Array, scale: Array | None) -> Array:
        return checkpoint_name(fp8_exported_linear(x, kernel, scale), PRODUCT)

    @property
    def unrounded(self) -> Compute:
        settings: dict[str, Any] = asdict(self) | {"matmul": None}
        return Compute(**settings)

    @property
    def evaluated(self) -> Compute:
        return self


SCALES = "scales"
"""Flax collection: in each layer's `attention` what goes into q, k, v ("input") and into o ("mixed"), in its `mlp` what
goes into gate and up ("input") and into down ("hidden"), a scalar each. It need not be there."""

Past = tuple[Float[Array, "B K S h"], Float[Array, "B K S h"]]
"""A layer's keys and values of the tokens before."""
Segments = Int[Array, "B T"] | tuple[Int[Array, "B S"], Int[Array, "B T"]] | None
"""The document each token belongs to, 0 for padding; with a past, those of the past and of the tokens."""


class Tokens(NamedTuple):
    """What attention is told of the tokens that it mixes."""

    angles: Angles
    position_scale: Float[Array, "B T"] | None
    segments: Segments


Tap = Callable[[dict[str, Array]], Any]
"""What is made of a layer's activations, see `VLM.observe`."""


def stored(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], std: float | None) -> Array:
    """A parameter of `module` in the dtype that it is kept in: normal of standard deviation `std`, or ones."""
    init = nn.initializers.ones if std is None else nn.initializers.normal(std)
    value: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    return value


def narrowed(value: Array, compute: Compute) -> Array:
    """A parameter in the dtype that is computed in; float64 stays."""
    return value if value.dtype == jnp.float64 else value.astype(compute.dtype)


def weight(module: Any, name: str, shape: tuple[int, ...], axes: tuple[str, ...], std: float | None) -> Array:
    """`stored`, then `narrowed` to the compute dtype of `module`."""
    return narrowed(stored(module, name, shape, axes, std), module.compute)


@jax.custom_vjp
def linear(x: Float[Array, "... in"], kernel: Float[Array, "in out"]) -> Float[Array, "... out"]:
    """`x` times `kernel`.

    Its own backward pass only to choose the order of the kernel gradient's product: the narrower of input and
    cotangent goes to the left, the operand XLA transposes on CPU, where JAX's rule always puts the cotangent.
    """
    return checkpoint_name(x @ kernel, PRODUCT)


def _linear_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return checkpoint_name(x @ kernel, PRODUCT), (x, kernel)


def _linear_backward(saved: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    x, kernel = saved
    tokens = tuple(range(x.ndim - 1))
    if kernel.shape[0] <= kernel.shape[1]:
        d_kernel = jnp.tensordot(x, d_y, axes=(tokens, tokens))
    else:
        d_kernel = jnp.tensordot(d_y, x, axes=(tokens, tokens)).T
    return d_y @ kernel.T, d_kernel


linear.defvjp(_linear_forward, _linear_backward)


def rms_norm(x: Float[Array, "... D"], gain: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """gain · x / √(mean(x²) + eps) over the last axis (arXiv 1910.07467, equation 4), in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps) * gain).astype(x.dtype)


_STREAM, _WHOLE = ("batch", "residual", None), ("batch", "length", None)


def residual(x: Float[Array, "B T D"], multiple_of: int) -> Float[Array, "B T D"]:
    """The residual stream, kept on the mesh as the rules say."""
    return constrain(x, _STREAM, multiple_of)


def gathered(x: Float[Array, "B T D"], multiple_of: int) -> Float[Array, "B T D"]:
    """What a product cut over heads, feed-forward or vocabulary reads: all tokens of a row's shard."""
    return relaid(x, _WHOLE, _STREAM, multiple_of)


def scattered(x: Float[Array, "B T D"], multiple_of: int) -> Float[Array, "B T D"]:
    """What such products sum up to, added to the stream: each device sums its own tokens."""
    return relaid(x, _STREAM, _WHOLE, multiple_of)


@dataclass(frozen=True)
class BlockSpec:
    """Sizes of one block and the names of its axes, in the order D, H, K, h, F.

    `multiple_of`: where a mesh cuts T, a shard holds a multiple of this many tokens: two chunks in zig-zag order, or
    whole blocks of patches.
    """

    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    norm_eps: float
    causal: bool
    axes: tuple[str, str, str, str, str]
    depth: int
    multiple_of: int


def product(module: Any, name: str, x: Float[Array, "B T in"], kernel: Float[Array, "in out"]) -> Array:
    """`x`, which `SCALES` calls `name`, times `kernel` `[B, T, out]`, as the `compute` of `module` says."""
    return module.compute.product(x, kernel, module.get_variable(SCALES, name))


class Attention(nn.Module):
    """Grouped-query attention without biases. Returns its output, the mixture of values that this is made of, and the
    tokens' keys and values."""

    spec: BlockSpec
    compute: Compute

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], tokens: Tokens, past: Past | None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T Hh"], tuple[Float[Array, "B T K h"], Float[Array, "B T K h"]]]:
        s = self.spec
        D, H, K, h, _ = s.axes
        std, out_std = s.width**-0.5, (2 * s.depth * s.heads * s.head_width) ** -0.5
        w_q = weight(self, "q", (s.width, s.heads, s.head_width), (D, H, h), std)
        w_k = weight(self, "k", (s.width, s.kv_heads, s.head_width), (D, K, h), std)
        w_v = weight(self, "v", (s.width, s.kv_heads, s.head_width), (D, K, h), std)
        w_o = weight(self, "o", (s.heads, s.head_width, s.width), (H, h, D), out_std)

        flat = (product(self, "input", x, rearrange(w, "D H h -> D (H h)")) for w in (w_q, w_k, w_v))
        q, k, v = (rearrange(y, "B T (H h) -> B T H h", h=s.head_width) for y in flat)
        q, k = apply_rope(q, tokens.angles), apply_rope(k, tokens.angles)
        if tokens.position_scale is not None:
            q = q * tokens.position_scale[:, :, None, None].astype(q.dtype)
        with jax.named_scope("attend"):
            if isinstance(tokens.segments, tuple):
                assert past is not None
                mixed = attend_cached(q, k, v, past, tokens.segments)
            else:
                mixed = attend_on_mesh(q, k, v, tokens.segments, self._attention())
        mixed = rearrange(mixed, "B T H h -> B T (H h)")
        return product(self, "mixed", mixed, rearrange(w_o, "H h D -> (H h) D")), mixed, (k, v)

    def _attention(self) -> AttentionSpec:
        s, c = self.spec, self.compute
        return AttentionSpec(s.causal, c.attention, c.attention_block, c.context, s.axes[1], s.multiple_of)


class SwiGLU(nn.Module):
    """(silu(x gate) ⊙ x up) down (arXiv 2002.05202). Returns it and the hidden product."""

    spec: BlockSpec
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T F"]]:
        s = self.spec
        D, *_, F = s.axes
        std, out_std = s.width**-0.5, (2 * s.depth * s.mlp_width) ** -0.5
        gate = weight(self, "gate", (s.width, s.mlp_width), (D, F), std)
        up = weight(self, "up", (s.width, s.mlp_width), (D, F), std)
        down = weight(self, "down", (s.mlp_width, s.width), (F, D), out_std)
        hidden = jax.nn.silu(product(self, "input", x, gate)) * product(self, "input", x, up)
        return product(self, "hidden", hidden, down), hidden


class Block(nn.Module):
    """Pre-norm block. Returns the residual stream and what `tap` made of the block's activations."""

    spec: BlockSpec
    compute: Compute

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], tokens: Tokens, tap: Tap | None, past: Past | None
    ) -> tuple[Float[Array, "B T D"], Any]:
        s = self.spec
        D, x = s.axes[0], checkpoint_name(x, INPUT)
        attention_gain = weight(self, "attention_norm", (s.width,), (D,), None)
        mlp_gain = weight(self, "mlp_norm", (s.width,), (D,), None)

        with jax.named_scope("attention"):
            attention_in = gathered(rms_norm(x, attention_gain, s.norm_eps), s.multiple_of)
            out, mixed, (key, value) = Attention(s, self.compute, name="attention")(attention_in, tokens, past)
            middle = residual(x + scattered(out, s.multiple_of), s.multiple_of)
        with jax.named_scope("mlp"):
            mlp_in = gathered(rms_norm(middle, mlp_gain, s.norm_eps), s.multiple_of)
            out, hidden = SwiGLU(s, self.compute, name="mlp")(mlp_in)
            out = residual(middle + scattered(out, s.multiple_of), s.multiple_of)
        if tap is None:
            return out, None
        seen = {"attention_norm_in": x, "attention_in": attention_in, "key": key, "value": value, "mixed": mixed}
        seen |= {"mlp_norm_in": middle, "mlp_in": mlp_in, "mlp_hidden": hidden}
        return out, tap({**seen, "out": out})


_policies = jax.checkpoint_policies
_REMAT = {
    "none": _policies.save_only_these_names(KEEP, PRODUCT),
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "attention": _policies.save_only_these_names(KEEP),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[INPUT, KEEP],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": _policies.nothing_saveable,
}


def check_remat(remat: str, platform: str, where: str) -> None:
    """Raise `UserError` when the devices of a mesh have no other memory for what `where`.compute.remat would keep."""
    if remat == "offload" and platform == "cpu":
        raise UserError(
            f"{where}.compute.remat = offload needs a TPU or GPU, beside which the host's memory is another one; on a "
            "CPU, attention keeps as much"
        )


def stacked(spec: BlockSpec, compute: Compute, axis: str, name: str | None = None) -> nn.Module:
    """`spec.depth` blocks in one scan over parameters, and `past`, stacked on a leading axis called `axis`."""
    # Only a loop keeps XLA from merging the recomputation with the original.
    block = nn.remat(Block, policy=_REMAT[compute.remat], prevent_cse=compute.unroll != 1)
    everywhere: Any = nn.broadcast
    in_axes: Any = (everywhere, everywhere, 0)
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, SCALES: 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=spec.depth,
        unroll=compute.unroll or spec.depth,
        metadata_params={nn.PARTITION_NAME: axis},
    )
    return scanned(spec, compute, name=name)
