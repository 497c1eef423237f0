"""A vision-language model small enough for float64 algebra, and packed batches with images and padding for it."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from model_cases import VISION, Case, inputs, pack, random_params, text, with_images

from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM

SPEC = ModelSpec(
    layers=3, width=20, mlp_width=28, heads=4, kv_heads=2, head_width=6, vocab=40, context=64,
    vision=VISION.model_copy(update={"layers": 1}),
)  # fmt: skip

WRITERS = ("decoder/embed", "decoder/layers/attention/o", "decoder/layers/mlp/down", "projector/linear_2")
"""What writes the residual stream."""


@cache
def params64(spec: ModelSpec) -> dict[str, Any]:
    """Float64 parameters whose norm gains are far from one. Call under `jax.enable_x64(True)`."""
    return jax.tree.map(jnp.asarray, random_params(spec, dtype=np.float64))


def params32(spec: ModelSpec, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The same parameters, narrower."""
    with jax.enable_x64(True):
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params64(spec))


def make_batch(seed: int = 0, rows: int = 3, images: bool = True) -> dict[str, np.ndarray]:
    """[rows, 24] tokens: two documents and padding; two images (2x4 and 2x2 patches) and four patches of padding."""

    def document(seed: int, columns: int, between: int):
        if images:
            return with_images([(1, columns)], between, seed, SPEC)
        return text(2 + columns + between, seed, SPEC)

    seeds = range(20 * seed, 20 * seed + 2 * rows, 2)
    return pack(Case(SPEC, tuple((document(s, 2, 8), document(s + 1, 1, 5)) for s in seeds)), padding=4)


@cache
def _forward(spec: ModelSpec):
    return jax.jit(lambda params, arguments: VLM(spec).apply({"params": params}, **arguments))


def logits(params: dict[str, Any], spec: ModelSpec, batch: dict[str, Any]) -> np.ndarray:
    """Float64 logits [N, V] of the tokens that are not padding."""
    found = np.asarray(_forward(spec)(params, inputs(batch)))[batch["segments"] > 0]
    assert found.dtype == np.float64
    return found
