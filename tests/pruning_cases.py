"""A vision-language model small enough for float64 algebra, and packed batches with images and padding for it."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ministral_jax.models.spec import ModelSpec, VisionSpec
from ministral_jax.models.vlm import VLM, abstract_params

VISION = VisionSpec(layers=1, width=16, mlp_width=24, heads=2, head_width=8, patch_size=2, max_image_size=16)
SPEC = ModelSpec(
    layers=3, width=20, mlp_width=28, heads=4, kv_heads=2, head_width=6, vocab=40, context=64, vision=VISION
)
IMAGES = ("patches", "patch_image", "patch_row", "patch_col", "image_slot")


@cache
def params64(spec: ModelSpec, seed: int = 0) -> dict[str, Any]:
    """Float64 parameters whose norm gains are far from one. Call under `jax.enable_x64(True)`."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        gain = "norm" in path[-1].key
        return jnp.asarray(rng.uniform(0.3, 2.0, leaf.shape) if gain else 0.2 * rng.standard_normal(leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, abstract_params(spec))


def params32(spec: ModelSpec, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The same parameters, narrower."""
    with jax.enable_x64(True):
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params64(spec))


def make_batch(seed: int = 0, rows: int = 3, images: bool = True, spec: ModelSpec = SPEC) -> dict[str, np.ndarray]:
    """[rows, 24] tokens: two documents and padding; two images (2x4 and 2x2 patches) and four patches of padding."""
    rng = np.random.default_rng(seed)
    length, first, second = 24, 12, 8
    tokens = rng.integers(11, spec.vocab, (rows, length)).astype(np.int32)
    segments = np.repeat([1, 2, 0], [first, second, length - first - second]).astype(np.int32)
    positions = np.concatenate([np.arange(first), np.arange(second), np.zeros(length - first - second)]).astype(
        np.int32
    )
    batch = {"positions": np.tile(positions, (rows, 1)), "segments": np.tile(segments, (rows, 1)), "tokens": tokens}
    if not images:
        return batch
    slots = np.full(length, -1, np.int32)
    slots[[2, 3, 13]] = 0, 1, 2
    tokens[:, [2, 3, 13]] = spec.image_token
    assert spec.vision is not None
    grids = {
        "patch_image": [1] * 8 + [2] * 4 + [0] * 4,
        "patch_row": [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1] + [0] * 4,
        "patch_col": [0, 1, 0, 1, 2, 3, 2, 3, 0, 1, 0, 1] + [0] * 4,
    }
    tiled = {name: np.tile(np.array(grid, np.int32), (rows, 1)) for name, grid in grids.items()}
    patches = rng.standard_normal((rows, 16, spec.vision.patch_width)).astype(np.float32)
    return {**batch, **tiled, "patches": patches, "image_slot": np.tile(slots, (rows, 1))}


@cache
def _forward(spec: ModelSpec):
    return jax.jit(lambda params, *arrays: VLM(spec).apply({"params": params}, *arrays))


def logits(params: dict[str, Any], spec: ModelSpec, batch: dict[str, Any]) -> np.ndarray:
    """Logits [N, V] of the tokens that are not padding."""
    images = {key: batch[key] for key in IMAGES} if "patches" in batch else None
    out = _forward(spec)(params, batch["tokens"], batch["positions"], batch["segments"], images)
    return np.asarray(out)[np.asarray(batch["segments"]) > 0]


def relative(value: np.ndarray, reference: np.ndarray) -> float:
    """|value - reference| / |reference|, maximum norm."""
    assert value.dtype == reference.dtype == np.float64
    return float(np.abs(value - reference).max() / np.abs(reference).max())
